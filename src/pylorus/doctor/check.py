"""One check of the doctor: what was checked, what was found and how to fix it."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum


class State(StrEnum):
    """Outcome of a check, from best to worst."""

    GOOD = "good"
    WARNING = "warning"
    WRONG = "wrong"


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        area: Heading under which it is printed.
        name: What was checked, such as a package or a disk.
        state: Whether Pylorus can work with what was found.
        found: What was found, as text.
        remedy: How to fix it; for a good result, an optional improvement. Empty if there is nothing to do.
    """

    area: str
    name: str
    state: State
    found: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the check with the keys of `pylorus doctor --json`, where the remedy is called `mend`."""
        content = asdict(self)
        return {**{key: content[key] for key in ("area", "name", "state", "found")}, "mend": self.remedy}

    def to_json(self) -> str:
        """Return the check as one line of JSON, for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Check":
        """Return the check that `to_json` wrote."""
        content = json.loads(line)
        return cls(**{**content, "state": State(content["state"])})


def get_worst_state(checks: Iterable[Check]) -> State:
    """Return the worst state of the checks; good if there are none.

    Example:
        >>> get_worst_state([Check("a", "b", State.WARNING, "c"), Check("a", "b", State.GOOD, "c")])
        <State.WARNING: 'warning'>
    """
    order = list(State)
    return max((check.state for check in checks), key=order.index, default=State.GOOD)


def run_guarded(area: str, name: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """Yield the checks of `look`; if it raises an error, yield that as a failed check.

    The doctor is called because something is broken, so one failure must not hide the remaining checks.
    """
    try:
        yield from look()
    except Exception as error:
        fix = "If another line names a broken package, fix that first. Otherwise report this with the output of --json."
        yield Check(area, name, State.WRONG, f"the check itself failed: {format_first_line(error)}", fix)


def format_first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
