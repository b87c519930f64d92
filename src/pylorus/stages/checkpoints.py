"""Checkpoints of a stage: the weights of its best epoch, and all that is needed to resume.

Both are in checkpoints/. `last.ckpt` is the state after a complete epoch, or within one that takes long or was asked to
stop: weights, optimizer, schedule, number of epochs and batches. It names the best epoch so far, whose weights are
beside it in `best-<epoch>.ckpt`. When the stage is trained, that file becomes `best.ckpt`, `stage.json` is written, and
`last.ckpt` is deleted. However a run is killed, the files that `last.ckpt` refers to exist.
"""

import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from pylorus.files import write_atomically, write_json
from pylorus.model.classifier import Classifier
from pylorus.parallel.processes import Processes
from pylorus.runs.folder import RunFolder
from pylorus.runs.signals import StopRequest
from pylorus.stages.folder import StageFolder, StageProgress

SHARE_OF_TIME = 0.02
"""Fraction of training time that saving may take: if it takes longer, not every epoch is saved."""
LONGEST = 600.0
"""Seconds of training that a killed run may lose: longer epochs are saved midway."""


class Checkpoints(pl.Callback):
    """Save a stage's state during training.

    Args:
        saved: The stage's folder.
        mode: Whether the best monitored value is the `min` or the `max`.
        processes: The run's processes; the first one writes.
        stop: Stop request: the current step is finished and its state saved.
    """

    def __init__(self, saved: StageFolder, *, mode: str, processes: Processes, stop: StopRequest) -> None:
        self._saved, self._sign = saved, 1.0 if mode == "max" else -1.0
        self._processes, self._stop = processes, stop
        self._best_score, self._best_epoch = -math.inf, -1
        self._saved_at, self._cost = -math.inf, 0.0
        self._trained_since = 0.0
        self._reached = StageProgress(0, 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; from now until the end of training, signals wait for a state that can be saved."""
        self._trained_since = time.monotonic()
        self._stop.wait_for_step()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *step: Any) -> None:
        """Save within long epochs, and when the run is asked to stop.

        Raises:
            KeyboardInterrupt: If the run was asked to stop.
        """
        batches = int(trainer.fit_loop.epoch_loop.batch_idx) + 1
        unsaved_seconds = time.monotonic() - self._trained_since
        due, stop = self._processes.reduce_any(
            unsaved_seconds >= max(LONGEST, self._cost / SHARE_OF_TIME), self._stop.asked
        )
        if batches == trainer.num_training_batches:
            return  # saved at the end of the epoch, after validation
        if due or stop:
            self._save_last(trainer, StageProgress(trainer.current_epoch, batches))
        if stop:
            self._stop.raise_interrupt()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the run's folder still exists, before anything of the epoch is written."""
        RunFolder(self._saved.path.parent).check_exists()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after validation, and after early stopping has decided.

        Raises:
            KeyboardInterrupt: If the run was asked to stop since the epoch's last step; its state is saved.
        """
        score = self._sign * float(trainer.callback_metrics["monitor"])
        if score > self._best_score or self._best_epoch < 0:  # NaN only beats having no score
            self._best_score = score if math.isfinite(score) else -math.inf
            self._best_epoch = int(trainer.current_epoch)
            self._save(trainer, self._saved.get_best_path(self._best_epoch), weights_only=True)
        done = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        due = time.monotonic() - self._saved_at >= self._cost / SHARE_OF_TIME
        due, stop = self._processes.reduce_any(due and self._processes.is_first, self._stop.asked)
        stop = stop and not trainer.should_stop  # resumed, it would train on although early stopping ended it
        if (due and not done) or stop:
            self._save_last(trainer, StageProgress(trainer.current_epoch + 1, 0))
        if stop:
            self._stop.raise_interrupt()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record that the stage is trained, and name its best checkpoint."""
        if self._processes.is_first:
            _create_link(self._saved.get_best_path(self._best_epoch), self._saved.best_checkpoint)
            write_json(
                self._saved.record_path, {"epochs": int(trainer.current_epoch), "best_epoch": self._best_epoch + 1}
            )
            self._saved.delete_training_state()
        self._processes.wait()
        self._stop.stop_waiting()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning does not save: the stage's progress and, within an epoch, its metric sums."""
        assert isinstance(pl_module, Classifier)
        checkpoint["reached"] = tuple(self._reached)
        if self._reached.batches:
            checkpoint["tally"] = pl_module.gather_metric_sums()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the metric sums of a partial epoch in the first process."""
        assert isinstance(pl_module, Classifier)
        if "tally" in checkpoint and self._processes.is_first:
            pl_module.restore_metric_sums(checkpoint["tally"])

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, so that a checkpoint loads with tensors only."""
        return {"best_score": self._best_score, "best_epoch": self._best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score and epoch."""
        self._best_score, self._best_epoch = state_dict["best_score"], state_dict["best_epoch"]

    def _save_last(self, trainer: pl.Trainer, reached: StageProgress) -> None:
        start = time.monotonic()
        self._reached = reached
        self._save(trainer, self._saved.last_checkpoint)
        self._saved_at = self._trained_since = time.monotonic()
        self._cost = self._saved_at - start
        if self._processes.is_first:
            self._saved.delete_other_bests(self._best_epoch)

    def _save(self, trainer: pl.Trainer, path: Path, *, weights_only: bool = False) -> None:
        """Write a checkpoint atomically from the first process; the others wait."""
        if self._processes.is_first:
            with write_atomically(path) as temporary:
                trainer.save_checkpoint(temporary, weights_only=weights_only)
        else:
            trainer.save_checkpoint(path, weights_only=weights_only)
        self._processes.wait()


def _create_link(path: Path, link: Path) -> None:
    """Hard-link or copy a file: if the run is killed now, the name in `last.ckpt` still exists."""
    with write_atomically(link) as temporary:
        try:
            temporary.hardlink_to(path)
        except OSError:  # the file system has no hard links
            shutil.copyfile(path, temporary)
