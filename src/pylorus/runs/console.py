"""Log a run to the terminal and to run.log."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm


class _TerminalHandler(logging.Handler):
    """Handler that prints above a progress bar; if the terminal is gone, the run continues without output."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _LogFileHandler(logging.FileHandler):
    """Handler for run.log that ignores errors of a full disk: the terminal still shows the line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 the standard library's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def open_run_log(folder: Path) -> Iterator[None]:
    """Send Pylorus's log to the terminal and to run.log, and silence warnings that users can do nothing about.

    Args:
        folder: The run's folder.
    """
    logger = logging.getLogger("pylorus")
    terminal, file = _TerminalHandler(), _LogFileHandler(folder / "run.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in (terminal, file):
        logger.addHandler(handler)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Frozen layers are in evaluation mode on purpose, the number of workers is chosen for the machine, small data
        # sets have few steps, and predictions are sorted by row.
        for message in (
            "Found .* module.* in eval mode",
            ".*does not have many workers",
            ".*smaller than the logging interval",
            "You are using a custom batch sampler",
            ".*LeafSpec.* is deprecated",
            "The .srun. command is available on your system",
            "You're resuming from a checkpoint that ended before the epoch ended",  # its batches are skipped
            "It is recommended to use .*sync_dist",  # the metrics already combine all processes
        ):
            warnings.filterwarnings("ignore", message=message)
        # Deprecations between Lightning, torch and timm: nothing that a user of Pylorus could change.
        warnings.filterwarnings("ignore", category=FutureWarning, module="(pytorch_lightning|torch|timm).*")
        warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning.*checkpoint")
        try:
            yield
        except Exception:
            # The terminal shows the error anyway; the next morning only the file is left.
            file.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": "failed", "exc_info": sys.exc_info()}))
            raise
        finally:
            for handler in (terminal, file):
                logger.removeHandler(handler)
                with suppress(OSError):  # the run itself reports a full disk
                    handler.close()
