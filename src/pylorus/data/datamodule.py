"""The LightningDataModule: batches of the network's size, in an order and with augmentations that repeat exactly."""

from collections.abc import Iterable

import cv2
import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from pylorus.cache.records import Records
from pylorus.config import AugmentConfig, CacheConfig
from pylorus.data.content import Root
from pylorus.data.dataset import Batch, ImageDataset, as_is
from pylorus.data.input import InputFormat, kept_images
from pylorus.data.order import Draw, EpochBatches, EpochOrder, Windows
from pylorus.data.shards import Shards
from pylorus.parallel.processes import ALONE, Processes


class ImageDataModule(pl.LightningDataModule):
    """Serves one stage of training: its training images augmented, validation and test images as they are."""

    def __init__(
        self,
        table: pd.DataFrame,
        root: Root,
        form: InputFormat,
        *,
        batch_size: int,
        workers: int,
        policy: AugmentConfig,
        seed: int,
        cache: CacheConfig,
        views: int | None = None,
        validation: str = "val",
        pin_memory: bool = False,
        shard_window: int | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Takes a split table and how to serve it.

        Args:
            table: Rows of `pylorus.data.split.split`.
            root: What the table's paths lie below.
            form: How a file becomes the network's input.
            batch_size: Images a step in training, of all processes; twice as many in evaluation, which keeps no
                gradients.
            workers: Processes that decode; 0 for none but this one.
            policy: The augmentation of the training images.
            seed: Of order and augmentation; another one for each stage.
            cache: What may be kept.
            views: How many augmented variants an image has; None: a new one each epoch.
            validation: The part to validate on: val, or test where the study's own protocol is repeated.
            pin_memory: Whether batches go to a GPU.
            shard_window: Shards whose training images are shuffled into one another; None: all.
            processes: Each serves its share of every batch.
        """
        super().__init__()
        self._table = table.reset_index(drop=True)
        rows = dict(list(self._table.groupby("split")))
        rows["val"] = rows[validation]
        self.parts = {part: chosen.reset_index(drop=True) for part, chosen in rows.items()}
        self._places = {part: chosen.index.to_numpy(dtype=np.int64) for part, chosen in rows.items()}
        self.root, self.form, self.policy, self.seed = root, form, policy, seed
        self.batch_size, self.workers, self.pin_memory = batch_size, workers, pin_memory
        self.views, self.shard_window, self._cache, self.processes = views, shard_window, cache, processes
        self.begun = (0, 0)
        """Epoch and batch where training goes on: Lightning has workers begin to read before it sets the epoch."""
        self._datasets: dict[str, ImageDataset] = {}
        self._decoded: Records | None = None
        self._looked = False

    @property
    def augments(self) -> bool:
        """Whether training images are varied."""
        return bool(self.policy.transforms)

    def sample_ids(self, part: str) -> NDArray[np.str_]:
        """The id of each image of a part, by row."""
        return self.parts[part]["sample_id"].to_numpy(dtype=np.str_)

    def dataset(self, part: str) -> ImageDataset:
        """The images of a part; with the first part that is asked for, all images are decoded where that pays."""
        if not self._looked:
            self._looked = True
            self._decoded = kept_images(self._table, self.root, self.form, self._cache, self.processes)
        if part not in self._datasets:
            kept = self._decoded.chosen(self._places[part]) if self._decoded is not None else None
            self._datasets[part] = ImageDataset(
                self.parts[part], self.root, self.form, policy=self.policy, seed=self.seed, kept=kept
            )
        return self._datasets[part]

    def order(self, part: str) -> EpochBatches:
        """The batches of a part: train shuffled and augmented, the others as they stand."""
        images = len(self.parts[part])
        if part == "train":
            order = EpochOrder(
                images, seed=self.seed, augmented=self.augments, views=self.views, windows=self._windows(part)
            )
            order.set_epoch(self.begun[0])
            return EpochBatches(order, self.batch_size, processes=self.processes, begun=self.begun[1])
        return EpochBatches(EpochOrder(images, seed=None), 2 * self.batch_size, processes=self.processes)

    def _windows(self, part: str) -> Windows | None:
        """The shards that training walks through, where it is to."""
        if self.shard_window is None or not isinstance(self.root, Shards):
            return None
        return Windows(self.root.numbers(list(self.parts[part]["path"])), self.shard_window)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Every training image once, shuffled and augmented anew each epoch."""
        return self.loader("train")

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every validation image once, as it is."""
        return self.loader("val")

    def loader(self, part: str) -> DataLoader[Batch]:
        """Every image of a part once."""
        return self.serve(part, self.order(part))

    def serve(self, part: str, batches: Iterable[list[Draw]]) -> DataLoader[Batch]:
        """Batches of a part's images that someone else chose."""
        return DataLoader(
            self.dataset(part),
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=as_is,
            worker_init_fn=_one_thread,
            persistent_workers=self.workers > 0,
            pin_memory=self.pin_memory,
        )


def _one_thread(_: int) -> None:
    """OpenCV's threads in every worker would fight for the same cores."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
