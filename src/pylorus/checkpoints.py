"""What a stage keeps of its network: the weights of its best epoch, and all that is needed to go on.

Both lie in checkpoints/. `last.ckpt` is the state after a whole epoch: weights, optimiser, schedule, how many epochs.
It names the best epoch up to then, whose weights lie beside it as `best-<epoch>.ckpt`; when the stage is trained these
become `best.ckpt`, `stage.json` says so, and `last.ckpt` goes. Whatever kills a run, what `last.ckpt` names is there.
"""

import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from pylorus.files import whole, write_json
from pylorus.run_folder import RunFolder
from pylorus.stage_folder import StageFolder

SHARE_OF_TIME = 0.02
"""Of training, that saving may take: where it takes longer, not every epoch is saved."""


class Checkpoints(pl.Callback):
    """Saves a stage's state as it goes on.

    Args:
        saved: The files of the stage.
        mode: Whether the best is the `min` or the `max` of what the stage monitors.
    """

    def __init__(self, saved: StageFolder, *, mode: str) -> None:
        self._saved, self._sign = saved, 1.0 if mode == "max" else -1.0
        self._best_score, self._best_epoch = -math.inf, -1
        self._saved_at, self._cost = -math.inf, 0.0

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before anything of the epoch is written."""
        RunFolder(self._saved.path.parent).expect_there()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After validation and after early stopping has decided."""
        score = self._sign * float(trainer.callback_metrics["monitor"])
        if score > self._best_score or self._best_epoch < 0:  # an undefined score is better than none only
            self._best_score = score if math.isfinite(score) else -math.inf
            self._best_epoch = int(trainer.current_epoch)
            _save(trainer, self._saved.best(self._best_epoch), weights_only=True)
        done = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        began = time.monotonic()
        if not done and trainer.strategy.broadcast(began - self._saved_at >= self._cost / SHARE_OF_TIME):
            _save(trainer, self._saved.last)
            self._saved_at = time.monotonic()
            self._cost = self._saved_at - began
            if trainer.is_global_zero:
                self._saved.forget_bests_but(self._best_epoch)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The stage is trained: its best epoch is known."""
        if trainer.is_global_zero:
            _name_also(self._saved.best(self._best_epoch), self._saved.chosen)
            write_json(self._saved.record, {"epochs": int(trainer.current_epoch), "best_epoch": self._best_epoch + 1})
            self._saved.forget_way()
        trainer.strategy.barrier("trained")

    def state_dict(self) -> dict[str, Any]:
        """Plain values, so that a checkpoint loads with tensors only."""
        return {"best_score": self._best_score, "best_epoch": self._best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a state."""
        self._best_score, self._best_epoch = state_dict["best_score"], state_dict["best_epoch"]


def _name_also(path: Path, name: Path) -> None:
    """Gives a file another name beside its own: if the run is killed now, `last.ckpt` still finds what it names."""
    with whole(name) as temporary:
        try:
            temporary.hardlink_to(path)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)


def _save(trainer: pl.Trainer, path: Path, *, weights_only: bool = False) -> None:
    """Writes a checkpoint whole, from the first process; the others wait."""
    if trainer.is_global_zero:
        with whole(path) as temporary:
            trainer.save_checkpoint(temporary, weights_only=weights_only)
    else:
        trainer.save_checkpoint(path, weights_only=weights_only)
