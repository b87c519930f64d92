"""Computes the records that a store lacks, keeps them on disk while it takes them, and in memory where they fit."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pylorus.cache.address import Address
from pylorus.cache.budget import make_room, readable_size, release_room
from pylorus.cache.lock import Lock
from pylorus.cache.shard import remove_leftovers
from pylorus.cache.shard_writer import ShardWriter
from pylorus.cache.source import InMemory, Source, gather
from pylorus.errors import PylorusError
from pylorus.parallel.processes import Processes

log = logging.getLogger(__name__)

Compute = Callable[[Sequence[int]], Iterator[NDArray[np.uint8]]]
"""Takes places in `names` whose records are missing, yields blocks (n, record_bytes) of the records in that order."""

SHARD_BYTES = 256 << 20
"""Most bytes of a shard: what a killed run loses."""


class DoesNotFitError(PylorusError):
    """The records fit neither the disk nor the memory given to them."""


class Filling:
    """One run's work on the records that a store lacks.

    Args:
        address: The store's.
        source: Where the records go.
        names: The name of each distinct record.
        places: Where each distinct record first stands in the request, shape (distinct records,).
        budget_bytes: Most bytes of everything below the root.
        memory_bytes: Most bytes of records to hold in memory, for messages.
        processes: Who works on them; each computes its share, and all come to each step here.
    """

    def __init__(
        self,
        address: Address,
        source: Source,
        *,
        names: Sequence[str],
        places: NDArray[np.intp],
        budget_bytes: int,
        memory_bytes: int,
        processes: Processes,
    ) -> None:
        self._address = address
        self._source = source
        self._names = names
        self._places = places
        self._budget_bytes = budget_bytes
        self._memory_bytes = memory_bytes
        self._processes = processes
        self._lock = Lock(address.root, address.name)
        self._writer: ShardWriter | None = None

    def run(self, compute: Compute) -> int:
        """Waits for who is computing already, computes what is missing then, and gives how many these were.

        Raises:
            DoesNotFitError: If there is no room on disk nor in memory.
            ValueError: If `compute` yields other than it was asked for.
            Exception: What `compute` raises.
        """
        folder = self._address.folder
        if self._processes.first:  # on behalf of all
            self._lock.acquire(watched=folder, holder=f"computing {self._address.kind}")
        try:
            missing = self._processes.agreed(self._missing)
            if len(missing):
                self._open_writer(missing)
                self._compute_share(compute, missing)
            gather(self._source, folder)
            self._processes.wait()  # whoever waits for the lock might make room of what is being read here
        finally:
            self._close_writer()
            self._lock.release()
        if len(self._source.missing):
            shared = " All machines of a run need one cache.folder that each of them sees." * self._processes.several
            raise PylorusError(f"{folder}: records vanished as soon as they were written.{shared} Start the run again.")
        return len(missing)

    def _missing(self) -> NDArray[np.intp]:
        gather(self._source, self._address.folder, remove_damaged=self._lock.held)
        return self._source.missing

    def _compute_share(self, compute: Compute, missing: NDArray[np.intp]) -> None:
        """Computes what falls to this process; all of it where the others can't hand theirs over by disk."""
        share = missing[self._processes.mine] if self._writer is not None else missing
        failed: DoesNotFitError | None = None
        try:
            self._compute(compute, share)
        except DoesNotFitError as error:
            failed = error
        failed_somewhere, in_memory_somewhere = self._processes.any(failed is not None, self._writer is None)
        if failed_somewhere:
            raise failed or DoesNotFitError(f"The {self._address.kind} had no room in another process of the run.")
        if in_memory_somewhere and self._processes.several:
            self._close_writer()
            gather(self._source, self._address.folder)
            self._compute(compute, self._source.missing)

    def _compute(self, compute: Compute, missing: NDArray[np.intp]) -> None:
        places: list[int] = self._places[missing].tolist()
        done = 0
        for block in _checked(compute(places), len(places), self._address.record_bytes):
            numbers = missing[done : done + len(block)]
            done += len(block)
            if isinstance(self._source, InMemory):
                self._source.put(numbers, block)
            self._write([self._names[number] for number in numbers], block)
        self._write([], None)

    def _write(self, names: list[str], block: NDArray[np.uint8] | None) -> None:
        """Writes a block, or with None completes the last shard; goes on without the disk if it fails."""
        if self._writer is None:
            return
        try:
            if block is None:
                self._writer.close()
            else:
                self._writer.add(names, block)
        except OSError as error:
            self._leave_disk(f"{self._address.folder} can't be written to: {error}.")

    def _open_writer(self, missing: NDArray[np.intp]) -> None:
        """Starts writing if there is room on disk; if there is none the memory has to do."""
        folder, need = self._address.folder, len(missing) * self._address.record_bytes
        reason = self._processes.agreed(lambda: self._made_room(missing))
        if reason is not None:
            self._leave_disk(reason)
            return
        log.debug(
            "Computing %d records of %s (%s) into %s.", len(missing), self._address.kind, readable_size(need), folder
        )
        self._writer = ShardWriter(folder, self._address.record_bytes, shard_bytes=SHARD_BYTES)

    def _made_room(self, missing: NDArray[np.intp]) -> str | None:
        """Makes room on disk; says why there is none."""
        folder, need = self._address.folder, len(missing) * self._address.record_bytes
        indices = sum(len(self._names[number].encode()) + 4 for number in missing) + 1024 * (1 + need // SHARD_BYTES)
        try:
            self._address.prepare()
            if self._lock.held:
                remove_leftovers(folder)
            return make_room(self._address.root, folder, need=need + indices, budget=self._budget_bytes)
        except OSError as error:
            return f"{folder} can't be written to: {error}."

    def _leave_disk(self, reason: str) -> None:
        """Goes on in memory, if the records fit there.

        Raises:
            DoesNotFitError: If they don't.
        """
        self._close_writer()
        self._lock.release()  # who waits for it would find nothing more by waiting
        if not isinstance(self._source, InMemory):
            all_records = readable_size(len(self._names) * self._address.record_bytes)
            raise DoesNotFitError(
                f"The {self._address.kind} are not kept on disk: {reason}\n"
                f"Nor do they fit in memory: they take {all_records}, and {readable_size(self._memory_bytes)} are free."
            )
        log.warning("The %s are computed into memory, for this run only: %s", self._address.kind, reason)

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.discard()
            self._writer = None
            if self._processes.first:
                release_room(self._address.folder)


def _checked(blocks: Iterable[NDArray[np.uint8]], count: int, record_bytes: int) -> Iterator[NDArray[np.uint8]]:
    """The blocks as they come, contiguous.

    Raises:
        ValueError: If one is not bytes of shape (n, record_bytes), or together they are not `count` records.
    """
    left = count
    for block in blocks:
        if block.dtype != np.uint8 or block.ndim != 2 or block.shape[1] != record_bytes or len(block) > left:
            expected = f"uint8 ({left} at most, {record_bytes})"
            raise ValueError(f"compute: found a block of {block.dtype} {block.shape}, expected {expected}")
        left -= len(block)
        yield np.ascontiguousarray(block)
    if left:
        raise ValueError(f"compute: found {count - left} records, expected {count}")
