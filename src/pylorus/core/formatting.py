"""Format numbers, lists and commands for people: on the console, in sentences, in tables, everywhere in the same way.

Decimals are rounded, a negative number has a real minus sign, and an undefined value is a dash in tables and the word
"undefined" in sentences. Files for programs (CSV, JSON) do not use these functions.
"""

import codecs
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, SupportsFloat

BROKEN_PIPE_CODE = 141
"""Exit code that a shell gives a program killed by SIGPIPE: 128 plus the number of the signal."""

if TYPE_CHECKING:
    import pandas as pd
    from tqdm import tqdm

DASH = "–"
"""Symbol for an undefined value."""

MIN_BAR_COLUMNS = 60
"""A narrower terminal shows count and time without a drawn bar."""
MAX_EXTRA_DIGITS = 4
"""Greatest number of additional digits of a p-value that rounding would move to the other side of the level."""


def format_number(value: SupportsFloat, digits: int, *, signed: bool = False) -> str:
    """Format a number with a fixed number of decimals; NaN becomes a dash.

    Args:
        value: The number.
        digits: Number of decimals, at least 0.
        signed: Whether a number gets a plus sign if it is positive after rounding.

    Example:
        >>> format_number(-0.04, 1), format_number(0.018, 3, signed=True), format_number(0.0004, 3, signed=True)
        ('0.0', '+0.018', '0.000')
    """
    number = float(value)
    if math.isnan(number):
        return DASH
    if math.isinf(number):
        return "∞" if number > 0 else "−∞"
    rounded = round(number, digits) + 0.0  # which turns -0.0 into 0.0
    sign = "+" if signed and rounded > 0 else ""
    return f"{sign}{rounded:.{digits}f}".replace("-", "−")


def format_duration(seconds: float) -> str:
    """Format an estimated duration in the two largest units.

    Example:
        >>> format_duration(42.4), format_duration(1500), format_duration(8100)
        ('42 s', '25 min', '2 h 15 min')
    """
    if seconds < 90:
        return f"{round(seconds)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def format_percent(proportion: SupportsFloat, *, digits: int | None = 1, signed: bool = False) -> str:
    """Format a proportion in percent, without the unit; NaN becomes a dash.

    Args:
        proportion: In [0, 1], or a difference of proportions.
        digits: Number of decimals; None: as many as the number has, for one that a user chose.
        signed: Whether a number that is not negative gets a plus sign.

    Example:
        >>> format_percent(0.90888), format_percent(0.975, digits=None), format_percent(-0.012, signed=True)
        ('90.9', '97.5', '−1.2')
    """
    percent = 100 * float(proportion)
    return f"{percent:g}" if digits is None else format_number(percent, digits, signed=signed)


def format_percent_with_unit(proportion: SupportsFloat) -> str:
    """Format a proportion for a sentence, in percent with one decimal and the unit.

    Example:
        >>> format_percent_with_unit(409 / 450), format_percent_with_unit(float("nan"))
        ('90.9 %', 'undefined')
    """
    value = float(proportion)
    return "undefined" if math.isnan(value) else f"{format_percent(value)} %"


def format_percent_at_least(proportion: float) -> str:
    """Format a proportion that is a lower bound in percent, rounded down to one decimal, without the unit.

    Example:
        >>> format_percent_at_least(0.8736), format_percent_at_least(0.9)
        ('87.3', '90.0')
    """
    return f"{math.floor(1000 * proportion + 1e-9) / 10:.1f}"


def format_threshold(threshold: float) -> str:
    """Format a threshold, rounded down to four digits, so that every positive image also exceeds the printed threshold.

    Example:
        >>> format_threshold(0.32996), format_threshold(0.5), format_threshold(0.0000123456), format_threshold(0.0)
        ('0.3299', '0.5', '1.234e-05', '0')
    """
    if threshold <= 0:
        return f"{threshold:.4g}"
    unit = 10.0 ** (math.floor(math.log10(threshold)) - 3)
    return f"{math.floor(threshold / unit + 1e-9) * unit:.4g}"


