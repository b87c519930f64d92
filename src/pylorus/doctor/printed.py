"""Print the checks to a terminal, or format them as JSON for programs."""

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
from pylorus.doctor.check import Check, State, get_worst_state

COLOURS = {State.GOOD: "32", State.WARNING: "33", State.WRONG: "31"}
"""ANSI color codes: green, yellow, red."""
STATE_WIDTH, NAME_WIDTH = 7, 15
COLUMN = 2 + STATE_WIDTH + 2 + NAME_WIDTH + 2
"""Column at which the text of a check begins."""


def print_checks(checks: Iterable[Check], output: TextIO = sys.stdout) -> State:
    """Print each check under its area as soon as it is done, then how many are good, warnings and wrong.

    Returns:
        The worst state of all checks.
    """
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    coloured = output.isatty() and "NO_COLOR" not in os.environ
    print(f"Pylorus {__version__}: what this machine has and lacks", file=output)
    done: list[Check] = []
    for check in checks:
        if not done or done[-1].area != check.area:
            print(f"\n{check.area}", file=output)
        print("\n".join(format_check_lines(check, width=width, coloured=coloured)), file=output, flush=True)
        done.append(check)
    counts = Counter(check.state for check in done)
    good, warnings, wrong = (counts[state] for state in State)
    print(f"\n{good} good, {warnings} warning{'' if warnings == 1 else 's'}, {wrong} wrong", file=output)
    return get_worst_state(done)


def format_check_lines(check: Check, *, width: int, coloured: bool) -> Iterator[str]:
    """Yield a check as lines of at most `width` characters, with its text and fix in a column of their own."""
    if check.mend and check.state is State.GOOD:
        texts = [f"{check.found}; optional: {check.mend}"]
    else:
        texts = [check.found, *([f"fix: {check.mend}"] if check.mend else [])]
    lines = [line for text in texts for line in _wrap_text(text, width)]
    state = f"{check.state:<{STATE_WIDTH}}"
    if coloured:
        state = f"\x1b[{COLOURS[check.state]}m{state}\x1b[0m"
    prefix = f"  {state}  {check.name:<{NAME_WIDTH}}"
    if len(check.name) <= NAME_WIDTH and lines[0].startswith(" " * COLUMN):
        yield f"{prefix}{lines.pop(0)[COLUMN - 2 :]}"
    else:
        yield prefix.rstrip()
    yield from lines


def _wrap_text(text: str, width: int) -> Iterator[str]:
    """Yield the text wrapped from `COLUMN` on; a long word, such as a hash, starts further left, unbroken."""
    for line in textwrap.wrap(text, width - COLUMN, break_long_words=False, break_on_hyphens=False) or [""]:
        yield " " * min(COLUMN, max(2, width - len(line))) + line


def format_json(checks: Iterable[Check]) -> tuple[str, State]:
    """Return all checks as one JSON object, and the worst state."""
    done = list(checks)
    content = {"pylorus": __version__, "state": get_worst_state(done), "checks": [asdict(check) for check in done]}
    return json.dumps(content, indent=2, ensure_ascii=False), get_worst_state(done)
