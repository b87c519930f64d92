"""Writes records into shards, of which each is whole or not there."""

import json
import os
import secrets
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pylorus.cache.shard import DATA, INDEX, PARTIAL, Shard, names_checksum

SHARD_SECONDS = 120.0
"""A shard is closed after so long even when it is small: a killed run loses no more than that."""


def write_all(file: FileIO, content: memoryview) -> None:
    """Writes all of `content`, however little the system takes at once.

    Raises:
        OSError: If the disk is full or gone.
    """
    while content:
        content = content[file.write(content) or 0 :]


class ShardWriter:
    """Takes records in any order and number, and keeps them in shards of bounded size.

    What was added counts for readers once its shard is closed: when it is full, when it is old, or by `close`.
    Each method but `discard` raises OSError if the disk is full or gone.

    Args:
        folder: Where the shards go.
        record_bytes: Bytes of one record.
        shard_bytes: Most bytes of a shard; one record is always taken.
    """

    def __init__(self, folder: Path, record_bytes: int, *, shard_bytes: int) -> None:
        self._folder = folder
        self._record_bytes = record_bytes
        self._most = max(1, shard_bytes // record_bytes)
        self._file: FileIO | None = None
        self._data = folder
        self._names: list[str] = []
        self._checksum = 0
        self._opened = 0.0

    def add(self, names: Sequence[str], block: NDArray[np.uint8]) -> None:
        """Writes the records `block` of shape (n, record_bytes) under `names`, one a record."""
        done = 0
        while done < len(names):
            file = self._file or self._open()
            part = block[done : done + self._most - len(self._names)]
            write_all(file, part.data.cast("B"))
            self._checksum = zlib.crc32(part.data, self._checksum)
            self._names += names[done : done + len(part)]
            done += len(part)
            if len(self._names) == self._most or time.monotonic() - self._opened > SHARD_SECONDS:
                self.close()

    def close(self) -> None:
        """Completes the shard that is being written, if there is one."""
        if self._file is None:
            return
        os.fsync(self._file.fileno())
        self._file.close()
        _partial(self._data).replace(self._data)
        names = tuple(self._names)
        shard = Shard(self._data, names, self._record_bytes, names_checksum(names, self._checksum))
        content = {"record_bytes": shard.record_bytes, "checksum": shard.checksum, "names": names}
        _write_index(self._data.with_suffix(INDEX), json.dumps(content, ensure_ascii=False).encode())
        shard.mark_verified()
        self._file = None

    def discard(self) -> None:
        """Removes the shard that is being written, if there is one; complete shards stay."""
        if self._file is None:
            return
        file, self._file = self._file, None
        # What can't be removed counts for nothing without an index; whoever next holds the lock tries again.
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            _partial(self._data).unlink(missing_ok=True)
        with suppress(OSError):
            if not self._data.with_suffix(INDEX).exists():
                self._data.unlink(missing_ok=True)

    def _open(self) -> FileIO:
        self._data = self._folder / f"{time.time_ns():x}-{secrets.token_hex(4)}{DATA}"
        self._names, self._checksum, self._opened = [], 0, time.monotonic()
        self._file = FileIO(_partial(self._data), "xb")
        return self._file


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def _write_index(path: Path, content: bytes) -> None:
    partial = _partial(path)
    try:
        with FileIO(partial, "xb") as file:
            write_all(file, memoryview(content))
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
