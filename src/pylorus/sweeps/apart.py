"""A job of a sweep as a process of its own: it leaves nothing behind in ours, and hears of the signals that we get."""

import os
import subprocess
import sys
from pathlib import Path

from pylorus.errors import INTERRUPTED, PylorusError
from pylorus.files import write_json
from pylorus.pipe import GONE
from pylorus.runs.folder import RunFolder
from pylorus.runs.signals import HAND_ON, IN_SWEEP, JOB_PATIENCE

interrupted: list[Path] = []
"""Jobs of this process that a signal ended: a launcher's worker begins no other."""


def run_apart(folder: RunFolder) -> None:
    """Runs a job of a sweep as `python -m pylorus.train FOLDER`; its failure is the job's, not the sweep's.

    Raises:
        KeyboardInterrupt: If a signal came to us or to the job.
        PylorusError: If it failed.
    """
    job = subprocess.Popen([sys.executable, "-m", "pylorus.train", str(folder.path)], env={**os.environ, IN_SWEEP: "1"})
    try:
        code = job.wait()
    except BaseException:  # a signal, or a launcher that puts its job back into a queue
        interrupted.append(folder.path)
        _end(job)
        if (status := folder.status())["state"] == "starting":  # it had not begun to say how it fares
            write_json(folder.path / "status.json", {**status, "state": "interrupted"})
        raise
    if code == INTERRUPTED:
        interrupted.append(folder.path)
        raise KeyboardInterrupt
    if code not in (0, GONE):
        why = folder.status().get("error", f"its process ended with exit code {code}")
        raise PylorusError(f"the job in {folder.path} failed: {why}")


def _end(job: subprocess.Popen[bytes]) -> None:
    """Has a job end, and kills one that does not; one that a terminal's Ctrl-C has reached already takes no notice."""
    job.send_signal(HAND_ON)
    try:
        job.wait(timeout=JOB_PATIENCE)
    except subprocess.TimeoutExpired:
        job.kill()
        job.wait()
