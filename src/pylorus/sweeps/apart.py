"""Run a job of a sweep in its own process: it leaves nothing behind in this one and receives this one's signals."""

import os
import subprocess
import sys
from pathlib import Path

from pylorus.errors import INTERRUPTED, PylorusError
from pylorus.files import write_json
from pylorus.pipe import GONE
from pylorus.runs.folder import RunFolder
from pylorus.runs.signals import IN_SWEEP, JOB_PATIENCE, JOB_STOP_SIGNAL

interrupted: list[Path] = []
"""Folders of this process's jobs that a signal ended: after that a launcher's worker starts no other job."""


def run_job_process(folder: RunFolder) -> None:
    """Run a job of a sweep as `python -m pylorus.train FOLDER`; if it fails, the sweep continues.

    Args:
        folder: The job's folder.

    Raises:
        KeyboardInterrupt: If this process or the job received a signal.
        PylorusError: If the job failed.
    """
    job = subprocess.Popen([sys.executable, "-m", "pylorus.train", str(folder.path)], env={**os.environ, IN_SWEEP: "1"})
    try:
        code = job.wait()
    except BaseException:  # a signal, or a launcher that requeues its job
        interrupted.append(folder.path)
        _stop_job(job)
        if (status := folder.read_status())["state"] == "starting":  # the job had not yet written its own status
            write_json(folder.path / "status.json", {**status, "state": "interrupted"})
        raise
    if code == INTERRUPTED:
        interrupted.append(folder.path)
        raise KeyboardInterrupt
    if code not in (0, GONE):
        reason = folder.read_status().get("error", f"its process ended with exit code {code}")
        raise PylorusError(f"the job in {folder.path} failed: {reason}")


def _stop_job(job: subprocess.Popen[bytes]) -> None:
    """Ask a job to end, and kill it if it does not; a job that already received Ctrl-C from the terminal ignores it."""
    job.send_signal(JOB_STOP_SIGNAL)
    try:
        job.wait(timeout=JOB_PATIENCE)
    except subprocess.TimeoutExpired:
        job.kill()
        job.wait()
