"""One line of the doctor's: what was looked at, what was found, how it is mended."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum


class State(StrEnum):
    """How a check ends; the later, the worse."""

    GOOD = "good"
    WARNING = "warning"
    WRONG = "wrong"


@dataclass(frozen=True)
class Check:
    """What was found of one thing.

    Attributes:
        area: The heading it stands under.
        name: Of the thing.
        state: Whether Pylorus can work with it.
        found: What is there, in words.
        mend: What to do about it; of a good thing, what could be added.
    """

    area: str
    name: str
    state: State
    found: str
    mend: str = ""

    def as_json(self) -> str:
        """One line of JSON, as `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Check":
        """The check that `as_json` wrote."""
        content = json.loads(line)
        return cls(**{**content, "state": State(content["state"])})


def worst(checks: Iterable[Check]) -> State:
    """The worst state of all; good where there is none.

    Example:
        >>> worst([Check("a", "b", State.WARNING, "c"), Check("a", "b", State.GOOD, "c")])
        <State.WARNING: 'warning'>
    """
    order = list(State)
    return max((check.state for check in checks), key=order.index, default=State.GOOD)


def guarded(area: str, name: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """What `look` finds; where it fails itself, that is a line too: a doctor is called because something is broken."""
    try:
        yield from look()
    except Exception as error:
        mend = "Where another line names a package, mend that first; else report this with the output of --json."
        yield Check(area, name, State.WRONG, f"could not be looked at: {first_line(error)}", mend)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
