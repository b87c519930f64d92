"""Style, fonts and panels of the figures, their export to SVG and PNG, and what the sections of a report consist of.

Series differ in color, line style and marker. Characters that matplotlib's default font lacks, as in Chinese class
names, are drawn in a font of the system.
"""

import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from pylorus.report.mistakes import Pictures
from pylorus.report.results import Result
from pylorus.report.table import Table

log = logging.getLogger(__name__)

DEFAULT_FONT = "DejaVu Sans"
"""matplotlib's default font, always available: Latin, Greek, Cyrillic, arrows and symbols."""

CJK_FONTS = re.compile(
    r"NotoSansCJK|NotoSansSC|SourceHanSans|PingFang|msyh|simhei|wqy|Hiragino|YuGoth|malgun|AppleGothic|Arial ?Unicode",
    re.IGNORECASE,
)
"""File names of fonts with Chinese, Japanese or Korean characters on Linux, macOS and Windows."""

WIDTH = 7.1
"""Width in inches: two columns of a journal."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Colours that colour-blind readers can distinguish (Okabe and Ito), alternating in lightness for greyscale print."""

LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

REPLICATES_NOTE = "Thin lines: individual runs of a configuration; the line in the legend is their mean."
"""Note below a figure with replicates."""

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
    # Text as paths, so that an SVG looks the same everywhere.
    "svg.fonttype": "path",
    "svg.hashsalt": "pylorus",
}

MAX_COLUMNS = 4
"""Maximum number of panels per row."""

MAX_PANELS = 16
"""Maximum number of panels per figure: what fits on a printed page."""


def set_figure_fonts(figure: Figure) -> None:
    """Set a CJK font on the texts of a figure that the default font cannot draw; warn if none is installed."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if not is_in_default_font(text.get_text()):
            font = _load_cjk_font()
            if font is not None:
                text.set_fontfamily([DEFAULT_FONT, font])
                text.set_fontweight("normal")  # the font may have no bold weight


def is_in_default_font(text: str) -> bool:
    """Return whether matplotlib's default font has all characters of a text."""
    # Latin characters need no lookup in the font.
    return max(map(ord, text), default=0) < 0x250 or _load_default_characters().issuperset(map(ord, text))


@cache
def _load_default_characters() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont(DEFAULT_FONT))
    return frozenset(int(code) for code in font.get_charmap())


@cache
def _load_cjk_font() -> str | None:
    """Return the name of a CJK font, after registering it: matplotlib's cached font list may be older."""
    path = find_cjk_font_file()
    if path is None:
        log.warning(
            "No installed font can draw these class names: figures will show boxes instead. Install Noto Sans CJK "
            "(on Debian and Ubuntu: apt install fonts-noto-cjk)."
        )
        return None
    font_manager.fontManager.addfont(path)
    return str(font_manager.get_font(path).family_name)


def find_cjk_font_file() -> Path | None:
    """Return the file of an installed font with Chinese, Japanese or Korean characters; None if there is none."""
    return _find_preferred_font(Path(path) for path in font_manager.findSystemFonts())


def _find_preferred_font(paths: Iterable[Path]) -> Path | None:
    """Select a known font deterministically, preferring the regular weight; None if there is none."""
    known = sorted(path for path in paths if CJK_FONTS.search(path.name))
    regular = [path for path in known if "regular" in path.name.lower()]
    return next(iter(regular or known), None)


@dataclass(frozen=True, eq=False)
class Drawing:
    """A figure with its caption.

    Attributes:
        key: Stem of its file names, unique in a report.
        title: Title, without a full stop.
        basis: The data it is based on, in full sentences.
        alt: Alternative text for readers who cannot see the figure.
        figure: The figure.
        notes: Further sentences of the caption.
    """

    key: str
    title: str
    basis: str
    alt: str
    figure: Figure
    notes: tuple[str, ...] = ()


@contextmanager
def report_style() -> Iterator[None]:
    """Apply the report's style while a figure is created or saved, without affecting other figures."""
    # Any, because matplotlib releases type these keys differently.
    settings: Any = STYLE | {"font.family": [DEFAULT_FONT]}
    with mpl.rc_context(settings):
        yield


