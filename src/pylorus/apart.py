"""A job of a sweep as a process of its own: it leaves nothing behind in ours, and hears of the signals that we get."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from pylorus.errors import INTERRUPTED, PylorusError
from pylorus.files import write_json
from pylorus.pipe import GONE
from pylorus.run_folder import RunFolder
from pylorus.signals import IN_SWEEP

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
    except BaseException as stop:  # a signal, or a launcher that puts its job back into a queue
        interrupted.append(folder.path)
        _end(job, heard=str(stop) not in ("SIGTERM", "SIGUSR1", "SIGUSR2"))
        if (status := folder.status())["state"] == "starting":  # it had not begun to say how it fares
            write_json(folder.path / "status.json", {**status, "state": "interrupted"})
        raise
    if code == INTERRUPTED:
        interrupted.append(folder.path)
        raise KeyboardInterrupt
    if code not in (0, GONE):
        why = folder.status().get("error", f"its process ended with exit code {code}")
        raise PylorusError(f"the job in {folder.path} failed: {why}")


def _end(job: subprocess.Popen[bytes], *, heard: bool) -> None:
    """Waits for a job that is to end.

    Args:
        job: Its process.
        heard: Whether the signal most likely reached the job too, as a terminal's Ctrl-C does; else it is handed on.
    """
    hand_on = partial(job.send_signal, signal.SIGINT if heard else signal.SIGTERM)
    if not heard:
        hand_on()
    for insist in (hand_on if heard else job.kill, job.kill):
        try:
            job.wait(timeout=10 if heard else 20)
            return
        except subprocess.TimeoutExpired:
            insist()
    job.wait()
