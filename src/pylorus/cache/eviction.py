"""How much disk space the stores may take, which of them are evicted, and the locks that protect those in use.

Locks end with their process. They lie in `.locks` beside the stores, so that a store can be removed while it is locked.
"""

import logging
import os
import re
import secrets
import shutil
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from pylorus.core.formatting import format_bytes

log = logging.getLogger(__name__)

KEY, USED, RESERVED = "key.json", "used", "reserved"
"""Files of a store: what it is for, when it was last used (its modification time), the bytes it will have once written."""
LOCKS, EVICTED = ".locks", ".evicted-"
"""Folder of the locks, and prefix of a folder that is being removed, both below the root."""
PATIENCE_SECONDS = 600.0
"""A holder whose folder has not changed for this long is considered hung; other runs stop waiting for it."""
POLL_SECONDS = 1.0
"""How often a waiting run checks whether the holder is making progress."""

_unlockable: set[Path] = set()
"""Lock folders that don't support locking and have already been logged."""


class Lock:
    """An exclusive lock between processes and threads; `held` says whether this object holds it."""

    def __init__(self, path: Path) -> None:
        self.path, self.held, self._possible = path, False, True
        self._lock = FileLock(path, thread_local=False)

    def acquire(self, *, watched: Path, holder: str) -> None:
        """Wait for the lock, unless its holder, whose progress is visible in the folder `watched`, hangs; see `held`."""
        size, last_change = -1, time.monotonic()
        while not self.try_acquire(POLL_SECONDS) and self._possible:
            if size < 0:
                log.info("Another run is %s in %s; waiting for it.", holder, watched)
            if (now := sum_file_sizes(watched)) != size:
                size, last_change = now, time.monotonic()
            elif (idle := time.monotonic() - last_change) > PATIENCE_SECONDS:
                message = "The other run, which is %s in %s, has written nothing for %.0f s: no longer waiting for it."
                log.warning(message, holder, watched, idle)
                return

    def try_acquire(self, seconds: float = 0.0) -> bool:
        """Acquire the lock if it becomes free within `seconds`; False if it doesn't or locking is not possible."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire(timeout=seconds, poll_interval=0.1)
            self.held = True
        except Timeout:
            pass
        except (OSError, NotImplementedError) as error:
            self._possible, folder = False, self.path.parent
            if folder not in _unlockable:
                log.warning("%s: locks don't work in this folder (%s); continuing without them.", folder, error)
                _unlockable.add(folder)
        return self.held

    def release(self) -> None:
        """Release the lock if it is held."""
        if self.held:
            self.held = False
            self._lock.release()


def get_writer_lock(store: Path, *, suffix: str = "") -> Lock:
    """Return the lock for the run that writes the store in this folder."""
    return Lock(store.parent.parent / LOCKS / f"{store.parent.name}-{store.name}{suffix}.lock")


class ReaderLease:
    """Protects the store in a folder, which is read from disk, from eviction for as long as this object lives."""

    def __init__(self, store: Path) -> None:
        lock = get_writer_lock(store, suffix=f".{secrets.token_hex(6)}.reader")
        if lock.try_acquire(1.0):
            weakref.finalize(self, _remove_reader_lock, lock, os.getpid())


def _remove_reader_lock(lock: Lock, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a forked child shares the lock and must not release its parent's
        lock.release()
        lock.path.unlink(missing_ok=True)


def _has_reader(store: Path) -> bool:
    """Whether a process or thread is reading the store from disk; True if that can't be determined."""
    writer = get_writer_lock(store).path
    for path in writer.parent.glob(f"{writer.stem}.*.reader.lock"):
        lock = Lock(path)
        if not lock.try_acquire():
            return True
        lock.release()
        path.unlink(missing_ok=True)  # left by a reader that was killed
    return False


@contextmanager
def _lock_if_idle(store: Path) -> Iterator[bool]:
    """Lock a store; yield False if a process or thread is writing or reading it, or if that can't be determined."""
    lock = get_writer_lock(store)
    try:
        yield lock.try_acquire() and not _has_reader(store)
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

    None is evicted if that would not free enough. The bytes stay reserved until `clear_reservation`.

    Args:
        store: Folder of the store that needs the space.
        need: Bytes that are going to be written.
        budget: Maximum bytes of everything in the folder of all stores.

    Returns:
        None if the space is reserved, otherwise the reason why there is not enough. OSError if nothing can be written.
    """
    root = store.parent.parent
    lock = Lock(root / LOCKS / "budget.lock")
    lock.acquire(watched=root, holder="freeing cache space")
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
        clear_reservation(store)
        return reason
    finally:
        lock.release()


def clear_reservation(store: Path) -> None:
    """Remove the reservation of `reserve_space`: the bytes have been written, or will not be."""
    with suppress(OSError):
        (store / RESERVED).unlink()


def sum_file_sizes(folder: Path) -> int:
    """Sum the sizes in bytes of all files below a folder; files that disappear meanwhile are skipped."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def get_free_bytes(root: Path) -> int:
    """Return the bytes that may still be written to the disk of `root`: all but 2 %, or 1 GiB of a large disk."""
    disk = shutil.disk_usage(root)
    return disk.free - min(2**30, disk.total // 50)


def _calculate_shortage(root: Path, stores: list[_OtherStore], need: int, budget: int) -> tuple[int, str]:
    """Return the bytes missing before anything is evicted, and a message with the reason and the fix."""
    pending = sum(store.pending for store in stores)
    idle = sum(store.size for store in stores if store.is_idle)
    used, free = sum_file_sizes(root) + pending, get_free_bytes(root) - pending
    shortage = max(used + need - budget, need - free)
    needed, more = f"{format_bytes(need)} must be written", format_bytes(shortage - idle)
    if shortage == used + need - budget:
        limit = f"cache.budget_gib is {format_bytes(budget)}, of which {format_bytes(used - idle)} is in use"
        return shortage, f"{needed}, but {limit}. Raise cache.budget_gib by at least {more}."
    limit = f"the disk of {root} has only {format_bytes(max(0, free))} available"
    return shortage, f"{needed}, but {limit}. Free {more} there, or set cache.folder to another disk."


def _inspect_store(folder: Path) -> _OtherStore:
    size, reserved, used = sum_file_sizes(folder), 0, 0.0
    with _lock_if_idle(folder) as is_idle:
        with suppress(OSError, ValueError):
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
