"""What a person at the terminal sees of a run: its log, a bar with the time left, a line an epoch, a table a stage."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pylorus.evaluation.confusion import class_indices
from pylorus.evaluation.proportion import proportions_of_predictions
from pylorus.predictions import class_names, confusion_of, labels_of

if TYPE_CHECKING:
    import pandas as pd

    from pylorus.model.classifier import StagePlan
    from pylorus.stage import StageResult

log = logging.getLogger(__name__)


class _Terminal(logging.Handler):
    """Prints above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


@contextmanager
def run_log(folder: Path) -> Iterator[None]:
    """Sends our log to the terminal and to run.log while a run goes on; quietens what says nothing to its user."""
    ours = logging.getLogger("pylorus")
    terminal, file = _Terminal(), logging.FileHandler(folder / "run.log", encoding="utf-8")
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
                handler.close()


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, on a terminal only: in a file each refresh would be a line."""

    def __init__(self, plan: StagePlan) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 0)
        self.plan = plan

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Names the bar after its stage."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(
            f"{self.plan.name} {trainer.current_epoch + 1}/{self.plan.config.epochs}"
        )


class EpochLine(pl.Callback):
    """One line an epoch, with the time that the stage will still take."""

    def __init__(self, plan: StagePlan) -> None:
        self.plan = plan
        self._began = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the line."""
        epochs, name = self.plan.config.epochs, self.plan.name
        left = (time.monotonic() - self._began) * (epochs - trainer.current_epoch - 1)

        def shown(part: str) -> str:
            loss, accuracy = (float(trainer.callback_metrics[f"{name}/{part}/{what}"]) for what in ("loss", "accuracy"))
            return f"loss {loss:.3f}, accuracy {_percent(accuracy)}"

        log.info(
            "%s %*d/%d   training: %s   validation: %s   %s left",
            name,
            len(str(epochs)),
            trainer.current_epoch + 1,
            epochs,
            shown("train"),
            shown("val"),
            time.strftime("%H:%M:%S" if left >= 3600 else "%M:%S", time.gmtime(left)),
        )


def show_stage(plan: StagePlan, result: StageResult) -> None:
    """Logs a table of each class's indices, on validation and test images, at the stage's best epoch."""
    table = Table(
        title=f"{plan.name}: epoch {result.best_epoch} of {result.epochs}, best by validation {plan.config.monitor}"
    )
    table.add_column("%", justify="left")
    for part in result.predictions:
        for index in ("precision", "sensitivity", "F1"):
            table.add_column(f"{part}\n{index}", justify="right")
    by_part = [class_indices(confusion_of(predictions)) for predictions in result.predictions.values()]
    names = class_names(result.predictions["test"])
    for place, name in enumerate(names):
        table.add_row(
            name,
            *(_percent(v[place]) for part in by_part for v in (part.precision, part.sensitivity, part.f1)),
        )
    means = [v.mean() for part in by_part for v in (part.precision, part.sensitivity, part.f1)]
    table.add_row("average", *(_percent(mean) for mean in means), style="bold")
    log.info("\n%s%s", rendered(table), "\n".join(_accuracy(part, t) for part, t in result.predictions.items()))


def rendered(table: Table, *, width: int = 140) -> str:
    """A table as text, the same on a terminal and in a file."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def _accuracy(part: str, table: pd.DataFrame) -> str:
    """Accuracy with its interval, and what it stands on."""
    true, predicted = labels_of(table)
    groups = table["group"].to_numpy(dtype=str)
    grouped = len(set(groups)) < len(groups)
    found = proportions_of_predictions(true, predicted, groups if grouped else None, classes=len(class_names(table)))
    share = found.accuracy
    level = f"{len(set(groups))} groups" if grouped else "each image its own group"
    return (
        f"{part}: accuracy {_percent(share.value)} (95 % interval {_percent(share.low)} to {_percent(share.high)}), "
        f"{len(table)} images, {level}"
    )


def _percent(share: Any) -> str:
    """A share in %, with one digit; a dash where it is undefined."""
    value = float(share)
    return "–" if value != value else f"{100 * value:.1f}"
