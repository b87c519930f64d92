"""Shards, the files that hold records, and the records of a request, read from them into memory or memory-mapped.

A shard is a line of JSON, the names of its records, followed by the records in the same order. It never changes, and it
has its name only when it is complete. The name ends in the CRC-32 of the whole file, so that damage is detected.
"""

import json
import logging
import os
import secrets
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pylorus.core.io import write_atomically

log = logging.getLogger(__name__)

SUFFIX = ".shard"
SHARD_BYTES, SHARD_SECONDS = 32 << 20, 120.0
"""Records are collected in memory for so many bytes or seconds before they are written: all that a killed run loses."""
READ_BYTES, LEFTOVER_SECONDS = 4 << 20, 3600.0
"""Bytes that are read at a time to verify a shard; age from which on an incomplete file is that of a killed run."""


class DamagedShardError(Exception):
    """The bytes of a shard are not those that were written."""


class Shard:
    """A complete file of records, of which only the names are read at first.

    Raises DamagedShardError if they or the file's size show that it is damaged, and OSError if it can't be read.
    """

    def __init__(self, path: Path, record_bytes: int) -> None:
        with path.open("rb") as file:
            header, size = file.readline(), os.fstat(file.fileno()).st_size
        names = None
        with suppress(ValueError, RecursionError):
            names = json.loads(header)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise DamagedShardError(f"{path}: it does not begin with the names of its records")
        if size != (expected := len(header) + len(names) * record_bytes):
            raise DamagedShardError(f"{path}: found {size} bytes, expected {expected}")
        self.path, self.names, self._offset, self._record_bytes = path, names, len(header), record_bytes

    def verify(self) -> None:
        """Read the whole file, and raise DamagedShardError if its checksum does not match, or OSError."""
        checksum = 0
        with self.path.open("rb") as file:
            while block := file.read(READ_BYTES):
                checksum = zlib.crc32(block, checksum)
        if not self.path.stem.endswith(f"-{checksum:08x}"):
            raise DamagedShardError(f"{self.path}: the checksum does not match its name")

    def open_mapped(self) -> NDArray[np.uint8]:
        """Return the records as a read-only, memory-mapped array of shape (names, record_bytes)."""
        shape = (len(self.names), self._record_bytes)
        return np.asarray(np.memmap(self.path, np.uint8, "r", self._offset, shape))


