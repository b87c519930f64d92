"""Compute the records that a store lacks, store them on disk as long as there is space, and in memory if they fit."""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pylorus.cache.eviction import Address, clear_reservation, ensure_space
from pylorus.cache.lock import Lock
from pylorus.cache.records import InMemorySource, OnDiskSource, Records, RecordSource, load_missing_records
from pylorus.cache.shard import ShardWriter, remove_leftovers
from pylorus.config.schema import CacheConfig
from pylorus.core.distributed import ALONE, Processes
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_bytes

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


__all__ = ["Compute", "DoesNotFitError", "RecordStore", "Records"]


class RecordStore:
    """Records of one kind that were all computed in the same way.

    Args:
        root: Folder of all stores. Files are accessible to their owner only, since the records derive from patients'
            images.
        kind: Subfolder, such as "features": lower-case letters, digits, - and _.
        key: Everything that the content of a record depends on besides its name, as plain JSON values.
        record_bytes: Size of one record in bytes.
        budget_bytes: Maximum bytes of everything below `root`.

    Raises:
        ValueError: If `kind` or `record_bytes` is invalid, or `key` holds a number that is not finite.
        TypeError: If `key` holds a value that JSON can't represent.
    """

    def __init__(
        self, root: Path, *, kind: str, key: Mapping[str, object], record_bytes: int, budget_bytes: int
    ) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", kind):
            raise ValueError(f"kind: found {kind!r}, expected lower-case letters, digits, - and _")
        if record_bytes < 1:
            raise ValueError(f"record_bytes: found {record_bytes}, expected at least 1")
        self._address = Address(root.absolute(), kind, key, record_bytes)
        self._budget_bytes = budget_bytes
        self.folder = self._address.folder

    def load_or_compute(
        self, names: Sequence[str], compute: Compute, *, memory_bytes: int, processes: Processes = ALONE
    ) -> Records:
        """Load the records of `names`; those that are missing are computed and stored.

        Args:
            names: One per record. If a name occurs twice, both share one record.
            compute: Computes missing records; see `Compute`. It is called at most once, and in every process
                or in none.
            memory_bytes: Maximum bytes of records to hold in memory; larger requests stay on disk and are mapped.
            processes: The processes that request the same names at the same time; each computes its share of the
                missing records.

        Raises:
            DoesNotFitError: If the missing records don't fit on disk, nor all records in `memory_bytes`.
            ValueError: If `compute` yields something other than the records it was asked for.
            Exception: Whatever `compute` raises; the shards that it completed stay in the store.
        """
        numbers: dict[str, int] = {}
        rows = np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.intp, len(names))
        with suppress(OSError):  # existing records can still be read; writing reports what is wrong
            self._address.prepare()
        source: RecordSource
        if len(numbers) * self._address.record_bytes <= memory_bytes:
            source = InMemorySource(numbers, self._address.record_bytes)
        else:
            source = OnDiskSource(numbers, self._address.record_bytes, self._address.root, self._address.name)
        load_missing_records(source, self.folder)
        computed = 0
        if any(processes.reduce_any(len(source.missing) > 0)):
            filling = StoreFiller(
                self._address,
                source,
                names=list(numbers),
                positions=np.unique(rows, return_index=True)[1],
                budget_bytes=self._budget_bytes,
                memory_bytes=memory_bytes,
                processes=processes,
            )
            computed = filling.run(compute)
        return Records(source, rows, kept=len(numbers) - computed, computed=computed)


GIB = 2**30


def load_or_compute_records(
    settings: CacheConfig,
    names: Sequence[str],
    compute: Compute,
    *,
    kind: str,
    key: Mapping[str, object],
    record_bytes: int,
    processes: Processes = ALONE,
) -> Records | None:
    """Load the records of `names`, computing and storing those that are missing.

    Args:
        settings: Where records are stored, and how much space they may take.
        names: One per record.
        compute: Computes missing records; see `pylorus.cache.store`.
        kind: "features" or "images": the subfolder for stores of this kind.
        key: Everything that the content of a record depends on besides its name.
        record_bytes: Size of one record in bytes.
        processes: The processes that request the same records at the same time; each computes its share of the
            missing ones.

    Returns:
        The records, or None if they fit neither on disk nor in memory, which is logged.
    """
    store = RecordStore(
        Path(settings.folder),
        kind=kind,
        key=key,
        record_bytes=record_bytes,
        budget_bytes=int(settings.budget_gib * GIB),
    )
    try:
        memory = int(settings.memory_gib * GIB) // processes.beside
        return store.load_or_compute(names, compute, memory_bytes=memory, processes=processes)
    except DoesNotFitError as error:
        log.warning("%s\nThe run continues without a cache: they are recomputed every time they are needed.", error)
        return None
