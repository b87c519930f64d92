"""A shard: a file of records that never changes once its index has been written.

`TOKEN.data` holds the records one after another. `TOKEN.index` is JSON: the size of a record in bytes, the names of
the records in order, and a checksum over both. The index is written last, so a data file without one is ignored.
"""

import json
import logging
import mmap
import os
import secrets
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

DATA, INDEX, PARTIAL = ".data", ".index", ".partial"
"""Suffixes of the files: records, their index, and either of them before it is complete."""

READ_BYTES = 4 << 20
"""Bytes read at a time, so that memory use does not depend on the size of a shard."""

LEFTOVER_SECONDS = 3600.0
"""An incomplete file older than this was left by a run that was killed."""

_verified: set[tuple[str, int, int, int, int]] = set()
"""Shards whose checksum this process has verified: path, inode, size, modification time, hash of the names."""


class DamagedShardError(Exception):
    """The bytes of a shard are not those that were written."""


@dataclass(frozen=True)
class Shard:
    """A complete shard, as described by its index.

    Attributes:
        data: The file of the records.
        names: One per record, in the order of the records.
        record_bytes: Size of one record in bytes.
        checksum: CRC-32 of the records followed by the names; see `compute_shard_checksum`.
    """

    data: Path
    names: tuple[str, ...]
    record_bytes: int
    checksum: int

    def iter_blocks(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Read the records in order and verify their checksum.

        Trust no block before the iterator has ended.

        Yields:
            The index of a block's first record, and the block of shape (n, record_bytes); the next one overwrites it.

        Raises:
            DamagedShardError: If the size or, at the end, the checksum differs from the index.
            OSError: If the file can't be read.
        """
        buffer = np.empty((max(1, READ_BYTES // self.record_bytes), self.record_bytes), np.uint8)
        checksum = 0
        with FileIO(self.data) as file:
            status = self._check_file_size(file)
            for first in range(0, len(self.names), len(buffer)):
                block = buffer[: len(self.names) - first]
                self._read_into(file, block.data.cast("B"))
                checksum = zlib.crc32(block.data, checksum)
                yield first, block
            if compute_shard_checksum(self.names, checksum) != self.checksum:
                raise DamagedShardError(f"{self.data}: the checksum does not match its index")
            _verified.add(self._get_identity(status))

    def open_mapped(self) -> NDArray[np.uint8]:
        """Return the records as a read-only array (n, record_bytes) that is memory-mapped from the file.

        The first call in a process reads the whole file to verify it.

        Raises:
            DamagedShardError: If size or checksum differ from the index.
            OSError: If the file can't be read.
        """
        with FileIO(self.data) as file:
            if self._get_identity(self._check_file_size(file)) not in _verified:
                for _ in self.iter_blocks():
                    pass
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapping, np.uint8).reshape(len(self.names), self.record_bytes)

    def register_verified(self) -> None:
        """Record that this process wrote the shard itself and need not read it again to verify it."""
        _verified.add(self._get_identity(self.data.stat()))

    def remove(self) -> None:
        """Remove the shard if possible; the index first, so that it never exists without its data."""
        with suppress(OSError):
            self.data.with_suffix(INDEX).unlink(missing_ok=True)
            self.data.unlink(missing_ok=True)

    def _get_identity(self, status: os.stat_result) -> tuple[str, int, int, int, int]:
        return str(self.data), status.st_ino, status.st_size, status.st_mtime_ns, hash(self.names)

    def _check_file_size(self, file: FileIO) -> os.stat_result:
        # Of the open file: a network file system may report an outdated status for a path.
        status = os.fstat(file.fileno())
        expected = len(self.names) * self.record_bytes
        if status.st_size != expected:
            raise DamagedShardError(f"{self.data}: found {status.st_size} bytes, expected {expected}")
        return status

    def _read_into(self, file: FileIO, target: memoryview) -> None:
        while target:
            count = file.readinto(target)
            if not count:
                raise DamagedShardError(f"{self.data}: the file ends before its last record")
            target = target[count:]


def compute_shard_checksum(names: tuple[str, ...], records_checksum: int) -> int:
    """Continue the CRC-32 of a shard's records over its names."""
    return zlib.crc32("\n".join(names).encode(), records_checksum)


def list_complete_shards(folder: Path, record_bytes: int, *, remove_damaged: bool = False) -> list[Shard]:
    """List the shards of a folder that have an index, oldest first; damaged indices are logged, or removed."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == INDEX)
    except OSError:
        return []
    shards = []
    for path in paths:
        try:
            shards.append(_read_index(path, record_bytes))
        except FileNotFoundError:
            continue  # another run has just removed it
        except OSError as error:
            log.warning("%s: can't read this index (%s); its records are recomputed.", path, error)
        except (ValueError, KeyError, TypeError) as error:
            if remove_damaged:
                with suppress(OSError):
                    path.unlink()  # without an index the data file is a leftover
            else:
                log.warning("%s: this index is damaged (%s); its records are recomputed.", path, error)
    return shards


def _read_index(index: Path, record_bytes: int) -> Shard:
    content = json.loads(index.read_bytes())
    names = content["names"]
    if not names or not all(isinstance(name, str) for name in names) or content["record_bytes"] != record_bytes:
        raise ValueError(f"expected the names of records of {record_bytes} bytes")
    return Shard(index.with_suffix(DATA), tuple(names), record_bytes, content["checksum"])


def remove_leftovers(folder: Path) -> None:
    """Remove files that killed runs left half-written: those without an index that are older than an hour."""
    for path in folder.iterdir():
        orphaned = path.suffix == DATA and not path.with_suffix(INDEX).exists()
        try:
            if (path.suffix == PARTIAL or orphaned) and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()
        except OSError as error:
            log.info("%s: can't remove this leftover: %s", path, error)


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
