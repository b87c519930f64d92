"""Files that are whole or not there, also after a power cut: written under a temporary name, then renamed."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; on success it takes that name, on any error it goes.

    Raises:
        OSError: If the folder can't be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays: writers such as pandas and matplotlib choose the format by it.
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        _on_disk(temporary)  # a name that is on disk before its content would be an empty file after a power cut
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _on_disk(path: Path) -> None:
    """Waits until a file's content has left the system's memory."""
    descriptor = os.open(path, os.O_RDWR)  # Windows syncs only what is open for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes `text` in UTF-8, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Writes plain values as indented JSON, whole or not at all.

    Raises:
        ValueError: If a number is not finite: JSON has no such number.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
