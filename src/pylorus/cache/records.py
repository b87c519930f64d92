"""Where the records of a request are collected: all in memory, or memory-mapped from their shards."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pylorus.cache.lock import ReaderLease
from pylorus.cache.shard import DamagedShardError, Shard, list_complete_shards

log = logging.getLogger(__name__)

Place = Literal["memory", "disk"]


class RecordSource(ABC):
    """Collects the distinct records of a request, from whichever shard or computation they come.

    Attributes:
        place: "memory" or "disk".
        record_bytes: Size of one record in bytes.
        damaged: Data files that are damaged or missing.

    Args:
        numbers: The index of each name, starting at 0.
        record_bytes: Size of one record in bytes.
    """

    place: Place

    def __init__(self, numbers: dict[str, int], record_bytes: int) -> None:
        self._numbers = numbers
        self.record_bytes = record_bytes
        self.damaged: set[Path] = set()
        self._present = np.zeros(len(numbers), bool)

    @property
    def missing(self) -> NDArray[np.intp]:
        """Indices of the records that have not been found yet."""
        return np.flatnonzero(~self._present)

    def load_shard(self, shard: Shard) -> None:
        """Take over the records from a shard that are still missing.

        Raises:
            DamagedShardError: If the shard is damaged; nothing is taken from it.
            OSError: If it can't be read; nothing is taken from it.
        """
        matches = [(self._numbers[name], index) for index, name in enumerate(shard.names) if name in self._numbers]
        pairs = np.array(matches, np.intp).reshape(-1, 2)
        pairs = pairs[~self._present[pairs[:, 0]]]
        if len(pairs):
            self._load_records(shard, pairs[:, 0], pairs[:, 1])
            self._present[pairs[:, 0]] = True

    @abstractmethod
    def read_records(self, numbers: NDArray[np.intp]) -> NDArray[np.uint8]:
        """Return the records as a new array of shape (len(numbers), record_bytes)."""

    @abstractmethod
    def _load_records(self, shard: Shard, numbers: NDArray[np.intp], positions: NDArray[np.intp]) -> None:
        """Take the records at `positions` of the shard, in ascending order, as those with the indices `numbers`."""


class InMemorySource(RecordSource):
    """Holds the records in one array."""

    place = "memory"

    def __init__(self, numbers: dict[str, int], record_bytes: int) -> None:
        super().__init__(numbers, record_bytes)
        self._array = np.empty((len(numbers), record_bytes), np.uint8)

    def put_records(self, numbers: NDArray[np.intp], block: NDArray[np.uint8]) -> None:
        """Store records that were computed: `block` of shape (len(numbers), record_bytes)."""
        self._array[numbers] = block
        self._present[numbers] = True

    def read_records(self, numbers: NDArray[np.intp]) -> NDArray[np.uint8]:
        """Return the records as a new array of shape (len(numbers), record_bytes)."""
        return self._array[numbers]

    def _load_records(self, shard: Shard, numbers: NDArray[np.intp], positions: NDArray[np.intp]) -> None:
        for first, block in shard.iter_blocks():
            low, high = np.searchsorted(positions, (first, first + len(block)))
            self._array[numbers[low:high]] = block[positions[low:high] - first]


class OnDiskSource(RecordSource):
    """Reads the records from memory-mapped shards; the store is not evicted while this object lives."""

    place = "disk"

    def __init__(self, numbers: dict[str, int], record_bytes: int, root: Path, store: str) -> None:
        super().__init__(numbers, record_bytes)
        self._lease: ReaderLease | None = ReaderLease(root, store)
        self._shards: list[Shard] = []
        self._mappings: list[NDArray[np.uint8]] = []
        self._shard_of = np.zeros(len(numbers), np.intp)
        self._position_of = np.zeros(len(numbers), np.intp)

    def read_records(self, numbers: NDArray[np.intp]) -> NDArray[np.uint8]:
        """Return the records as a new array of shape (len(numbers), record_bytes)."""
        records = np.empty((len(numbers), self.record_bytes), np.uint8)
        shards, positions = self._shard_of[numbers].tolist(), self._position_of[numbers].tolist()
        for row, (shard, position) in enumerate(zip(shards, positions, strict=True)):
            records[row] = self._mappings[shard][position]
        return records

    def _load_records(self, shard: Shard, numbers: NDArray[np.intp], positions: NDArray[np.intp]) -> None:
        self._mappings.append(shard.open_mapped())
        self._shards.append(shard)
        self._shard_of[numbers] = len(self._shards) - 1
        self._position_of[numbers] = positions

    def __getstate__(self) -> dict[str, object]:
        # A spawned worker maps the files again; its parent, which outlives it, holds the lease.
        return {**self.__dict__, "_lease": None, "_mappings": []}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._mappings = [shard.open_mapped() for shard in self._shards]


def load_missing_records(source: RecordSource, folder: Path, *, remove_damaged: bool = False) -> None:
    """Collect missing records from the complete shards of a folder; a damaged shard is skipped with a warning.

    Args:
        source: Where the records are collected.
        folder: The store's folder.
        remove_damaged: Whether to remove damaged shards; only for the holder of the store's lock.
    """
    if not len(source.missing):
        return
    for shard in list_complete_shards(folder, source.record_bytes, remove_damaged=remove_damaged):
        if shard.data not in source.damaged:
            try:
                source.load_shard(shard)
            except DamagedShardError as error:
                log.warning("%s; its records are recomputed.", error)
                source.damaged.add(shard.data)
            except FileNotFoundError:
                source.damaged.add(shard.data)
            except OSError as error:
                log.warning("%s: can't read this shard (%s); its records are recomputed.", shard.data, error)
        if remove_damaged and shard.data in source.damaged:
            shard.remove()


class Records:
    """All records of a request, in the order of its names.

    Attributes:
        kept: Number of distinct records that were found in the store.
        computed: Number of distinct records that had to be computed.
        place: Where they are held: "memory" or "disk".

    Args:
        source: The distinct records.
        numbers: Index of each name's record in `source`, shape (names,).
        kept: See above.
        computed: See above.
    """

    def __init__(self, source: RecordSource, numbers: NDArray[np.intp], *, kept: int, computed: int) -> None:
        self.kept = kept
        self.computed = computed
        self.place: Place = source.place
        self._source = source
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def select_rows(self, rows: NDArray[np.integer]) -> "Records":
        """Return the records at the given rows, in their order, as a request of their own."""
        return Records(self._source, self._numbers[rows], kept=self.kept, computed=self.computed)

    def read_rows(self, rows: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint8]:
        """Return the records of the names at `rows` as a new, writable array of shape (len(rows), record_bytes).

        Raises:
            IndexError: If a row is not an integer or out of range.
        """
        indices = np.asarray(rows)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise IndexError(f"rows: found {indices.dtype} of shape {indices.shape}, expected a 1D array of integers")
        return self._source.read_records(self._numbers[indices.astype(np.intp)])