def format_p_value(p_value: float, *, level: float = 0.05) -> str:
    """Format a p-value with two digits, or more if rounding would move it to the other side of the level.

    Args:
        p_value: In [0, 1], or NaN.
        level: Significance level, in (0, 1).

    Example:
        >>> [format_p_value(value) for value in (0.3317, 0.0496, 0.00002, 1.0, math.nan)]
        ['p = 0.33', 'p = 0.0496', 'p < 0.001', 'p = 1', 'p undefined']
        >>> format_p_value(0.05), format_p_value(0.0499999999)
        ('p = 0.050', 'p < 0.05')
    """
    if math.isnan(p_value):
        return "p undefined"
    if p_value < 0.001 <= level:
        return "p < 0.001"
    if p_value > 0.995:
        return "p = 1"
    figures = max(2, 1 - math.floor(math.log10(p_value))) if p_value else 2
    for digits in range(figures, figures + MAX_EXTRA_DIGITS):
        text = f"{p_value:.{digits}f}"
        if (float(text) < level) == (p_value < level):
            return f"p = {text}"
    return f"p < {level:g}" if p_value < level else f"p = {level:g}"


def format_count(number: int, noun: str, plural: str = "") -> str:
    """Format a count with its noun in singular or plural.

    Args:
        number: The count.
        noun: The noun in singular.
        plural: Its plural, if that is not the singular with an s.

    Example:
        >>> format_count(1, "group"), format_count(1200, "group"), format_count(2, "copy", "copies")
        ('1 group', '1,200 groups', '2 copies')
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def join_names(names: Sequence[str], *, last: str = "and", most: int | None = None) -> str:
    """Join names for a sentence.

    Args:
        names: At least one.
        last: Word before the last name.
        most: If there are more names than this, the rest is counted; None: all are named.

    Example:
        >>> join_names(["a", "b", "c"], last="or"), join_names(["a", "b", "c", "d"], most=2)
        ('a, b or c', 'a, b and 2 others')
    """
    if most is not None and len(names) > most:
        return f"{', '.join(names[:most])} {last} {len(names) - most} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def format_estimate(value: float, low: float, high: float, *, in_percent: bool = True, label: str = "") -> str:
    """Format a value with its confidence interval, in % or with two decimals; without an undefined interval.

    Args:
        value: The value.
        low: Lower limit of its interval.
        high: Upper limit.
        in_percent: Whether it is a proportion that is given in %.
        label: Text before the limits.

    Example:
        >>> format_estimate(0.9, 0.8, 0.95), format_estimate(0.9, 0.8, 0.95, in_percent=False, label="95 % CI ")
        ('90.0 % (80.0 to 95.0)', '0.90 (95 % CI 0.80 to 0.95)')
    """
    text, *limits = (format_percent(each) if in_percent else format_number(each, 2) for each in (value, low, high))
    unit = " %" if in_percent and not math.isnan(value) else ""
    return f"{text}{unit}" + (f" ({label}{' to '.join(limits)})" if DASH not in limits else "")


def format_bytes(count: float) -> str:
    """Format a number of bytes.

    Example:
        >>> format_bytes(1536), format_bytes(3 * 2**30)
        ('1.5 KiB', '3.0 GiB')
    """
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def format_command(words: Sequence[str]) -> str:
    r"""Format the words of a command as they have to be typed in a shell.

    Example:
        >>> print(format_command(["data=folders", "data.root='/images/from Köln'", r"data.group=P\d+"]))
        data=folders "data.root='/images/from Köln'" 'data.group=P\d+'
    """
    return " ".join(map(_quote_word, words))


def _quote_word(word: str) -> str:
    """Quote a word unless bash and zsh pass it on as it is: zsh takes `[a]`, `(a)`, `a?` and `a*` for file names."""
    if re.fullmatch(r"[\w@%+=:,./…-]+", word) and not word.startswith("="):
        return word
    if word.startswith("="):
        return f"'{word}'" if "'" not in word else f"'='{shlex.quote(word[1:])}"  # zsh: the path of a program
    return shlex.quote(word) if "'" not in word or re.search(r'["\\$`!]', word) else f'"{word}"'


FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""First characters of a text that a spreadsheet runs as a formula."""


