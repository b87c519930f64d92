"""Where records gather: all in memory, or mapped from the shards they lie in."""

import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pylorus.cache.lock import Lease
from pylorus.cache.shard import DamagedShardError, Shard, complete_shards

log = logging.getLogger(__name__)

Place = Literal["memory", "disk"]


class Source(ABC):
    """Where the distinct records of a request gather, whatever shard or computation they come from.

    Attributes:
        place: "memory" or "disk".
        record_bytes: Bytes of one record.
        damaged: Data files that can't be trusted, or are gone.

    Args:
        numbers: The number of each name, from 0 on.
        record_bytes: Bytes of one record.
    """

    place: Place

    def __init__(self, numbers: dict[str, int], record_bytes: int) -> None:
        self._numbers = numbers
        self.record_bytes = record_bytes
        self.damaged: set[Path] = set()
        self._present = np.zeros(len(numbers), bool)

    @property
    def missing(self) -> NDArray[np.intp]:
        """Numbers of the records that have not been found yet."""
        return np.flatnonzero(~self._present)

    def absorb(self, shard: Shard) -> None:
        """Takes from a shard the records that are still missing.

        Raises:
            DamagedShardError: If the shard is damaged; then nothing is taken from it.
            OSError: If it can't be read; then nothing is taken from it.
        """
        wanted = [(self._numbers[name], place) for place, name in enumerate(shard.names) if name in self._numbers]
        pairs = np.array(wanted, np.intp).reshape(-1, 2)
        pairs = pairs[~self._present[pairs[:, 0]]]
        if len(pairs):
            self._take_over(shard, pairs[:, 0], pairs[:, 1])
            self._present[pairs[:, 0]] = True

    @abstractmethod
    def take(self, numbers: NDArray[np.intp]) -> NDArray[np.uint8]:
        """A fresh array (len(numbers), record_bytes)."""

    @abstractmethod
    def _take_over(self, shard: Shard, numbers: NDArray[np.intp], places: NDArray[np.intp]) -> None:
        """Makes the records at `places` of the shard, in ascending order, those of `numbers`."""


class InMemory(Source):
    """Records in one array."""

    place = "memory"

    def __init__(self, numbers: dict[str, int], record_bytes: int) -> None:
        super().__init__(numbers, record_bytes)
        self._array = np.empty((len(numbers), record_bytes), np.uint8)

    def put(self, numbers: NDArray[np.intp], block: NDArray[np.uint8]) -> None:
        """Takes records that were computed: `block` of shape (len(numbers), record_bytes)."""
        self._array[numbers] = block
        self._present[numbers] = True

    def take(self, numbers: NDArray[np.intp]) -> NDArray[np.uint8]:
        """A fresh array (len(numbers), record_bytes)."""
        return self._array[numbers]

    def _take_over(self, shard: Shard, numbers: NDArray[np.intp], places: NDArray[np.intp]) -> None:
        for first, block in shard.blocks():
            low, high = np.searchsorted(places, (first, first + len(block)))
            self._array[numbers[low:high]] = block[places[low:high] - first]


class OnDisk(Source):
    """Records in mapped shards; while it lives, the store is not evicted."""

    place = "disk"

    def __init__(self, numbers: dict[str, int], record_bytes: int, root: Path, store: str) -> None:
        super().__init__(numbers, record_bytes)
        self._lease: Lease | None = Lease(root, store)
        self._shards: list[Shard] = []
        self._mappings: list[NDArray[np.uint8]] = []
        self._shard_of = np.zeros(len(numbers), np.intp)
        self._place_of = np.zeros(len(numbers), np.intp)

    def take(self, numbers: NDArray[np.intp]) -> NDArray[np.uint8]:
        """A fresh array (len(numbers), record_bytes)."""
        taken = np.empty((len(numbers), self.record_bytes), np.uint8)
        shards, places = self._shard_of[numbers].tolist(), self._place_of[numbers].tolist()
        for row, (shard, place) in enumerate(zip(shards, places, strict=True)):
            taken[row] = self._mappings[shard][place]
        return taken

    def _take_over(self, shard: Shard, numbers: NDArray[np.intp], places: NDArray[np.intp]) -> None:
        self._mappings.append(shard.mapped())
        self._shards.append(shard)
        self._shard_of[numbers] = len(self._shards) - 1
        self._place_of[numbers] = places

    def __getstate__(self) -> dict[str, object]:
        # A worker process that is not forked maps the files again; its parent, which outlives it, keeps the lease.
        return {**self.__dict__, "_lease": None, "_mappings": []}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._mappings = [shard.mapped() for shard in self._shards]


def gather(source: Source, folder: Path, *, remove_damaged: bool = False) -> None:
    """Takes what is missing from the complete shards of a folder; a damaged shard is passed over with a warning.

    Args:
        source: Where the records go.
        folder: The store's.
        remove_damaged: Whether to remove damaged shards: only for who holds the store's lock.
    """
    if not len(source.missing):
        return
    for shard in complete_shards(folder, source.record_bytes, remove_damaged=remove_damaged):
        if shard.data not in source.damaged:
            try:
                source.absorb(shard)
            except DamagedShardError as error:
                log.warning("%s; its records are computed anew.", error)
                source.damaged.add(shard.data)
            except FileNotFoundError:
                source.damaged.add(shard.data)
            except OSError as error:
                log.warning("%s can't be read (%s); its records are computed anew.", shard.data, error)
        if remove_damaged and shard.data in source.damaged:
            shard.remove()
