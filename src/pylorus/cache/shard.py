"""A shard: a file of records that never changes once its index lies beside it.

`TOKEN.data` holds the records one after the other. `TOKEN.index` is JSON: how many bytes a record has, the records'
names in order and a checksum over both. The index is written last, so a data file without one does not count.
"""

import json
import logging
import mmap
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

DATA, INDEX, PARTIAL = ".data", ".index", ".partial"
"""How names of files end: records, their index, and either of them before it is whole."""

READ_BYTES = 4 << 20
"""What is read at once: memory stays small whatever the size of a shard."""

LEFTOVER_SECONDS = 3600.0
"""A file that nobody finished for so long was left by a run that was killed."""

_verified: set[tuple[str, int, int, int, int]] = set()
"""Shards whose checksum this process has seen to be right: path, inode, size, time of writing, names."""


class DamagedShardError(Exception):
    """The bytes of a shard are not those that were written."""


@dataclass(frozen=True)
class Shard:
    """A complete shard, as its index describes it.

    Attributes:
        data: The file of the records.
        names: One a record, in the order of the records.
        record_bytes: Bytes of one record.
        checksum: CRC-32 over the records, then over the names; see `names_checksum`.
    """

    data: Path
    names: tuple[str, ...]
    record_bytes: int
    checksum: int

    def blocks(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Reads the records in order and checks them on the way: place of the first, records (n, record_bytes).

        A block is overwritten by the one after it. Trust none before the iterator has ended.

        Raises:
            DamagedShardError: If the size or, at the end, the checksum differs from the index.
            OSError: If the file can't be read.
        """
        buffer = np.empty((max(1, READ_BYTES // self.record_bytes), self.record_bytes), np.uint8)
        checksum = 0
        with FileIO(self.data) as file:
            found = self._checked_status(file)
            for first in range(0, len(self.names), len(buffer)):
                block = buffer[: len(self.names) - first]
                self._read(file, block.data.cast("B"))
                checksum = zlib.crc32(block.data, checksum)
                yield first, block
            if names_checksum(self.names, checksum) != self.checksum:
                raise DamagedShardError(f"{self.data}: its checksum is not that of its index")
            _verified.add(self._identity(found))

    def mapped(self) -> NDArray[np.uint8]:
        """The records as a read-only array (n, record_bytes) that the file is mapped into.

        The first call in a process reads the whole file to check it.

        Raises:
            DamagedShardError: If size or checksum differ from the index.
            OSError: If the file can't be read.
        """
        with FileIO(self.data) as file:
            if self._identity(self._checked_status(file)) not in _verified:
                for _ in self.blocks():
                    pass
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapping, np.uint8).reshape(len(self.names), self.record_bytes)

    def mark_verified(self) -> None:
        """Notes that this process wrote the shard itself and need not read it again to check it."""
        _verified.add(self._identity(self.data.stat()))

    def remove(self) -> None:
        """Takes the shard away, if that can be; the index goes first, so that it never counts without its data."""
        with suppress(OSError):
            self.data.with_suffix(INDEX).unlink(missing_ok=True)
            self.data.unlink(missing_ok=True)

    def _identity(self, found: os.stat_result) -> tuple[str, int, int, int, int]:
        return str(self.data), found.st_ino, found.st_size, found.st_mtime_ns, hash(self.names)

    def _checked_status(self, file: FileIO) -> os.stat_result:
        found = os.fstat(file.fileno())  # of the open file: what a network file system says of a path may be old
        expected = len(self.names) * self.record_bytes
        if found.st_size != expected:
            raise DamagedShardError(f"{self.data}: found {found.st_size} bytes, expected {expected}")
        return found

    def _read(self, file: FileIO, wanted: memoryview) -> None:
        while wanted:
            count = file.readinto(wanted)
            if not count:
                raise DamagedShardError(f"{self.data}: it ends before its records do")
            wanted = wanted[count:]


def names_checksum(names: tuple[str, ...], records_checksum: int) -> int:
    """The checksum of a shard: that of its records carried on over its names."""
    return zlib.crc32("\n".join(names).encode(), records_checksum)


def complete_shards(folder: Path, record_bytes: int, *, remove_damaged: bool = False) -> list[Shard]:
    """The shards of a folder that have an index, oldest first; a damaged index is warned about, or removed."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == INDEX)
    except OSError:
        return []
    shards = []
    for path in paths:
        try:
            shards.append(_described(path, record_bytes))
        except FileNotFoundError:
            continue  # another run has just taken it away
        except OSError as error:
            log.warning("%s: this index can't be read (%s); its records are computed anew.", path, error)
        except (ValueError, KeyError, TypeError) as error:
            if remove_damaged:
                with suppress(OSError):
                    path.unlink()  # without it the data are a leftover
            else:
                log.warning("%s: this index is damaged (%s); its records are computed anew.", path, error)
    return shards


def _described(index: Path, record_bytes: int) -> Shard:
    content = json.loads(index.read_bytes())
    names = content["names"]
    if not names or not all(isinstance(name, str) for name in names) or content["record_bytes"] != record_bytes:
        raise ValueError(f"expected names of records of {record_bytes} bytes")
    return Shard(index.with_suffix(DATA), tuple(names), record_bytes, content["checksum"])


def remove_leftovers(folder: Path) -> None:
    """Removes what killed runs left half-written in `folder`: files older than an hour without their index."""
    for path in folder.iterdir():
        orphaned = path.suffix == DATA and not path.with_suffix(INDEX).exists()
        try:
            if (path.suffix == PARTIAL or orphaned) and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()
        except OSError as error:
            log.info("%s: this leftover can't be removed: %s", path, error)
