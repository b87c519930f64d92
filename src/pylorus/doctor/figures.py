"""Fonts for the report's figures."""

from collections.abc import Iterable, Iterator

from pylorus.doctor.check import Check, State
from pylorus.report.fonts import OWN, drawn_by_own, wider_font_file

AREA = "Figures"


def check_fonts(words: Iterable[str] = ()) -> Iterator[Check]:
    """Whether figures can draw names of classes.

    Args:
        words: Names that figures will hold, where they are known.
    """
    wider = wider_font_file()
    needed = [word for word in words if not drawn_by_own(word)]
    if wider is not None:
        yield Check(AREA, "fonts", State.GOOD, f"{OWN}, and {wider.name} for Chinese, Japanese and Korean")
        return
    found = f"{OWN}: Latin, Greek, Cyrillic; none for Chinese, Japanese or Korean names of classes"
    mend = "install Noto Sans CJK (on Debian and Ubuntu: apt install fonts-noto-cjk)"
    if needed:
        yield Check(AREA, "fonts", State.WARNING, f"{found}: figures show {', '.join(needed)} as boxes", mend)
    else:
        yield Check(AREA, "fonts", State.GOOD, found, mend)
