"""What ends a run from outside: Ctrl-C, SIGTERM, and SIGUSR1 or SIGUSR2, by which SLURM tells that a job's time is up.

Each ends it cleanly: in training after the step that is being computed (an epoch's last one: after its validation),
whose state is kept, elsewhere at once. A
second signal does not wait for any of that.
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
"""The environment variable of a job that a sweep started: its signals are the sweep's affair."""
PATIENCE = 60.0
"""Seconds that a run has, once it is asked to end, for the step that it is in and for saving it."""
JOB_PATIENCE = 1.5 * PATIENCE
"""Seconds that a sweep gives a job, which may have processes of its own to wait for."""
HAND_ON = signal.SIGTERM
"""What a sweep sends its jobs when it is asked to end, by whatever signal; it is no second one to those that heard."""
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class Stop:
    """Whether a run was asked to end, and when it may: at once, or when a step of training is done.

    Attributes:
        asked: Whether it was.
    """

    def __init__(self) -> None:
        self.asked = False
        self._waits = False

    def ask(self, name: str) -> None:
        """Raises a KeyboardInterrupt that says `name`, or leaves that to the end of the step."""
        self.asked = True
        if not self._waits:
            raise KeyboardInterrupt(name)

    def wait_for_step(self) -> None:
        """From now on who trains looks whether it is asked to end."""
        self._waits = True

    def at_once(self) -> None:
        """From now on a signal ends the run where it is; so does one that came meanwhile."""
        self._waits = False
        if self.asked:
            self.now()

    def now(self) -> None:
        """Ends the run.

        Raises:
            KeyboardInterrupt: Always.
        """
        self._waits = False
        raise KeyboardInterrupt


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """Makes a KeyboardInterrupt of the first signal that comes, inside; the second ends the process.

    A job of SLURM that got SIGUSR1 is put back into the queue, unless submitit or a sweep started it, which do
    so themselves.
    """
    received: list[int] = []
    asked = Stop()

    def stop(number: int, _: FrameType | None) -> None:
        if received and number == HAND_ON and IN_SWEEP in os.environ:
            return
        if received:
            os._exit(INTERRUPTED)
        received.append(number)
        asked.ask(signal.Signals(number).name)

    before: dict[signal.Signals, Any] = {}
    try:
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received and signal.Signals(received[0]).name == "SIGUSR1":
            _requeue()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, a signal waits: an import that is broken off leaves half a module, and who needs it next may crash."""
    if threading.current_thread() is not threading.main_thread():  # only there can it be broken off
        yield
        return
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in heard:
            signal.raise_signal(number)


def _requeue() -> None:
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    if job is None or "SUBMITIT_EXECUTOR" in os.environ or IN_SWEEP in os.environ:
        return
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{job}_{task}" if task and os.environ.get("SLURM_ARRAY_JOB_ID") else job
    found = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        print(f"SLURM did not put job {name} back into the queue: {found.stderr.strip()}", file=sys.stderr)
