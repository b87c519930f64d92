"""Find a system font for characters that matplotlib's default font lacks, such as Chinese class names."""

import logging
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text

log = logging.getLogger(__name__)

OWN = "DejaVu Sans"
"""matplotlib's default font, always available: Latin, Greek, Cyrillic, arrows and symbols."""

WIDER = re.compile(
    r"NotoSansCJK|NotoSansSC|SourceHanSans|PingFang|msyh|simhei|wqy|Hiragino|YuGoth|malgun|AppleGothic|Arial ?Unicode",
    re.IGNORECASE,
)
"""File names of fonts with Chinese, Japanese or Korean characters on Linux, macOS and Windows."""


def set_figure_fonts(figure: Figure) -> None:
    """Set a CJK font on the texts of a figure that the default font cannot draw; warn if none is installed."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if not is_in_default_font(text.get_text()):
            font = _load_cjk_font()
            if font is not None:
                text.set_fontfamily([OWN, font])
                text.set_fontweight("normal")  # the font may have no bold weight


def is_in_default_font(text: str) -> bool:
    """Return whether matplotlib's default font has all characters of a text."""
    # Latin characters need no lookup in the font.
    return max(map(ord, text), default=0) < 0x250 or _load_default_characters().issuperset(map(ord, text))


@cache
def _load_default_characters() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont(OWN))
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
    known = sorted(path for path in paths if WIDER.search(path.name))
    regular = [path for path in known if "regular" in path.name.lower()]
    return next(iter(regular or known), None)