def create_figure(height: float, *, width: float = WIDTH, legend: Sequence[str] = ()) -> Figure:
    """Create an empty figure with constrained layout.

    Args:
        height: Height in inches, without the legend.
        width: Width in inches.
        legend: Labels of a legend above the axes; the height grows to fit it.
    """
    lines = -(-len(legend) // _count_legend_columns(legend, width)) if legend else 0
    return Figure(figsize=(width, height + 0.19 * lines), layout="constrained")


def get_line_style(number: int) -> dict[str, Any]:
    """Return colour, line style and marker of the n-th line of a figure; the first 56 are distinct."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def get_replicate_style(number: int) -> dict[str, Any]:
    """Return the style of a single replicate of the n-th line: thin and pale, in the colour of the line."""
    return {"color": COLOURS[number % len(COLOURS)], "linewidth": 0.7, "alpha": 0.45, "marker": ""}


def add_legend_above(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Add a legend above all axes, where it covers nothing."""
    columns = _count_legend_columns(labels, figure.get_figwidth())
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=8)


def _count_legend_columns(labels: Sequence[str], width: float) -> int:
    """Return how many labels fit side by side: 0.068 inches per character, nine characters for the line sample."""
    longest = max(len(label) for label in labels)
    return max(1, min(len(labels), int(width / 0.068 / (longest + 9))))


def add_legend_below(axes: Axes, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Add a legend of short labels below one panel and its axis label."""
    axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.25), fontsize=7.5, borderaxespad=0)


def render_svg(drawing: Drawing) -> bytes:
    """Render the figure as SVG; the bytes are reproducible."""
    return _render_figure(drawing, "svg", metadata={"Date": None, "Creator": None})


def render_png(drawing: Drawing) -> bytes:
    """Render the figure as PNG at 200 dpi."""
    return _render_figure(drawing, "png", dpi=200, metadata={"Software": None})


def _render_figure(drawing: Drawing, kind: str, **arguments: Any) -> bytes:
    file = io.BytesIO()
    set_figure_fonts(drawing.figure)
    with report_style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # `set_figure_fonts` has warned
        drawing.figure.savefig(file, format=kind, **arguments)
        # The layout is final: a second format need not compute it again.
        drawing.figure.set_layout_engine("none")
    return file.getvalue()


def split_into_panels(results: Sequence[Result]) -> list[list[list[Result | None]]]:
    """Arrange results in figures of rows of panels: models in columns and stages in rows if they fit, else in sequence.

    Args:
        results: At least one, in the order of runs and stages.

    Returns:
        Figures, each a list of rows of equal length; None marks an empty panel.
    """
    runs = list(dict.fromkeys(result.run for result in results))
    stages = list(dict.fromkeys(result.stage.name for result in results))
    if 1 < len(runs) <= MAX_COLUMNS and len(runs) * len(stages) <= MAX_PANELS:
        by_position = {(result.stage.name, result.run): result for result in results}
        return [[[by_position.get((stage, run)) for run in runs] for stage in stages]]
    figures = []
    for start in range(0, len(results), MAX_PANELS):
        chunk: list[Result | None] = list(results[start : start + MAX_PANELS])
        columns = min(MAX_COLUMNS, len(chunk))
        chunk += [None] * (-len(chunk) % columns)
        figures.append([chunk[first : first + columns] for first in range(0, len(chunk), columns)])
    return figures


@dataclass(frozen=True)
class Sentences:
    """Sentences, each in its own paragraph or, if `is_list`, as items of a list."""

    texts: tuple[str, ...]
    is_list: bool = False


@dataclass(frozen=True)
class Listing:
    """Preformatted text, such as the content of a file."""

    title: str
    text: str


@dataclass(frozen=True)
class FileOnly:
    """A table that is written to files but not shown on the page."""

    table: Table


Item: TypeAlias = Table | Drawing | Sentences | Pictures | Listing | FileOnly


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        key: Anchor of the section in the page.
        title: Heading.
        items: Content, in order; a section without items is omitted.
    """

    key: str
    title: str
    items: tuple[Item, ...]
