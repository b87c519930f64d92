"""Find the last feature map of a network, from which heat maps are computed, and make it accessible to hooks."""

import copy
import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pylorus.errors import PylorusError

POOLS = (nn.MaxPool2d, nn.AvgPool2d)


class FeatureTap(nn.Module):
    """Wrap a module so that its output passes through `map` as (n, channels, height, width), whatever its own layout.

    Args:
        part: Module that returns maps (n, channels, height, width) or (n, height, width, channels), or tokens
            (n, tokens, channels).
        channels_last: Whether the maps are (n, height, width, channels).
        prefix: Number of tokens before those of the image, such as a class token.
    """

    def __init__(self, part: nn.Module, *, channels_last: bool = False, prefix: int = 0) -> None:
        super().__init__()
        self.part, self.channels_last, self.prefix = part, channels_last, prefix
        self.map = nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the module's output, unchanged."""
        output = self.part(inputs)
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            raise PylorusError(
                "a heat map needs a last feature map or a square grid of tokens; this network has neither."
            )
        if output.ndim == 4:
            if not self.channels_last:
                return self.map(output)  # type: ignore[no-any-return]
            return self.map(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # type: ignore[no-any-return]
        # Some networks add the class token only after their last block.
        count = output.shape[1]
        prefix = next(
            (candidate for candidate in (self.prefix, 0) if math.isqrt(count - candidate) ** 2 == count - candidate),
            None,
        )
        if prefix is None:
            raise PylorusError(f"a heat map needs a square grid of tokens; this network has {count} tokens.")
        prefix_tokens, tokens = output[:, :prefix], output[:, prefix:]
        side = math.isqrt(count - prefix)
        square = self.map(tokens.transpose(1, 2).reshape(len(tokens), -1, side, side))
        return torch.cat([prefix_tokens, square.flatten(2).transpose(1, 2)], dim=1)


class _Features(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network.forward_features(pixels)  # type: ignore[no-any-return]


class _FeaturesAndHead(nn.Module):
    def __init__(self, features: nn.Module, network: Any) -> None:
        super().__init__()
        self.features, self.network = features, network

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network.forward_head(self.features(pixels))  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class LastMap:
    """A network and its last feature map.

    Attributes:
        network: Module that returns logits (n, classes) for normalised images.
        layer: Its module whose output is the feature map, (n, channels, height, width).
        method: Description of where Grad-CAM is applied.
    """

    network: nn.Module
    layer: nn.Module
    method: str


def find_last_map(network: Any) -> LastMap:
    """Find the last feature map before the head of a timm model.

    The modules are copies that share the model's tensors, so hooks on them don't affect others who use the model at the
    same time.

    Args:
        network: A timm model; it is not changed.

    Raises:
        PylorusError: If it has a class token but blocks of an unknown type.
    """
    tensors = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
    network_copy = copy.deepcopy(network, tensors)
    prefix = int(getattr(network_copy, "num_prefix_tokens", 0) or 0)
    if prefix:
        blocks = getattr(network_copy, "blocks", None)
        block: Any = blocks[-1] if isinstance(blocks, nn.Sequential | nn.ModuleList) else None
        if not hasattr(block, "norm1"):
            raise PylorusError(
                "a heat map needs the tokens that enter the last block; they are not accessible in "
                f"{type(network_copy).__name__}."
            )
        tap = block.norm1 = FeatureTap(block.norm1, prefix=prefix)
        return LastMap(network_copy, tap.map, "Grad-CAM on the tokens that enter the last block, as a square grid")
    pool = _find_last_pool(network_copy)
    if pool is not None:
        layers, index = pool
        tap = layers[index - 1] = FeatureTap(layers[index - 1])
        return LastMap(network_copy, tap.map, "Grad-CAM on the last feature map before the last pooling")
    tap = FeatureTap(_Features(network_copy), channels_last=getattr(network_copy, "output_fmt", None) == "NHWC")
    return LastMap(_FeaturesAndHead(tap, network_copy), tap.map, "Grad-CAM on the last feature map before pooling")


def _find_last_pool(network: Any) -> tuple[nn.Sequential, int] | None:
    """Return the pooling that ends a network's features, as in VGG: its container and index; None if there is none."""
    info = getattr(network, "feature_info", None)
    if not info:
        return None
    name = (info[-1] if isinstance(info, list) else info.info[-1])["module"]
    parent, _, index = name.rpartition(".")
    layers = dict(network.named_modules()).get(parent)  # not every name that timm reports is a module
    if not (isinstance(layers, nn.Sequential) and index.isdigit() and isinstance(layers[int(index)], POOLS)):
        return None
    return layers, int(index)
