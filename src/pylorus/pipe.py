"""What is printed into a pipe whose reader has gone, as in `… | head -1`: nothing more, and no traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

GONE = 141
"""The exit code that a shell gives a program whose reader has gone: 128 and SIGPIPE's number."""


@contextmanager
def ends_quietly() -> Iterator[None]:
    """Ends the process without a word where nobody reads any more what is printed inside."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # else Python does so when nobody can catch it
    except BrokenPipeError:
        # What is still kept back has to go somewhere when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(GONE)