class ShardWriter:
    """Writes `count` records as shards of limited size; each is on disk as a whole or not at all."""

    def __init__(self, folder: Path, record_bytes: int, count: int) -> None:
        self._folder, self._remaining = folder, count
        self._buffer = np.empty((min(count, max(1, SHARD_BYTES // record_bytes)), record_bytes), np.uint8)
        self._names, self._start = list[str](), 0.0

    def add(self, names: Sequence[str], block: NDArray[np.uint8]) -> None:
        """Add records of shape (names, record_bytes), and write what is due; OSError if the disk is full or fails."""
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
        _write_shard(self._folder, self._names, [self._buffer[: len(self._names)]])
        self._names = []


def write_shards(folder: Path, names: Sequence[str], records: Sequence[NDArray[np.uint8]]) -> None:
    """Write one record for each name as shards of limited size; OSError if the disk is full or fails."""
    step = max(1, SHARD_BYTES // records[0].size)
    for start in range(0, len(names), step):
        _write_shard(folder, names[start : start + step], records[start : start + step])


def _write_shard(folder: Path, names: Sequence[str], parts: Sequence[NDArray[np.uint8]]) -> None:
    views = (np.ascontiguousarray(part).data.cast("B") for part in parts)
    pieces = [memoryview(json.dumps(list(names)).encode() + b"\n"), *views]
    checksum = reduce(lambda value, piece: zlib.crc32(piece, value), pieces, 0)
    path = folder / f"{time.time_ns():x}-{secrets.token_hex(4)}-{checksum:08x}{SUFFIX}"
    with write_atomically(path, durable=False) as temporary, temporary.open("wb") as file:
        file.writelines(pieces)  # `Shard.verify` finds out after a power failure


class Records:
    """The records of a request, in the order of its names, held in memory or memory-mapped from their shards.

    Attributes:
        place: "memory" or "disk"; a store is not evicted while its records are mapped from disk.
        distinct_names: The names without duplicates; the position of a name in it is the number of its record.
        first_rows: Position in the request of each record's first name.
        kept, computed: Numbers of distinct records that were found in the store, and that had to be computed.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        record_bytes: int,
        *,
        memory_bytes: int,
        lease: Callable[[Path], object],
    ) -> None:
        self._numbers: dict[str, int] = {}
        numbers = (self._numbers.setdefault(name, len(self._numbers)) for name in names)
        self._number_of = np.fromiter(numbers, np.intp, len(names))
        self.first_rows = np.unique(self._number_of, return_index=True)[1]
        self.distinct_names, count = list(self._numbers), len(self._numbers)
        self.kept, self.computed = count, 0
        self._folder, self._record_bytes = folder, record_bytes
        in_memory = count * record_bytes <= memory_bytes
        self.place = "memory" if in_memory else "disk"
        self._lease = None if in_memory else lease(folder)
        self._found, self._damaged, self._shards = np.zeros(count, bool), set[Path](), list[Shard]()
        self._arrays = [np.empty((count, record_bytes), np.uint8)] if in_memory else []
        self._array_of, self._row_of = np.zeros(count, np.intp), np.arange(count)

    def __len__(self) -> int:
        return len(self._number_of)

    def select_rows(self, rows: NDArray[np.integer]) -> "Records":
        """Return the records at the given rows, in their order, as a request of their own."""
        selection = Records.__new__(Records)
        selection.__dict__.update(self.__dict__, _number_of=self._number_of[rows])
        return selection

    def read_rows(self, rows: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint8]:
        """Return the records at `rows` as a new array of shape (rows, record_bytes); IndexError for any other row."""
        indices = np.asarray(rows)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise IndexError(f"rows: found {indices.dtype} of shape {indices.shape}, expected a 1D array of integers")
        numbers = self._number_of[indices.astype(np.intp)]
        records = np.empty((len(numbers), self._record_bytes), np.uint8)
        sources = zip(self._array_of[numbers].tolist(), self._row_of[numbers].tolist(), strict=True)
        for index, (array, row) in enumerate(sources):
            records[index] = self._arrays[array][row]
        return records

    def put_computed(self, numbers: NDArray[np.intp], block: NDArray[np.uint8]) -> None:
        """Hold the records `block`, of shape (numbers, record_bytes), in memory if that is their place."""
        if self.place == "memory":
            self._arrays[0][numbers] = block
            self._found[numbers] = True

    def load_missing(self, *, clean: bool = False) -> NDArray[np.intp]:
        """Load missing records from the shards; return the numbers of those that are still missing.

        Damaged shards are skipped. `clean`, only for the holder of the store's lock, removes them and old leftovers.
        """
        paths: list[Path] = []
        with suppress(OSError):
            paths = sorted(path for path in self._folder.iterdir() if path.suffix == SUFFIX)
        for path in paths:
            if path.name.startswith("."):  # incomplete
                with suppress(OSError):
                    if clean and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                        path.unlink()
                continue
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
            if clean and path in self._damaged:
                with suppress(OSError):
                    path.unlink()
        return np.flatnonzero(~self._found)

    def _load_shard(self, shard: Shard) -> None:
        matches = [(self._numbers[name], row) for row, name in enumerate(shard.names) if name in self._numbers]
        numbers, rows = np.array([pair for pair in matches if not self._found[pair[0]]], np.intp).reshape(-1, 2).T
        if not len(numbers):
            return
        shard.verify()  # before mapping it: a bad sector is an error to who reads it, but kills who has mapped it
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
