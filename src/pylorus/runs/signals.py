"""Handle signals that end a run: Ctrl-C, SIGTERM, and SIGUSR1 or SIGUSR2, which SLURM sends when a job's time is up.

Each ends the run cleanly: during training after the current step (after the last step of an epoch: after its
validation), whose state is saved; otherwise at once. A second signal does not wait for any of that.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pylorus.errors import INTERRUPTED

IN_SWEEP = "PYLORUS_IN_SWEEP"
"""The environment variable of a job that a sweep started: the sweep handles its signals."""
PATIENCE = 60.0
"""Seconds in which a run must finish and save its current step once it is asked to end."""
JOB_PATIENCE = 1.5 * PATIENCE
"""Seconds in which a job of a sweep must end; it may have to wait for processes of its own."""
JOB_STOP_SIGNAL = signal.SIGTERM
"""The signal that a sweep sends to its jobs when it has to end; a job that already received a signal ignores it."""
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)


class StopRequest:
    """Whether a run was asked to end, and when it may end: at once or after the current training step.

    Attributes:
        asked: Whether the run was asked to end.
    """

    def __init__(self) -> None:
        self.asked = False
        self._waits = False

    def handle_request(self, name: str) -> None:
        """Raise a KeyboardInterrupt with the signal's name, or leave that to the end of the training step."""
        self.asked = True
        if not self._waits:
            raise KeyboardInterrupt(name)

    def wait_for_step(self) -> None:
        """Let signals take effect at the end of a training step: from now on the trainer checks `asked`."""
        self._waits = True

    def stop_waiting(self) -> None:
        """Let signals take effect at once, including one that was received in the meantime."""
        self._waits = False
        if self.asked:
            self.raise_interrupt()

    def raise_interrupt(self) -> None:
        """End the run.

        Raises:
            KeyboardInterrupt: Always.
        """
        self._waits = False
        raise KeyboardInterrupt


@contextmanager
def handle_signals() -> Iterator[StopRequest]:
    """Turn the first signal inside the context into a KeyboardInterrupt; a second one ends the process.

    A SLURM job that received SIGUSR1 is requeued, unless submitit or a sweep started it: these requeue it themselves.
    """
    received: list[int] = []
    request = StopRequest()

    def handle_signal(number: int, _: FrameType | None) -> None:
        if received and number == JOB_STOP_SIGNAL and IN_SWEEP in os.environ:
            return
        if received:
            os._exit(INTERRUPTED)
        received.append(number)
        request.handle_request(signal.Signals(number).name)

    before: dict[signal.Signals, Any] = {}
    try:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle_signal)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received and signal.Signals(received[0]).name == "SIGUSR1":
            _send_requeue()


@contextmanager
def ensure_uninterrupted() -> Iterator[None]:
    """Defer signals until the end of the context: an interrupted import leaves an incomplete module behind."""
    if threading.current_thread() is not threading.main_thread():  # signals only interrupt the main thread
        yield
        return
    deferred: list[int] = []
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: deferred.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in deferred:
            signal.raise_signal(number)


def _send_requeue() -> None:
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    if job is None or "SUBMITIT_EXECUTOR" in os.environ or IN_SWEEP in os.environ:
        return
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{job}_{task}" if task and os.environ.get("SLURM_ARRAY_JOB_ID") else job
    result = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        print(f"SLURM did not requeue job {name}: {result.stderr.strip()}", file=sys.stderr)
