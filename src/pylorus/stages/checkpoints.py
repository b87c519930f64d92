"""What a stage keeps of its network: the weights of its best epoch, and all that is needed to go on.

Both lie in checkpoints/. `last.ckpt` is the state after a whole epoch, or within one that takes long or was asked to
stop: weights, optimiser, schedule, how many epochs and batches. It names the best epoch up to then, whose weights lie
beside it as `best-<epoch>.ckpt`; when the stage is trained these become `best.ckpt`, `stage.json` says so, and
`last.ckpt` goes. Whatever kills a run, what `last.ckpt` names is there.
"""

import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from pylorus.files import whole, write_json
from pylorus.model.classifier import Classifier
from pylorus.parallel.processes import Processes
from pylorus.runs.folder import RunFolder
from pylorus.runs.signals import Stop
from pylorus.stages.folder import Reached, StageFolder

SHARE_OF_TIME = 0.02
"""Of training, that saving may take: where it takes longer, not every epoch is saved."""
LONGEST = 600.0
"""Seconds of training that a killed run may lose: an epoch that takes longer is saved in its middle."""


class Checkpoints(pl.Callback):
    """Saves a stage's state as it goes on.

    Args:
        saved: The files of the stage.
        mode: Whether the best is the `min` or the `max` of what the stage monitors.
        processes: Of which the first one writes.
        stop: Whether the run is asked to end: then the step goes to its end, and its state is kept.
    """

    def __init__(self, saved: StageFolder, *, mode: str, processes: Processes, stop: Stop) -> None:
        self._saved, self._sign = saved, 1.0 if mode == "max" else -1.0
        self._processes, self._stop = processes, stop
        self._best_score, self._best_epoch = -math.inf, -1
        self._saved_at, self._cost = -math.inf, 0.0
        self._trained_since = 0.0
        self._reached = Reached(0, 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock of what would be lost; from here to the end a signal waits for what can be saved."""
        self._trained_since = time.monotonic()
        self._stop.wait_for_step()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *step: Any) -> None:
        """Saves within an epoch that takes long, and where the run is asked to stop.

        Raises:
            KeyboardInterrupt: If it was asked to.
        """
        batches = int(trainer.fit_loop.epoch_loop.batch_idx) + 1
        waited = time.monotonic() - self._trained_since
        due, stop = self._processes.any(waited >= max(LONGEST, self._cost / SHARE_OF_TIME), self._stop.asked)
        if batches == trainer.num_training_batches:
            return  # the epoch's end is what is saved, after its validation
        if due or stop:
            self._save_last(trainer, Reached(trainer.current_epoch, batches))
        if stop:
            self._stop.now()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before anything of the epoch is written."""
        RunFolder(self._saved.path.parent).expect_there()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After validation and after early stopping has decided.

        Raises:
            KeyboardInterrupt: If the run was asked to stop since the epoch's last step; its state is kept.
        """
        score = self._sign * float(trainer.callback_metrics["monitor"])
        if score > self._best_score or self._best_epoch < 0:  # an undefined score is better than none only
            self._best_score = score if math.isfinite(score) else -math.inf
            self._best_epoch = int(trainer.current_epoch)
            self._save(trainer, self._saved.best(self._best_epoch), weights_only=True)
        done = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        due = time.monotonic() - self._saved_at >= self._cost / SHARE_OF_TIME
        due, stop = self._processes.any(due and self._processes.first, self._stop.asked)
        stop = stop and not trainer.should_stop  # gone on with, it would train on where patience has ended the stage
        if (due and not done) or stop:
            self._save_last(trainer, Reached(trainer.current_epoch + 1, 0))
        if stop:
            self._stop.now()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The stage is trained: its best epoch is known."""
        if self._processes.first:
            _name_also(self._saved.best(self._best_epoch), self._saved.chosen)
            write_json(self._saved.record, {"epochs": int(trainer.current_epoch), "best_epoch": self._best_epoch + 1})
            self._saved.forget_way()
        self._processes.wait()
        self._stop.at_once()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds what Lightning does not keep: how far the stage is and, within an epoch, what was gathered of it."""
        assert isinstance(pl_module, Classifier)
        checkpoint["reached"] = tuple(self._reached)
        if self._reached.batches:
            checkpoint["tally"] = pl_module.gathered()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes up what was gathered of an epoch; the first process has it all."""
        assert isinstance(pl_module, Classifier)
        if "tally" in checkpoint and self._processes.first:
            pl_module.take_gathered(checkpoint["tally"])

    def state_dict(self) -> dict[str, Any]:
        """Plain values, so that a checkpoint loads with tensors only."""
        return {"best_score": self._best_score, "best_epoch": self._best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state."""
        self._best_score, self._best_epoch = state_dict["best_score"], state_dict["best_epoch"]

    def _save_last(self, trainer: pl.Trainer, reached: Reached) -> None:
        began = time.monotonic()
        self._reached = reached
        self._save(trainer, self._saved.last)
        self._saved_at = self._trained_since = time.monotonic()
        self._cost = self._saved_at - began
        if self._processes.first:
            self._saved.forget_bests_but(self._best_epoch)

    def _save(self, trainer: pl.Trainer, path: Path, *, weights_only: bool = False) -> None:
        """Writes a checkpoint whole, from the first process; the others wait."""
        if self._processes.first:
            with whole(path) as temporary:
                trainer.save_checkpoint(temporary, weights_only=weights_only)
        else:
            trainer.save_checkpoint(path, weights_only=weights_only)
        self._processes.wait()


def _name_also(path: Path, name: Path) -> None:
    """Gives a file another name beside its own: if the run is killed now, `last.ckpt` still finds what it names."""
    with whole(name) as temporary:
        try:
            temporary.hardlink_to(path)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
