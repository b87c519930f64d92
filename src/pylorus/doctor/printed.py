"""The checks as people read them in a terminal, and as JSON for programs."""

import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TextIO

from pylorus import __version__
from pylorus.doctor.check import Check, State, worst

COLOURS = {State.GOOD: "32", State.WARNING: "33", State.WRONG: "31"}
"""Of ANSI terminals: green, yellow, red."""
STATE_WIDTH, NAME_WIDTH = 7, 15
COLUMN = 2 + STATE_WIDTH + 2 + NAME_WIDTH + 2
"""Where what was found begins."""


def print_checks(checks: Iterable[Check], output: TextIO = sys.stdout) -> State:
    """Prints each check as it comes, under its area, and at the end how many are good.

    Returns:
        The worst state of all.
    """
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    coloured = output.isatty() and "NO_COLOR" not in os.environ
    print(f"Pylorus {__version__}: what this machine has and lacks", file=output)
    done: list[Check] = []
    for check in checks:
        if not done or done[-1].area != check.area:
            print(f"\n{check.area}", file=output)
        print("\n".join(lines_of(check, width=width, coloured=coloured)), file=output, flush=True)
        done.append(check)
    counts = Counter(check.state for check in done)
    good, warnings, wrong = (counts[state] for state in State)
    print(f"\n{good} good, {warnings} warning{'' if warnings == 1 else 's'}, {wrong} wrong", file=output)
    return worst(done)


def lines_of(check: Check, *, width: int, coloured: bool) -> Iterator[str]:
    """A check as lines of at most `width` characters, what was found and its mend in a column of their own."""
    if check.mend and check.state is State.GOOD:
        texts = [f"{check.found}; if wanted: {check.mend}"]
    else:
        texts = [check.found, *([f"mend: {check.mend}"] if check.mend else [])]
    lines = [line for text in texts for line in _column(text, width)]
    state = f"{check.state:<{STATE_WIDTH}}"
    if coloured:
        state = f"\x1b[{COLOURS[check.state]}m{state}\x1b[0m"
    begin = f"  {state}  {check.name:<{NAME_WIDTH}}"
    if len(check.name) <= NAME_WIDTH and lines[0].startswith(" " * COLUMN):
        yield f"{begin}{lines.pop(0)[COLUMN - 2 :]}"
    else:
        yield begin.rstrip()
    yield from lines


def _column(text: str, width: int) -> Iterator[str]:
    """The text from `COLUMN` on; a word too long for that, such as a hash, begins further left and stays whole."""
    for line in textwrap.wrap(text, width - COLUMN, break_long_words=False, break_on_hyphens=False) or [""]:
        yield " " * min(COLUMN, max(2, width - len(line))) + line


def as_json(checks: Iterable[Check]) -> tuple[str, State]:
    """All checks as one JSON object, and the worst state."""
    done = list(checks)
    content = {"pylorus": __version__, "state": worst(done), "checks": [asdict(check) for check in done]}
    return json.dumps(content, indent=2, ensure_ascii=False), worst(done)
