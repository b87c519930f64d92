"""The LightningDataModule: batches of the network's size, in an order and with augmentations that repeat exactly."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from pylorus.chance import derived_seed
from pylorus.config import AugmentConfig
from pylorus.data.augment import build_augmentation
from pylorus.data.image import fit, read


class Draw(NamedTuple):
    """Which image to serve, and for which epoch: all that an augmentation's chance depends on beside the seed."""

    row: int
    epoch: int


class Batch(NamedTuple):
    """Images with what is true of them.

    Attributes:
        image: uint8 of shape (batch, 3, size, size), RGB in [0, 255]; the classifier normalises.
        label: int64 of shape (batch,).
        row: int64 of shape (batch,): the place in the table of the part.
    """

    image: torch.Tensor
    label: torch.Tensor
    row: torch.Tensor


@dataclass(frozen=True)
class InputFormat:
    """How a file becomes the network's input, the same in training and in prediction.

    Attributes:
        size: Side of the square in pixels.
        fit: pad, stretch or crop; see `pylorus.data.image.fit`.
        interpolation: Of the resize.
    """

    size: int
    fit: str
    interpolation: str


class ImageDataset(Dataset[tuple[torch.Tensor, int, int]]):
    """Decodes, fits and augments one image at a time; holds paths as one array, which processes share."""

    def __init__(
        self,
        table: pd.DataFrame,
        root: Path,
        form: InputFormat,
        *,
        policy: AugmentConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.root, self.form, self.policy, self.seed = root, form, policy or AugmentConfig(), seed
        self.paths: NDArray[np.str_] = table["path"].to_numpy(dtype=np.str_)
        self.ids: NDArray[np.str_] = table["sample_id"].to_numpy(dtype=np.str_)
        self.labels: NDArray[np.int64] = table["label"].to_numpy(dtype=np.int64)
        self._augment = build_augmentation(self.policy)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, draw: Draw) -> tuple[torch.Tensor, int, int]:
        """Image (3, size, size) uint8, label and row; a pure function of the draw and the constructor's arguments."""
        image = read(self.root / str(self.paths[draw.row]))
        image = fit(image, size=self.form.size, how=self.form.fit, interpolation=self.form.interpolation)
        if self._augment is not None:
            image = self._augment(image, derived_seed(self.seed, draw.epoch, str(self.ids[draw.row])))
        pixels = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
        return pixels, int(self.labels[draw.row]), draw.row


class EpochOrder(Sampler[Draw]):
    """All images once, in an order that is one of seed and epoch; without a seed as they stand."""

    def __init__(self, images: int, *, seed: int | None) -> None:
        self.images, self.seed, self.epoch = images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it before each epoch, after a resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[Draw]:
        order = np.arange(self.images)
        if self.seed is not None:
            order = np.random.default_rng(derived_seed(self.seed, "order", self.epoch)).permutation(self.images)
        return iter([Draw(int(index), self.epoch) for index in order])


class EpochBatches(Sampler[list[Draw]]):
    """Batches of an order; a single image left over joins the last batch, since batch norm can't learn from one."""

    def __init__(self, sampler: EpochOrder, batch_size: int) -> None:
        self.sampler, self.batch_size = sampler, batch_size

    def __len__(self) -> int:
        full, left = divmod(len(self.sampler), self.batch_size)
        return max(1, full + (left > (1 if self.batch_size > 1 else 0)))

    def __iter__(self) -> Iterator[list[Draw]]:
        draws = list(self.sampler)
        for number in range(len(self)):
            last = number == len(self) - 1
            start = number * self.batch_size
            yield draws[start:] if last else draws[start : start + self.batch_size]


class ImageDataModule(pl.LightningDataModule):
    """Serves one stage of training: its training images augmented, validation and test images as they are."""

    def __init__(
        self,
        table: pd.DataFrame,
        root: Path,
        form: InputFormat,
        *,
        batch_size: int,
        workers: int,
        policy: AugmentConfig,
        seed: int,
        validation: str = "val",
        pin_memory: bool = False,
    ) -> None:
        """Takes a split table and how to serve it.

        Args:
            table: Rows of `pylorus.data.split.split`.
            root: Folder below which the table's paths lie.
            form: How a file becomes the network's input.
            batch_size: Images a step in training; twice as many in evaluation, which keeps no gradients.
            workers: Processes that decode; 0 for none but this one.
            policy: The augmentation of the training images.
            seed: Of order and augmentation; another one for each stage.
            validation: The part to validate on: val, or test where the study's own protocol is repeated.
            pin_memory: Whether batches go to a GPU.
        """
        super().__init__()
        self.parts = {part: rows.reset_index(drop=True) for part, rows in table.groupby("split")}
        self.parts["val"] = self.parts[validation]
        self.root, self.form, self.policy, self.seed = root, form, policy, seed
        self.batch_size, self.workers, self.pin_memory = batch_size, workers, pin_memory

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, int, int]]:
        """Every training image once, shuffled and augmented anew each epoch."""
        dataset = ImageDataset(self.parts["train"], self.root, self.form, policy=self.policy, seed=self.seed)
        return self._loader(dataset, EpochBatches(EpochOrder(len(dataset), seed=self.seed), self.batch_size))

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, int, int]]:
        """Every validation image once, as it is."""
        return self.loader("val")

    def loader(self, part: str) -> DataLoader[tuple[torch.Tensor, int, int]]:
        """Every image of a part once, as it is, in the table's order."""
        dataset = ImageDataset(self.parts[part], self.root, self.form)
        return self._loader(dataset, EpochBatches(EpochOrder(len(dataset), seed=None), 2 * self.batch_size))

    def _loader(self, dataset: ImageDataset, batches: EpochBatches) -> DataLoader[tuple[torch.Tensor, int, int]]:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=collate,
            worker_init_fn=_one_thread,
            persistent_workers=self.workers > 0,
            pin_memory=self.pin_memory,
        )


def collate(samples: list[tuple[torch.Tensor, int, int]]) -> Batch:
    """Samples of a dataset as one batch."""
    images, labels, rows = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(rows))


def suggested_workers(accelerator: str) -> int:
    """How many processes should decode beside a training on `accelerator` (cpu, cuda, mps)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # On a CPU the network itself is by far the slower part and wants all cores; a GPU is fed by the others.
    return 0 if accelerator == "cpu" else min(16, cores - 1)


def _one_thread(_: int) -> None:
    """OpenCV's threads in every worker would fight for the same cores."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
