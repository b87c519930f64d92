"""Where a run's log goes: to the terminal and to run.log."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm


class _Terminal(logging.Handler):
    """Prints above a progress bar, not through it; where the terminal has gone, a run goes on without."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _File(logging.FileHandler):
    """A line that a full disk does not take is on the terminal all the same."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 the standard library's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def run_log(folder: Path) -> Iterator[None]:
    """Sends our log to the terminal and to run.log while a run goes on; quietens what says nothing to its user."""
    ours = logging.getLogger("pylorus")
    terminal, file = _Terminal(), _File(folder / "run.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours.setLevel(logging.INFO)
    ours.propagate = False
    for handler in (terminal, file):
        ours.addHandler(handler)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Frozen parts are in evaluation mode on purpose, workers are chosen for the machine, small sets have
        # few steps, and predictions are put in order by their rows.
        for known in (
            "Found .* module.* in eval mode",
            ".*does not have many workers",
            ".*smaller than the logging interval",
            "You are using a custom batch sampler",
            ".*LeafSpec.* is deprecated",
            "The .srun. command is available on your system",
            "You're resuming from a checkpoint that ended before the epoch ended",  # its batches are skipped
            "It is recommended to use .*sync_dist",  # the tallies are those of all processes
        ):
            warnings.filterwarnings("ignore", message=known)
        # The seam between Lightning and torch: nothing that a user of ours could change.
        warnings.filterwarnings("ignore", category=FutureWarning, module="(pytorch_lightning|torch|timm).*")
        warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning.*checkpoint")
        try:
            yield
        except Exception:
            # The terminal shows it anyway; a night later the file is what is left.
            file.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": "failed", "exc_info": sys.exc_info()}))
            raise
        finally:
            for handler in (terminal, file):
                ours.removeHandler(handler)
                with suppress(OSError):  # of a full disk the run itself tells
                    handler.close()
