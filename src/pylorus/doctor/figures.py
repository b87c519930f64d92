"""Check the fonts for the report's figures."""

from collections.abc import Iterable, Iterator

from pylorus.doctor.check import Check, State
from pylorus.report.fonts import OWN, find_cjk_font_file, is_in_default_font

FIGURES = "Figures"


def check_fonts(words: Iterable[str] = ()) -> Iterator[Check]:
    """Check that an installed font can draw the class names.

    Args:
        words: The class names, if known.
    """
    cjk_font = find_cjk_font_file()
    unsupported = [word for word in words if not is_in_default_font(word)]
    if cjk_font is not None:
        yield Check(FIGURES, "fonts", State.GOOD, f"{OWN}, and {cjk_font.name} for Chinese, Japanese and Korean")
        return
    summary = f"{OWN}: Latin, Greek, Cyrillic; no font for Chinese, Japanese or Korean class names"
    fix = "install Noto Sans CJK (on Debian and Ubuntu: apt install fonts-noto-cjk)"
    if unsupported:
        yield Check(FIGURES, "fonts", State.WARNING, f"{summary}: figures show {', '.join(unsupported)} as boxes", fix)
    else:
        yield Check(FIGURES, "fonts", State.GOOD, summary, fix)
