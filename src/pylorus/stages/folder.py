"""A stage's folder: what lies where, and how far the stage came."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PARTS = ("val", "test")


@dataclass(frozen=True)
class Trained:
    """What is known of a stage when it is trained.

    Attributes:
        epochs: How many ran.
        best_epoch: The one whose weights were chosen, from 1.
    """

    epochs: int
    best_epoch: int


class Reached(NamedTuple):
    """How far a stage came that is not trained yet: so many whole epochs, and so many batches of the next."""

    epochs: int
    batches: int


@dataclass(frozen=True)
class StageFolder:
    """The files of one stage."""

    path: Path

    @property
    def metrics(self) -> Path:
        """The curves."""
        return self.path / "metrics.csv"

    @property
    def last(self) -> Path:
        """The state from which an interrupted stage goes on: after a whole epoch, or in the middle of one."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def reached(self) -> Reached:
        """What is on record: all of a trained stage, else what `last.ckpt` stands for."""
        if self.trained is not None:
            return Reached(self.trained.epochs, 0)
        if not self.last.is_file():
            return Reached(0, 0)
        import torch  # only here: a status is read without it

        return Reached(*torch.load(self.last, map_location="meta", weights_only=True)["reached"])

    @property
    def chosen(self) -> Path:
        """The weights of the best epoch, once the stage is trained."""
        return self.path / "checkpoints" / "best.ckpt"

    @property
    def record(self) -> Path:
        """Says that the stage is trained; see `Trained`."""
        return self.path / "stage.json"

    def best(self, epoch: int) -> Path:
        """The weights of an epoch, from 0, that is the best up to now."""
        return self.path / "checkpoints" / f"best-{epoch}.ckpt"

    def forget_bests_but(self, epoch: int | None) -> None:
        """Deletes weights that are the best no longer."""
        for path in self.chosen.parent.glob("best-*.ckpt"):
            if epoch is None or path != self.best(epoch):
                path.unlink()

    def forget_way(self) -> None:
        """Deletes what only a stage that is not trained yet needs."""
        self.forget_bests_but(None)
        self.last.unlink(missing_ok=True)

    def predictions(self, part: str) -> Path:
        """What the best epoch says of each image of `val` or `test`."""
        return self.path / f"predictions-{part}.parquet"

    def features(self, part: str) -> Path:
        """Penultimate features of images of `val` or `test`: there until the bundle is written."""
        return self.path / "checkpoints" / f"features-{part}.npy"

    @property
    def network(self) -> Path:
        """The whole network of a stage that may be shipped, while later stages change it."""
        return self.path / "checkpoints" / "network.safetensors"

    def forget_candidate(self) -> None:
        """Deletes what only a bundle that is not written yet needs."""
        for path in (*map(self.features, PARTS), self.network):
            path.unlink(missing_ok=True)

    @property
    def trained(self) -> Trained | None:
        """How the training ended; None where it has not."""
        if not self.record.is_file():
            return None
        return Trained(**json.loads(self.record.read_text(encoding="utf-8")))

    @property
    def finished(self) -> bool:
        """Whether the stage is trained and has predicted every part, as the bundle predicts it.

        A stage whose features are gone predicts again: before versions that keep them, predictions were made in the
        precision of the training.
        """
        made = [path for part in PARTS for path in (self.features(part), self.predictions(part))]
        return self.trained is not None and all(path.is_file() for path in made)
