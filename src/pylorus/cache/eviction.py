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

from filelock import BaseFileLock, FileLock, Timeout

from pylorus.core.formatting import format_bytes

log = logging.getLogger(__name__)

KEY, USED, RESERVED = "key.json", "used", "reserved"
"""Files of a store: what it is for, when it was last used (its modification time), its size once it is written."""
LOCKS, EVICTED = ".locks", ".evicted-"
"""Folder of the locks, and prefix of a folder that is being removed, both below the root."""
PATIENCE_SECONDS = 600.0
"""A holder whose folder has not changed for this long is considered hung; other runs stop waiting for it."""
POLL_SECONDS = 1.0
"""How often a waiting run checks whether the holder is making progress."""

_unlockable: set[Path] = set()
"""Lock folders that don't support locking and have already been logged."""


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
