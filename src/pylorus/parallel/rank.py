"""One process of a run of several: `python -m pylorus.parallel.rank FOLDER`; `pylorus.parallel.start` starts them."""

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

from pylorus.begun import as_begun
from pylorus.console import run_log
from pylorus.errors import INTERRUPTED, PylorusError
from pylorus.faults import faults_explained
from pylorus.machine import choose_accelerator
from pylorus.parallel.processes import Processes, found, joined
from pylorus.parallel.start import Failure
from pylorus.run_folder import RunFolder
from pylorus.signals import stopped_by_signals
from pylorus.train import train
from pylorus.validation import loaded


def main() -> None:
    """Trains with the others; what goes wrong is written down for who started them."""
    folder = RunFolder(Path(sys.argv[1]))
    config = loaded(folder.config)
    processes = found()
    _end_with(os.getppid())
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # whoever started this one hears it, and puts the job back
    try:
        with stopped_by_signals() as stop, _voice(folder, processes), faults_explained(folder, config):
            accelerator, _ = choose_accelerator(as_begun(config.trainer, folder.path / "environment.json"))
            with joined(processes, accelerator=accelerator):
                train(config, folder, processes, stop)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        known = isinstance(error, PylorusError)
        trace = "" if known else traceback.format_exc()
        Failure(processes.index, str(error) or type(error).__name__, trace, time.time()).write(folder.path)
        os._exit(1)  # an orderly end would wait for the others


@contextmanager
def _voice(folder: RunFolder, processes: Processes) -> Iterator[None]:
    """The first process speaks for all."""
    with run_log(folder.path) if processes.first else nullcontext():
        if not processes.first:
            logging.disable(logging.CRITICAL)
            warnings.simplefilter("ignore")
        yield


def _end_with(parent: int) -> None:
    """Ends this process when who started it is gone: killed, it can't say so, and another run may follow."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    main()
