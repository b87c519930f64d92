"""Files that are whole or not there: written under a temporary name, then renamed."""

import json
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
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
