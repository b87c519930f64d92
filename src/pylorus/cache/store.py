"""Compute the records that a store lacks, store them on disk as long as there is space, and in memory if they fit.

Also how much disk space the stores may take, which of them are evicted, and the locks that protect those in use. Locks
end with their process. They lie in `.locks` beside the stores, so that a store can be removed while it is locked.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import BaseFileLock, FileLock, Timeout
from numpy.typing import NDArray

from pylorus.cache.shards import Records, ShardWriter, write_shards
from pylorus.config.schema import CacheConfig
from pylorus.core.distributed import SINGLE_PROCESS, Processes, get_concurrent_jobs
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_bytes
from pylorus.core.io import create_private_folder, write_json
from pylorus.core.system import get_free_memory

log = logging.getLogger(__name__)

FORMAT = 2
"""Part of every key. Increase it when the format of the shards changes, so that old shards are not read."""

KEY, USED, RESERVED = "key.json", "used", "reserved"
"""Files of a store: what it is for, when it was last used (its modification time), its size once it is written."""
LOCKS, EVICTED = ".locks", ".evicted-"
"""Folder of the locks, and prefix of a folder that is being removed, both below the root."""
PATIENCE_SECONDS = 600.0
"""A holder whose folder has not changed for this long is considered hung; other runs stop waiting for it."""
MEMORY_FRACTION = 0.5
"""Fraction of the free memory that the records of one kind may take."""
POLL_SECONDS = 1.0
"""How often a waiting run checks whether the holder is making progress."""

_unlockable: set[Path] = set()
"""Lock folders that don't support locking and have already been logged."""

Compute = Callable[[Sequence[int]], Iterator[NDArray[np.uint8]]]
"""Takes the indices in `names` of missing records; yields blocks of shape (n, record_bytes) in the same order."""


class DoesNotFitError(PylorusError):
    """The records fit neither on disk nor in the memory available to them."""


