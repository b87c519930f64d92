"""Run a stage's network over the images of a run exactly as its bundle does: by the same code, in fp32."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from pylorus.data.dataset import Draw, ImageBatches
from pylorus.hardware.engine import Engine, is_faster_channels_last, use_full_precision
from pylorus.model.backbone import Backbone, convert_to_pixel_scale, normalize_images, restore_modes

UNLIKENESS = "cosine distance of the penultimate features to the mean direction of the nearest class"


class NetworkOutput(NamedTuple):
    """The network's output for n images.

    Attributes:
        logits: float32 of shape (n, classes); not calibrated.
        unlikeness: Distance from the training images, float32 of shape (n,), in [0, 2]: see `UNLIKENESS`.
    """

    logits: Tensor
    unlikeness: Tensor


class NormalizingNetwork(nn.Module):
    """A network in evaluation mode that normalises its input images itself.

    Both a run and a bundle predict with it, so both give the same logits.

    Args:
        network: A timm model.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        for name, tensor in zip(("mean", "std"), convert_to_pixel_scale(mean, std), strict=True):
            self.register_buffer(name, tensor)
        self.eval()

    def normalize_images(self, image: Tensor) -> Tensor:
        """Normalise uint8 RGB images of shape (n, 3, size, size) to float32 of the same shape."""
        return normalize_images(image, self.mean, self.std)

    def forward_with_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and penultimate features; see the function of this name.

        Args:
            image: uint8 RGB of shape (n, 3, size, size).
        """
        return compute_logits_and_features(self.network, self.normalize_images(image))


class BundleClassifier(NormalizingNetwork):
    """A network that also computes the distance of images from its training images.

    Args:
        network: A timm model.
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].
        directions: Unit vectors of shape (classes, features): the mean direction of each class's training images.
    """

    directions: Tensor

    def __init__(self, network: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...], directions: Tensor):
        super().__init__(network, mean=mean, std=std)
        self.register_buffer("directions", directions)

    def forward(self, image: Tensor) -> NetworkOutput:
        """Compute the output for uint8 RGB images of shape (n, 3, size, size)."""
        logits, features = self.forward_with_features(image)
        return NetworkOutput(logits, compute_unlikeness(features, self.directions))


def compute_logits_and_features(network: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute logits and penultimate features.

    Args:
        network: A timm model.
        pixels: Normalised images of shape (n, 3, size, size).

    Returns:
        Logits of shape (n, classes) and the last layer's input of shape (n, features), both float32.
    """
    maps = network.forward_features(pixels)
    logits, features = network.forward_head(maps), network.forward_head(maps, pre_logits=True)
    if features.ndim == 4:
        features = features.mean(dim=(2, 3))  # heads that pool after their last layer, or hold 1 × 1 maps
    elif features.ndim == 3:
        features = features.mean(dim=1)
    return logits.float(), features.float()


def compute_unlikeness(features: Tensor, directions: Tensor) -> Tensor:
    """Compute the distance of images from the training images; see `UNLIKENESS`.

    Args:
        features: Penultimate features of shape (n, features).
        directions: Unit vectors of shape (classes, features): the mean direction of each class.

    Returns:
        Distances of shape (n,), in [0, 2].
    """
    return 1 - (functional.normalize(features, dim=1) @ directions.T).amax(dim=1)


