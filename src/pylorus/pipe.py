"""Quiet handling of closed pipes: if the reader has gone, as in `… | head -1`, exit without a traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

GONE = 141
"""Exit code that a shell gives a program killed by SIGPIPE: 128 plus the number of the signal."""


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
        sys.exit(GONE)
