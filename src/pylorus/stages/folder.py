"""A stage's folder: its files, and how far the stage has come."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PARTS = ("val", "test")


@dataclass(frozen=True)
class TrainingResult:
    """Result of a stage's training.

    Attributes:
        epochs: Number of epochs trained.
        best_epoch: Epoch whose weights were chosen, from 1.
    """

    epochs: int
    best_epoch: int


class StageProgress(NamedTuple):
    """Progress of a stage in training: complete epochs, and batches of the next one."""

    epochs: int
    batches: int


@dataclass(frozen=True)
class StageFolder:
    """The files of one stage."""

    path: Path

    @property
    def metrics_path(self) -> Path:
        """The learning curves."""
        return self.path / "metrics.csv"

    @property
    def last_checkpoint(self) -> Path:
        """The state from which an interrupted stage resumes: after an epoch, or within one."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def progress(self) -> StageProgress:
        """Saved progress: all epochs of a trained stage, else that of `last.ckpt`."""
        if self.training_result is not None:
            return StageProgress(self.training_result.epochs, 0)
        if not self.last_checkpoint.is_file():
            return StageProgress(0, 0)
        import torch  # imported here, since reading a status needs no torch

        return StageProgress(*torch.load(self.last_checkpoint, map_location="meta", weights_only=True)["reached"])

    @property
    def best_checkpoint(self) -> Path:
        """The weights of the best epoch, once the stage is trained."""
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def record_path(self) -> Path:
        """The file that marks the stage as trained; see `TrainingResult`."""
        return self.path / "stage.json"

    def get_best_path(self, epoch: int) -> Path:
        """Return the path of the weights of an epoch, counted from 0, that is the best so far."""
        return self.path / "checkpoints" / f"best-{epoch}.ckpt"

    def delete_other_bests(self, epoch: int | None) -> None:
        """Delete weights of epochs that are no longer the best."""
        for path in self.best_checkpoint.parent.glob("best-*.ckpt"):
            if epoch is None or path != self.get_best_path(epoch):
                path.unlink()

    def delete_training_state(self) -> None:
        """Delete what is only needed until the stage is trained."""
        self.delete_other_bests(None)
        self.last_checkpoint.unlink(missing_ok=True)

    def get_predictions_path(self, split: str) -> Path:
        """Return the path of the best epoch's predictions for `val` or `test`."""
        return self.path / f"predictions-{split}.parquet"

    def get_features_path(self, split: str) -> Path:
        """Return the path of penultimate features for `val` or `test`; they exist until the bundle does."""
        return self.path / "checkpoints" / f"features-{split}.npy"

    @property
    def network_path(self) -> Path:
        """The complete network of a stage that may be shipped, since later stages change it."""
        return self.path / "checkpoints" / "network.safetensors"

    def delete_candidate(self) -> None:
        """Delete what is only needed until the bundle is written."""
        for path in (*map(self.get_features_path, PARTS), self.network_path):
            path.unlink(missing_ok=True)

    @property
    def training_result(self) -> TrainingResult | None:
        """The result of training; None if it has not finished."""
        if not self.record_path.is_file():
            return None
        return TrainingResult(**json.loads(self.record_path.read_text(encoding="utf-8")))

    @property
    def is_finished(self) -> bool:
        """Whether the stage is trained and has predicted every split, as the bundle predicts it.

        A stage without features predicts again: older versions, which saved none, predicted in training precision.
        """
        outputs = [
            path for split in PARTS for path in (self.get_features_path(split), self.get_predictions_path(split))
        ]
        return self.training_result is not None and all(path.is_file() for path in outputs)
