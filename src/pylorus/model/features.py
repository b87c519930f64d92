"""What is frozen in a stage, computed once for each image and view instead of in each epoch.

The features are kept on disk under all that they depend on: weights, cut, preprocessing, precision, view and the
image's content. Later epochs, validation, later stages and other runs find them there.
"""

import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pylorus.cache.kept import kept_records
from pylorus.cache.records import Records
from pylorus.config import CacheConfig
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.dataset import as_is
from pylorus.data.order import Draw
from pylorus.model.prefix import Prefix

log = logging.getLogger(__name__)

PARTS = ("train", "val")
"""What training asks for; test images are answered by the whole network, in 32 bits."""


class FeatureBatch(NamedTuple):
    """Features with what is true of their images.

    Attributes:
        features: What passes the cut: tensors of `batch` rows each.
        label: int64 of shape (batch,).
        row: int64 of shape (batch,): the place in the table of the part.
    """

    features: tuple[Tensor, ...]
    label: Tensor
    row: Tensor


class FeatureDataset(Dataset[FeatureBatch]):
    """The features of one part of a split, as whole batches.

    Args:
        prefix: Knows how a record is made up.
        records: Of all images and views.
        places: Where each draw of the part stands among them.
        labels: int64 of shape (images,).
    """

    def __init__(self, prefix: Prefix, records: Records, places: dict[Draw, int], labels: NDArray[np.int64]) -> None:
        self._prefix, self._records, self._places, self._labels = prefix, records, places, labels

    def __getitems__(self, draws: list[Draw]) -> FeatureBatch:
        """The batch of some draws."""
        rows = np.array([draw.row for draw in draws])
        features = self._prefix.unpacked(self._records.take([self._places[draw] for draw in draws]))
        return FeatureBatch(features, torch.from_numpy(self._labels[rows]), torch.from_numpy(rows))


class FeatureDataModule(pl.LightningDataModule):
    """Serves features where they are kept, and images where an augmentation makes new ones in every epoch.

    Args:
        served: The stage's images.
        prefix: What to compute of them.
        name: Of the stage, for its user.
        epochs: Of the stage: no more views are computed than it will ask for.
        settings: What may be kept, and where.
        progress: Whether to draw a progress bar on a terminal.

    Attributes:
        seconds: How long it took to find or compute the features.
    """

    def __init__(
        self,
        served: ImageDataModule,
        prefix: Prefix,
        *,
        name: str,
        epochs: int,
        settings: CacheConfig,
        progress: bool,
    ) -> None:
        super().__init__()
        began = time.monotonic()
        self.served, self._prefix, self._name = served, prefix, name
        self._silent = not (progress and sys.stderr.isatty())
        self._draws = {part: _draws(served, part, epochs) for part in PARTS}
        self._records = kept_records(
            settings,
            [name for part in PARTS for name in _names(served, part, self._draws[part])],
            self._compute,
            kind="features",
            key={**prefix.key(), "input": served.form.key()},
            record_bytes=prefix.record_bytes,
            processes=served.processes,
        )
        self.seconds = time.monotonic() - began
        if self._records is not None:
            self._tell(self._records)

    def train_dataloader(self) -> DataLoader[Any]:
        """Every training image once, in the order in which the images would have come."""
        return self.loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Every validation image once."""
        return self.loader("val")

    def loader(self, part: str) -> DataLoader[Any]:
        """Every image of a part once: its features, or the image where they are not kept."""
        draws = self._draws[part]
        if self._records is None or not draws:
            return self.served.loader(part)
        first = sum(len(self._draws[other]) for other in PARTS[: PARTS.index(part)])
        places = {draw: first + place for place, draw in enumerate(draws)}
        labels = self.served.parts[part]["label"].to_numpy(dtype=np.int64)
        return DataLoader(
            FeatureDataset(self._prefix, self._records, places, labels),
            batch_sampler=self.served.order(part),
            collate_fn=as_is,
            pin_memory=self.served.pin_memory,
        )

    def _compute(self, missing: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The records at some places, in batches of evaluation."""
        for part in PARTS:
            self.served.dataset(part)  # decoded by all processes together, also by one that has nothing to compute
        places = [(part, draw) for part in PARTS for draw in self._draws[part]]
        with tqdm(total=len(missing), desc=f"{self._name} features", leave=False, disable=self._silent) as bar:
            for part, chosen in groupby((places[place] for place in missing), key=lambda place: place[0]):
                draws = [draw for _, draw in chosen]
                size = max(1, 2 * self.served.batch_size // self.served.processes.count)
                for batch in self.served.serve(part, [draws[at : at + size] for at in range(0, len(draws), size)]):
                    yield self._prefix.packed(batch.image)
                    bar.update(len(batch.row))

    def _tell(self, records: Records) -> None:
        fresh = not self._draws["train"]
        log.info(
            "features %s: %d kept, %d computed in %.1f s, %.1f KiB each, %s; what is frozen is not computed again%s",
            self._name,
            records.kept,
            records.computed,
            self.seconds,
            self._prefix.record_bytes / 1024,
            "in memory" if records.place == "memory" else "mapped from disk",
            f", but for training images: they are augmented anew in each epoch (stages.{self._name}.views)"
            if fresh
            else " (cache.prefix)",
        )


def _draws(served: ImageDataModule, part: str, epochs: int) -> list[Draw]:
    """All draws of a part that a stage will ask for, where they are not new in each epoch."""
    rows = range(len(served.parts[part]))
    if part != "train" or not served.augments:
        return [Draw(row, None) for row in rows]
    return [Draw(row, view) for view in range(min(served.views or 0, epochs)) for row in rows]


def _names(served: ImageDataModule, part: str, draws: Sequence[Draw]) -> list[str]:
    """A name a draw, under which its features are found again: its content, and what its augmentation hangs on."""
    contents = list(served.parts[part]["sha256"])
    policy = json.dumps(dict(served.policy.transforms), sort_keys=True, default=str)
    digest = hashlib.sha256(f"{policy} {version('albumentations')}".encode()).hexdigest()[:16]
    return [
        contents[draw.row]
        if draw.view is None
        else f"{contents[draw.row]}/{digest}/{served.dataset(part).chance(draw.row, draw.view):x}"
        for draw in draws
    ]
