"""Training progress: a progress bar on a terminal, and one line per epoch everywhere."""

import logging
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

from pylorus.model.classifier import StagePlan
from pylorus.percent import format_percent

log = logging.getLogger(__name__)


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar, on a terminal only: in a file each refresh would be a line."""

    def __init__(self, plan: StagePlan) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 0)
        self.plan = plan

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Label the bar with stage and epoch."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(
            f"{self.plan.name} {trainer.current_epoch + 1}/{self.plan.config.epochs}"
        )


class EpochLine(pl.Callback):
    """Log one line per epoch, with the time remaining in the stage."""

    def __init__(self, plan: StagePlan) -> None:
        self.plan = plan
        self._epoch_start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock here too: an epoch resumed midway does not call `on_train_epoch_start`."""
        self._epoch_start = time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._epoch_start = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the line."""
        epochs, name = self.plan.config.epochs, self.plan.name
        seconds_left = (time.monotonic() - self._epoch_start) * (epochs - trainer.current_epoch - 1)

        def format_metrics(split: str) -> str:
            loss, accuracy = (
                float(trainer.callback_metrics[f"{name}/{split}/{metric}"]) for metric in ("loss", "accuracy")
            )
            return f"loss {loss:.3f}, acc {format_percent(accuracy)} %"

        log.info(
            "%s epoch %*d/%d | train: %s | val: %s | %s left",
            name,
            len(str(epochs)),
            trainer.current_epoch + 1,
            epochs,
            format_metrics("train"),
            format_metrics("val"),
            time.strftime("%H:%M:%S" if seconds_left >= 3600 else "%M:%S", time.gmtime(seconds_left)),
        )
