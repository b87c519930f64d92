"""The structure of a network as its run wrote it down: blocks alike are told together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pylorus.errors import PylorusError
from pylorus.report.saved_run import SavedRun
from pylorus.report.table import Column, Row, Table, text_columns


@dataclass(frozen=True)
class Blocks:
    """One block, or several alike in a row.

    Attributes:
        name: As `layer1.1–2`.
        type: As `2 × Bottleneck`.
        layers: Layers with weights: convolutions and linear layers.
        parameters: How many there are.
        output: Shape of what the last gives, without the batch; None where that is no tensor.
        learning: How many of the parameters learn in each stage.
    """

    name: str
    type: str
    layers: int
    parameters: int
    output: tuple[int, ...] | None
    learning: Mapping[str, int]


def blocks_of(run: SavedRun) -> list[Blocks]:
    """The blocks of a run's network, in its order.

    Raises:
        PylorusError: If network.json is not as a run writes it.
    """
    try:
        return [
            Blocks(
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
        raise PylorusError(f"{run.folder / 'network.json'}: not as a run writes it: {error!r}") from error


def united(blocks: Sequence[Blocks]) -> list[Blocks]:
    """Neighbours in one sequence, of one type and one output, as one entry.

    Example:
        >>> two = [Blocks(f"layer1.{n}", "Bottleneck", 3, 10, (64, 8, 8), {"finetune": 10}) for n in (1, 2)]
        >>> [(entry.name, entry.type, entry.layers) for entry in united(two)]
        [('layer1.1–2', '2 × Bottleneck', 6)]
    """
    runs: list[list[Blocks]] = []
    for block in blocks:
        alike = runs and "." in block.name and _kind(runs[-1][-1]) == _kind(block)
        if alike:
            runs[-1].append(block)
        else:
            runs.append([block])
    return [_one(run) for run in runs]


def network_table(run: SavedRun) -> Table:
    """Every block of a run's network."""
    blocks = blocks_of(run)
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
            *text_columns("block", "type"),
            Column("layers with weights"),
            Column("parameters"),
            Column("output"),
            *(Column(f"learn in {stage}") for stage in stages),
        ),
        rows=(*(Row(_cells(block, stages)) for block in blocks), total),
        notes=("Layers with weights: convolutions and linear layers. Output: of one image, without the batch.",),
    )


def _cells(block: Blocks, stages: Sequence[str]) -> tuple[Any, ...]:
    return (
        block.name,
        block.type,
        block.layers,
        block.parameters,
        output_text(block),
        *(block.learning[stage] for stage in stages),
    )


def output_text(block: Blocks) -> str:
    """The shape of what it gives, or nothing.

    Example:
        >>> output_text(Blocks("fc", "Linear", 1, 6147, (3,), {}))
        '3'
    """
    return "" if block.output is None else " × ".join(str(side) for side in block.output)


def _kind(block: Blocks) -> tuple[object, ...]:
    return block.name.rpartition(".")[0], block.type, block.output


def _one(blocks: Sequence[Blocks]) -> Blocks:
    first, last = blocks[0], blocks[-1]
    if first is last:
        return first
    return Blocks(
        name=f"{first.name}–{last.name.rpartition('.')[2]}",
        type=f"{len(blocks)} × {first.type}",
        layers=sum(block.layers for block in blocks),
        parameters=sum(block.parameters for block in blocks),
        output=last.output,
        learning={stage: sum(block.learning[stage] for block in blocks) for stage in first.learning},
    )
