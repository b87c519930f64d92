"""Style, text and panels of the figures, and their export to SVG and PNG.

Series differ in color, line style and marker. All text is plain: dollar signs in class names are no formulas.
Characters that matplotlib's default font lacks, as in Chinese class names, are drawn in a system font; where none has
them, letters stand for them, which the caption explains. Long names are wrapped by their measured width.
"""

import io
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Patch
from matplotlib.text import Text

from pylorus.report.results import Result

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
    # Names of classes, models and stages may contain dollar signs.
    "text.parse_math": False,
}

MAX_COLUMNS = 4
"""Maximum number of panels per row."""

MAX_PANELS = 16
"""Maximum number of panels per figure: what fits on a printed page."""


class ReportFigure(Figure):
    """A figure whose text is safe to draw, whoever draws it: a report, a dashboard or a notebook."""

    def draw(self, renderer: Any) -> None:
        """Draw in the report's style; names are no formulas, and each character is drawn in a font that has it."""
        with report_style():
            prepare_text(self)
            super().draw(renderer)


def prepare_text(figure: Figure, label: Callable[[str], str] | None = None) -> None:
    """Make a figure's text plain, and replace characters that no installed font can draw.

    Args:
        figure: The figure.
        label: Returns what to write in place of such characters; None: their Unicode code points.
    """
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        plain = _set_reading_direction(replace_undrawable(text.get_text(), label))
        if plain != text.get_text():
            text.set_text(plain)
    for axes in figure.axes:
        # An axis writes its tick labels again whenever it is drawn.
        for axis in (axes.xaxis, axes.yaxis):
            ticks = [tick.get_text() for tick in axis.get_ticklabels()]
            if any(find_undrawable(tick) for tick in ticks):
                axis.set_ticks(axis.get_ticklocs(), [replace_undrawable(tick, label) for tick in ticks])
    set_figure_fonts(figure)


LEFT_TO_RIGHT = "\N{LEFT-TO-RIGHT MARK}"


def _set_reading_direction(text: str) -> str:
    """Keep a sentence in order that contains Arabic or Hebrew names: it would be read from the right otherwise."""
    lines = text.split("\n")
    has_right_to_left = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text)
    if not has_right_to_left or lines[0].startswith(LEFT_TO_RIGHT):
        return text
    return "\n".join(LEFT_TO_RIGHT + line for line in lines)


def replace_undrawable(text: str, label: Callable[[str], str] | None = None) -> str:
    """Replace the characters of a text that no installed font can draw; drop those that are invisible anyway.

    Args:
        text: The text.
        label: Returns what to write in place of several such characters in a row; None: their Unicode code points.
    """
    undrawable = find_undrawable(text)
    if not undrawable:
        return text
    visible = "".join(
        letter for letter in text if letter not in undrawable or unicodedata.category(letter) not in ("Mn", "Cf", "Cc")
    )
    run = "[" + re.escape("".join(sorted(undrawable))) + "]"
    return re.sub(rf"{run}(?:{run}| (?={run}))*", lambda match: (label or _format_code_points)(match[0]), visible)


def _format_code_points(characters: str) -> str:
    return "[" + " ".join(f"U+{ord(letter):04X}" for letter in characters) + "]"


def find_undrawable(text: str) -> frozenset[str]:
    """Return the characters of a text that no installed font can draw."""
    if is_in_default_font(text):
        return frozenset()
    missing = frozenset(letter for letter in text if ord(letter) not in _load_default_characters() and letter != "\n")
    covered = {
        letter for path in _find_font_files(missing) for letter in missing if ord(letter) in _load_characters(path)
    }
    undrawable = missing - covered
    if undrawable and not (any(map(_is_ideograph, undrawable)) and _load_cjk_font() is None):  # which warns itself
        _warn_of_missing_fonts(frozenset(letter for letter in undrawable if letter.isprintable()))
    return undrawable


def select_font(text: str) -> tuple[Path, str]:
    """Return the file of the font that has most characters of a text, and the text with code points for the others."""
    missing = frozenset(letter for letter in text if ord(letter) not in _load_default_characters())
    default = Path(font_manager.findfont(DEFAULT_FONT))
    path = max(
        [default, *_find_font_files(missing)],
        key=lambda path: sum(ord(letter) in _load_characters(path) for letter in text),
    )
    known = _load_characters(path)
    return path, "".join(letter if ord(letter) in known else _format_code_points(letter) for letter in text)


