"""One process of a distributed run.

`pylorus.launch.train` starts it as `python -m pylorus.launch.train --rank FOLDER`. A user's own torchrun or srun starts
`python train.py …` once for each process: the first one does what the command says, and the others train with it.
"""

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

from pylorus.config.checks import load_config
from pylorus.config.schema import Config
from pylorus.core.distributed import (
    Processes,
    announce_folder,
    join_process_group,
    read_processes,
    wait_for_folder,
)
from pylorus.core.errors import INTERRUPTED, TRAIN_COMMAND, PylorusError
from pylorus.core.io import write_json
from pylorus.hardware import resolve_accelerator
from pylorus.runs.console import detach_streams, open_run_log
from pylorus.runs.folder import RunFolder
from pylorus.runs.process import (
    StopRequest,
    Timeline,
    compute_process_start,
    handle_signals,
    restore_trainer_config,
)
from pylorus.training.faults import explain_faults

Train = Callable[[Config, RunFolder, Processes, StopRequest, Timeline], None]
"""The function that trains in one of the processes; the module that holds it imports this one."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""The environment variable in which torch's elastic launch names the file for a process's error."""


class RankErrorHandler(ErrorHandler):
    """Write an error as torch's does, but with what names the first of several: torch's times are whole seconds."""

    def record_exception(self, e: BaseException) -> None:
        """Write the error to the file that the launcher named; without one, print it."""
        is_user_error = isinstance(e, PylorusError)
        message = str(e) or type(e).__name__
        trace = message if is_user_error else traceback.format_exc()
        if ERROR_FILE not in os.environ:
            print(f"\nerror: {trace}", file=sys.stderr)
            return
        now, rank = time.time(), int(os.environ["RANK"])
        details = {"py_callstack": trace, "timestamp": str(int(now)), "time": now, "rank": rank}
        error = {"message": message, "extraInfo": details | {"is_user_error": is_user_error}}
        write_json(Path(os.environ[ERROR_FILE]), {"message": error})


def run_launched(run_command: Callable[[], int], train: Train) -> int:
    """Run a command line in the first of the processes that torchrun or srun started; the others train with it.

    Args:
        run_command: Executes `sys.argv` and returns the exit code.
        train: Trains in one of the processes: `pylorus.launch.train.train`.

    Raises:
        PylorusError: If the command is a sweep.
    """
    processes = read_processes()
    if not processes.is_first:
        folder = wait_for_folder()
        if folder:
            train_rank(Path(folder), processes, train)
        return 0
    try:
        if {"-m", "--multirun"} & set(sys.argv):
            raise PylorusError(
                f"-m: found a sweep in {processes.count} processes that torchrun or srun started. A sweep starts the "
                f"processes of its jobs itself: {TRAIN_COMMAND} -m trainer.devices={processes.local_count} …"
            )
        known_keys = {argument.lstrip("+").partition("=")[0] for argument in sys.argv[1:]}
        for key, count in (("devices", processes.local_count), ("nodes", processes.count // processes.local_count)):
            if f"trainer.{key}" not in known_keys:
                sys.argv.append(f"trainer.{key}={count}")
        return run_command()
    finally:
        announce_folder("")


def train_rank(folder: Path, processes: Processes, train: Train) -> None:
    """Train with the other processes; exit with an error's code, after recording it for the launcher."""
    _stop_with_parent(os.getppid())
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the process that the user started handles it and requeues the job
    try:
        record(_train, RankErrorHandler())(RunFolder(folder), processes, train)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception:
        os._exit(1)  # a clean exit would wait for the others


@detach_streams()
def _train(folder: RunFolder, processes: Processes, train: Train) -> None:
    timeline = Timeline(compute_process_start())
    config = load_config(folder.config)
    with handle_signals() as stop, _setup_rank_logging(folder, processes), explain_faults(folder, config):
        accelerator, _ = resolve_accelerator(restore_trainer_config(config.trainer, folder.path / "environment.json"))
        with join_process_group(processes, accelerator=accelerator):
            train(config, folder, processes, stop, timeline)
    if processes.is_first:
        timeline.write(folder.speed)  # the process that started this one includes it in its own


@contextmanager
def _setup_rank_logging(folder: RunFolder, processes: Processes) -> Iterator[None]:
    """Let only the first process log and warn."""
    with open_run_log(folder.path) if processes.is_first else nullcontext():
        if not processes.is_first:
            logging.disable(logging.CRITICAL)
            warnings.simplefilter("ignore")
        yield


def _stop_with_parent(parent: int) -> None:
    """Exit when the parent process is gone: if it was killed, it can't stop this one, and a new run may follow."""

    def wait_for_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(INTERRUPTED)

    threading.Thread(target=wait_for_parent, name="parent", daemon=True).start()
