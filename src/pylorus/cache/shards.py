"""Shards, the files that hold records, and the records of a request, read from them into memory or memory-mapped.

A shard is a line of JSON, the names of its records, followed by the records in the same order. It never changes, and it
has its name only when it is complete. The name ends in the CRC-32 of the whole file, so that damage is detected.
"""

import json
import logging
import mmap
import os
import secrets
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pylorus.cache.eviction import ReaderLease
from pylorus.core.io import write_atomically

log = logging.getLogger(__name__)

SUFFIX = ".shard"
SHARD_BYTES = 32 << 20
"""Bytes of records that are collected in memory before they are written, and so the most that a killed run loses."""
SHARD_SECONDS = 120.0
"""A shard is written after this time even if it is small, so that a killed run loses no more than that."""
READ_BYTES = 4 << 20
"""Bytes that are read at a time to verify a shard."""
LEFTOVER_SECONDS = 3600.0
"""An incomplete file older than this was left by a run that was killed."""

_verified: set[tuple[str, int, int, int]] = set()
"""Shards that this process has written or verified: path, inode, size and modification time."""


class DamagedShardError(Exception):
    """The bytes of a shard are not those that were written."""


class Shard:
    """A complete file of records. Its names are read at once, and its records when they are mapped.

    Args:
        path: The file.
        record_bytes: Size of one record in bytes.

    Raises:
        DamagedShardError: If the names or the size of the file show that it is damaged.
        OSError: If the file can't be read.
    """

    def __init__(self, path: Path, record_bytes: int) -> None:
        with path.open("rb") as file:
            header, size = file.readline(), os.fstat(file.fileno()).st_size
        try:
            names = json.loads(header)
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise DamagedShardError(f"{path}: it does not begin with the names of its records")
        if size != (expected := len(header) + len(names) * record_bytes):
            raise DamagedShardError(f"{path}: found {size} bytes, expected {expected}")
        self.path, self.names, self._offset = path, names, len(header)

    def open_mapped(self) -> NDArray[np.uint8]:
        """Return the records as a read-only, memory-mapped array of shape (names, record_bytes).

        The first call in a process reads the whole file to verify it.

        Raises:
            DamagedShardError: If the checksum does not match.
            OSError: If the file can't be read.
        """
        with self.path.open("rb") as file:
            identity = _get_identity(self.path, os.fstat(file.fileno()))
            if identity not in _verified:
                # A bad sector is an error when it is read, but kills a process that has mapped it.
                checksum = 0
                while block := file.read(READ_BYTES):
                    checksum = zlib.crc32(block, checksum)
                if not self.path.stem.endswith(f"-{checksum:08x}"):
                    raise DamagedShardError(f"{self.path}: the checksum does not match its name")
                _verified.add(identity)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapping, np.uint8, offset=self._offset).reshape(len(self.names), -1)


