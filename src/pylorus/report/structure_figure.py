"""The structure of a network: its blocks from the image to the classes, and what learned in which stage."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from pylorus.report.drawing import FAINT, INK, PAPER, WIDTH, Drawing, new_figure, style
from pylorus.report.network import Blocks, blocks_of, output_text, united
from pylorus.report.saved_run import SavedRun

FROZEN, LEARNING = "#eceff2", "#bcdcf2"
ROW = 0.27
"""Inches a block takes."""

NAME, BOX, OUTPUT, LAYERS, PARAMETERS, STAGES = 0.0, 0.34, 0.6, 0.665, 0.8, 0.83
"""Where the columns stand, as shares of the width: names from the left, boxes around their middle, numbers up to."""


def structure_figure(run: SavedRun) -> Drawing:
    """The blocks of a run's network, top to bottom.

    Args:
        run: With network.json.
    """
    blocks = blocks_of(run)
    told = united(blocks)
    stages = list(blocks[0].learning)
    layers, parameters = sum(block.layers for block in blocks), sum(block.parameters for block in blocks)
    with style():
        figure = new_figure(ROW * (len(told) + 2.4))
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(0, 1)
        axes.set_ylim(len(told) + 1.2, -1.2)
        _heads(axes, stages)
        for place, block in enumerate(told):
            _draw_block(axes, place, block, stages, _widest(told))
        _say(axes, NAME, len(told) + 0.4, "all", weight="bold")
        _say(axes, LAYERS, len(told) + 0.4, f"{layers:,}", ha="right", weight="bold")
        _say(axes, PARAMETERS, len(told) + 0.4, f"{parameters:,}", ha="right", weight="bold")
    learned = "; ".join(
        f"{stage}: {sum(block.learning[stage] for block in blocks):,} of {parameters:,} parameters learn"
        for stage in stages
    )
    return Drawing(
        key=f"structure-{run.stem}",
        title=f"Structure of {run.model}, from the image to the classes",
        basis="",
        alt=f"{len(blocks)} blocks with {layers} layers with weights. {learned}.",
        figure=figure,
        notes=(
            "Boxes are as wide as their output has channels, on a logarithmic scale. Squares: filled where all of a "
            "block learned in that stage, half where a part of it did, empty where it was frozen.",
        ),
    )


def _heads(axes: Axes, stages: Sequence[str]) -> None:
    for x, text, align in (
        (NAME, "block", "left"),
        (BOX, "type", "center"),
        (OUTPUT, "output", "right"),
        (LAYERS, "layers", "right"),
        (PARAMETERS, "parameters", "right"),
    ):
        _say(axes, x, -0.9, text, ha=align, weight="bold")
    for number, stage in enumerate(stages):
        _say(axes, _stage_at(number, len(stages)), -0.9, stage, ha="center", weight="bold")
    axes.plot([0, 1], [-0.55, -0.55], color=FAINT, linewidth=0.8)


def _draw_block(axes: Axes, place: int, block: Blocks, stages: Sequence[str], widest: float) -> None:
    learns = bool(stages) and block.learning[stages[-1]] > 0
    width = 0.15 + 0.12 * _channels(block) / widest
    if place:
        axes.annotate(
            "",
            xy=(BOX, place - 0.36),
            xytext=(BOX, place - 0.64),
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 1},
        )
    axes.add_patch(
        FancyBboxPatch(
            (BOX - width / 2, place - 0.36),
            width,
            0.72,
            boxstyle="round,pad=0,rounding_size=0.008",
            mutation_aspect=30,
            facecolor=LEARNING if learns else FROZEN,
            edgecolor=INK,
            linewidth=0.6,
            alpha=0.9,
        )
    )
    _say(axes, BOX, place, block.type if len(block.type) < 26 else f"{block.type[:24]}…", ha="center", size=7)
    _say(axes, NAME, place, block.name if len(block.name) < 26 else f"{block.name[:24]}…")
    _say(axes, OUTPUT, place, output_text(block), ha="right")
    _say(axes, LAYERS, place, str(block.layers), ha="right")
    _say(axes, PARAMETERS, place, f"{block.parameters:,}", ha="right")
    for number, stage in enumerate(stages):
        _square(axes, _stage_at(number, len(stages)), place, block.learning[stage] / max(1, block.parameters))


def _square(axes: Axes, x: float, y: float, share: float) -> None:
    """A square filled as far as a block learns: not at all, half or all."""
    height, width = 0.5, 0.5 * ROW / WIDTH
    fill = 0.0 if share == 0 else 1.0 if share == 1 else 0.5
    axes.add_patch(
        Rectangle((x - width / 2, y - height / 2), width, height, facecolor=PAPER, edgecolor=INK, linewidth=0.7)
    )
    if fill:
        axes.add_patch(
            Rectangle((x - width / 2, y + height / 2 - fill * height), width, fill * height, facecolor=INK, linewidth=0)
        )


def _stage_at(number: int, count: int) -> float:
    return STAGES + (1 - STAGES) * (number + 0.5) / max(count, 1)


def _channels(block: Blocks) -> float:
    """Channels of the output on a logarithmic scale: first of three axes, else the last."""
    if not block.output:
        return 0.0
    return math.log2(max(2, block.output[0] if len(block.output) == 3 else block.output[-1]))


def _widest(blocks: Sequence[Blocks]) -> float:
    return max(1.0, *(_channels(block) for block in blocks), 1.0)


def _say(
    axes: Axes, x: float, y: float, text: str, *, ha: str = "left", size: float = 7.5, weight: str = "normal"
) -> None:
    axes.text(x, y, text, ha=ha, va="center", fontsize=size, fontweight=weight)
