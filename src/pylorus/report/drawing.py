"""How figures look, and how they become SVG and PNG: one style, told apart by colour, line and marker alike."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pylorus.report.fonts import OWN, give_fonts

WIDTH = 7.1
"""Inches across: two columns of a journal."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Told apart by colour-blind readers too (Okabe and Ito), and rising and falling in lightness for grey print."""

LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

REPLICATES = "Thin lines: the runs of a configuration; the line of the legend is their mean."
"""The note of a figure that draws replicates."""

INK, FAINT, PAPER = "#1f2933", "#9aa5b1", "#ffffff"

STYLE: dict[str, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    # Letters as shapes: an SVG looks the same wherever it is opened.
    "svg.fonttype": "path",
    "svg.hashsalt": "pylorus",
}


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure with its caption.

    Attributes:
        key: Name of its files, unique in a report.
        title: What it shows, without a full stop.
        basis: What it rests on; whole sentences.
        alt: What a reader who can't see it has to know.
        figure: The figure.
        notes: Sentences of the caption.
    """

    key: str
    title: str
    basis: str
    alt: str
    figure: Figure
    notes: tuple[str, ...] = ()


@contextmanager
def style() -> Iterator[None]:
    """Our style while a figure is made or saved; nobody else's figures are touched."""
    # Any, because releases of matplotlib type these keys in different ways.
    settings: Any = STYLE | {"font.family": [OWN]}
    with mpl.rc_context(settings):
        yield


def new_figure(height: float, *, width: float = WIDTH, legend: Sequence[str] = ()) -> Figure:
    """An empty figure whose parts make room for each other.

    Args:
        height: In inches, without the legend.
        width: In inches.
        legend: Labels of a legend above, for which the figure is higher.
    """
    lines = -(-len(legend) // _columns(legend, width)) if legend else 0
    return Figure(figsize=(width, height + 0.19 * lines), layout="constrained")


def line_style(number: int) -> dict[str, Any]:
    """Colour, line and marker of the n-th line of a figure; 56 differ in two of the three."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def replicate_style(number: int) -> dict[str, Any]:
    """How a single replicate is drawn beside the mean of the n-th line: thin and pale, in the line's colour."""
    return {"color": COLOURS[number % len(COLOURS)], "linewidth": 0.7, "alpha": 0.45, "marker": ""}


def legend_above(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """A legend above all axes, where it covers nothing."""
    columns = _columns(labels, figure.get_figwidth())
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=8)


def _columns(labels: Sequence[str], width: float) -> int:
    """How many labels stand side by side: a letter takes 0.068 inches, a line and its spaces nine letters."""
    longest = max(len(label) for label in labels)
    return max(1, min(len(labels), int(width / 0.068 / (longest + 9))))


def legend_below(axes: Axes, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """A legend of short words below one pair of axes and their label."""
    axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.25), fontsize=7.5, borderaxespad=0)


def as_svg(drawing: Drawing) -> bytes:
    """The figure as SVG, the same bytes each time."""
    return _saved(drawing, "svg", metadata={"Date": None, "Creator": None})


def as_png(drawing: Drawing) -> bytes:
    """The figure as PNG, 200 pixels an inch."""
    return _saved(drawing, "png", dpi=200, metadata={"Software": None})


def _saved(drawing: Drawing, kind: str, **arguments: Any) -> bytes:
    file = io.BytesIO()
    give_fonts(drawing.figure)
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # `give_fonts` has told
        drawing.figure.savefig(file, format=kind, **arguments)
        # Its parts have found their places: a second format need not look for them again.
        drawing.figure.set_layout_engine("none")
    return file.getvalue()
