"""The frozen part of a network as a function from images to records of bytes, in the run's precision.

A stage's network is cut where its learning begins (`pylorus.model.cut`); `pylorus.model.features` keeps what comes
before it.
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
from pylorus.model.cut import Cut, cut
from pylorus.model.freeze import Depth


@dataclass(frozen=True)
class Field:
    """How one tensor of the features lies in an image's record.

    Attributes:
        shape: For one image.
        dtype: Of its numbers.
        channels_last: Whether a pixel's channels lie together, in memory and in the record.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    @property
    def size(self) -> int:
        """Bytes for one image."""
        return math.prod(self.shape) * self.dtype.itemsize

    def packed(self, tensor: Tensor) -> NDArray[np.uint8]:
        """Bytes (images, size) of a tensor (images, *shape)."""
        lying = tensor.permute(0, 2, 3, 1) if self.channels_last else tensor
        found: NDArray[np.uint8] = lying.contiguous().flatten(1).view(torch.uint8).cpu().numpy()
        return found

    def unpacked(self, content: Tensor) -> Tensor:
        """The tensor (images, *shape) of bytes (images, size)."""
        numbers = content.contiguous().view(self.dtype)
        if not self.channels_last:
            return numbers.reshape(-1, *self.shape)
        channels, height, width = self.shape
        return numbers.reshape(-1, height, width, channels).permute(0, 3, 1, 2)


class Classifying(Protocol):
    """What of `pylorus.model.classifier.Classifier` is needed here."""

    network: nn.Module
    mean: Tensor
    std: Tensor

    def pixels(self, image: Tensor) -> Tensor:
        """Normalised images (batch, 3, size, size) of uint8 ones."""

    def to(self, device: str) -> object:
        """Moves all of it."""


class Prefix:
    """The frozen part of a network at one depth, and what it gives for an image set.

    Args:
        classifier: Normalises images and holds the network, which is moved to where the run computes.
        depth: What learns.
        engine: Where and how precisely to compute.
        image_size: Side of the input in pixels.

    Attributes:
        cut: The network in its two parts.
        fields: How a record holds the features of one image.

    Raises:
        UncuttableError: If the network can't be cut at this depth; the message says why.
    """

    def __init__(self, classifier: Classifying, depth: Depth, engine: Engine, *, image_size: int) -> None:
        self._classifier, self._engine = classifier, engine
        classifier.to(engine.accelerator)
        sample = torch.randint(
            256, (2, 3, image_size, image_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        with engine.computing():
            self.cut: Cut = cut(classifier.network, depth, classifier.pixels(sample.to(engine.accelerator)))
        self.fields = tuple(_field(tensor) for tensor in self.features(sample))

    @property
    def record_bytes(self) -> int:
        """Bytes of one image's features."""
        return sum(field.size for field in self.fields)

    def key(self) -> dict[str, object]:
        """All that features depend on besides the image, as plain values."""
        return {
            "prefix": self.cut.digest(),
            "fields": str(self.fields),
            "mean": self._classifier.mean.flatten().tolist(),
            "std": self._classifier.std.flatten().tolist(),
            "accelerator": self._engine.accelerator,
            "precision": self._engine.precision,
            "torch": torch.__version__,
            "timm": timm.__version__,
        }

    def features(self, image: Tensor) -> tuple[Tensor, ...]:
        """The features of uint8 images (batch, 3, size, size), in evaluation; each tensor has `batch` rows."""
        network = self.cut.network
        network.eval()
        with self._engine.computing(), torch.inference_mode():
            return self.cut.features(self._classifier.pixels(image.to(self._engine.accelerator, non_blocking=True)))

    def packed(self, image: Tensor) -> NDArray[np.uint8]:
        """Records (batch, record_bytes) of uint8 images (batch, 3, size, size)."""
        parts = [field.packed(tensor) for field, tensor in zip(self.fields, self.features(image), strict=True)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def unpacked(self, records: NDArray[np.uint8]) -> tuple[Tensor, ...]:
        """Features of records (batch, record_bytes)."""
        sizes = [field.size for field in self.fields]
        parts = torch.from_numpy(records).split(sizes, dim=1)  # type: ignore[no-untyped-call]
        return tuple(field.unpacked(part) for field, part in zip(self.fields, parts, strict=True))


def _field(tensor: Tensor) -> Field:
    lying = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return Field(tuple(tensor.shape[1:]), tensor.dtype, lying)