def move_to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move the network to a device, in the memory layout that is fastest for its convolutions; values stay the same."""
    is_faster = is_faster_channels_last(network, device.type)
    return network.to(device, memory_format=torch.channels_last if is_faster else torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


MAX_IMAGES = {"train": 1000, "val": 5000, "test": 5000}
"""Images of each split whose features are saved: enough for the classes' means and the threshold's quantile."""


@dataclass(frozen=True, eq=False)
class SplitOutputs:
    """The network's output for a split of the images.

    Attributes:
        logits: float32 of shape (images, classes), in the order of the split's rows.
        features: float32 of shape (n, features): penultimate features of the rows that `select_feature_rows` returns.
    """

    logits: NDArray[np.float32]
    features: NDArray[np.float32]


def select_feature_rows(part: str, images: int) -> NDArray[np.int64]:
    """Return the rows of a split whose features are saved: all, or `MAX_IMAGES` evenly spaced ones.

    Args:
        part: train, val or test.
        images: Number of images in the split.
    """
    return np.linspace(0, images - 1, min(images, MAX_IMAGES[part])).round().astype(np.int64)


def compute_split_outputs(
    backbone: Backbone, datamodule: ImageBatches, part: str, engine: Engine, *, progress: bool
) -> SplitOutputs:
    """Compute the network's output for every image of a split.

    Each distributed process computes its share of the images; all processes return the output for all images.

    Args:
        backbone: The network, and how its input is normalised.
        datamodule: The data module of the images.
        part: val or test.
        engine: The compute engine.
        progress: Whether to show a progress bar on a terminal.
    """
    images = len(datamodule.parts[part])
    saved_rows = select_feature_rows(part, images)
    rows, logits, features = [], [], []
    is_silent = not (progress and datamodule.processes.is_first and sys.stderr.isatty())
    with (
        _prepare_network(backbone, engine.accelerator) as network,
        tqdm(total=images, desc=f"{part} predictions", leave=False, disable=is_silent) as bar,
    ):
        for batch in datamodule.build_loader(part):
            batch_logits, batch_features = _run_network(network, batch.image)
            row = batch.row.cpu()
            is_saved = torch.from_numpy(np.isin(row.numpy(), saved_rows))
            rows.append(row)
            logits.append(batch_logits)
            features.append((row[is_saved], batch_features[is_saved]))
            bar.update(datamodule.processes.count * len(row))
    local = (torch.cat(rows), torch.cat(logits), *(torch.cat(tensors) for tensors in zip(*features, strict=True)))
    by_process = datamodule.processes.gather(local)
    all_rows, all_logits, feature_row, all_features = (torch.cat(each) for each in zip(*by_process, strict=True))
    return SplitOutputs(all_logits[torch.argsort(all_rows)].numpy(), all_features[torch.argsort(feature_row)].numpy())


def compute_mean_directions(backbone: Backbone, datamodule: ImageBatches, engine: Engine, *, classes: int) -> Tensor:
    """Compute the mean direction of each class's features over the training images, without augmentation.

    Args:
        backbone: The network, and how its input is normalised.
        datamodule: The data module of the images, for a single process.
        engine: The compute engine.
        classes: Number of classes.

    Returns:
        Unit vectors of shape (classes, features).
    """
    rows = select_feature_rows("train", len(datamodule.parts["train"]))
    size = 2 * datamodule.batch_size
    batches = [[Draw(int(row), None) for row in rows[at : at + size]] for at in range(0, len(rows), size)]
    with _prepare_network(backbone, engine.accelerator) as network:
        features = torch.cat(
            [_run_network(network, batch.image)[1] for batch in datamodule.build_batch_loader("train", batches)]
        )
    labels = torch.from_numpy(datamodule.parts["train"]["label"].to_numpy(dtype=np.int64)[rows])
    directions = functional.normalize(features.double(), dim=1)
    means = torch.stack([directions[labels == label].mean(dim=0) for label in range(classes)])
    return functional.normalize(means, dim=1).float()


@contextmanager
def _prepare_network(backbone: Backbone, accelerator: str) -> Iterator[NormalizingNetwork]:
    """Move the network to its device as a bundle does; on exit it is on the CPU again, with its modes restored."""
    device = torch.device(accelerator)
    with restore_modes(backbone.network), use_full_precision():
        network = move_to_device(backbone.network, device)
        yield NormalizingNetwork(network, mean=backbone.mean, std=backbone.std).to(device)
        network.to("cpu")


def _run_network(network: NormalizingNetwork, image: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        logits, features = network.forward_with_features(image.to(network.mean.device))
    return logits.cpu(), features.cpu()
