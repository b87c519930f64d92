"""Table and figure of a network's structure: its blocks from image to classes, and which were trained in which stage.

The blocks are read from the run's network.json; consecutive identical ones are merged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from pylorus.core.errors import PylorusError
from pylorus.report.evidence import Evidence
from pylorus.report.figure_style import FAINT, INK, PAPER, WIDTH, Drawing, create_figure, report_style
from pylorus.report.mistakes import FileOnly, Item, Section, Sentences
from pylorus.report.table import Column, Row, Table, create_text_columns
from pylorus.runs.reading import SavedRun

FROZEN, TRAINABLE = "#eceff2", "#bcdcf2"
BLOCK_HEIGHT = 0.27
"""Height of a block in inches."""

NAME, BOX, OUTPUT, LAYERS, PARAMETERS, STAGES = 0.0, 0.34, 0.6, 0.665, 0.8, 0.83
"""Positions of the columns as fractions of the width: left edge of names, center of boxes, right edge of numbers."""


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


def build_network_section(evidence: Evidence) -> Section:
    """Build the section of network structures, each shown once."""
    distinct: dict[str, SavedRun] = {}
    for run in evidence.runs:
        if run.network:
            distinct.setdefault(f"{run.model} {read_network_blocks(run)}", run)
    items: list[Item] = []
    for run in distinct.values():
        items += [plot_network_structure(run), FileOnly(build_network_table(run))]
    without = [run.label for run in evidence.runs if not run.network]
    if without:
        items.append(Sentences((f"No figure of the network, because network.json is missing: {', '.join(without)}.",)))
    return Section("networks", "Networks", tuple(items))


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


def plot_network_structure(run: SavedRun) -> Drawing:
    """Plot the blocks of a run's network, top to bottom.

    Args:
        run: A run with network.json.
    """
    blocks = read_network_blocks(run)
    rows = merge_similar_blocks(blocks)
    stages = list(blocks[0].learning)
    layers, parameters = sum(block.layers for block in blocks), sum(block.parameters for block in blocks)
    with report_style():
        figure = create_figure(BLOCK_HEIGHT * (len(rows) + 2.4))
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(0, 1)
        axes.set_ylim(len(rows) + 1.2, -1.2)
        _draw_column_heads(axes, stages)
        for position, block in enumerate(rows):
            _draw_block(axes, position, block, stages, _calculate_max_channels(rows))
        _draw_text(axes, NAME, len(rows) + 0.4, "all", weight="bold")
        _draw_text(axes, LAYERS, len(rows) + 0.4, f"{layers:,}", ha="right", weight="bold")
        _draw_text(axes, PARAMETERS, len(rows) + 0.4, f"{parameters:,}", ha="right", weight="bold")
    trained = "; ".join(
        f"{stage}: {sum(block.learning[stage] for block in blocks):,} of {parameters:,} parameters trained"
        for stage in stages
    )
    return Drawing(
        key=f"structure-{run.stem}",
        title=f"Structure of {run.model}, from image to classes",
        basis="",
        alt=f"{len(blocks)} blocks with {layers} layers with weights. {trained}.",
        figure=figure,
        notes=(
            "Box width increases with the number of output channels (logarithmic scale). Squares: filled if all "
            "parameters of a block were trained in that stage, half filled if some were, empty if the block was "
            "frozen.",
            *(
                (f"Stages: {', '.join(f'{number} {stage}' for number, stage in enumerate(stages, start=1))}.",)
                if len(stages) > MAX_NAMED_STAGES
                else ()
            ),
        ),
    )


MAX_NAMED_STAGES = 2
"""More stages are numbered, as their names would cover each other."""


def _draw_column_heads(axes: Axes, stages: Sequence[str]) -> None:
    for x, text, align in (
        (NAME, "block", "left"),
        (BOX, "type", "center"),
        (OUTPUT, "output", "right"),
        (LAYERS, "layers", "right"),
        (PARAMETERS, "parameters", "right"),
    ):
        _draw_text(axes, x, -0.9, text, ha=align, weight="bold")
    heads = stages if len(stages) <= MAX_NAMED_STAGES else [str(number + 1) for number in range(len(stages))]
    for number, head in enumerate(heads):
        _draw_text(axes, _calculate_stage_position(number, len(stages)), -0.9, head, ha="center", weight="bold")
    axes.plot([0, 1], [-0.55, -0.55], color=FAINT, linewidth=0.8)


def _draw_block(axes: Axes, position: int, block: NetworkBlock, stages: Sequence[str], widest: float) -> None:
    is_trained = bool(stages) and block.learning[stages[-1]] > 0
    width = 0.15 + 0.12 * _calculate_log_channels(block) / widest
    if position:
        axes.annotate(
            "",
            xy=(BOX, position - 0.36),
            xytext=(BOX, position - 0.64),
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 1},
        )
    axes.add_patch(
        FancyBboxPatch(
            (BOX - width / 2, position - 0.36),
            width,
            0.72,
            boxstyle="round,pad=0,rounding_size=0.008",
            mutation_aspect=30,
            facecolor=TRAINABLE if is_trained else FROZEN,
            edgecolor=INK,
            linewidth=0.6,
            alpha=0.9,
        )
    )
    _draw_text(axes, BOX, position, block.type if len(block.type) < 26 else f"{block.type[:24]}…", ha="center", size=7)
    _draw_text(axes, NAME, position, block.name if len(block.name) < 26 else f"{block.name[:24]}…")
    _draw_text(axes, OUTPUT, position, format_output_shape(block), ha="right")
    _draw_text(axes, LAYERS, position, str(block.layers), ha="right")
    _draw_text(axes, PARAMETERS, position, f"{block.parameters:,}", ha="right")
    for number, stage in enumerate(stages):
        _draw_training_square(
            axes,
            _calculate_stage_position(number, len(stages)),
            position,
            block.learning[stage] / max(1, block.parameters),
        )


def _draw_training_square(axes: Axes, x: float, y: float, proportion: float) -> None:
    """Draw a square that is empty, half filled or filled for the proportion of a block that is trained."""
    height, width = 0.5, 0.5 * BLOCK_HEIGHT / WIDTH
    fill = 0.0 if proportion == 0 else 1.0 if proportion == 1 else 0.5
    axes.add_patch(
        Rectangle((x - width / 2, y - height / 2), width, height, facecolor=PAPER, edgecolor=INK, linewidth=0.7)
    )
    if fill:
        axes.add_patch(
            Rectangle((x - width / 2, y + height / 2 - fill * height), width, fill * height, facecolor=INK, linewidth=0)
        )


def _calculate_stage_position(number: int, count: int) -> float:
    return STAGES + (1 - STAGES) * (number + 0.5) / max(count, 1)


def _calculate_log_channels(block: NetworkBlock) -> float:
    """Return log2 of the number of output channels: the first of three axes, else the last."""
    if not block.output:
        return 0.0
    return math.log2(max(2, block.output[0] if len(block.output) == 3 else block.output[-1]))


def _calculate_max_channels(blocks: Sequence[NetworkBlock]) -> float:
    return max(1.0, *(_calculate_log_channels(block) for block in blocks), 1.0)


def _draw_text(
    axes: Axes, x: float, y: float, text: str, *, ha: str = "left", size: float = 7.5, weight: str = "normal"
) -> None:
    axes.text(x, y, text, ha=ha, va="center", fontsize=size, fontweight=weight)