class RecordStore:
    """Records of one kind that were all computed in the same way.

    Args:
        root: Folder of all stores. Files are accessible to their owner only: the records derive from patients' images.
        kind: Subfolder, such as "features": lower-case letters, digits, - and _.
        key: Everything that the content of a record depends on besides its name, as plain JSON values.
        record_bytes: Size of one record in bytes.
        budget_bytes: Maximum bytes of everything below `root`.
    """

    def __init__(
        self, root: Path, *, kind: str, key: Mapping[str, object], record_bytes: int, budget_bytes: int
    ) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", kind) or record_bytes < 1:
            expected = "lower-case letters, digits, - and _ for the kind, and at least 1 byte"
            raise ValueError(f"kind {kind!r} of records of {record_bytes} bytes: expected {expected}")
        self.kind, self.record_bytes, self.budget_bytes = kind, record_bytes, budget_bytes
        self._content = {"format": FORMAT, "kind": kind, "record_bytes": record_bytes, "key": dict(key)}
        canonical = json.dumps(self._content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        self.folder = root.absolute() / kind / hashlib.sha256(canonical.encode()).hexdigest()[:24]

    def prepare_folder(self) -> None:
        """Create the folder if necessary, for its owner only, and record the time of use; OSError if that fails."""
        create_private_folder(self.folder, levels=3)
        if not (self.folder / KEY).exists():
            write_json(self.folder / KEY, self._content)
        (self.folder / USED).touch()

    def load_or_compute(
        self, names: Sequence[str], compute: Compute, *, memory_bytes: int, processes: Processes = SINGLE_PROCESS
    ) -> Records:
        """Load the records of `names`; those that are missing are computed and stored.

        Args:
            names: One per record. If a name occurs twice, both share one record.
            compute: See `Compute`. It is called at most once, and in every process or in none.
            memory_bytes: Maximum bytes of records to hold in memory; larger requests stay on disk and are mapped.
            processes: The processes that request the same names at the same time; each computes its share.

        Raises:
            DoesNotFitError: If the missing records don't fit on disk, nor all records in `memory_bytes`.
            Exception: Whatever `compute` raises; what was written by then stays in the store.
        """
        with suppress(OSError):  # existing records can still be read; writing reports what is wrong
            self.prepare_folder()
        records = Records(names, self.folder, self.record_bytes, memory_bytes=memory_bytes, lease=ReaderLease)
        if any(processes.reduce_any(len(records.load_missing()) > 0)):
            records.computed = _Filler(self, records, processes, memory_bytes).compute_missing(compute)
            records.kept -= records.computed
        return records

    def save(self, names: Sequence[str], records: Sequence[NDArray[np.uint8]]) -> bool:
        """Store records that were computed already, unless another run is computing records of this store.

        Args:
            names: One per record.
            records: One for each name, of `record_bytes` values in any shape.

        Returns:
            Whether they are stored; False too if there is no space, or the folder can't be written to.
        """
        lock = open_lock(self.folder)
        if not try_lock(lock):
            return False
        try:
            self.prepare_folder()
            need = len(names) * self.record_bytes + len(json.dumps(list(names)))
            if reserve_space(self.folder, need=need, budget=self.budget_bytes):
                return False
            write_shards(self.folder, names, records)
            (self.folder / RESERVED).unlink()
        except OSError:
            return False
        finally:
            lock.release()
        return True


class _Filler:
    """The work of one run on the records that a store lacks; its processes must all call the same methods."""

    def __init__(self, store: RecordStore, records: Records, processes: Processes, memory_bytes: int) -> None:
        self._store, self._records, self._processes, self._memory_bytes = store, records, processes, memory_bytes
        self._lock, self._is_writing = open_lock(store.folder), False

    def compute_missing(self, compute: Compute) -> int:
        """Wait for any run that is already computing, then compute what is still missing; return how many."""
        if self._processes.is_first:  # on behalf of all processes
            wait_for_lock(self._lock, watched=self._store.folder, holder=f"computing {self._store.kind}")
        try:
            missing = self._processes.run_on_first(lambda: self._records.load_missing(clean=self._lock.is_locked))
            if len(missing):
                reason = self._processes.run_on_first(lambda: self._reserve_space(missing))
                self._is_writing = reason is None
                if reason is not None:
                    self._use_memory_only(reason)
                self._compute_share(compute, missing)
            disappeared = self._records.load_missing()
            self._processes.wait()  # a run that waits for the lock might evict what is still being read here
        finally:
            self._stop_writing()
            self._lock.release()
        if len(disappeared):
            hint = " (all machines must share cache.folder)" * self._processes.is_distributed
            raise PylorusError(f"{self._store.folder}: records disappeared after writing{hint}. Start the run again.")
        return len(missing)

    def _reserve_space(self, missing: NDArray[np.intp]) -> str | None:
        """Reserve space on disk; return None, or the reason why there is not enough."""
        names = [self._records.distinct_names[number] for number in missing]
        need = len(json.dumps(names)) + len(names) * self._store.record_bytes
        try:
            self._store.prepare_folder()
            return reserve_space(self._store.folder, need=need, budget=self._store.budget_bytes)
        except OSError as error:
            return f"{self._store.folder} can't be written to: {error}."

    def _compute_share(self, compute: Compute, missing: NDArray[np.intp]) -> None:
        """Compute this process's share, or everything if the processes can't exchange records through the disk."""
        failure: DoesNotFitError | None = None
        try:
            self._compute_records(compute, missing[self._processes.own_slice] if self._is_writing else missing)
        except DoesNotFitError as error:
            failure = error
        any_failed, any_in_memory = self._processes.reduce_any(failure is not None, not self._is_writing)
        if any_failed:
            raise failure or DoesNotFitError(f"The {self._store.kind} did not fit in another process of the run.")
        if any_in_memory and self._processes.is_distributed:
            self._stop_writing()
            self._compute_records(compute, self._records.load_missing())

    def _compute_records(self, compute: Compute, missing: NDArray[np.intp]) -> None:
        size, done = self._store.record_bytes, 0
        writer = ShardWriter(self._store.folder, size, len(missing))
        for block in compute(self._records.first_rows[missing].tolist()):
            numbers = missing[done : done + len(block)]
            done += len(block)
            if block.dtype != np.uint8 or block.shape != (len(numbers), size):
                expected = f"uint8 of shape (at most {len(numbers)}, {size})"
                raise ValueError(f"compute: found a block of {block.dtype} of shape {block.shape}, expected {expected}")
            self._records.put_computed(numbers, block)
            try:
                if self._is_writing:
                    writer.add([self._records.distinct_names[number] for number in numbers], block)
            except OSError as error:
                self._use_memory_only(f"{self._store.folder} can't be written to: {error}.")
        if done < len(missing):
            raise ValueError(f"compute: found {done} records, expected {len(missing)}")

    def _use_memory_only(self, reason: str) -> None:
        """Continue in memory, or raise DoesNotFitError if the records don't fit there."""
        self._stop_writing()
        self._lock.release()  # a run that waits for it would gain nothing by waiting longer
        if self._records.place != "memory":
            size = format_bytes(len(self._records.distinct_names) * self._store.record_bytes)
            raise DoesNotFitError(
                f"The {self._store.kind} can't be stored on disk: {reason}\nThey don't fit in memory either: "
                f"they take {size}, and {format_bytes(self._memory_bytes)} is available (cache.memory_gib)."
            )
        log.warning("The %s are kept in memory, for this run only: %s", self._store.kind, reason)

    def _stop_writing(self) -> None:
        if self._is_writing and self._processes.is_first:
            with suppress(OSError):
                (self._store.folder / RESERVED).unlink()
        self._is_writing = False


def create_store(settings: CacheConfig, *, kind: str, key: Mapping[str, object], record_bytes: int) -> RecordStore:
    """Return the store of records of one kind in the configured folder, within the configured budget."""
    budget = int(settings.budget_gib * 2**30)
    return RecordStore(Path(settings.folder), kind=kind, key=key, record_bytes=record_bytes, budget_bytes=budget)


def load_or_compute_records(
    settings: CacheConfig,
    names: Sequence[str],
    compute: Compute,
    *,
    kind: str,
    key: Mapping[str, object],
    record_bytes: int,
    processes: Processes = SINGLE_PROCESS,
) -> Records | None:
    """Load or compute the records of `names`, as `RecordStore` does, within the configured space.

    Return None, and log why, if they fit neither on disk nor in memory.
    """
    store = create_store(settings, kind=kind, key=key, record_bytes=record_bytes)
    try:
        # A container or job may have less memory than the key allows, and the network needs some of it too.
        memory = min(int(settings.memory_gib * 2**30), int(MEMORY_FRACTION * get_free_memory() / get_concurrent_jobs()))
        memory //= processes.local_count
        return store.load_or_compute(names, compute, memory_bytes=memory, processes=processes)
    except DoesNotFitError as error:
        log.warning("%s\nThe run continues without a cache: they are recomputed every time they are needed.", error)
        return None


def open_lock(store: Path, suffix: str = "") -> BaseFileLock:
    """Return the lock, not yet acquired, for the run that writes a store, or another lock with a suffix."""
    path = store.parent.parent / LOCKS / f"{store.parent.name}-{store.name}{suffix}.lock"
    return FileLock(path, thread_local=False)


def wait_for_lock(lock: BaseFileLock, *, watched: Path, holder: str) -> None:
    """Acquire a lock, unless its holder, whose progress is visible in the folder `watched`, hangs; see `try_lock`."""
    size, last_change = -1, time.monotonic()
    while not try_lock(lock, POLL_SECONDS) and Path(lock.lock_file).parent not in _unlockable:
        if size < 0:
            log.info("Another run is %s in %s; waiting for it.", holder, watched)
        if (now := sum_file_sizes(watched)) != size:
            size, last_change = now, time.monotonic()
        elif (idle := time.monotonic() - last_change) > PATIENCE_SECONDS:
            message = "The other run, which is %s in %s, has written nothing for %.0f s: no longer waiting for it."
            log.warning(message, holder, watched, idle)
            return


def try_lock(lock: BaseFileLock, seconds: float = 0.0) -> bool:
    """Acquire a lock if it becomes free within `seconds`; False if it doesn't or the file system has no locks."""
    folder = Path(lock.lock_file).parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire(timeout=seconds, poll_interval=0.1)
    except Timeout:
        pass
    except (OSError, NotImplementedError) as error:
        if folder not in _unlockable:
            log.warning("%s: locks don't work in this folder (%s); continuing without them.", folder, error)
            _unlockable.add(folder)
    return lock.is_locked


class ReaderLease:
    """Protects the store in a folder, which is read from disk, from eviction for as long as this object lives."""

    def __init__(self, store: Path) -> None:
        lock = open_lock(store, f".{secrets.token_hex(6)}.reader")
        if try_lock(lock, 1.0):
            weakref.finalize(self, _remove_reader_lock, lock, os.getpid())


def _remove_reader_lock(lock: BaseFileLock, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a forked child shares the lock and must not release its parent's
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _has_reader(store: Path) -> bool:
    """Whether a process or thread is reading the store from disk; True if that can't be determined."""
    for path in (store.parent.parent / LOCKS).glob(f"{store.parent.name}-{store.name}.*.reader.lock"):
        lock = FileLock(path, thread_local=False)
        if not try_lock(lock):
            return True
        lock.release()
        path.unlink(missing_ok=True)  # left by a reader that was killed
    return False


@contextmanager
def _lock_if_idle(store: Path) -> Iterator[bool]:
    """Lock a store; yield False if a process or thread is writing or reading it, or if that can't be determined."""
    lock = open_lock(store)
    try:
        yield try_lock(lock) and not _has_reader(store)
    finally:
        lock.release()


class _OtherStore(NamedTuple):
    used: float  # time of its last use
    folder: Path
    size: int  # bytes on disk
    pending: int  # bytes that its writer has reserved but not yet written
    is_idle: bool


def reserve_space(store: Path, *, need: int, budget: int) -> str | None:
    """Reserve `need` more bytes for a store, evicting idle stores where necessary, the least recently used first.

    Everything in the folder of all stores may take `budget` bytes. Nothing is evicted if that would not free enough.
    The bytes stay reserved until the file RESERVED is removed. OSError means that the store can't be written to.

    Returns:
        None if the space is reserved, otherwise the reason why there is not enough.
    """
    root = store.parent.parent
    lock = FileLock(root / LOCKS / "budget.lock", thread_local=False)
    wait_for_lock(lock, watched=root, holder="freeing cache space")
    try:
        (store / RESERVED).write_text(str(sum_file_sizes(store) + need))
        for evicted in root.glob(f"{EVICTED}*"):  # left by a run that was killed
            shutil.rmtree(evicted, ignore_errors=True)
        # Only a folder that is certainly a store of Pylorus may ever be removed.
        folders = [path.parent for path in root.glob(f"*/*/{KEY}") if re.fullmatch("[0-9a-f]{24}", path.parent.name)]
        stores = sorted(_inspect_store(folder) for folder in folders if folder != store)
        shortage, reason = _calculate_shortage(root, stores, need, budget)
        idle = [other for other in stores if other.is_idle]
        if shortage <= sum(other.size for other in idle):
            for other in idle:
                if shortage > 0 and _evict_store(other):
                    shortage -= other.size
        if shortage <= 0:
            return None
        (store / RESERVED).unlink()
        return reason
    finally:
        lock.release()


def sum_file_sizes(folder: Path) -> int:
    """Sum the sizes in bytes of all files below a folder; files that disappear meanwhile are skipped."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def _calculate_shortage(root: Path, stores: list[_OtherStore], need: int, budget: int) -> tuple[int, str]:
    """Return the bytes missing before anything is evicted, and a message with the reason and the fix."""
    pending = sum(store.pending for store in stores)
    idle = sum(store.size for store in stores if store.is_idle)
    disk = shutil.disk_usage(root)
    free = disk.free - min(2**30, disk.total // 50) - pending  # 2 % or 1 GiB of the disk stay free
    used = sum_file_sizes(root) + pending
    shortage = max(used + need - budget, need - free)
    needed, more = f"{format_bytes(need)} must be written", format_bytes(shortage - idle)
    if shortage == used + need - budget:
        limit = f"cache.budget_gib is {format_bytes(budget)}, of which {format_bytes(used - idle)} is in use"
        return shortage, f"{needed}, but {limit}. Raise cache.budget_gib by at least {more}."
    limit = f"the disk of {root} has only {format_bytes(max(0, free))} available"
    return shortage, f"{needed}, but {limit}. Free {more} there, or set cache.folder to another disk."


def _inspect_store(folder: Path) -> _OtherStore:
    size, reserved, used = sum_file_sizes(folder), 0, 0.0
    with _lock_if_idle(folder) as is_idle, suppress(OSError, ValueError):
        used = (folder / USED).stat().st_mtime
        reserved = 0 if is_idle else int((folder / RESERVED).read_text())
    return _OtherStore(used, folder, size, max(0, reserved - size), is_idle)


def _evict_store(store: _OtherStore) -> bool:
    with _lock_if_idle(store.folder) as is_idle:
        if not is_idle:
            return False
        evicted = store.folder.parent.parent / f"{EVICTED}{secrets.token_hex(6)}"
        try:
            store.folder.rename(evicted)  # atomic: no run ever sees half a store
        except OSError as error:
            log.warning("%s: can't evict this store to free space: %s", store.folder, error)
            return False
        shutil.rmtree(evicted, ignore_errors=True)
    log.info("%s: evicted to free %s.", store.folder, format_bytes(store.size))
    return True
