"""A stage's folder: its files, and how far the stage has come."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PARTS = ("val", "test")


@dataclass(frozen=True)
class Trained:
    """Result of a stage's training.

    Attributes:
        epochs: Number of epochs trained.
        best_epoch: Epoch whose weights were chosen, from 1.
    """

    epochs: int
    best_epoch: int


class Reached(NamedTuple):
    """Progress of a stage in training: complete epochs, and batches of the next one."""

    epochs: int
    batches: int


@dataclass(frozen=True)
class StageFolder:
    """The files of one stage."""

    path: Path

    @property
    def metrics(self) -> Path:
        """The learning curves."""
        return self.path / "metrics.csv"

    @property
    def last(self) -> Path:
        """The state from which an interrupted stage resumes: after an epoch, or within one."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def reached(self) -> Reached:
        """Saved progress: all epochs of a trained stage, else that of `last.ckpt`."""
        if self.trained is not None:
            return Reached(self.trained.epochs, 0)
        if not self.last.is_file():
            return Reached(0, 0)
        import torch  # imported here, since reading a status needs no torch

        return Reached(*torch.load(self.last, map_location="meta", weights_only=True)["reached"])

    @property
    def chosen(self) -> Path:
        """The weights of the best epoch, once the stage is trained."""
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def record(self) -> Path:
        """The file that marks the stage as trained; see `Trained`."""
        return self.path / "stage.json"

    def best(self, epoch: int) -> Path:
        """Return the path of the weights of an epoch, counted from 0, that is the best so far."""
        return self.path / "checkpoints" / f"best-{epoch}.ckpt"

    def forget_bests_but(self, epoch: int | None) -> None:
        """Delete weights of epochs that are no longer the best."""
        for path in self.chosen.parent.glob("best-*.ckpt"):
            if epoch is None or path != self.best(epoch):
                path.unlink()

    def forget_way(self) -> None:
        """Delete what is only needed until the stage is trained."""
        self.forget_bests_but(None)
        self.last.unlink(missing_ok=True)

    def predictions(self, split: str) -> Path:
        """Return the path of the best epoch's predictions for `val` or `test`."""
        return self.path / f"predictions-{split}.parquet"

    def features(self, split: str) -> Path:
        """Return the path of penultimate features for `val` or `test`; they exist until the bundle does."""
        return self.path / "checkpoints" / f"features-{split}.npy"

    @property
    def network(self) -> Path:
        """The complete network of a stage that may be shipped, since later stages change it."""
        return self.path / "checkpoints" / "network.safetensors"

    def forget_candidate(self) -> None:
        """Delete what is only needed until the bundle is written."""
        for path in (*map(self.features, PARTS), self.network):
            path.unlink(missing_ok=True)

    @property
    def trained(self) -> Trained | None:
        """The result of training; None if it has not finished."""
        if not self.record.is_file():
            return None
        return Trained(**json.loads(self.record.read_text(encoding="utf-8")))

    @property
    def finished(self) -> bool:
        """Whether the stage is trained and has predicted every split, as the bundle predicts it.

        A stage without features predicts again: older versions, which saved none, predicted in training precision.
        """
        outputs = [path for split in PARTS for path in (self.features(split), self.predictions(split))]
        return self.trained is not None and all(path.is_file() for path in outputs)
