"""The LightningDataModule: batches of decoded, augmented images at the network's input size.

The order of images and their augmented variants are functions of seed and epoch alone, for any number of workers.

`ImageDataModule(folder)` reads class folders for any `pl.Trainer`; runs use `ImageDataModule.from_table`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Required, Self, TypedDict, Unpack

import cv2
import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from pylorus.cache.shards import Records
from pylorus.config.checks import check_values
from pylorus.config.schema import AugmentConfig, CacheConfig, DataConfig
from pylorus.core.distributed import ALONE, Processes
from pylorus.core.seeding import compute_seed
from pylorus.data.augmentation import build_augmentation, has_augmentation, load_policy
from pylorus.data.catalog import ReadOptions, read_folders
from pylorus.data.files import Root
from pylorus.data.input_format import InputFormat, load_or_decode_images, resolve_input_format
from pylorus.data.shards import Shards
from pylorus.data.split import split_catalog


class ShardWindows(NamedTuple):
    """How to traverse the images shard by shard.

    Attributes:
        shards: Shard number of each image, of shape (images,).
        width: Number of shards that are shuffled together.
    """

    shards: NDArray[np.int32]
    width: int

    def generate_order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """Return all image indices once: the shards in random order, and the images of each `width` shards shuffled."""
        shard_order = generator.permutation(int(self.shards.max()) + 1)
        ranks = np.empty_like(shard_order)
        ranks[shard_order] = np.arange(len(shard_order))
        shuffled = generator.permutation(len(self.shards))
        window = ranks[self.shards[shuffled]] // self.width
        return shuffled[np.argsort(window, kind="stable")]


class Draw(NamedTuple):
    """One image to load.

    Attributes:
        row: Its row in the split's table.
        view: Number of its augmented variant; None: unaugmented.
    """

    row: int
    view: int | None


class EpochSampler(Sampler[Draw]):
    """All images once, in an order that depends on seed and epoch; without a seed, in the table's order.

    Args:
        images: Number of images.
        seed: Seed of the order; None: the table's order.
        augmented: Whether each epoch draws another variant of an image.
        views: Number of epochs after which the variants repeat; None: never.
        windows: Shards to traverse; None: any image may follow any other.
    """

    def __init__(
        self,
        images: int,
        *,
        seed: int | None,
        augmented: bool = False,
        views: int | None = None,
        windows: ShardWindows | None = None,
    ) -> None:
        self.images, self.seed, self.augmented, self.views, self.epoch = images, seed, augmented, views, 0
        self._windows = windows

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before each epoch, including the first after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[Draw]:
        order = np.arange(self.images)
        if self.seed is not None:
            generator = np.random.default_rng(compute_seed(self.seed, "order", self.epoch))
            order = (
                generator.permutation(self.images) if self._windows is None else self._windows.generate_order(generator)
            )
        view = self.epoch if self.views is None else self.epoch % self.views
        return iter([Draw(int(row), view if self.augmented else None) for row in order])


class EpochBatchSampler(Sampler[list[Draw]]):
    """Batches of an order, or this process's share of each.

    A single remaining image joins the last batch, since batch norm can't be trained on one image; so do remaining
    images that are too few to give every process one.

    Args:
        sampler: The order.
        batch_size: Images per step, over all processes.
        processes: The processes that share each batch.
        first_batch: In the first epoch, batches before this one are skipped: they were drawn before an interruption.
    """

    def __init__(
        self, sampler: EpochSampler, batch_size: int, *, processes: Processes = ALONE, first_batch: int = 0
    ) -> None:
        self.sampler, self.batch_size, self._processes = sampler, batch_size, processes
        self._first_batch, self._resumed_epoch = first_batch, sampler.epoch

    def __len__(self) -> int:
        full_batches, remaining = divmod(len(self.sampler), self.batch_size)
        return max(1, full_batches + (remaining >= max(2 if self.batch_size > 1 else 1, self._processes.count)))

    def __iter__(self) -> Iterator[list[Draw]]:
        draws = list(self.sampler)
        first = self._first_batch if self.sampler.epoch == self._resumed_epoch else 0
        for index in range(first, len(self)):
            is_last = index == len(self) - 1
            start = index * self.batch_size
            batch = draws[start:] if is_last else draws[start : start + self.batch_size]
            yield batch[self._processes.own_slice]


class Batch(NamedTuple):
    """Images with their labels.

    Attributes:
        image: uint8 of shape (batch, 3, size, size), RGB in [0, 255]; the classifier normalizes it.
        label: int64 of shape (batch,).
        row: int64 of shape (batch,): row of each image in the split's table.
    """

    image: torch.Tensor
    label: torch.Tensor
    row: torch.Tensor


class ImageDataset(Dataset[Batch]):
    """Dataset that returns whole batches; paths are held in one array, which worker processes share.

    Args:
        table: Rows of one split.
        root: Root of the table's paths: a folder or shards.
        form: How a file becomes the network's input.
        policy: The augmentation.
        seed: Seed of the augmentation.
        cached: The prepared images of all rows; None: each is read from its file.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        root: Root,
        form: InputFormat,
        *,
        policy: AugmentConfig,
        seed: int,
        cached: Records | None = None,
    ) -> None:
        self.root, self.form, self.seed, self._cached = root, form, seed, cached
        self.paths: NDArray[np.str_] = table["path"].to_numpy(dtype=np.str_)
        self.ids: NDArray[np.str_] = table["sample_id"].to_numpy(dtype=np.str_)
        self.labels: NDArray[np.int64] = table["label"].to_numpy(dtype=np.int64)
        self._augment = build_augmentation(policy)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, draws: Sequence[Draw | int]) -> Batch:
        """Return the batch of the given draws: a pure function of them and the constructor's arguments.

        A number is a row, unaugmented: so samplers of torch and Lightning work as well.
        """
        rows = [draw.row if isinstance(draw, Draw) else draw for draw in draws]
        images = self.load_rows(rows)
        if self._augment is not None:
            for index, draw in enumerate(draws):
                if isinstance(draw, Draw) and draw.view is not None:
                    images[index] = self._augment(images[index], self.get_augmentation_seed(draw.row, draw.view))
        return Batch(
            image=torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
            label=torch.from_numpy(self.labels[rows]),
            row=torch.tensor(rows),
        )

    def get_augmentation_seed(self, row: int, view: int) -> int:
        """Return the seed of an augmented variant, in [0, 2^63)."""
        return compute_seed(self.seed, view, str(self.ids[row]))

    def load_rows(self, rows: list[int]) -> NDArray[np.uint8]:
        """Load unaugmented images of the network's input size, as a writable array of shape (rows, size, size, 3).

        Raises:
            UnreadableImageError: Names the file.
        """
        if self._cached is not None:
            return self._cached.read_rows(rows).reshape(len(rows), self.form.size, self.form.size, 3)
        return self.form.load_images([self.root / str(self.paths[row]) for row in rows])


