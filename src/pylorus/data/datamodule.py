"""The LightningDataModule: batches of decoded, augmented images at the network's input size.

The order of images and their augmented variants are functions of seed and epoch alone, for any number of workers.

`ImageDataModule(folder)` reads class folders for any `pl.Trainer`; runs use `ImageDataModule.from_table`.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Required, Self, TypedDict, Unpack

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from pylorus.cache.shards import Records
from pylorus.config.schema import AugmentConfig, CacheConfig, DataConfig
from pylorus.core.arguments import check_arguments
from pylorus.core.distributed import SINGLE_PROCESS, Processes
from pylorus.core.errors import PylorusError, format_suggestion, translate_errors
from pylorus.core.formatting import format_bytes
from pylorus.core.io import resolve_path, validate
from pylorus.data.audit_findings import Thresholds
from pylorus.data.augmentation import build_augmentation, has_augmentation, load_policy
from pylorus.data.catalog import ReadOptions, read_folders
from pylorus.data.dataset import (
    Batch,
    DeviceMemory,
    Draw,
    EpochBatchSampler,
    EpochSampler,
    ImageDataset,
    LoadingProcesses,
    ShardWindows,
    SharedLoader,
    find_device_obstacle,
    return_batch,
    setup_loading_process,
)
from pylorus.data.files import Root
from pylorus.data.input_format import ImageWriter, InputFormat, load_or_decode_images, resolve_input_format
from pylorus.data.leakage import find_copies
from pylorus.data.shards import Shards
from pylorus.data.split import split_catalog
from pylorus.data.walk import log_ignored

log = logging.getLogger(__name__)

COPIED_AT_ONCE = 256
"""Images that are copied to a device at a time."""

ARGUMENTS = {
    "data.root": "folder",
    "data.classes": "classes",
    "data.exclude": "exclude",
    "data.group": "group",
    "data.val_fraction": "val_fraction",
    "data.test_fraction": "test_fraction",
    "data.split_seed": "split_seed",
    "data.fit": "fit",
    "data.crop": "crop",
    "data.mask": "mask",
    "data.accept_leaks=true: the report then states them": "accept_leaks=True",
    "cache.folder": "cache",
    "Replace them, move them out of the class folders, or leave them out with data.on_error=quarantine, which lists "
    "them in quarantine.csv.": "Replace them, or move them out of the class folders.",
    "remove them, or leave them out with data.on_error=quarantine.": "or remove them.",
}
"""What the keys in messages are called in Python."""
DEFAULT_FIT: Any = DataConfig.fit
DEFAULT_CROP: Any = DataConfig.crop


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
        loading: The run's processes that decode images; None: each loader starts its own.
        memory: Where decoded images are held if there is space; None: in the main memory.
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
    loading: LoadingProcesses | None
    memory: DeviceMemory | None


class ImageDataModule(pl.LightningDataModule):
    """Provides images in batches: training images augmented, validation and test images unchanged.

    It works with any `pl.Trainer`: fit, validate, test, and predict, which predicts the test images. On several
    devices, each takes its share of every batch; the Trainer then needs `use_distributed_sampler=False`.

    Attributes:
        classes: Names of the class folders, in label order.
        ignored: Files and folders beside the images that are not used, with reasons.
        parts: Table of each split (train, val, test) with one row per image: path, label, group and more.
    """

    @check_arguments
    def __init__(
        self,
        folder: str | Path,
        *,
        model: str | None = None,
        image_size: Annotated[int, Ge(32)] | None = None,
        classes: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        group: str | None = None,
        val_fraction: float = DataConfig.val_fraction,
        test_fraction: float = DataConfig.test_fraction,
        split_seed: Annotated[int, Ge(0)] = DataConfig.split_seed,
        accept_leaks: bool = False,
        batch_size: Annotated[int, Ge(1)] = 16,
        workers: Annotated[int, Ge(0)] = 0,
        augment: str | Mapping[str, Any] = "light",
        fit: Literal["pad", "stretch", "crop"] = DEFAULT_FIT,
        crop: Literal["none", "auto"] = DEFAULT_CROP,
        mask: Literal["overlays", "none"] | None = None,
        seed: Annotated[int, Ge(0)] = 0,
        cache: str | Path | None = None,
    ) -> None:
        """Read class folders and split them: each group, and each copy of an image, stays in one split.

        Every file is read once, here.

        Args:
            folder: FOLDER/CLASS/…, or FOLDER/{train,val,test}/CLASS/… or FOLDER/CLASS/{train,test}/…, which are used
                as they are.
            model: Name of the timm model whose input size and interpolation the images get.
            image_size: Side of the images in pixels; None: the model's own.
            classes: Names of the class folders, in label order; None: those found, sorted by name.
            exclude: Names of class folders to leave out.
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
            mask: overlays: cover text and plates that the console draws; none; None: overlays if crop is auto.
            seed: Random seed of order and augmentation.
            cache: Folder that holds what was read and decoded for the next time; None: nothing is cached.

        Raises:
            PylorusError: If the images can't be used as they are; the message says what is wrong.
        """
        super().__init__()
        root = resolve_path(folder, argument="folder")
        if not root.is_dir():
            raise PylorusError(
                f"folder: found {root}, expected an existing folder with images as in FOLDER/CLASS/image.jpg."
            )
        values = {
            "root": str(root),
            "val_fraction": val_fraction,
            "test_fraction": test_fraction,
            "split_seed": split_seed,
            "accept_leaks": accept_leaks,
            "fit": fit,
            "crop": crop,
            "mask": mask,
        }
        cache_folder = None if cache is None else resolve_path(cache, argument="cache")
        cache_config = CacheConfig(images=False) if cache_folder is None else CacheConfig(folder=str(cache_folder))
        store = None if cache_folder is None else cache_folder / "facts"
        with translate_errors({**ARGUMENTS, f"there is no augment/{augment}.yaml": f'found "{augment}"'}):
            options = validate(DataConfig, values, where="data.")
            policy = load_policy(augment) if isinstance(augment, str) else AugmentConfig("custom", dict(augment))
            build_augmentation(policy)  # reports a typo before the files are read
            form = resolve_input_format(model, image_size=image_size, fit=fit, crop=crop, mask=mask)
            catalog = read_folders(
                root,
                classes=None if classes is None else list(classes),
                exclude=None if exclude is None else list(exclude),
                group=group,
                reading=ReadOptions(store=store, images=ImageWriter(form, cache_config)),
            )
            log_ignored(catalog.ignored, listed_in="ImageDataModule.ignored")
            copies = find_copies(catalog.facts, Thresholds(), store=store)
            table = split_catalog(catalog, options, copies=copies).table
        self._set_table(
            table,
            catalog.root,
            form,
            batch_size=batch_size,
            workers=workers,
            policy=policy,
            seed=seed,
            cache=cache_config,
        )
        self.classes: tuple[str, ...] = catalog.classes
        self.ignored = tuple(catalog.ignored)

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
        loading: LoadingProcesses | None = None,
        memory: DeviceMemory | None = None,
    ) -> None:
        self._table = table.reset_index(drop=True)
        rows = dict(list(self._table.groupby("split")))
        rows["val"] = rows[validation]
        self.parts: dict[str, pd.DataFrame] = {
            str(split): split_rows.reset_index(drop=True) for split, split_rows in rows.items()
        }
        self._rows = {str(split): split_rows.index.to_numpy(dtype=np.int64) for split, split_rows in rows.items()}
        self.root, self.form, self.policy, self.seed = root, form, policy, seed
        self.batch_size, self.workers, self.pin_memory = batch_size, workers, pin_memory
        self.views, self.shard_window, self._cache, self._processes = views, shard_window, cache, processes
        self._loading = loading
        self.begun = (0, 0)
        """Epoch and batch at which training resumes: Lightning starts the workers before it sets the epoch."""
        self._datasets: dict[str, ImageDataset] = {}
        self._cached_images: Records | None = None
        self._is_cache_checked = False
        has_space = memory is not None and memory.has_space(len(table) * 3 * form.size**2)
        self.memory = memory
        self._image_memory = memory if has_space else None
        self._device_images: dict[str, torch.Tensor] = {}

    @property
    def processes(self) -> Processes:
        """The processes that share each batch: a run's, or else the Trainer's."""
        if self._processes is not None:
            return self._processes
        trainer = self.trainer
        if trainer is None or trainer.world_size == 1:
            return SINGLE_PROCESS
        return Processes(trainer.global_rank, trainer.world_size, trainer.local_rank)

    @property
    def augments(self) -> bool:
        """Whether training images are augmented."""
        return has_augmentation(self.policy)

    def get_sample_ids(self, split: str) -> NDArray[np.str_]:
        """Return the ID of each image of a split, by row."""
        return self._get_part(split)["sample_id"].to_numpy(dtype=np.str_)

    def get_labels(self, split: str) -> NDArray[np.int64]:
        """Return the label of each image of a split, by row: an index into `classes`."""
        return self._get_part(split)["label"].to_numpy(dtype=np.int64)

    def _get_part(self, split: str) -> pd.DataFrame:
        if split not in self.parts:
            names = ", ".join(self.parts)
            raise PylorusError(
                f"split: found {split!r}, expected one of {names}.{format_suggestion(str(split), self.parts)}"
            )
        return self.parts[split]

    def get_dataset(self, split: str) -> ImageDataset:
        """Return the images of a split; the first call caches the images of all splits if that is worthwhile."""
        if not self._is_cache_checked:
            self._is_cache_checked = True
            # Images for the device are all decoded once.
            is_needed = self._image_memory is not None and self._cache.images is None
            settings = replace(self._cache, images=True) if is_needed else self._cache
            self._cached_images = load_or_decode_images(self._table, self.root, self.form, settings, self.processes)
            if self._image_memory is not None:
                self._device_images = self._copy_images(self._image_memory.device)
        if split not in self._datasets:
            cached = self._cached_images.select_rows(self._rows[split]) if self._cached_images is not None else None
            self._datasets[split] = ImageDataset(
                self.parts[split],
                self.root,
                self.form,
                policy=self.policy,
                seed=self.seed,
                cached=cached,
                on_device=self._device_images.get(split),
            )
        return self._datasets[split]

    def _copy_images(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Copy the images of each split to a device, uint8 of shape (images, 3, size, size); {} if it is too small.

        Training images that the device can't augment are left out.
        """
        obstacle = find_device_obstacle(self.policy)
        if obstacle is not None:
            log.info("images   training images are augmented on the CPU: %s", obstacle)
        splits = [split for split in self._rows if split != "train" or obstacle is None]
        rows = np.concatenate([self._rows[split] for split in splits])
        reader = ImageDataset(
            self._table, self.root, self.form, policy=AugmentConfig(), seed=self.seed, cached=self._cached_images
        )
        start = time.monotonic()
        try:
            images = torch.empty((len(rows), 3, self.form.size, self.form.size), dtype=torch.uint8, device=device)
            for first in range(0, len(rows), COPIED_AT_ONCE):
                block = torch.from_numpy(reader.load_rows(rows[first : first + COPIED_AT_ONCE].tolist()))
                images[first : first + len(block)] = block.to(device).permute(0, 3, 1, 2)
        except torch.OutOfMemoryError:
            log.warning("images   stay in the main memory: that of the device is full (cache.on_device)")
            return {}
        seconds, size = time.monotonic() - start, format_bytes(images.numel())
        log.info("images   %d copied to the device in %.1f s: %s (cache.on_device)", len(rows), seconds, size)
        ends = np.cumsum([len(self._rows[split]) for split in splits]).tolist()
        return {split: images[start_row:end] for split, start_row, end in zip(splits, [0, *ends], ends, strict=False)}

    def build_batches(self, split: str) -> EpochBatchSampler:
        """Build the batches of a split: train is shuffled and augmented, the others are in the table's order."""
        images = len(self._get_part(split))
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

    def train_dataloader(self) -> DataLoader[Batch] | SharedLoader:
        """Every training image once, shuffled and augmented differently in each epoch."""
        return self.build_loader("train")

    def val_dataloader(self) -> DataLoader[Batch] | SharedLoader:
        """Every validation image once, unaugmented."""
        return self.build_loader("val")

    def test_dataloader(self) -> DataLoader[Batch] | SharedLoader:
        """Every test image once, unaugmented."""
        return self.build_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Every test image once, unaugmented, in the order of the table."""
        # Lightning puts its own batches in the place of a sampler's, to follow which images are predicted.
        dataset = self.get_dataset("test")
        return DataLoader(
            dataset,
            batch_size=2 * self.batch_size,
            num_workers=0 if dataset.is_on_device else self.workers,
            collate_fn=return_batch,
            worker_init_fn=setup_loading_process,
            pin_memory=self.pin_memory and not dataset.is_on_device,
        )

    def build_loader(self, split: str) -> DataLoader[Batch] | SharedLoader:
        """Build the loader that yields every image of a split once."""
        return self.build_batch_loader(split, self.build_batches(split))

    def build_batch_loader(self, split: str, batches: Iterable[list[Draw]]) -> DataLoader[Batch] | SharedLoader:
        """Build a loader of the given batches of a split's images."""
        dataset = self.get_dataset(split)
        workers = 0 if dataset.is_on_device else self.workers
        if self._loading is not None and workers > 0:
            return SharedLoader(self._loading, {name: self.get_dataset(name) for name in self.parts}, split, batches)
        # A run sets the epoch in `begun`; any other Trainer sets it after it has asked for the iterator.
        loader = _LateLoader if self._processes is None else DataLoader
        return loader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=return_batch,
            worker_init_fn=setup_loading_process,
            persistent_workers=workers > 0,
            pin_memory=self.pin_memory and not dataset.is_on_device,
        )


class _LateLoader(DataLoader[Batch]):
    """A loader that starts with its first batch: Lightning asks for the iterator before it restores the epoch."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()