def set_figure_fonts(figure: Figure) -> None:
    """Set a font of the system on the texts of a figure that the default font cannot draw; warn if there is none."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if not is_in_default_font(text.get_text()):
            fonts = _list_fallback_fonts(text.get_text())
            if fonts:
                text.set_fontfamily([DEFAULT_FONT, *fonts])
                text.set_fontweight("normal")  # the fonts may have no bold weight


def _list_fallback_fonts(text: str) -> list[str]:
    """Return the names of the fonts that have what the default font lacks, after registering them."""
    missing = frozenset(letter for letter in text if ord(letter) not in _load_default_characters())
    cjk_font = _load_cjk_font() if any(map(_is_ideograph, missing)) else None
    names = [] if cjk_font is None else [cjk_font]
    for path in _find_font_files(missing):
        font_manager.fontManager.addfont(path)
        names.append(str(font_manager.get_font(path).family_name))
    return list(dict.fromkeys(names))


def _is_ideograph(letter: str) -> bool:
    """Return whether a character is one of those for which `find_cjk_font_file` looks."""
    return unicodedata.category(letter) == "Lo" and unicodedata.east_asian_width(letter) in ("W", "F")


@cache
def _warn_of_missing_fonts(characters: frozenset[str]) -> None:
    if characters:
        log.warning(
            "No installed font can draw %s in these class names: figures show a letter in brackets or a Unicode code "
            "point instead. Install a font for this script, such as Noto Sans.",
            " ".join(f"U+{ord(letter):04X}" for letter in sorted(characters)),
        )


@lru_cache(maxsize=256)
def _find_font_files(characters: frozenset[str]) -> tuple[Path, ...]:
    """Find fonts of the system that have characters, those for Chinese, Japanese and Korean first, else by name."""
    cjk_file = find_cjk_font_file() if any(map(_is_ideograph, characters)) else None
    paths = sorted(
        map(Path, font_manager.findSystemFonts()), key=lambda path: ("regular" not in path.name.lower(), path)
    )
    wanted, files = {ord(letter) for letter in characters}, []
    for path in [*([] if cjk_file is None else [cjk_file]), *paths]:
        if wanted & _load_characters(path):
            files.append(path)
            wanted -= _load_characters(path)
        if not wanted:
            break
    return tuple(files)


@cache
def _load_characters(path: Path) -> frozenset[int]:
    """Return the code points that a font file can draw; none if matplotlib can't use it (fonts of colored emoji)."""
    try:
        font = font_manager.get_font(path)
        return frozenset(map(int, font.get_charmap())) if font.scalable else frozenset()
    except Exception:  # whatever a damaged file raises
        return frozenset()


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
            "No installed font can draw the Chinese, Japanese or Korean characters of these class names: figures show "
            "a letter in brackets or Unicode code points instead. Install Noto Sans CJK (on Debian and Ubuntu: apt "
            "install fonts-noto-cjk)."
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


@lru_cache(maxsize=4096)
def measure_text(text: str, size: float, *, bold: bool = False) -> float:
    """Return the width of a line in inches at a size in points; ideographs count as squares."""
    font = FT2Font(font_manager.findfont(DEFAULT_FONT))
    font.set_size(size, 72)
    known = "".join(letter for letter in text if ord(letter) in _load_default_characters())
    font.set_text(known)
    width = font.get_width_height()[0] / 64 / 72 + (len(text) - len(known)) * size / 72
    return float(width) * (BOLD_RATIO if bold else 1)


BOLD_RATIO = 1.15
"""Width of bold text relative to regular text."""


def wrap_text(text: str, width: float, size: float, *, bold: bool = False) -> str:
    r"""Break a text into lines of at most `width` inches, after spaces, underscores, hyphens and dots if possible.

    Example:
        >>> wrap_text("intestinal_metaplasia", 0.8, 8)
        'intestinal_\nmetaplasia'
    """
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for token in re.findall(r"[_.\-]*[^\s_.\-]+[_.\-]*\s*|\S+\s*|\s+", paragraph):
            for part in _split_token(token, width, size, bold=bold):
                if line and measure_text((line + part).rstrip(), size, bold=bold) > width:
                    lines.append(line.rstrip())
                    line = ""
                line += part
        lines.append(line.rstrip())
    return "\n".join(lines)


def _split_token(token: str, width: float, size: float, *, bold: bool) -> list[str]:
    """Split a word into parts of at most `width` inches."""
    parts = [""]
    for letter in token:
        if parts[-1] and measure_text((parts[-1] + letter).rstrip(), size, bold=bold) > width:
            parts.append("")
        parts[-1] += letter
    return parts


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

    def __post_init__(self) -> None:
        """Put letters in place of characters that no installed font can draw, and explain them in the caption."""
        letters: dict[str, str] = {}
        prepare_text(
            self.figure, lambda characters: letters.setdefault(characters, f"[{_format_letter(len(letters))}]")
        )
        if letters:
            meanings = ", ".join(f"{letter} {characters}" for characters, letter in letters.items())
            note = f"Letters in brackets stand for characters that no installed font can draw: {meanings}."
            object.__setattr__(self, "notes", (*self.notes, note))