def defuse_formula(text: str) -> str:
    """Return a text for a CSV file: one that a spreadsheet would run as a formula gets an apostrophe in front.

    Example:
        >>> defuse_formula("=1+1.png"), defuse_formula("a=1.png"), defuse_formula("-0.25")
        ("'=1+1.png", 'a=1.png', '-0.25')
    """
    if not text.startswith(FORMULA_STARTS):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def defuse_formulas(table: "pd.DataFrame") -> "pd.DataFrame":
    """Return a table for CSV with the texts of all cells as `defuse_formula` returns them."""
    defused = {
        name: [defuse_formula(value) if isinstance(value, str) else value for value in table[name]]
        for name in table.select_dtypes(include=["object", "string"]).columns
    }
    return table.assign(**defused)


def expand_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with `~` expanded where the shell leaves it, as in `--output=~/results`.

    If a word or the value of an option is empty, as "$NAME" is if the variable is not set, the process exits with code
    2, as argparse does.
    """
    expanded = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if not value.strip() and (equals or not option):
            where = f"{option}: " if option else ""
            print(f'error: {where}found an empty word. Is the variable set, if you wrote "$NAME"?', file=sys.stderr)
            sys.exit(2)
        expanded.append(f"{option}{equals}{os.path.expanduser(value)}")  # noqa: PTH111 statistics import this module
    return expanded


ASCII = str.maketrans(
    dict.fromkeys("–—−‑", "-")
    | dict.fromkeys("“”„", '"')
    | {"‘": "'", "’": "'", "×": "x", "·": ".", "…": "...", "→": "->", "≥": ">=", "≤": "<=", "≈": "~", "∞": "inf"}
)
"""What an old terminal shows in place of the signs of our messages."""
TERMINAL_ERRORS = "pylorus-terminal"


def _replace_for_terminal(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(ASCII)
    return "".join(letter if letter.isascii() else "?" for letter in text), error.end


codecs.register_error(TERMINAL_ERRORS, _replace_for_terminal)


def setup_terminal() -> None:
    """Let this process print what a terminal or log that is not UTF-8 can't show: `-`, `->`, or else `?`.

    An error handler that the user chose, as in PYTHONIOENCODING=ascii:backslashreplace, stays.
    """
    if getattr(sys.stdout, "errors", None) not in ("strict", "surrogateescape"):
        return
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            with suppress(OSError):  # a file that something else writes to as well can't be repositioned
                stream.reconfigure(errors=TERMINAL_ERRORS)


def is_live_terminal() -> bool:
    """Return whether standard error is a terminal on which a line can be overwritten: not a file, and not TERM=dumb."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def open_progress_bar(label: str, total: int | None, *, done: int = 0, shown: bool = True) -> "tqdm[Any]":
    """Open a progress bar on a terminal: label, count and time left in one line that disappears at the end.

    Args:
        label: What is being done.
        total: Number of items; None: not known, then the bar shows how many are done in a second.
        done: Number of items that were done before.
        shown: Whether to draw a bar at all; elsewhere than on a terminal none is drawn.
    """
    from tqdm import tqdm

    columns = shutil.get_terminal_size().columns
    layout = "{desc}: {n_fmt}, {rate_noinv_fmt}"
    if total is not None:
        layout = "{desc}: {n_fmt}/{total_fmt} |{bar}| {remaining} left"
        if columns < MIN_BAR_COLUMNS:
            layout = "{desc}: {n_fmt}/{total_fmt}, {remaining} left"
            room = max(2, columns - len(f": {total}/{total}, 00:00 left "))
            label = label if len(label) <= room else f"{label[: room - 1].rstrip()}…"
    return tqdm(
        total=total,
        desc=label,
        initial=done,
        leave=False,
        disable=not (shown and is_live_terminal()),
        bar_format=layout,
        dynamic_ncols=True,
        unit="",
    )


@contextmanager
def handle_closed_pipe() -> Iterator[None]:
    """Exit the process silently if the standard output is closed while the body of the `with` statement prints."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # otherwise Python flushes at exit, where the error can't be caught
    except BrokenPipeError:
        # Python flushes the remaining buffer at exit, so it needs somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE_CODE)