def return_batch(batch: Any) -> Any:
    """Return the batch unchanged, as the collate function of a DataLoader whose dataset returns whole batches."""
    return batch


class LoadingOptions(TypedDict, total=False):
    """Options of `ImageDataModule.from_table`; those up to `cache` are required.

    Attributes:
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
        processes: Each process provides its share of every batch; None: the Trainer's processes.
    """

    batch_size: Required[int]
    workers: Required[int]
    policy: Required[AugmentConfig]
    seed: Required[int]
    cache: Required[CacheConfig]
    views: int | None
    validation: str
    pin_memory: bool
    shard_window: int | None
    processes: Processes | None


class ImageDataModule(pl.LightningDataModule):
    """Provides images in batches: training images augmented, validation and test images unchanged.

    It works with any `pl.Trainer`: fit, validate, test, and predict, which predicts the test images. On several
    devices, each takes its share of every batch; the Trainer then needs `use_distributed_sampler=False`.

    Attributes:
        classes: Names of the class folders, in label order.
        parts: Table of each split (train, val, test) with one row per image: path, label, group and more.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: str | None = None,
        image_size: int | None = None,
        classes: Sequence[str] | None = None,
        group: str | None = None,
        val_fraction: float = DataConfig.val_fraction,
        test_fraction: float = DataConfig.test_fraction,
        split_seed: int = DataConfig.split_seed,
        accept_leaks: bool = False,
        batch_size: int = 16,
        workers: int = 0,
        augment: str | Mapping[str, Any] = "light",
        fit: str = DataConfig.fit,
        crop: str = DataConfig.crop,
        seed: int = 0,
        cache: str | Path | None = None,
    ) -> None:
        """Read class folders and split them: each group, and each copy of an image, stays in one split.

        Every file is read once, here.

        Args:
            folder: FOLDER/CLASS/…, or FOLDER/{train,val,test}/CLASS/…, which is used as it is.
            model: Name of the timm model whose input size and interpolation the images get.
            image_size: Side of the images in pixels; None: the model's own.
            classes: Names of the class folders, in label order; None: those found, sorted by name.
            group: Regular expression that finds the patient in a path below the folder; None: each image is its own.
            val_fraction: Fraction of the training images used for validation, if there is no val folder.
            test_fraction: Fraction of the images used for testing, if there is no test folder.
            split_seed: Random seed of the split.
            accept_leaks: Whether a patient or a copy may be in more than one split.
            batch_size: Images per training step, over all devices; evaluation uses twice as many.
            workers: Number of processes that decode images; 0: the main process decodes them.
            augment: Augmentation of the training images: none, light, endoscopy, or transforms with their arguments.
            fit: How a frame is made square: pad, stretch or crop.
            crop: none, or auto: crop to the endoscopic field of view.
            seed: Random seed of order and augmentation.
            cache: Folder that holds what was read and decoded for the next time; None: nothing is cached.

        Raises:
            PylorusError: If the images can't be used as they are; the message says what is wrong.
        """
        super().__init__()
        options = DataConfig(
            root=str(folder),
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            accept_leaks=accept_leaks,
            fit=fit,
            crop=crop,
        )
        check_values(options, path="data.")
        policy = load_policy(augment) if isinstance(augment, str) else AugmentConfig("custom", dict(augment))
        build_augmentation(policy)  # reports a typo before the files are read
        form = resolve_input_format(model, image_size=image_size, fit=fit, crop=crop)
        catalog = read_folders(
            Path(folder),
            classes=None if classes is None else list(classes),
            group=group,
            reading=ReadOptions(store=None if cache is None else Path(cache) / "facts"),
        )
        self._set_table(
            split_catalog(catalog, options).table,
            catalog.root,
            form,
            batch_size=batch_size,
            workers=workers,
            policy=policy,
            seed=seed,
            cache=CacheConfig(images=False) if cache is None else CacheConfig(folder=str(cache)),
        )
        self.classes: tuple[str, ...] = catalog.classes

    @classmethod
    def from_table(cls, table: pd.DataFrame, root: Root, form: InputFormat, **options: Unpack[LoadingOptions]) -> Self:
        """Create the data module of a split table, as runs do.

        Args:
            table: Rows of `pylorus.data.split.split_catalog`.
            root: Root of the table's paths: a folder or shards.
            form: How a file becomes the network's input.
            options: How to load the images.
        """
        module = cls.__new__(cls)
        pl.LightningDataModule.__init__(module)
        module._set_table(table, root, form, **options)
        return module

    def _set_table(
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
        processes: Processes | None = None,
    ) -> None:
        self._table = table.reset_index(drop=True)
        rows = dict(list(self._table.groupby("split")))
        rows["val"] = rows[validation]
        self.parts = {split: split_rows.reset_index(drop=True) for split, split_rows in rows.items()}
        self._rows = {split: split_rows.index.to_numpy(dtype=np.int64) for split, split_rows in rows.items()}
        self.root, self.form, self.policy, self.seed = root, form, policy, seed
        self.batch_size, self.workers, self.pin_memory = batch_size, workers, pin_memory
        self.views, self.shard_window, self._cache, self._processes = views, shard_window, cache, processes
        self.begun = (0, 0)
        """Epoch and batch at which training resumes: Lightning starts the workers before it sets the epoch."""
        self._datasets: dict[str, ImageDataset] = {}
        self._cached_images: Records | None = None
        self._is_cache_checked = False

    @property
    def processes(self) -> Processes:
        """The processes that share each batch: a run's, or else the Trainer's."""
        if self._processes is not None:
            return self._processes
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return ALONE
        return Processes(trainer.global_rank, trainer.world_size, trainer.local_rank)

    @property
    def augments(self) -> bool:
        """Whether training images are augmented."""
        return has_augmentation(self.policy)

    def get_sample_ids(self, split: str) -> NDArray[np.str_]:
        """Return the ID of each image of a split, by row."""
        return self.parts[split]["sample_id"].to_numpy(dtype=np.str_)

    def get_labels(self, split: str) -> NDArray[np.int64]:
        """Return the label of each image of a split, by row: an index into `classes`."""
        return self.parts[split]["label"].to_numpy(dtype=np.int64)

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

    def test_dataloader(self) -> DataLoader[Batch]:
        """Every test image once, unaugmented."""
        return self.build_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Every test image once, unaugmented, in the order of the table."""
        # Lightning puts its own batches in the place of a sampler's, to follow which images are predicted.
        return DataLoader(
            self.get_dataset("test"),
            batch_size=2 * self.batch_size,
            num_workers=self.workers,
            collate_fn=return_batch,
            worker_init_fn=_use_one_thread,
            pin_memory=self.pin_memory,
        )

    def build_loader(self, split: str) -> DataLoader[Batch]:
        """Build the loader that yields every image of a split once."""
        return self.build_batch_loader(split, self.build_batches(split))

    def build_batch_loader(self, split: str, batches: Iterable[list[Draw]]) -> DataLoader[Batch]:
        """Build a loader of the given batches of a split's images."""
        # A run sets the epoch in `begun`; any other Trainer sets it after it has asked for the iterator.
        loader = _LateLoader if self._processes is None else DataLoader
        return loader(
            self.get_dataset(split),
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=return_batch,
            worker_init_fn=_use_one_thread,
            persistent_workers=self.workers > 0,
            pin_memory=self.pin_memory,
        )


class _LateLoader(DataLoader[Batch]):
    """A loader that starts with its first batch: Lightning asks for the iterator before it restores the epoch."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


def _use_one_thread(_: int) -> None:
    """Limit a worker to one thread: the threads of several workers would compete for the same cores."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
