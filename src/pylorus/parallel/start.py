"""Start the processes of a run, wait for them, and report the cause if one fails."""

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
"""Seconds to wait after a failure before the remaining processes are stopped."""


@dataclass(frozen=True)
class Failure:
    """Why a process failed.

    Attributes:
        index: Rank of the process.
        message: Error message.
        trace: Traceback; empty if the message says all that the user needs.
        at: Time in seconds since 1970.
    """

    index: int
    message: str
    trace: str
    at: float

    def write(self, folder: Path) -> None:
        """Write the failure to the run's folder, where the parent process reads it."""
        write_json(folder / f".failure-{self.index}.json", asdict(self))


def train_in_processes(config: Config, folder: RunFolder) -> None:
    """Train in as many processes as the configuration says, one per device.

    Raises:
        PylorusError: If a process fails; the message is that of the first to fail.
        KeyboardInterrupt: If they are interrupted.
    """
    if isinstance(config.trainer.batch_size, int):
        check_batch_divides(config.trainer.batch_size, config.trainer.devices * config.trainer.nodes)
    if config.trainer.nodes > 1:
        check_slurm_nodes(config.trainer)
        children = [_start_slurm_step(config.trainer, folder.path)]
    else:
        port, count = _find_free_port(), config.trainer.devices
        children = [_start_local_process(index, count, port, folder.path) for index in range(count)]
    try:
        codes = _wait_for_children(children)
    except BaseException:
        _stop_children(children, patience=PATIENCE)
        raise
    if any(codes):
        raise _build_error(codes, folder.path)


def check_batch_divides(size: int, count: int) -> None:
    """Check that a batch of `size` images divides evenly among `count` processes.

    Raises:
        PylorusError: If not; the message names a size that does.
    """
    if size % count:
        raise PylorusError(
            f"trainer.batch_size: found {size} for {count} devices, expected a multiple of {count}, such as "
            f"{max(1, size // count) * count}."
        )


def check_slurm_nodes(trainer: TrainerConfig) -> None:
    """Check that SLURM allocated the configured number of machines.

    Raises:
        PylorusError: If not; the message says how to request them.
    """
    allocated = int(os.environ.get("SLURM_JOB_NUM_NODES", "0"))
    if allocated != trainer.nodes or shutil.which("srun") is None:
        raise PylorusError(
            f"trainer.nodes: found {trainer.nodes}, but SLURM allocated {allocated or 'none'}. Put the same command "
            f"into a script, then run: sbatch --nodes={trainer.nodes} --ntasks-per-node={trainer.devices} SCRIPT"
        )


def _start_slurm_step(trainer: TrainerConfig, folder: Path) -> "subprocess.Popen[bytes]":
    """Start all processes as one step of the current SLURM job; their output comes here."""
    # The job's own variables would be mistaken for those of one process.
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {"MASTER_ADDR": socket.gethostname(), "MASTER_PORT": str(_find_free_port())}
    srun = ["srun", f"--nodes={trainer.nodes}", f"--ntasks-per-node={trainer.devices}", "--kill-on-bad-exit=0"]
    return subprocess.Popen([*srun, *_build_command(folder)], env=environment, start_new_session=True)


def _start_local_process(index: int, count: int, port: int, folder: Path) -> "subprocess.Popen[bytes]":
    """Start one process on this machine, in its own session, so that only this process forwards signals to it."""
    ranks = {"RANK": index, "WORLD_SIZE": count, "LOCAL_RANK": index, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    variables = {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
    return subprocess.Popen(_build_command(folder), env={**os.environ, **variables}, start_new_session=True)


def _build_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "pylorus.parallel.rank", str(folder)]


def _wait_for_children(children: "Sequence[subprocess.Popen[bytes]]") -> list[int]:
    """Return the exit codes of all processes; after a failure, stop the rest, which would wait for it forever."""
    failed_at: float | None = None
    while any(child.poll() is None for child in children):
        if failed_at is None and any(child.poll() for child in children):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > AFTER_FAILURE:
            codes = [child.poll() for child in children]
            _stop_children([child for child in children if child.poll() is None], patience=AFTER_FAILURE)
            return [0 if code is None else code for code in codes]  # a process that we stopped did not fail
        time.sleep(0.1)
    return [child.wait() for child in children]


def _stop_children(children: "Sequence[subprocess.Popen[bytes]]", *, patience: float) -> None:
    """Ask processes to stop, and kill those that don't."""
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGUSR2)  # srun forwards this signal without acting on it
    deadline = time.monotonic() + patience
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()


def _build_error(codes: list[int], folder: Path) -> BaseException:
    """Return the error that ended the run: that of a killed process, else of the first that failed."""
    # srun reports 128 + the signal number.
    signals = [-code if code < 0 else code - 128 if code != INTERRUPTED else 0 for code in codes]
    killed_processes = [(index, signal_number) for index, signal_number in enumerate(signals) if signal_number > 0]
    failures = [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob(".failure-*.json")]
    for path in folder.glob(".failure-*.json"):
        path.unlink(missing_ok=True)
    if killed_processes:
        index, signal_number = killed_processes[0]
        process_label = f"process {index + 1} of {len(codes)}" if len(codes) > 1 else "a process"
        return PylorusError(
            f"{process_label} was killed by {signal.Signals(signal_number).name}. Most often the machine "
            "ran out of memory (see dmesg): set a smaller trainer.batch_size or fewer trainer.devices.\n"
            f"Then resume: python train.py resume={folder}"
        )
    if failures:
        first = min(failures, key=lambda failure: failure.at)
        print(first.trace, file=sys.stderr, end="")
        return PylorusError(f"process {first.index + 1} failed: {first.message}" if first.trace else first.message)
    if INTERRUPTED in codes:
        return KeyboardInterrupt()
    return PylorusError(f"the run's processes exited with codes {', '.join(map(str, codes))}")


def _find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
