"""The benchmark's own virtual environment, `benchmarks/.venv`: Pylorus with its constraints, and fastai."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FOLDER = HERE / ".venv"
NEEDED = (HERE / "requirements.txt", HERE.parent / "constraints.txt", HERE.parent / "pyproject.toml")


def enter() -> None:
    """Restart this program in the environment; create it if it is missing or older than its requirements."""
    python = FOLDER / "bin" / "python"
    if Path(sys.prefix) == FOLDER:
        return
    made = FOLDER / "installed"
    if not made.is_file() or made.stat().st_mtime < max(file.stat().st_mtime for file in NEEDED):
        print("Installing into benchmarks/.venv (about 7 GB, some minutes) …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *os.environ.get("PIP_OPTIONS", "").split()]
        words = ["--constraint", "constraints.txt", "--requirement", "benchmarks/requirements.txt", "--editable", "."]
        subprocess.run([*install, *words], check=True, cwd=HERE.parent)
        made.touch()
    os.execv(python, [str(python), *sys.argv])
