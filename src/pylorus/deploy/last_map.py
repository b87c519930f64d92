"""Where a network's heat map is taken: its last map of features, opened so that it can be looked at."""

import copy
import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pylorus.errors import PylorusError

POOLS = (nn.MaxPool2d, nn.AvgPool2d)


class Opened(nn.Module):
    """A part of a network whose output passes through `map` as (n, channels, height, width), whatever its layout.

    Args:
        part: Gives maps (n, channels, height, width) or (n, height, width, channels), or tokens (n, tokens, channels).
        channels_last: Whether its maps have the channels last.
        prefix: Tokens before those of the image, such as a class token.
    """

    def __init__(self, part: nn.Module, *, channels_last: bool = False, prefix: int = 0) -> None:
        super().__init__()
        self.part, self.channels_last, self.prefix = part, channels_last, prefix
        self.map = nn.Identity()

    def forward(self, given: Tensor) -> Tensor:
        """What the part gives."""
        found = self.part(given)
        if not isinstance(found, Tensor) or found.ndim not in (3, 4):
            raise PylorusError("a heat map needs a last map, or tokens of a square; this network has neither.")
        if found.ndim == 4:
            if not self.channels_last:
                return self.map(found)  # type: ignore[no-any-return]
            return self.map(found.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]
        # Some networks put the class token to the others only after their last block.
        count = found.shape[1]
        prefix = next((each for each in (self.prefix, 0) if math.isqrt(count - each) ** 2 == count - each), None)
        if prefix is None:
            raise PylorusError(f"a heat map needs the tokens of a square; this network has {count} tokens.")
        before, tokens = found[:, :prefix], found[:, prefix:]
        side = math.isqrt(count - prefix)
        square = self.map(tokens.transpose(1, 2).reshape(len(tokens), -1, side, side))
        return torch.cat([before, square.flatten(2).transpose(1, 2)], dim=1)


class _Features(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network.forward_features(pixels)  # type: ignore[no-any-return]


class _Split(nn.Module):
    def __init__(self, features: nn.Module, network: Any) -> None:
        super().__init__()
        self.features, self.network = features, network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network.forward_head(self.features(pixels))  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class LastMap:
    """A network and its last map of features.

    Attributes:
        network: Gives logits (n, classes) of normalised images.
        layer: A module of it whose output is the map, (n, channels, height, width).
        method: What Grad-CAM is taken of, in words.
    """

    network: nn.Module
    layer: nn.Module
    method: str


def last_map(network: Any) -> LastMap:
    """Finds the last map before the head in a timm model.

    The modules are copies with the model's own tensors: what is hung on them is not seen by others who use the model
    at the same time.

    Args:
        network: A timm model; it is not changed.

    Raises:
        PylorusError: If it has a class token, but blocks of an unknown kind.
    """
    tensors = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
    own = copy.deepcopy(network, tensors)
    prefix = int(getattr(own, "num_prefix_tokens", 0) or 0)
    if prefix:
        blocks = getattr(own, "blocks", None)
        block: Any = blocks[-1] if isinstance(blocks, nn.Sequential | nn.ModuleList) else None
        if not hasattr(block, "norm1"):
            raise PylorusError(
                f"a heat map needs the tokens that enter the last block; {type(own).__name__} hides them."
            )
        opened = block.norm1 = Opened(block.norm1, prefix=prefix)
        return LastMap(own, opened.map, "Grad-CAM on the tokens that enter the last block, as a square")
    pool = _last_pool(own)
    if pool is not None:
        layers, place = pool
        opened = layers[place - 1] = Opened(layers[place - 1])
        return LastMap(own, opened.map, "Grad-CAM on the last map before the last pooling")
    opened = Opened(_Features(own), channels_last=getattr(own, "output_fmt", None) == "NHWC")
    return LastMap(_Split(opened, own), opened.map, "Grad-CAM on the last map before pooling")


def _last_pool(network: Any) -> tuple[nn.Sequential, int] | None:
    """The pooling that the features of a network end with, as VGG's do, by its place; None where they do not."""
    info = getattr(network, "feature_info", None)
    if not info:
        return None
    name = (info[-1] if isinstance(info, list) else info.info[-1])["module"]
    parent, _, place = name.rpartition(".")
    layers = dict(network.named_modules()).get(parent)  # not every name that timm gives is one
    if not (isinstance(layers, nn.Sequential) and place.isdigit() and isinstance(layers[int(place)], POOLS)):
        return None
    return layers, int(place)
