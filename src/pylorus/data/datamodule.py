"""The LightningDataModule: batches of the network's input size, with reproducible order and augmentation."""

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
from pylorus.data.dataset import Batch, ImageDataset, return_batch
from pylorus.data.input import InputFormat, load_or_decode_images
from pylorus.data.order import Draw, EpochBatchSampler, EpochSampler, ShardWindows
from pylorus.data.shards import Shards
from pylorus.parallel.processes import ALONE, Processes


class ImageDataModule(pl.LightningDataModule):
    """Provides the images of one training stage: training images augmented, validation and test images unchanged."""

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
        """Create the data module of a split table.

        Args:
            table: Rows of `pylorus.data.split.split_catalog`.
            root: Root of the table's paths: a folder or shards.
            form: How a file becomes the network's input.
            batch_size: Images per training step, over all processes; evaluation uses twice as many, as it stores no
                gradients.
            workers: Number of processes that decode images; 0: the main process decodes them.
            policy: The augmentation of the training images.
            seed: Seed of order and augmentation; different for each stage.
            cache: What may be cached, and where.
            views: Number of augmented variants of each image; None: a new one in each epoch.
            validation: The split to validate on: val, or test if the study's own protocol is replicated.
            pin_memory: Whether to pin the batches' memory for transfer to a GPU.
            shard_window: Number of shards whose training images are shuffled together; None: all.
            processes: Each process provides its share of every batch.
        """
        super().__init__()
        self._table = table.reset_index(drop=True)
        rows = dict(list(self._table.groupby("split")))
        rows["val"] = rows[validation]
        self.parts = {split: split_rows.reset_index(drop=True) for split, split_rows in rows.items()}
        self._rows = {split: split_rows.index.to_numpy(dtype=np.int64) for split, split_rows in rows.items()}
        self.root, self.form, self.policy, self.seed = root, form, policy, seed
        self.batch_size, self.workers, self.pin_memory = batch_size, workers, pin_memory
        self.views, self.shard_window, self._cache, self.processes = views, shard_window, cache, processes
        self.begun = (0, 0)
        """Epoch and batch at which training resumes: Lightning starts the workers before it sets the epoch."""
        self._datasets: dict[str, ImageDataset] = {}
        self._cached_images: Records | None = None
        self._is_cache_checked = False

    @property
    def augments(self) -> bool:
        """Whether training images are augmented."""
        return bool(self.policy.transforms)

    def get_sample_ids(self, split: str) -> NDArray[np.str_]:
        """Return the ID of each image of a split, by row."""
        return self.parts[split]["sample_id"].to_numpy(dtype=np.str_)

    def get_dataset(self, split: str) -> ImageDataset:
        """Return the images of a split; the first call caches the images of all splits if that is worthwhile."""
        if not self._is_cache_checked:
            self._is_cache_checked = True
            self._cached_images = load_or_decode_images(self._table, self.root, self.form, self._cache, self.processes)
        if split not in self._datasets:
            cached = self._cached_images.select_rows(self._rows[split]) if self._cached_images is not None else None
            self._datasets[split] = ImageDataset(
                self.parts[split], self.root, self.form, policy=self.policy, seed=self.seed, cached=cached
            )
        return self._datasets[split]

    def build_batches(self, split: str) -> EpochBatchSampler:
        """Build the batches of a split: train is shuffled and augmented, the others are in the table's order."""
        images = len(self.parts[split])
        if split == "train":
            order = EpochSampler(
                images, seed=self.seed, augmented=self.augments, views=self.views, windows=self._build_windows(split)
            )
            order.set_epoch(self.begun[0])
            return EpochBatchSampler(order, self.batch_size, processes=self.processes, first_batch=self.begun[1])
        return EpochBatchSampler(EpochSampler(images, seed=None), 2 * self.batch_size, processes=self.processes)

    def _build_windows(self, split: str) -> ShardWindows | None:
        """Return the shards through which training walks; None if it shuffles all images."""
        if self.shard_window is None or not isinstance(self.root, Shards):
            return None
        return ShardWindows(self.root.get_shard_numbers(list(self.parts[split]["path"])), self.shard_window)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Every training image once, shuffled and augmented differently in each epoch."""
        return self.build_loader("train")

    def val_dataloader(self) -> DataLoader[Batch]:
        """Every validation image once, unaugmented."""
        return self.build_loader("val")

    def build_loader(self, split: str) -> DataLoader[Batch]:
        """Build the loader that yields every image of a split once."""
        return self.build_batch_loader(split, self.build_batches(split))

    def build_batch_loader(self, split: str, batches: Iterable[list[Draw]]) -> DataLoader[Batch]:
        """Build a loader of the given batches of a split's images."""
        return DataLoader(
            self.get_dataset(split),
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=return_batch,
            worker_init_fn=_use_one_thread,
            persistent_workers=self.workers > 0,
            pin_memory=self.pin_memory,
        )


def _use_one_thread(_: int) -> None:
    """Limit a worker to one thread: the threads of several workers would compete for the same cores."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
