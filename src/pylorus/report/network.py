"""Structure of a network as its run recorded it, with consecutive identical blocks merged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pylorus.errors import PylorusError
from pylorus.report.saved_run import SavedRun
from pylorus.report.table import Column, Row, Table, create_text_columns


@dataclass(frozen=True)
class NetworkBlock:
    """One block, or several consecutive identical ones.

    Attributes:
        name: Name, such as `layer1.1–2`.
        type: Type, such as `2 × Bottleneck`.
        layers: Number of layers with weights: convolutions and linear layers.
        parameters: Number of parameters.
        output: Shape of the last block's output without the batch axis; None if it is not a tensor.
        learning: Number of trainable parameters by stage.
    """

    name: str
    type: str
    layers: int
    parameters: int
    output: tuple[int, ...] | None
    learning: Mapping[str, int]


def read_network_blocks(run: SavedRun) -> list[NetworkBlock]:
    """Read the blocks of a run's network, in order.

    Raises:
        PylorusError: If network.json does not have the format that a run writes.
    """
    try:
        return [
            NetworkBlock(
                name=str(block["name"]),
                type=str(block["type"]),
                layers=int(block["layers"]),
                parameters=int(block["parameters"]),
                output=None if block["output"] is None else tuple(int(side) for side in block["output"]),
                learning={str(stage): int(count) for stage, count in block["learning"].items()},
            )
            for block in run.network or []
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PylorusError(
            f"{run.folder / 'network.json'}: expected the format that a run writes, found an invalid block: {error!r}"
        ) from error


def merge_similar_blocks(blocks: Sequence[NetworkBlock]) -> list[NetworkBlock]:
    """Merge consecutive blocks of one sequence with the same type and output shape into one entry.

    Example:
        >>> two = [NetworkBlock(f"layer1.{n}", "Bottleneck", 3, 10, (64, 8, 8), {"finetune": 10}) for n in (1, 2)]
        >>> [(entry.name, entry.type, entry.layers) for entry in merge_similar_blocks(two)]
        [('layer1.1–2', '2 × Bottleneck', 6)]
    """
    runs: list[list[NetworkBlock]] = []
    for block in blocks:
        alike = runs and "." in block.name and _get_block_signature(runs[-1][-1]) == _get_block_signature(block)
        if alike:
            runs[-1].append(block)
        else:
            runs.append([block])
    return [_merge_blocks(run) for run in runs]


def build_network_table(run: SavedRun) -> Table:
    """Build the table of all blocks of a run's network."""
    blocks = read_network_blocks(run)
    stages = list(blocks[0].learning) if blocks else []
    total = Row(
        (
            "all",
            "",
            sum(block.layers for block in blocks),
            sum(block.parameters for block in blocks),
            "",
            *(sum(block.learning[stage] for block in blocks) for stage in stages),
        ),
        strong=True,
    )
    return Table(
        key=f"network-{run.stem}",
        title=f"{run.label}: blocks of the network ({run.model})",
        basis="",
        columns=(
            *create_text_columns("block", "type"),
            Column("layers with weights"),
            Column("parameters"),
            Column("output"),
            *(Column(f"learn in {stage}") for stage in stages),
        ),
        rows=(*(Row(_build_block_cells(block, stages)) for block in blocks), total),
        notes=(
            "Layers with weights: convolutions and linear layers. Output: shape for one image, without the batch axis.",
        ),
    )


def _build_block_cells(block: NetworkBlock, stages: Sequence[str]) -> tuple[Any, ...]:
    return (
        block.name,
        block.type,
        block.layers,
        block.parameters,
        format_output_shape(block),
        *(block.learning[stage] for stage in stages),
    )


def format_output_shape(block: NetworkBlock) -> str:
    """Format the output shape of a block; empty if it is unknown.

    Example:
        >>> format_output_shape(NetworkBlock("fc", "Linear", 1, 6147, (3,), {}))
        '3'
    """
    return "" if block.output is None else " × ".join(str(side) for side in block.output)


def _get_block_signature(block: NetworkBlock) -> tuple[object, ...]:
    return block.name.rpartition(".")[0], block.type, block.output


def _merge_blocks(blocks: Sequence[NetworkBlock]) -> NetworkBlock:
    first, last = blocks[0], blocks[-1]
    if first is last:
        return first
    return NetworkBlock(
        name=f"{first.name}–{last.name.rpartition('.')[2]}",
        type=f"{len(blocks)} × {first.type}",
        layers=sum(block.layers for block in blocks),
        parameters=sum(block.parameters for block in blocks),
        output=last.output,
        learning={stage: sum(block.learning[stage] for block in blocks) for stage in first.learning},
    )
