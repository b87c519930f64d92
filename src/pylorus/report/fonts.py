"""Letters that matplotlib's own font lacks, such as Chinese names of classes: drawn in a font of this machine."""

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
"""matplotlib's own font, which is always there: Latin, Greek, Cyrillic, arrows and signs."""

WIDER = re.compile(
    r"NotoSansCJK|NotoSansSC|SourceHanSans|PingFang|msyh|simhei|wqy|Hiragino|YuGoth|malgun|AppleGothic|Arial ?Unicode",
    re.IGNORECASE,
)
"""Files of fonts that know Chinese, Japanese or Korean, on Linux, macOS and Windows."""


def give_fonts(figure: Figure) -> None:
    """Gives texts of a figure that need other letters a font that has them; says so where there is none."""
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if not drawn_by_own(text.get_text()):
            font = _wider_font()
            if font is not None:
                text.set_fontfamily([OWN, font])
                text.set_fontweight("normal")  # it may have no other


def drawn_by_own(words: str) -> bool:
    """Whether matplotlib's own font has all these letters."""
    # Latin letters need no look into the font.
    return max(map(ord, words), default=0) < 0x250 or _own_letters().issuperset(map(ord, words))


@cache
def _own_letters() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont(OWN))
    return frozenset(int(code) for code in font.get_charmap())


@cache
def _wider_font() -> str | None:
    """Name of a font with many more letters; matplotlib is told of it, since its own list may be older."""
    found = wider_font_file()
    if found is None:
        log.warning(
            "No font on this machine draws these names of classes: figures show boxes. Install Noto Sans CJK "
            "(on Debian and Ubuntu: apt install fonts-noto-cjk)."
        )
        return None
    font_manager.fontManager.addfont(found)
    return str(font_manager.get_font(found).family_name)


def wider_font_file() -> Path | None:
    """A font's file on this machine that knows Chinese, Japanese or Korean; None where there is none."""
    return _by_preference(Path(path) for path in font_manager.findSystemFonts())


def _by_preference(paths: Iterable[Path]) -> Path | None:
    """The regular weight where there is one; the same font each time."""
    known = sorted(path for path in paths if WIDER.search(path.name))
    regular = [path for path in known if "regular" in path.name.lower()]
    return next(iter(regular or known), None)
