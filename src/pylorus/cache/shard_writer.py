"""Write records into shards; a shard is either complete or ignored."""

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

from pylorus.cache.shard import DATA, INDEX, PARTIAL, Shard, compute_shard_checksum

SHARD_SECONDS = 120.0
"""A shard is closed after this time even if it is small, so that a killed run loses no more than that."""


def write_all(file: FileIO, content: memoryview) -> None:
    """Write all of `content`, even if the system accepts only part of it at a time.

    Raises:
        OSError: If the disk is full or unavailable.
    """
    while content:
        content = content[file.write(content) or 0 :]


class ShardWriter:
    """Writes records, in any order and number, into shards of limited size.

    Records become visible to readers when their shard is closed: when it is full, when it is old, or by `close`.
    Each method except `discard` raises OSError if the disk is full or unavailable.

    Args:
        folder: Folder of the shards.
        record_bytes: Size of one record in bytes.
        shard_bytes: Maximum size of a shard in bytes; it always holds at least one record.
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
        """Write the records `block`, of shape (n, record_bytes), under `names`, one per record."""
        done = 0
        while done < len(names):
            file = self._file or self._open_data_file()
            chunk = block[done : done + self._most - len(self._names)]
            write_all(file, chunk.data.cast("B"))
            self._checksum = zlib.crc32(chunk.data, self._checksum)
            self._names += names[done : done + len(chunk)]
            done += len(chunk)
            if len(self._names) == self._most or time.monotonic() - self._opened > SHARD_SECONDS:
                self.close()

    def close(self) -> None:
        """Complete the shard that is being written, if there is one."""
        if self._file is None:
            return
        os.fsync(self._file.fileno())
        self._file.close()
        _get_partial_path(self._data).replace(self._data)
        names = tuple(self._names)
        shard = Shard(self._data, names, self._record_bytes, compute_shard_checksum(names, self._checksum))
        content = {"record_bytes": shard.record_bytes, "checksum": shard.checksum, "names": names}
        _write_index(self._data.with_suffix(INDEX), json.dumps(content, ensure_ascii=False).encode())
        shard.register_verified()
        self._file = None

    def discard(self) -> None:
        """Remove the shard that is being written, if there is one; complete shards stay."""
        if self._file is None:
            return
        file, self._file = self._file, None
        # A file that can't be removed is ignored, as it has no index; the next holder of the lock tries again.
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            _get_partial_path(self._data).unlink(missing_ok=True)
        with suppress(OSError):
            if not self._data.with_suffix(INDEX).exists():
                self._data.unlink(missing_ok=True)

    def _open_data_file(self) -> FileIO:
        self._data = self._folder / f"{time.time_ns():x}-{secrets.token_hex(4)}{DATA}"
        self._names, self._checksum, self._opened = [], 0, time.monotonic()
        self._file = FileIO(_get_partial_path(self._data), "xb")
        return self._file


def _get_partial_path(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def _write_index(path: Path, content: bytes) -> None:
    partial = _get_partial_path(path)
    try:
        with FileIO(partial, "xb") as file:
            write_all(file, memoryview(content))
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
