"""Errors that a user can mend: shown as one message, without a traceback."""

import difflib
from collections.abc import Iterable

INTERRUPTED = 130
"""The exit code of a process that Ctrl-C ended."""


class PylorusError(Exception):
    """Something in the user's hands is wrong: it names file or key, what was found and how to mend it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The part of an error message that suggests the known name nearest to `name`, or nothing.

    Example:
        >>> did_you_mean("resnet5", ["vgg19", "resnet50"])
        ' Did you mean "resnet50"?'
    """
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{nearest[0]}"?' if nearest else ""


def listing(names: Iterable[object], *, most: int = 10) -> str:
    """`names` one a line, indented; what is over `most` is counted.

    Example:
        >>> print(listing(["a", "b", "c"], most=2))
          a
          b
          … and 1 more
    """
    lines = [str(name) for name in names]
    shown = [f"  {line}" for line in lines[:most]]
    if len(lines) > most:
        shown.append(f"  … and {len(lines) - most} more")
    return "\n".join(shown)
