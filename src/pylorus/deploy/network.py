"""The trained network as a function of images: logits, and the distance from its training images."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pylorus.machine.choices import is_faster_channels_last

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
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))
        self.eval()

    def normalize_images(self, image: Tensor) -> Tensor:
        """Normalise uint8 RGB images of shape (n, 3, size, size) to float32 of the same shape."""
        return (image.float() - self.mean) / self.std

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
