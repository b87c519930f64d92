"""One process of a distributed run, started by `pylorus.launch.train`: `python -m pylorus.launch.rank FOLDER`."""

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from pylorus.config.checks import load_config
from pylorus.core.distributed import Processes, join_process_group, read_processes
from pylorus.core.errors import INTERRUPTED, PylorusError
from pylorus.hardware.engine import resolve_accelerator
from pylorus.launch.train import Failure, train
from pylorus.runs.folder import RunFolder
from pylorus.runs.process import handle_signals, open_run_log, restore_trainer_config
from pylorus.training.faults import explain_faults


def main() -> None:
    """Train with the other processes; record an error for the process that started this one."""
    folder = RunFolder(Path(sys.argv[1]))
    config = load_config(folder.config)
    processes = read_processes()
    _stop_with_parent(os.getppid())
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the parent handles it and requeues the job
    try:
        with handle_signals() as stop, _setup_rank_logging(folder, processes), explain_faults(folder, config):
            accelerator, _ = resolve_accelerator(
                restore_trainer_config(config.trainer, folder.path / "environment.json")
            )
            with join_process_group(processes, accelerator=accelerator):
                train(config, folder, processes, stop)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        is_user_error = isinstance(error, PylorusError)
        traceback_text = "" if is_user_error else traceback.format_exc()
        Failure(processes.index, str(error) or type(error).__name__, traceback_text, time.time()).write(folder.path)
        os._exit(1)  # a clean exit would wait for the others


@contextmanager
def _setup_rank_logging(folder: RunFolder, processes: Processes) -> Iterator[None]:
    """Let only the first process log and warn."""
    with open_run_log(folder.path) if processes.is_first else nullcontext():
        if not processes.is_first:
            logging.disable(logging.CRITICAL)
            warnings.simplefilter("ignore")
        yield


def _stop_with_parent(parent: int) -> None:
    """Exit when the parent process is gone: if it was killed, it can't tell this one, and a new run may follow."""

    def wait_for_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(INTERRUPTED)

    threading.Thread(target=wait_for_parent, name="parent", daemon=True).start()


if __name__ == "__main__":
    main()