def _format_letter(number: int) -> str:
    """Return A for 0, B for 1, and so on; AA follows Z."""
    return ("" if number < 26 else _format_letter(number // 26 - 1)) + chr(ord("A") + number % 26)


@contextmanager
def report_style() -> Iterator[None]:
    """Apply the report's style while a figure is created or saved, without affecting other figures."""
    # Any, because matplotlib releases type these keys differently.
    settings: Any = STYLE | {"font.family": [DEFAULT_FONT]}
    with mpl.rc_context(settings):
        yield


LEGEND_SIZE = 8.0
"""Font size of a legend above the axes."""


def create_figure(
    height: float, *, width: float = WIDTH, legend: Sequence[str] = (), key: Sequence[str] = ()
) -> Figure:
    """Create an empty figure with constrained layout.

    Args:
        height: Height in inches, without the legend and the key.
        width: Width in inches.
        legend: Labels of a legend above the axes; the height grows to fit it.
        key: Entries of a key below the axes; the height grows to fit it.
    """
    height += 0.2 if key else 0
    for labels, arrange, line in ((legend, _arrange_legend, 0.19), (key, _arrange_key, 0.17)):
        columns, wrapped = arrange(labels, width) if labels else (1, [])
        height += line * sum(
            max(label.count("\n") + 1 for label in islice(wrapped, row, None, -(-len(wrapped) // columns)))
            for row in range(-(-len(wrapped) // columns))
        )
    return ReportFigure(figsize=(width, height), layout="constrained")


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
    columns, wrapped = _arrange_legend(labels, figure.get_figwidth())
    _add_legend(figure, handles, wrapped, loc="outside upper left", ncols=columns, fontsize=LEGEND_SIZE)


def add_key_below(figure: Figure, entries: Sequence[str]) -> None:
    """Add a list of entries below all axes, such as the names of numbered classes."""
    columns, wrapped = _arrange_key(entries, figure.get_figwidth())
    handles = [Patch(visible=False) for _ in entries]
    spacing = {"handlelength": 0, "handletextpad": 0, "labelspacing": 0.3}
    _add_legend(figure, handles, wrapped, loc="outside lower left", ncols=columns, fontsize=TICK_SIZE, **spacing)


TICK_SIZE = 7.5
"""Font size of class names at an axis, and in a key."""


def _arrange_legend(labels: Sequence[str], width: float) -> tuple[int, list[str]]:
    """Return how many labels fit side by side, and the labels, wrapped if one is wider than the figure."""
    return _arrange_columns(labels, width, LEGEND_SIZE, margin=0.66)  # the line sample and the space between columns


def _arrange_key(entries: Sequence[str], width: float) -> tuple[int, list[str]]:
    return _arrange_columns(entries, width, TICK_SIZE, margin=0.25)


def _arrange_columns(labels: Sequence[str], width: float, size: float, *, margin: float) -> tuple[int, list[str]]:
    wrapped = [wrap_text(label, width - margin, size) for label in labels]
    longest = max(measure_text(line, size) for label in wrapped for line in label.split("\n"))
    return max(1, min(len(labels), int(width / (longest + margin)))), wrapped


def _add_legend(parent: Figure | Axes, handles: Sequence[Artist], labels: Sequence[str], **options: Any) -> None:
    # matplotlib leaves out labels that begin with an underscore, unless they are set afterwards.
    legend = parent.legend(handles, [f"label {number}" for number in range(len(labels))], **options)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)


def add_legend_below(axes: Axes, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Add a legend of short labels below one panel and its axis label."""
    options = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.25), "fontsize": 7.5, "borderaxespad": 0}
    _add_legend(axes, handles, labels, **options)


def render_svg(drawing: Drawing) -> bytes:
    """Render the figure as SVG; the bytes are reproducible."""
    return _render_figure(drawing, "svg", metadata={"Date": None, "Creator": None})


def render_png(drawing: Drawing) -> bytes:
    """Render the figure as PNG at 200 dpi."""
    return _render_figure(drawing, "png", dpi=200, metadata={"Software": None})


def _render_figure(drawing: Drawing, kind: str, **arguments: Any) -> bytes:
    file = io.BytesIO()
    with report_style():
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
