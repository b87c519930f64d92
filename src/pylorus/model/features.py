"""Compute the features of the frozen prefix once per image and view instead of once per epoch.

Features are cached on disk under a key of all that they depend on: weights, split point, preprocessing, precision, view
and the image's content. Later epochs, validation, later stages and other runs read them from there.
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

from pylorus.cache.kept import load_or_compute_records
from pylorus.cache.records import Records
from pylorus.config import CacheConfig
from pylorus.data.datamodule import ImageDataModule
from pylorus.data.dataset import return_batch
from pylorus.data.order import Draw
from pylorus.model.prefix import FrozenPrefix

log = logging.getLogger(__name__)

PARTS = ("train", "val")
"""Splits used in training; test images always run through the complete network, in 32 bits."""


class FeatureBatch(NamedTuple):
    """Features with the labels and row numbers of their images.

    Attributes:
        features: Output of the frozen prefix: tensors of `batch` rows each.
        label: int64 of shape (batch,).
        row: int64 of shape (batch,): row in the table of the split.
    """

    features: tuple[Tensor, ...]
    label: Tensor
    row: Tensor


class FeatureDataset(Dataset[FeatureBatch]):
    """The features of one split, read in whole batches.

    Args:
        prefix: Decodes the records.
        records: Records of all images and views.
        positions: Position of each draw of the split among the records.
        labels: int64 of shape (images,).
    """

    def __init__(
        self, prefix: FrozenPrefix, records: Records, positions: dict[Draw, int], labels: NDArray[np.int64]
    ) -> None:
        self._prefix, self._records, self._positions, self._labels = prefix, records, positions, labels

    def __getitems__(self, draws: list[Draw]) -> FeatureBatch:
        """Return the batch of the given draws."""
        rows = np.array([draw.row for draw in draws])
        features = self._prefix.decode_records(self._records.read_rows([self._positions[draw] for draw in draws]))
        return FeatureBatch(features, torch.from_numpy(self._labels[rows]), torch.from_numpy(rows))


class FeatureDataModule(pl.LightningDataModule):
    """Serve cached features where possible, and images where each epoch augments them anew.

    Args:
        image_data: The stage's images.
        prefix: Computes their features.
        name: Name of the stage, for log messages.
        epochs: Epochs of the stage: no more views are computed than it will use.
        settings: What may be cached, and where.
        progress: Whether to draw a progress bar on a terminal.

    Attributes:
        seconds: Time it took to find or compute the features.
    """

    def __init__(
        self,
        image_data: ImageDataModule,
        prefix: FrozenPrefix,
        *,
        name: str,
        epochs: int,
        settings: CacheConfig,
        progress: bool,
    ) -> None:
        super().__init__()
        start = time.monotonic()
        self._image_data, self._prefix, self._name = image_data, prefix, name
        self._silent = not (progress and sys.stderr.isatty())
        self._draws = {split: _list_draws(image_data, split, epochs) for split in PARTS}
        self._records = load_or_compute_records(
            settings,
            [name for split in PARTS for name in _build_record_names(image_data, split, self._draws[split])],
            self._compute_records,
            kind="features",
            key={**prefix.build_cache_key(), "input": image_data.form.get_key()},
            record_bytes=prefix.record_bytes,
            processes=image_data.processes,
        )
        self.seconds = time.monotonic() - start
        if self._records is not None:
            self._log_cache_use(self._records)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return every training image once, in the order in which the images would have come."""
        return self.build_loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        """Return every validation image once."""
        return self.build_loader("val")

    def build_loader(self, split: str) -> DataLoader[Any]:
        """Return a loader over every image of a split once: its features, or the image if they are not cached."""
        draws = self._draws[split]
        if self._records is None or not draws:
            return self._image_data.build_loader(split)
        offset = sum(len(self._draws[previous]) for previous in PARTS[: PARTS.index(split)])
        positions = {draw: offset + position for position, draw in enumerate(draws)}
        labels = self._image_data.parts[split]["label"].to_numpy(dtype=np.int64)
        return DataLoader(
            FeatureDataset(self._prefix, self._records, positions, labels),
            batch_sampler=self._image_data.build_batches(split),
            collate_fn=return_batch,
            pin_memory=self._image_data.pin_memory,
        )

    def _compute_records(self, missing: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Compute the records at the given positions, in batches of evaluation size."""
        for split in PARTS:
            self._image_data.get_dataset(
                split
            )  # all processes decode together, including one that has nothing to compute
        all_draws = [(split, draw) for split in PARTS for draw in self._draws[split]]
        with tqdm(total=len(missing), desc=f"{self._name} features", leave=False, disable=self._silent) as progress_bar:
            for split, split_draws in groupby((all_draws[position] for position in missing), key=lambda item: item[0]):
                draws = [draw for _, draw in split_draws]
                size = max(1, 2 * self._image_data.batch_size // self._image_data.processes.count)
                for batch in self._image_data.build_batch_loader(
                    split, [draws[start : start + size] for start in range(0, len(draws), size)]
                ):
                    yield self._prefix.compute_records(batch.image)
                    progress_bar.update(len(batch.row))

    def _log_cache_use(self, records: Records) -> None:
        images_are_fresh = not self._draws["train"]
        log.info(
            "features %s: %d cached, %d computed in %.1f s, %.1f KiB each, %s; frozen layers are not recomputed%s",
            self._name,
            records.kept,
            records.computed,
            self.seconds,
            self._prefix.record_bytes / 1024,
            "in memory" if records.place == "memory" else "mapped from disk",
            f", except for training images, which are augmented anew in each epoch (stages.{self._name}.views)"
            if images_are_fresh
            else " (cache.prefix)",
        )


def _list_draws(image_data: ImageDataModule, split: str, epochs: int) -> list[Draw]:
    """List all draws of a split that a stage will use, unless each epoch augments its images anew."""
    rows = range(len(image_data.parts[split]))
    if split != "train" or not image_data.augments:
        return [Draw(row, None) for row in rows]
    return [Draw(row, view) for view in range(min(image_data.views or 0, epochs)) for row in rows]


def _build_record_names(image_data: ImageDataModule, split: str, draws: Sequence[Draw]) -> list[str]:
    """Name each draw for the cache: by the image's content and, for a view, what its augmentation depends on."""
    hashes = list(image_data.parts[split]["sha256"])
    policy = json.dumps(dict(image_data.policy.transforms), sort_keys=True, default=str)
    policy_digest = hashlib.sha256(f"{policy} {version('albumentations')}".encode()).hexdigest()[:16]
    return [
        hashes[draw.row]
        if draw.view is None
        else f"{hashes[draw.row]}/{policy_digest}/{image_data.get_dataset(split).get_augmentation_seed(draw.row, draw.view):x}"
        for draw in draws
    ]
