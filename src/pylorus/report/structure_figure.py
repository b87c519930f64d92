"""Plot the structure of a network: its blocks from image to classes, and which were trained in which stage."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from pylorus.report.drawing import FAINT, INK, PAPER, WIDTH, Drawing, create_figure, report_style
from pylorus.report.network import NetworkBlock, format_output_shape, merge_similar_blocks, read_network_blocks
from pylorus.report.saved_run import SavedRun

FROZEN, LEARNING = "#eceff2", "#bcdcf2"
ROW = 0.27
"""Height of a block in inches."""

NAME, BOX, OUTPUT, LAYERS, PARAMETERS, STAGES = 0.0, 0.34, 0.6, 0.665, 0.8, 0.83
"""Positions of the columns as fractions of the width: left edge of names, center of boxes, right edge of numbers."""


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
        figure = create_figure(ROW * (len(rows) + 2.4))
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
        ),
    )


def _draw_column_heads(axes: Axes, stages: Sequence[str]) -> None:
    for x, text, align in (
        (NAME, "block", "left"),
        (BOX, "type", "center"),
        (OUTPUT, "output", "right"),
        (LAYERS, "layers", "right"),
        (PARAMETERS, "parameters", "right"),
    ):
        _draw_text(axes, x, -0.9, text, ha=align, weight="bold")
    for number, stage in enumerate(stages):
        _draw_text(axes, _calculate_stage_position(number, len(stages)), -0.9, stage, ha="center", weight="bold")
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
            facecolor=LEARNING if is_trained else FROZEN,
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
    height, width = 0.5, 0.5 * ROW / WIDTH
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
