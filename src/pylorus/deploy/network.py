"""The trained network as a function of images: logits, and how unlike its training images an image is."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pylorus.machine.choices import gains_channels_last

UNLIKENESS = "cosine distance of the penultimate features to the mean direction of the nearest class"


class Output(NamedTuple):
    """What the network says of some images.

    Attributes:
        logits: float32 of shape (n, classes); not calibrated.
        unlikeness: float32 of shape (n,), in [0, 2]: see `UNLIKENESS`.
    """

    logits: Tensor
    unlikeness: Tensor


class NormalisedNetwork(nn.Module):
    """A network in evaluation mode that normalises its images itself.

    A run predicts with it and a bundle computes by it, so that both give the same logits.

    Args:
        network: A timm model.
        mean: Of pixels in [0, 1], a value a channel.
        std: As `mean`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))
        self.eval()

    def pixels(self, image: Tensor) -> Tensor:
        """Normalised images (n, 3, size, size) of uint8 RGB ones."""
        return (image.float() - self.mean) / self.std

    def logits_and_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, classes) and penultimate features (n, features) of uint8 RGB images (n, 3, size, size)."""
        return logits_and_features(self.network, self.pixels(image))


class BundledClassifier(NormalisedNetwork):
    """A network that also says how unlike its training images an image is.

    Args:
        network: A timm model.
        mean: Of pixels in [0, 1], a value a channel.
        std: As `mean`.
        directions: Unit vectors of shape (classes, features): the mean direction of each class's training images.
    """

    directions: Tensor

    def __init__(self, network: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...], directions: Tensor):
        super().__init__(network, mean=mean, std=std)
        self.register_buffer("directions", directions)

    def forward(self, image: Tensor) -> Output:
        """What it says of uint8 RGB images of shape (n, 3, size, size)."""
        logits, features = self.logits_and_features(image)
        return Output(logits, unlikeness(features, self.directions))


def logits_and_features(network: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) of normalised images, and what the last layer makes them of, (n, features); in float32."""
    found = network.forward_features(pixels)
    logits, features = network.forward_head(found), network.forward_head(found, pre_logits=True)
    if features.ndim == 4:
        features = features.mean(dim=(2, 3))  # heads that pool after their last layer, or hold 1 × 1 maps
    elif features.ndim == 3:
        features = features.mean(dim=1)
    return logits.float(), features.float()


def unlikeness(features: Tensor, directions: Tensor) -> Tensor:
    """How unlike the training images some images are, of shape (n,); see `UNLIKENESS`.

    Args:
        features: Of shape (n, features).
        directions: Unit vectors of shape (classes, features).
    """
    return 1 - (functional.normalize(features, dim=1) @ directions.T).amax(dim=1)


def laid_out(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on a device, in the layout in memory that its convolutions prefer; the numbers are the same."""
    last = gains_channels_last(network, device.type)
    return network.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)  # type: ignore[call-overload,no-any-return]
