"""One process of a distributed run, started by `pylorus.parallel.start`: `python -m pylorus.parallel.rank FOLDER`."""

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

from pylorus.errors import INTERRUPTED, PylorusError
from pylorus.machine.engine import choose_accelerator
from pylorus.parallel.processes import Processes, found, joined
from pylorus.parallel.start import Failure
from pylorus.runs.begun import as_begun
from pylorus.runs.console import run_log
from pylorus.runs.faults import faults_explained
from pylorus.runs.folder import RunFolder
from pylorus.runs.signals import stopped_by_signals
from pylorus.train import train
from pylorus.validation import loaded


def main() -> None:
    """Train with the other processes; record an error for the process that started this one."""
    folder = RunFolder(Path(sys.argv[1]))
    config = loaded(folder.config)
    processes = found()
    _end_with(os.getppid())
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the parent handles it and requeues the job
    try:
        with stopped_by_signals() as stop, _voice(folder, processes), faults_explained(folder, config):
            accelerator, _ = choose_accelerator(as_begun(config.trainer, folder.path / "environment.json"))
            with joined(processes, accelerator=accelerator):
                train(config, folder, processes, stop)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        is_user_error = isinstance(error, PylorusError)
        traceback_text = "" if is_user_error else traceback.format_exc()
        Failure(processes.index, str(error) or type(error).__name__, traceback_text, time.time()).write(folder.path)
        os._exit(1)  # a clean exit would wait for the others


@contextmanager
def _voice(folder: RunFolder, processes: Processes) -> Iterator[None]:
    """Let only the first process log and warn."""
    with run_log(folder.path) if processes.first else nullcontext():
        if not processes.first:
            logging.disable(logging.CRITICAL)
            warnings.simplefilter("ignore")
        yield


def _end_with(parent: int) -> None:
    """Exit when the parent process is gone: if it was killed, it can't tell this one, and a new run may follow."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    main()
