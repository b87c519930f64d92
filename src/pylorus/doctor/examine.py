"""Run all checks and yield each as soon as it is done.

The checks that need no heavy package run first, while a second process loads those packages.
"""

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pylorus.doctor.check import Check, State, run_guarded
from pylorus.doctor.extras import EXTRAS as EXTRAS
from pylorus.doctor.extras import check_extras
from pylorus.doctor.loading import LOADING as LOADING
from pylorus.doctor.network import check_network
from pylorus.doctor.packages import PACKAGES as PACKAGES
from pylorus.doctor.packages import check_packages
from pylorus.doctor.space import MEMORY_AND_DISK as SPACE
from pylorus.doctor.space import check_space

PATIENCE = 600.0
"""Time limit of the second process, in seconds: from a cold network disk torch takes minutes to load."""


@dataclass(frozen=True)
class DoctorOptions:
    """What the doctor should check besides the machine.

    Attributes:
        weights: Folder of weight files that were copied to this machine.
        data: Folder of images to check, or None.
        bundle: Folder of a bundle to check, or None.
    """

    weights: Path = Path("weights")
    data: Path | None = None
    bundle: Path | None = None

    def to_json(self) -> str:
        """Return the question as JSON, for the second process."""
        folders = {"data": self.data, "bundle": self.bundle}
        paths = {name: None if path is None else str(path) for name, path in folders.items()}
        return json.dumps({"weights": str(self.weights), **paths})


def run_checks(question: DoctorOptions) -> Iterator[Check]:
    """Run all checks and yield each as soon as it is done."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = _start_process(question, errors)
        try:
            yield from run_guarded(PACKAGES, "packages", check_packages)
            yield from run_guarded(EXTRAS, "extras", check_extras)
            yield from run_guarded(SPACE, "memory and disk", check_space)
            yield from check_network()
            yield from _read_checks(process, errors)
        finally:
            process.kill()
            process.wait()


def _start_process(question: DoctorOptions, errors: IO[str]) -> "subprocess.Popen[str]":
    # -P: a file in the current folder that has the name of a module must not be imported in its place.
    command = [sys.executable, "-P", "-m", "pylorus.doctor.second", question.to_json()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8")


def _read_checks(process: "subprocess.Popen[str]", errors: IO[str]) -> Iterator[Check]:
    """Yield the second process's checks; if it ends early, also a check that says during which step."""
    timer = threading.Timer(PATIENCE, process.kill)
    timer.daemon = True
    timer.start()
    step = "starting"
    assert process.stdout is not None
    for line in process.stdout:
        if not line.endswith("\n"):
            break  # the process ended while it wrote this line
        content = json.loads(line)
        if "doing" in content:
            step = content["doing"]
        else:
            yield Check.from_json(line)
    in_time = timer.is_alive()
    timer.cancel()
    if process.wait() != 0:
        yield report_early_end(step, process.returncode, in_time=in_time, said=_read_last_line(errors))


def _read_last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = errors.read().strip().splitlines()
    return lines[-1].strip() if lines else ""


def report_early_end(doing: str, code: int, *, in_time: bool, said: str) -> Check:
    """Return the check that reports that the second process ended early.

    Args:
        doing: What it was doing.
        code: Its exit code; negative: the number of the signal that ended it.
        in_time: Whether it ended before the time limit.
        said: The last line of its standard error.
    """
    if not in_time:
        summary = f"not finished within {PATIENCE:.0f} s; the checks after it were skipped"
        return Check(
            LOADING,
            doing,
            State.WRONG,
            summary,
            "See whether the disk with the Python packages is slow, or whether a device hangs.",
        )
    ending = f"exit code {code}"
    if code < 0:
        ending = signal.Signals(-code).name
    meanings = {
        "SIGILL": "this processor lacks an instruction that it uses: install an older release or another build",
        "SIGKILL": "the usual cause is that memory ran out: close other programs",
    }
    fix = (
        f"Reinstall the package; {meanings[ending]}."
        if ending in meanings
        else "Reinstall the package, then run pylorus doctor again."
    )
    detail = f" ({said})" if said else ""
    return Check(
        LOADING, doing, State.WRONG, f"Python ended with {ending}{detail}; the checks after it were skipped", fix
    )
