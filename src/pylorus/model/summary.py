"""Describe a network as plain values: its blocks, their parameters and output shapes, and what each stage trains.

A run writes the description once, so that a report can draw it without torch.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from pylorus.model.backbone import restore_modes
from pylorus.model.freeze import iter_blocks

NETWORK_BLOCK = "(own)"
"""Block name for parameters that belong to the network itself, such as a class token."""


class BlockStructure(TypedDict):
    """One block; every value is plain JSON."""

    name: str
    """Name as `stages.<stage>.learn` accepts it, or `NETWORK_BLOCK`."""
    type: str
    """Class of its module."""
    layers: int
    """Number of layers with weights: convolutions and linear layers."""
    parameters: int
    """Number of its parameters that no earlier block holds."""
    output: list[int] | None
    """Output shape for one image, without the batch; None if it returns no tensor or is not called."""
    learning: dict[str, int]
    """Number of its trainable parameters in each stage."""


def extract_network_structure(
    network: nn.Module, *, image_size: int, learning: Mapping[str, Collection[str]]
) -> list[BlockStructure]:
    """List blocks with weights in the network's order: its children and, where a child is a sequence, its children.

    Runs one image of zeros through the network to find output shapes; modes are restored afterwards.

    Args:
        network: Any timm model; takes (batch, 3, size, size).
        image_size: Side of that image in pixels.
        learning: Names of the trainable parameters of each stage, as `pylorus.model.freeze.resolve_depth` gives them.

    Raises:
        ValueError: If a name in `learning` is not a parameter of the network.

    Example:
        >>> network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.AdaptiveAvgPool2d(1))
        >>> learning = {"pretrain": []}
        >>> extract_network_structure(network, image_size=8, learning=learning)  # doctest: +NORMALIZE_WHITESPACE
        [{'name': '0.0', 'type': 'Conv2d', 'layers': 1, 'parameters': 112, 'output': [4, 6, 6],
          'learning': {'pretrain': 0}}]
    """
    parameters = dict(network.named_parameters())
    for stage, names in learning.items():
        unknown = [name for name in names if name not in parameters]
        if unknown:
            raise ValueError(f'learning of stage "{stage}": the network has no parameter "{unknown[0]}"')
    modules = dict(iter_blocks(network))
    shapes = _compute_output_shapes(network, modules, image_size)
    counted_names: set[str] = set()
    structure = []
    for block, module in [(NETWORK_BLOCK, network), *modules.items()]:
        block_names = _list_block_parameters(block, parameters, [*modules]) - counted_names
        counted_names |= block_names
        if block_names:
            structure.append(
                BlockStructure(
                    name=block,
                    type=type(module).__name__ if block != NETWORK_BLOCK else ", ".join(sorted(block_names)),
                    layers=0 if block == NETWORK_BLOCK else _count_layers(module),
                    parameters=sum(parameters[name].numel() for name in block_names),
                    output=shapes.get(block),
                    learning={
                        stage: sum(parameters[name].numel() for name in block_names.intersection(names))
                        for stage, names in learning.items()
                    },
                )
            )
    return structure


def _list_block_parameters(block: str, parameters: Collection[str], blocks: list[str]) -> set[str]:
    """Return the names of a block's parameters; for `NETWORK_BLOCK`, of those that are in no block."""
    if block != NETWORK_BLOCK:
        return {name for name in parameters if name.startswith(f"{block}.")}
    block_prefixes = tuple(f"{name}." for name in blocks)
    return {name for name in parameters if not name.startswith(block_prefixes)}


def _count_layers(module: nn.Module) -> int:
    return sum(isinstance(inner, _ConvNd | nn.Linear | nn.Bilinear) for inner in module.modules())


def _compute_output_shapes(
    network: nn.Module, modules: Mapping[str, nn.Module], image_size: int
) -> dict[str, list[int]]:
    """Return each block's output shape for one image of zeros, without the batch."""
    shapes: dict[str, list[int]] = {}
    handles: list[RemovableHandle] = []

    def register_shape_hook(name: str, module: nn.Module) -> None:
        def save_shape(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = _find_first_tensor(output)
            if tensor is not None:
                shapes[name] = list(tensor.shape[1:])

        handles.append(module.register_forward_hook(save_shape))

    parameter = next(network.parameters())
    try:
        for name, module in modules.items():
            register_shape_hook(name, module)
        with restore_modes(network), torch.no_grad():
            network.eval()  # leaves batch-norm statistics alone
            network(torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device))
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _find_first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((tensor for tensor in map(_find_first_tensor, parts) if tensor is not None), None)