class ShardWriter:
    """Collects records and writes them as shards of limited size; each is on disk as a whole or not at all.

    Args:
        folder: Folder of the shards.
        record_bytes: Size of one record in bytes.
        count: Number of records that will be added.
    """

    def __init__(self, folder: Path, record_bytes: int, count: int) -> None:
        self._folder, self._remaining = folder, count
        self._buffer = np.empty((min(count, max(1, SHARD_BYTES // record_bytes)), record_bytes), np.uint8)
        self._names: list[str] = []
        self._start = 0.0

    def add(self, names: Sequence[str], block: NDArray[np.uint8]) -> None:
        """Add the records `block`, of shape (names, record_bytes); write a shard if it is full, old or the last one.

        Raises:
            OSError: If the disk is full or unavailable.
        """
        for name, record in zip(names, block, strict=True):
            self._start = self._start if self._names else time.monotonic()
            self._buffer[len(self._names)] = record
            self._names.append(name)
            self._remaining -= 1
            if len(self._names) == len(self._buffer) or not self._remaining:
                self._write_shard()
        if self._names and time.monotonic() - self._start > SHARD_SECONDS:
            self._write_shard()

    def _write_shard(self) -> None:
        content = b"".join((json.dumps(self._names).encode(), b"\n", self._buffer[: len(self._names)].data))
        path = self._folder / f"{time.time_ns():x}-{secrets.token_hex(4)}-{zlib.crc32(content):08x}{SUFFIX}"
        with write_atomically(path) as temporary:
            temporary.write_bytes(content)
        _verified.add(_get_identity(path, path.stat()))
        self._names = []


def _get_identity(path: Path, status: os.stat_result) -> tuple[str, int, int, int]:
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed runs: those that are older than an hour."""
    for path in folder.glob(f".*{SUFFIX}"):
        try:
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()
        except OSError as error:
            log.info("%s: can't remove this leftover: %s", path, error)


class Records:
    """The records of a request, in the order of its names, held in memory or memory-mapped from their shards.

    Attributes:
        place: "memory" or "disk"; a store is not evicted while its records are mapped from disk.
        distinct_names: The names without duplicates; the position of a name in it is the number of its record.
        computed: Number of distinct records that had to be computed; the others were found in the store.

    Args:
        names: One per record.
        folder: Folder of the shards.
        record_bytes: Size of one record in bytes.
        memory_bytes: Maximum bytes of records to hold in memory.
    """

    def __init__(self, names: Sequence[str], folder: Path, record_bytes: int, *, memory_bytes: int) -> None:
        self._numbers: dict[str, int] = {}
        numbers = (self._numbers.setdefault(name, len(self._numbers)) for name in names)
        self._number_of = np.fromiter(numbers, np.intp, len(names))
        self.distinct_names, count = list(self._numbers), len(self._numbers)
        self.computed = 0
        self._folder, self._record_bytes = folder, record_bytes
        self._found = np.zeros(count, bool)
        self._damaged: set[Path] = set()
        self.place = "memory" if count * record_bytes <= memory_bytes else "disk"
        in_memory = self.place == "memory"
        self._lease = None if in_memory else ReaderLease(folder)
        self._shards: list[Shard] = []
        self._arrays = [np.empty((count, record_bytes), np.uint8)] if in_memory else []
        self._array_of, self._row_of = np.zeros(count, np.intp), np.arange(count)

    def __len__(self) -> int:
        return len(self._number_of)

    @property
    def kept(self) -> int:
        """Number of distinct records that were found in the store."""
        return len(self.distinct_names) - self.computed

    def select_rows(self, rows: NDArray[np.integer]) -> "Records":
        """Return the records at the given rows, in their order, as a request of their own."""
        selection = Records.__new__(Records)
        selection.__dict__.update(self.__dict__, _number_of=self._number_of[rows])
        return selection

    def read_rows(self, rows: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint8]:
        """Return the records of the names at `rows` as a new, writable array of shape (rows, record_bytes).

        Raises:
            IndexError: If a row is not an integer or out of range.
        """
        indices = np.asarray(rows)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise IndexError(f"rows: found {indices.dtype} of shape {indices.shape}, expected a 1D array of integers")
        numbers = self._number_of[indices.astype(np.intp)]
        records = np.empty((len(numbers), self._record_bytes), np.uint8)
        sources = zip(self._array_of[numbers].tolist(), self._row_of[numbers].tolist(), strict=True)
        for index, (array, row) in enumerate(sources):
            records[index] = self._arrays[array][row]
        return records

    def get_positions(self, numbers: NDArray[np.intp]) -> list[int]:
        """Return the position in the request of the first name of each of these records."""
        positions: list[int] = np.unique(self._number_of, return_index=True)[1][numbers].tolist()
        return positions

    def put_computed(self, numbers: NDArray[np.intp], block: NDArray[np.uint8]) -> None:
        """Hold the records `block`, of shape (numbers, record_bytes), in memory if that is their place."""
        if self.place == "memory":
            self._arrays[0][numbers] = block
            self._found[numbers] = True

    def load_missing(self, *, remove_damaged: bool = False) -> NDArray[np.intp]:
        """Load missing records from the shards; return the numbers of those that are still missing.

        Args:
            remove_damaged: Whether to remove damaged shards, which are skipped with a warning; only for the holder of
                the store's lock.
        """
        for path in _list_shards(self._folder):
            try:
                if path not in self._damaged and not self._found.all():
                    self._load_shard(Shard(path, self._record_bytes))
            except FileNotFoundError:
                continue  # another run has just removed it
            except DamagedShardError as error:
                log.warning("%s; its records are recomputed.", error)
                self._damaged.add(path)
            except OSError as error:
                log.warning("%s: can't read this shard (%s); its records are recomputed.", path, error)
            if remove_damaged and path in self._damaged:
                with suppress(OSError):
                    path.unlink()
        return np.flatnonzero(~self._found)

    def _load_shard(self, shard: Shard) -> None:
        matches = [(self._numbers[name], row) for row, name in enumerate(shard.names) if name in self._numbers]
        numbers, rows = np.array([pair for pair in matches if not self._found[pair[0]]], np.intp).reshape(-1, 2).T
        if not len(numbers):
            return
        mapped = shard.open_mapped()
        if self.place == "memory":
            self._arrays[0][numbers] = mapped[rows]
        else:
            self._array_of[numbers], self._row_of[numbers] = len(self._arrays), rows
            self._arrays.append(mapped)
            self._shards.append(shard)
        self._found[numbers] = True

    def __getstate__(self) -> dict[str, object]:
        # A spawned worker maps the files again; its parent, which outlives it, holds the lease.
        return {**self.__dict__, "_lease": None, "_arrays": self._arrays if self.place == "memory" else []}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._arrays += [shard.open_mapped() for shard in self._shards]


def _list_shards(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == SUFFIX and not path.name.startswith("."))
    except OSError:
        return []
