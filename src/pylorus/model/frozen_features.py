"""Compute the features of the frozen prefix once per image and view instead of once per epoch.

Features are cached on disk under a key of all that they depend on: weights, split point, preprocessing, precision, view
and the image's content. Later epochs, validation, later stages and other runs read them from there.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np
import pytorch_lightning as pl
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pylorus.cache.shards import Records
from pylorus.cache.store import load_or_compute_records
from pylorus.config.schema import CacheConfig
from pylorus.core.formatting import open_progress_bar
from pylorus.data.augmentation import compute_augmentation_version, format_policy
from pylorus.data.dataset import Draw, ImageBatches, SharedLoader, return_batch
from pylorus.data.device_augmentation import send_array
from pylorus.hardware import Engine
from pylorus.model.finetuning import Depth
from pylorus.model.frozen_prefix import CannotCutError, CutNetwork, cut_network
from pylorus.model.inference import Evaluator, NormalizingNetwork, RowOutputs, pool_features


@dataclass(frozen=True)
class TensorLayout:
    """How one feature tensor is stored in an image's record.

    Attributes:
        shape: Shape for one image.
        dtype: Data type of its elements.
        channels_last: Whether a pixel's channels are adjacent, in memory and in the record.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    @property
    def size(self) -> int:
        """Size for one image in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def encode_tensor(self, tensor: Tensor) -> NDArray[np.uint8]:
        """Return the bytes, uint8 (images, size), of a tensor (images, *shape)."""
        ordered = tensor.permute(0, 2, 3, 1) if self.channels_last else tensor
        content: NDArray[np.uint8] = ordered.contiguous().flatten(1).view(torch.uint8).cpu().numpy()
        return content

    def decode_tensor(self, content: Tensor) -> Tensor:
        """Return the tensor (images, *shape) stored in bytes (images, size)."""
        elements = content.contiguous().view(self.dtype)
        if not self.channels_last:
            return elements.reshape(-1, *self.shape)
        channels, height, width = self.shape
        return elements.reshape(-1, height, width, channels).permute(0, 3, 1, 2)


class ClassifierProtocol(Protocol):
    """The part of `pylorus.model.classifier.Classifier` that is needed here."""

    network: nn.Module
    mean: Tensor
    std: Tensor

    def normalize_images(self, image: Tensor) -> Tensor:
        """Normalize uint8 images (batch, 3, size, size)."""

    def to(self, device: str) -> object:
        """Move the network and its buffers to a device."""


class FrozenPrefix:
    """The frozen prefix of a network at one depth, and the features it computes from images.

    Args:
        classifier: Normalizes images and holds the network; moved to the device of the run.
        depth: What is trained.
        engine: Device and precision to compute with.
        image_size: Side of the input in pixels.
        cut: The network if it has been split at this depth already.

    Attributes:
        cut: The network in its two parts.
        fields: How a record stores the features of one image.

    Raises:
        UncuttableError: If the network can't be split at this depth; the message says why.
    """

    def __init__(
        self,
        classifier: ClassifierProtocol,
        depth: Depth,
        engine: Engine,
        *,
        image_size: int,
        cut: CutNetwork | None = None,
    ) -> None:
        self._classifier, self._engine = classifier, engine
        classifier.to(engine.accelerator)
        sample = generate_sample(image_size)
        with engine.use_precision():
            self.cut = cut or cut_network(
                classifier.network, depth, classifier.normalize_images(sample.to(engine.accelerator))
            )
        self.fields = tuple(_detect_layout(tensor) for tensor in self.compute_features(sample))

    @property
    def record_bytes(self) -> int:
        """Size of one image's features in bytes."""
        return sum(field.size for field in self.fields)

    def build_cache_key(self) -> dict[str, object]:
        """Return everything that features depend on besides the image, as plain values."""
        return {
            "prefix": self.cut.digest,
            "fields": str(self.fields),
            "mean": self._classifier.mean.flatten().tolist(),
            "std": self._classifier.std.flatten().tolist(),
            "accelerator": self._engine.accelerator,
            "precision": _describe_precision(self._engine),
            "torch": torch.__version__,
            "timm": timm.__version__,
        }

    def compute_features(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of uint8 images (batch, 3, size, size) in evaluation mode; `batch` rows each."""
        network = self.cut.network
        network.eval()
        with self._engine.use_precision(), torch.inference_mode():
            return self.cut.run_prefix(
                self._classifier.normalize_images(image.to(self._engine.accelerator, non_blocking=True))
            )

    def compute_records(self, image: Tensor) -> NDArray[np.uint8]:
        """Compute the records, uint8 (batch, record_bytes), of uint8 images (batch, 3, size, size)."""
        parts = [
            field.encode_tensor(tensor) for field, tensor in zip(self.fields, self.compute_features(image), strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def decode_records(self, records: Tensor) -> tuple[Tensor, ...]:
        """Return the features stored in records, uint8 of shape (batch, record_bytes)."""
        sizes = [field.size for field in self.fields]
        parts = records.split(sizes, dim=1)  # type: ignore[no-untyped-call]
        return tuple(field.decode_tensor(part) for field, part in zip(self.fields, parts, strict=True))


def generate_sample(image_size: int) -> Tensor:
    """Generate two random images, uint8 of shape (2, 3, image_size, image_size), on which a split is verified."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (2, 3, image_size, image_size), dtype=torch.uint8, generator=generator)


def _describe_precision(engine: Engine) -> str:
    """Describe the arithmetic: on a GPU, evaluation computes in 32 bits without TF32, and training with it."""
    is_full = engine.precision == "32" and torch.get_float32_matmul_precision() == "highest"
    return "32 without TF32" if is_full and engine.accelerator != "cpu" else engine.precision


def _detect_layout(tensor: Tensor) -> TensorLayout:
    channels_last = (
        tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    )
    return TensorLayout(tuple(tensor.shape[1:]), tensor.dtype, channels_last)


log = logging.getLogger(__name__)

COPIED_AT_ONCE = 1024
"""Records that are copied to a device at a time."""
PARTS = ("train", "val")
"""Splits used in training."""


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
        on_device: All records on the device that trains, uint8 of shape (records, record_bytes); None: on the CPU.
    """

    def __init__(
        self,
        prefix: FrozenPrefix,
        records: Records,
        positions: dict[Draw, int],
        labels: NDArray[np.int64],
        on_device: Tensor | None = None,
    ) -> None:
        self._prefix, self._records, self._positions, self._labels = prefix, records, positions, labels
        self._on_device = on_device

    def __getitems__(self, draws: list[Draw]) -> FeatureBatch:
        """Return the batch of the given draws."""
        rows = np.array([draw.row for draw in draws])
        positions = np.array([self._positions[draw] for draw in draws])
        labels = self._labels[rows]
        if self._on_device is None:
            records = torch.from_numpy(self._records.read_rows(positions))
            return FeatureBatch(self._prefix.decode_records(records), torch.from_numpy(labels), torch.from_numpy(rows))
        position, label, row = (send_array(array, self._on_device.device) for array in (positions, labels, rows))
        return FeatureBatch(self._prefix.decode_records(self._on_device.index_select(0, position)), label, row)


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
        image_data: ImageBatches,
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
        self._progress = progress
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
        self._device_records = None if self._records is None else self._copy_records(self._records)
        self.seconds = time.monotonic() - start
        if self._records is not None:
            self._log_cache_use(self._records)

    @property
    def has_training_features(self) -> bool:
        """Whether training batches are features, not images."""
        return self._records is not None and bool(self._draws["train"])

    def train_dataloader(self) -> DataLoader[Any] | SharedLoader:
        """Return every training image once, in the order in which the images would have come."""
        return self.build_loader("train")

    def val_dataloader(self) -> DataLoader[Any] | SharedLoader:
        """Return every validation image once."""
        return self.build_loader("val")

    def build_loader(self, split: str) -> DataLoader[Any] | SharedLoader:
        """Return a loader over every image of a split once: its features, or the image if they are not cached."""
        draws = self._draws[split]
        if self._records is None or not draws:
            return self._image_data.build_loader(split)
        offset = sum(len(self._draws[previous]) for previous in PARTS[: PARTS.index(split)])
        positions = {draw: offset + position for position, draw in enumerate(draws)}
        labels = self._image_data.parts[split]["label"].to_numpy(dtype=np.int64)
        return DataLoader(
            FeatureDataset(self._prefix, self._records, positions, labels, self._device_records),
            batch_sampler=self._image_data.build_batches(split),
            collate_fn=return_batch,
            pin_memory=self._image_data.pin_memory and self._device_records is None,
        )

    def _copy_records(self, records: Records) -> Tensor | None:
        """Copy all records to the device that trains; None if they do not fit, or shall not be held there."""
        memory, size = self._image_data.memory, self._prefix.record_bytes
        # Features are held beside the images, whose memory `trainer.batch_size=auto` leaves free; a tenth remains.
        if memory is None or not memory.has_space(5 * len(records) * size):
            return None
        try:
            copies = torch.empty((len(records), size), dtype=torch.uint8, device=memory.device)
            for first in range(0, len(records), COPIED_AT_ONCE):
                block = torch.from_numpy(records.read_rows(range(first, min(first + COPIED_AT_ONCE, len(records)))))
                copies[first : first + len(block)] = block.to(memory.device)
        except torch.OutOfMemoryError:
            return None
        return copies

    def _compute_records(self, missing: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Compute the records at the given positions, in batches of evaluation size."""
        for split in PARTS:
            self._image_data.get_dataset(
                split
            )  # all processes decode together, including one that has nothing to compute
        all_draws = [(split, draw) for split in PARTS for draw in self._draws[split]]
        with open_progress_bar(f"{self._name} features", len(missing), shown=self._progress) as progress_bar:
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


def _list_draws(image_data: ImageBatches, split: str, epochs: int) -> list[Draw]:
    """List all draws of a split that a stage will use, unless each epoch augments its images anew."""
    rows = range(len(image_data.parts[split]))
    if split != "train" or not image_data.augments:
        return [Draw(row, None) for row in rows]
    return [Draw(row, view) for view in range(min(image_data.views or 0, epochs)) for row in rows]


def _build_record_names(image_data: ImageBatches, split: str, draws: Sequence[Draw]) -> list[str]:
    """Name each draw for the cache: by the image's content and, for a view, what its augmentation depends on."""
    hashes = list(image_data.parts[split]["sha256"])
    policy = format_policy(image_data.policy)
    policy_digest = hashlib.sha256(f"{policy} {compute_augmentation_version()}".encode()).hexdigest()[:16]
    dataset = image_data.get_dataset(split)
    return [
        hashes[draw.row]
        if draw.view is None
        else f"{hashes[draw.row]}/{policy_digest}/{dataset.get_augmentation_seed(draw.row, draw.view):x}"
        for draw in draws
    ]


class FrozenPrefixEvaluator(Evaluator):
    """Computes a network's output from features of its frozen prefix, which are cached in the 32 bits of evaluation.

    Another stage or run with the same prefix, such as the next job of a sweep, finds them; so does this one if it was
    trained in 32 bits.

    Args:
        network: The network, prepared by `prepare_network`.
        image_data: The images.
        prefix: Its frozen prefix, in 32 bits.
        settings: What may be cached, and where.
    """

    def __init__(
        self, network: NormalizingNetwork, image_data: ImageBatches, prefix: FrozenPrefix, settings: CacheConfig
    ) -> None:
        super().__init__(network, image_data)
        self._prefix, self._settings = prefix, settings

    def compute_outputs(
        self, split: str, rows: NDArray[np.int64], *, advance: Callable[[int], object] = int
    ) -> Iterator[RowOutputs]:
        """Compute the output for some images of a split; see `Evaluator`."""
        image_data, draws = self.image_data, [Draw(int(row), None) for row in rows]
        records = load_or_compute_records(
            self._settings,
            _build_record_names(image_data, split, draws),
            partial(self._compute_records, split, draws, advance),
            kind="features",
            key={**self._prefix.build_cache_key(), "input": image_data.form.get_key()},
            record_bytes=self._prefix.record_bytes,
            processes=image_data.processes,
        )
        if records is None:
            yield from super().compute_outputs(split, rows, advance=advance)
            return
        positions = {draw.row: position for position, draw in enumerate(draws)}
        for batch in self.build_batches(rows):
            block = torch.from_numpy(records.read_rows([positions[draw.row] for draw in batch]))
            logits, features = self.run_suffix(block)
            yield RowOutputs(torch.tensor([draw.row for draw in batch]), logits.cpu(), features.cpu())

    def run_suffix(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and penultimate features from records, uint8 of shape (n, record_bytes)."""
        penultimate: list[Tensor] = []
        layer: nn.Module = self.network.network.get_classifier()  # type: ignore[operator]
        hook = layer.register_forward_pre_hook(lambda _, arguments: penultimate.append(arguments[0]))
        try:
            with torch.inference_mode():
                features = self._prefix.decode_records(records.to(self.network.mean.device))
                logits = self._prefix.cut.run_suffix(features)
        finally:
            hook.remove()
        return logits.float(), pool_features(penultimate[-1])

    def is_exact(self) -> bool:
        """Return whether the output is that of the whole network, for two random images."""
        sample = generate_sample(self.image_data.form.size)
        with torch.inference_mode():
            expected = self.network.forward_with_features(sample.to(self.network.mean.device))
        try:
            outputs = self.run_suffix(torch.from_numpy(self._prefix.compute_records(sample)))
        except (AttributeError, IndexError):  # several last layers, or none that is called as a module
            return False
        return all(
            output.shape == whole.shape and torch.allclose(output, whole, rtol=1e-5, atol=1e-6, equal_nan=True)
            for output, whole in zip(outputs, expected, strict=True)
        )

    def _compute_records(
        self, split: str, draws: list[Draw], advance: Callable[[int], object], missing: Sequence[int]
    ) -> Iterator[NDArray[np.uint8]]:
        size = max(1, 2 * self.image_data.batch_size // self.image_data.processes.count)
        batches = [[draws[index] for index in missing[start : start + size]] for start in range(0, len(missing), size)]
        self.image_data.get_dataset(split)  # all processes decode together, including one with nothing to compute
        for batch in self.image_data.build_batch_loader(split, batches):
            yield self._prefix.compute_records(batch.image)
            advance(len(batch.row))


def build_evaluator(
    network: NormalizingNetwork,
    image_data: ImageBatches,
    depth: Depth,
    engine: Engine,
    settings: CacheConfig,
    *,
    cut: CutNetwork | None = None,
) -> Evaluator:
    """Build what computes a network's output: from cached features if that is worthwhile, else from the images.

    Args:
        network: The network, prepared by `prepare_network`.
        image_data: The images.
        depth: What the stage trained: the rest of the network is its frozen prefix.
        engine: The compute engine of the run.
        settings: What may be cached, and where.
        cut: The network if it has been split at this depth already.
    """
    plain, image_size = Evaluator(network, image_data), image_data.form.size
    if not settings.prefix or not depth.frozen:
        return plain
    try:
        prefix = FrozenPrefix(network, depth, replace(engine, precision="32"), image_size=image_size, cut=cut)
    except CannotCutError:
        return plain
    if prefix.record_bytes > 3 * image_size**2:  # they would take more space than the images
        return plain
    evaluator = FrozenPrefixEvaluator(network, image_data, prefix, settings)
    return plain if any(image_data.processes.reduce_any(not evaluator.is_exact())) else evaluator
