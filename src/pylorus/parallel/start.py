"""Starts the processes of a run, waits for them, and says what ended them where one fails."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pylorus.config import Config, TrainerConfig
from pylorus.errors import INTERRUPTED, PylorusError
from pylorus.files import write_json
from pylorus.runs.folder import RunFolder
from pylorus.runs.signals import PATIENCE

AFTER_FAILURE = 5.0
"""Seconds after which those that wait for one that failed are ended."""


@dataclass(frozen=True)
class Failure:
    """Why a process ended.

    Attributes:
        index: The process's number.
        message: In words.
        trace: Where it happened; empty where the message says all that its user needs.
        at: When, in seconds since 1970.
    """

    index: int
    message: str
    trace: str
    at: float

    def write(self, folder: Path) -> None:
        """Into the run's folder, where whoever started the process looks."""
        write_json(folder / f".failure-{self.index}.json", asdict(self))


def train_in_processes(config: Config, folder: RunFolder) -> None:
    """Trains in as many processes as the configuration says, each on a device of its own.

    Raises:
        PylorusError: If one fails; the message is the one of the first that did.
        KeyboardInterrupt: If they are interrupted.
    """
    if isinstance(config.trainer.batch_size, int):
        check_shares(config.trainer.batch_size, config.trainer.devices * config.trainer.nodes)
    if config.trainer.nodes > 1:
        check_nodes(config.trainer)
        started = [_by_slurm(config.trainer, folder.path)]
    else:
        port, count = _free_port(), config.trainer.devices
        started = [_here(index, count, port, folder.path) for index in range(count)]
    try:
        codes = _ended(started)
    except BaseException:
        _end(started, patience=PATIENCE)
        raise
    if any(codes):
        raise _why(codes, folder.path)


def check_shares(size: int, count: int) -> None:
    """Refuses a batch of `size` images that `count` processes can't share evenly.

    Raises:
        PylorusError: Names a size that they can.
    """
    if size % count:
        raise PylorusError(
            f"trainer.batch_size: found {size} for {count} devices, expected a number that they can share: "
            f"{max(1, size // count) * count}, for instance."
        )


def check_nodes(trainer: TrainerConfig) -> None:
    """Refuses several machines where nothing brings the run to them.

    Raises:
        PylorusError: Says how SLURM is asked for them.
    """
    granted = int(os.environ.get("SLURM_JOB_NUM_NODES", "0"))
    if granted != trainer.nodes or shutil.which("srun") is None:
        raise PylorusError(
            f"trainer.nodes: found {trainer.nodes}, but {granted or 'no'} machines of SLURM. Put the same command into "
            f"a script, and: sbatch --nodes={trainer.nodes} --ntasks-per-node={trainer.devices} SCRIPT"
        )


def _by_slurm(trainer: TrainerConfig, folder: Path) -> "subprocess.Popen[bytes]":
    """All processes as one step of the job that this one runs in; its output comes here."""
    # The job's own numbers would be taken for those of a process.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": str(_free_port())}
    words = ["srun", f"--nodes={trainer.nodes}", f"--ntasks-per-node={trainer.devices}", "--kill-on-bad-exit=0"]
    return subprocess.Popen([*words, *_command(folder)], env=environment, start_new_session=True)


def _here(index: int, count: int, port: int, folder: Path) -> "subprocess.Popen[bytes]":
    """One of the processes on this machine, in a session of its own: signals come to it through this process alone."""
    numbers = {"RANK": index, "WORLD_SIZE": count, "LOCAL_RANK": index, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    said = {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(_command(folder), env={**os.environ, **said}, start_new_session=True)


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "pylorus.parallel.rank", str(folder)]


def _ended(started: "Sequence[subprocess.Popen[bytes]]") -> list[int]:
    """The exit codes, when all have ended; where one fails the others are ended, since they would wait for it."""
    failed_at: float | None = None
    while any(process.poll() is None for process in started):
        if failed_at is None and any(process.poll() for process in started):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > AFTER_FAILURE:
            codes = [process.poll() for process in started]
            _end([process for process in started if process.poll() is None], patience=AFTER_FAILURE)
            return [0 if code is None else code for code in codes]  # what we ended did not fail
        time.sleep(0.1)
    return [process.wait() for process in started]


def _end(started: "Sequence[subprocess.Popen[bytes]]", *, patience: float) -> None:
    """Asks processes to end, and kills those that don't."""
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGUSR2)  # srun hands it on, and does not take it for its own
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


def _why(codes: list[int], folder: Path) -> BaseException:
    """What ended the run: a process that was killed, else the one that failed first."""
    # srun says 128 + the signal's number.
    signals = [-code if code < 0 else code - 128 if code != INTERRUPTED else 0 for code in codes]
    killed = [(index, number) for index, number in enumerate(signals) if number > 0]
    failures = [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob(".failure-*.json")]
    for path in folder.glob(".failure-*.json"):
        path.unlink(missing_ok=True)
    if killed:
        index, number = killed[0]
        which = f"process {index + 1} of {len(codes)}" if len(codes) > 1 else "a process"
        return PylorusError(
            f"{which} was ended by {signal.Signals(number).name}. Most often the machine's "
            "memory is used up (dmesg tells): take a smaller trainer.batch_size or fewer trainer.devices.\n"
            f"Then go on: python train.py resume={folder}"
        )
    if failures:
        first = min(failures, key=lambda failure: failure.at)
        print(first.trace, file=sys.stderr, end="")
        return PylorusError(f"process {first.index + 1} failed: {first.message}" if first.trace else first.message)
    if INTERRUPTED in codes:
        return KeyboardInterrupt()
    return PylorusError(f"the run's processes ended with exit codes {', '.join(map(str, codes))}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
