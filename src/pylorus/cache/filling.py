"""Compute the records that a store lacks, store them on disk as long as there is space, and in memory if they fit."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from pylorus.cache.address import Address
from pylorus.cache.budget import clear_reservation, ensure_space, format_bytes
from pylorus.cache.lock import Lock
from pylorus.cache.shard import remove_leftovers
from pylorus.cache.shard_writer import ShardWriter
from pylorus.cache.source import InMemorySource, RecordSource, load_missing_records
from pylorus.errors import PylorusError
from pylorus.parallel.processes import Processes

log = logging.getLogger(__name__)

Compute = Callable[[Sequence[int]], Iterator[NDArray[np.uint8]]]
"""Takes the indices in `names` of missing records; yields blocks of shape (n, record_bytes) in the same order."""

SHARD_BYTES = 256 << 20
"""Maximum size of a shard in bytes, and so the most that a killed run loses."""


class DoesNotFitError(PylorusError):
    """The records fit neither on disk nor in the memory available to them."""


class StoreFiller:
    """The work of one run on the records that a store lacks.

    Args:
        address: Location of the store.
        source: Where the records are collected.
        names: Name of each distinct record.
        positions: Index of the first occurrence of each distinct record in the request, shape (distinct records,).
        budget_bytes: Maximum bytes of everything below the root.
        memory_bytes: Maximum bytes of records in memory, for messages.
        processes: The processes that share the work. All of them must call each method here.
    """

    def __init__(
        self,
        address: Address,
        source: RecordSource,
        *,
        names: Sequence[str],
        positions: NDArray[np.intp],
        budget_bytes: int,
        memory_bytes: int,
        processes: Processes,
    ) -> None:
        self._address = address
        self._source = source
        self._names = names
        self._positions = positions
        self._budget_bytes = budget_bytes
        self._memory_bytes = memory_bytes
        self._processes = processes
        self._lock = Lock(address.root, address.name)
        self._writer: ShardWriter | None = None

    def run(self, compute: Compute) -> int:
        """Wait for any run that is already computing, then compute what is still missing.

        Returns:
            How many records were missing and have been computed.

        Raises:
            DoesNotFitError: If there is space neither on disk nor in memory.
            ValueError: If `compute` yields something other than the records it was asked for.
            Exception: Whatever `compute` raises.
        """
        folder = self._address.folder
        if self._processes.is_first:  # on behalf of all processes
            self._lock.acquire(watched=folder, holder=f"computing {self._address.kind}")
        try:
            missing = self._processes.run_on_first(self._find_missing)
            if len(missing):
                self._open_writer(missing)
                self._compute_share(compute, missing)
            load_missing_records(self._source, folder)
            self._processes.wait()  # a run that waits for the lock might evict what is still being read here
        finally:
            self._close_writer()
            self._lock.release()
        if len(self._source.missing):
            shared = (
                " cache.folder must be a folder that all machines of the run share." * self._processes.is_distributed
            )
            raise PylorusError(f"{folder}: records disappeared after they were written.{shared} Start the run again.")
        return len(missing)

    def _find_missing(self) -> NDArray[np.intp]:
        load_missing_records(self._source, self._address.folder, remove_damaged=self._lock.held)
        return self._source.missing

    def _compute_share(self, compute: Compute, missing: NDArray[np.intp]) -> None:
        """Compute this process's share, or everything if the processes can't exchange records through the disk."""
        share = missing[self._processes.own_slice] if self._writer is not None else missing
        failure: DoesNotFitError | None = None
        try:
            self._compute_missing(compute, share)
        except DoesNotFitError as error:
            failure = error
        any_failed, any_in_memory = self._processes.reduce_any(failure is not None, self._writer is None)
        if any_failed:
            raise failure or DoesNotFitError(f"The {self._address.kind} did not fit in another process of the run.")
        if any_in_memory and self._processes.is_distributed:
            self._close_writer()
            load_missing_records(self._source, self._address.folder)
            self._compute_missing(compute, self._source.missing)

    def _compute_missing(self, compute: Compute, missing: NDArray[np.intp]) -> None:
        positions: list[int] = self._positions[missing].tolist()
        done = 0
        for block in _validate_blocks(compute(positions), len(positions), self._address.record_bytes):
            numbers = missing[done : done + len(block)]
            done += len(block)
            if isinstance(self._source, InMemorySource):
                self._source.put_records(numbers, block)
            self._write_block([self._names[number] for number in numbers], block)
        self._write_block([], None)

    def _write_block(self, names: list[str], block: NDArray[np.uint8] | None) -> None:
        """Write a block, or complete the last shard if `block` is None; continue without the disk if writing fails."""
        if self._writer is None:
            return
        try:
            if block is None:
                self._writer.close()
            else:
                self._writer.add(names, block)
        except OSError as error:
            self._use_memory_only(f"{self._address.folder} can't be written to: {error}.")

    def _open_writer(self, missing: NDArray[np.intp]) -> None:
        """Open a writer if there is space on disk; otherwise continue in memory."""
        folder, need = self._address.folder, len(missing) * self._address.record_bytes
        reason = self._processes.run_on_first(lambda: self._ensure_space(missing))
        if reason is not None:
            self._use_memory_only(reason)
            return
        log.debug(
            "Computing %d records of %s (%s) into %s.", len(missing), self._address.kind, format_bytes(need), folder
        )
        self._writer = ShardWriter(folder, self._address.record_bytes, shard_bytes=SHARD_BYTES)

    def _ensure_space(self, missing: NDArray[np.intp]) -> str | None:
        """Reserve space on disk; return None, or the reason why there is not enough."""
        folder, need = self._address.folder, len(missing) * self._address.record_bytes
        indices = sum(len(self._names[number].encode()) + 4 for number in missing) + 1024 * (1 + need // SHARD_BYTES)
        try:
            self._address.prepare()
            if self._lock.held:
                remove_leftovers(folder)
            return ensure_space(self._address.root, folder, need=need + indices, budget=self._budget_bytes)
        except OSError as error:
            return f"{folder} can't be written to: {error}."

    def _use_memory_only(self, reason: str) -> None:
        """Continue in memory if the records fit there.

        Raises:
            DoesNotFitError: If they don't.
        """
        self._close_writer()
        self._lock.release()  # a run that waits for it would gain nothing by waiting longer
        if not isinstance(self._source, InMemorySource):
            all_records = format_bytes(len(self._names) * self._address.record_bytes)
            raise DoesNotFitError(
                f"The {self._address.kind} can't be stored on disk: {reason}\n"
                f"They don't fit in memory either: they take {all_records}, and "
                f"{format_bytes(self._memory_bytes)} is available (cache.memory_gib)."
            )
        log.warning("The %s are kept in memory, for this run only: %s", self._address.kind, reason)

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.discard()
            self._writer = None
            if self._processes.is_first:
                clear_reservation(self._address.folder)


def _validate_blocks(blocks: Iterable[NDArray[np.uint8]], count: int, record_bytes: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the blocks unchanged but contiguous.

    Raises:
        ValueError: If a block is not uint8 of shape (n, record_bytes), or the blocks are not `count` records in total.
    """
    remaining = count
    for block in blocks:
        if block.dtype != np.uint8 or block.ndim != 2 or block.shape[1] != record_bytes or len(block) > remaining:
            expected = f"uint8 of shape (at most {remaining}, {record_bytes})"
            raise ValueError(f"compute: found a block of {block.dtype} of shape {block.shape}, expected {expected}")
        remaining -= len(block)
        yield np.ascontiguousarray(block)
    if remaining:
        raise ValueError(f"compute: found {count - remaining} records, expected {count}")
