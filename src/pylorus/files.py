"""Atomic file writes: a file is complete or absent, even after a power failure, because it is renamed into place."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` on success, delete it on any error.

    Raises:
        OSError: If the folder can't be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Keep the suffix: writers such as pandas and matplotlib choose the format by it.
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        _ensure_on_disk(temporary)  # if only the name reached the disk before a power failure, the file would be empty
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _ensure_on_disk(path: Path) -> None:
    """Block until the content of a file has been written to disk."""
    descriptor = os.open(path, os.O_RDWR)  # Windows only syncs files that are open for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically, in UTF-8."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write plain values atomically, as indented JSON.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON can't represent.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
