"""What the PATHs of `pylorus report` mean: a run, a sweep, or several runs, and where the report goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pylorus.errors import PylorusError, listing

STATUS = "status.json"
"""The file that makes a folder a run."""


@dataclass(frozen=True)
class Scope:
    """What a report is about.

    Attributes:
        kind: "run", "sweep" or "runs".
        folders: Of the runs, each once, a sweep's jobs in their order.
        output: The report's folder.
    """

    kind: str
    folders: tuple[Path, ...]
    output: Path


def scope_of(paths: Sequence[Path], output: Path | None = None) -> Scope:
    """Finds the runs in the paths.

    Args:
        paths: Folders of runs or of sweeps (whose subfolders are runs).
        output: The report's folder; None: `report` in the one run or sweep, or here for several paths.

    Raises:
        PylorusError: If there is no path, or one is neither a run nor a sweep.
    """
    if not paths:
        raise PylorusError("no path given: expected the folder of a run, or of a sweep.")
    found = [(path, _runs(path)) for path in paths]
    folders = tuple({folder.resolve(): folder for _, inside in found for folder in inside}.values())
    if len(paths) > 1:
        return Scope("runs" if len(folders) > 1 else "run", folders, output or Path("report"))
    is_run = (paths[0] / STATUS).is_file()
    return Scope("run" if is_run else "sweep", folders, output or paths[0] / "report")


def _runs(path: Path) -> list[Path]:
    """The run that a path is, or the runs right inside it."""
    if not path.is_dir():
        raise PylorusError(f"{path}: found no such folder, expected the folder of a run or of a sweep.")
    if (path / STATUS).is_file():
        return [path]
    jobs = [file.parent for file in path.glob(f"*/{STATUS}")]
    if jobs:
        return sorted(jobs, key=_job_order)
    deeper = sorted({file.parent for pattern in (f"*/*/{STATUS}", f"*/*/*/{STATUS}") for file in path.glob(pattern)})
    hint = f" Runs lie deeper:\n{listing(deeper, most=4)}" if deeper else ""
    raise PylorusError(f"{path}: neither a run (it holds no {STATUS}) nor a sweep (no folder in it does).{hint}")


def _job_order(folder: Path) -> tuple[int, str]:
    """Jobs 0, 1, …, 10 by number, what has a name after them."""
    return (int(folder.name), "") if folder.name.isdigit() else (1 << 31, folder.name)
