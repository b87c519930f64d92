"""How a stage comes along: a bar with the time left on a terminal, a line an epoch everywhere."""

import logging
import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

from pylorus.model.classifier import StagePlan
from pylorus.percent import percent

log = logging.getLogger(__name__)


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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An epoch that goes on in its middle does not begin."""
        self._began = time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints the line."""
        epochs, name = self.plan.config.epochs, self.plan.name
        left = (time.monotonic() - self._began) * (epochs - trainer.current_epoch - 1)

        def shown(part: str) -> str:
            loss, accuracy = (float(trainer.callback_metrics[f"{name}/{part}/{what}"]) for what in ("loss", "accuracy"))
            return f"loss {loss:.3f}, accuracy {percent(accuracy)}"

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
