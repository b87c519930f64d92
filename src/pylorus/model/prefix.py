"""The frozen prefix of a network as a function from images to byte records, in the run's precision.

`pylorus.model.cut` splits a stage's network before its first trainable layer; `pylorus.model.features` caches what the
prefix computes.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pylorus.machine.engine import Engine
from pylorus.model.cut import CutNetwork, cut_network
from pylorus.model.freeze import Depth


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

    Attributes:
        cut: The network in its two parts.
        fields: How a record stores the features of one image.

    Raises:
        UncuttableError: If the network can't be split at this depth; the message says why.
    """

    def __init__(self, classifier: ClassifierProtocol, depth: Depth, engine: Engine, *, image_size: int) -> None:
        self._classifier, self._engine = classifier, engine
        classifier.to(engine.accelerator)
        sample = torch.randint(
            256, (2, 3, image_size, image_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        with engine.use_precision():
            self.cut: CutNetwork = cut_network(
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
            "prefix": self.cut.compute_digest(),
            "fields": str(self.fields),
            "mean": self._classifier.mean.flatten().tolist(),
            "std": self._classifier.std.flatten().tolist(),
            "accelerator": self._engine.accelerator,
            "precision": self._engine.precision,
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

    def decode_records(self, records: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        """Return the features stored in records (batch, record_bytes)."""
        sizes = [field.size for field in self.fields]
        parts = torch.from_numpy(records).split(sizes, dim=1)  # type: ignore[no-untyped-call]
        return tuple(field.decode_tensor(part) for field, part in zip(self.fields, parts, strict=True))


def _detect_layout(tensor: Tensor) -> TensorLayout:
    channels_last = (
        tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    )
    return TensorLayout(tuple(tensor.shape[1:]), tensor.dtype, channels_last)
