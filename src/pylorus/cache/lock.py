"""Locks for the run that writes a store and for the runs that read one from disk; they end with their process.

They lie in `.locks` beside the stores, never inside them, so that a store can be removed while its lock is held.
"""

import logging
import os
import secrets
import time
import weakref
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

LOCKS = ".locks"
"""Folder below the root."""

PATIENCE_SECONDS = 600.0
"""A holder whose folder has not changed for this long is considered hung; other runs stop waiting for it."""

POLL_SECONDS = 1.0
"""How often a waiting run checks whether the holder is making progress."""

_unlockable: set[Path] = set()
"""Lock folders that don't support locking and have already been logged."""


class Lock:
    """An exclusive lock between processes and threads.

    Attributes:
        held: Whether this object holds the lock.

    Args:
        root: Folder of the stores.
        name: What is locked; one file in `.locks`.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.held = False
        self._possible = True
        self._folder = root / LOCKS
        self._lock = FileLock(self._folder / f"{name}.lock", thread_local=False)

    def acquire(self, *, watched: Path, holder: str) -> None:
        """Wait for the lock, unless its holder hangs or this file system doesn't support locks; see `held`.

        Args:
            watched: Folder in which the holder's progress is visible.
            holder: What the holder is doing, for the log.
        """
        contents, last_change, is_logged = _list_file_sizes(watched), time.monotonic(), False
        while not (self.held or self.try_acquire(POLL_SECONDS)):
            if not self._possible:
                return
            if not is_logged:
                log.info("Another run is %s in %s; waiting for it.", holder, watched)
                is_logged = True
            if (now := _list_file_sizes(watched)) != contents:
                contents, last_change = now, time.monotonic()
            if time.monotonic() - last_change > PATIENCE_SECONDS:
                log.warning(
                    "The other run, which is %s in %s, has written nothing for %.0f s: no longer waiting for it.",
                    holder,
                    watched,
                    time.monotonic() - last_change,
                )
                return

    def try_acquire(self, seconds: float = 0.0) -> bool:
        """Acquire the lock if it becomes free within `seconds`; False if it doesn't or locking is not possible."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire(timeout=seconds, poll_interval=0.1)
            self.held = True
        except Timeout:
            pass
        except (OSError, NotImplementedError) as error:
            self._possible = False
            if self._folder not in _unlockable:
                log.warning("%s: locks don't work in this folder (%s); continuing without them.", self._folder, error)
                _unlockable.add(self._folder)
        return self.held

    def release(self) -> None:
        """Release the lock if it is held."""
        if self.held:
            self.held = False
            self._lock.release()


class ReaderLease:
    """Protects a store that is being read from disk from removal for as long as this object lives.

    Args:
        root: Folder of the stores.
        store: The store's name.
    """

    def __init__(self, root: Path, store: str) -> None:
        name = f"{store}.{secrets.token_hex(6)}.reader"
        lock = Lock(root, name)
        if lock.try_acquire(1.0):
            weakref.finalize(self, _remove_reader_lock, lock, root / LOCKS / f"{name}.lock", os.getpid())


def is_in_use(root: Path, store: str) -> bool:
    """Whether a process or thread is writing the store or reading it from disk; True if that can't be determined."""
    return not _is_unlocked(root, store) or has_reader(root, store)


def has_reader(root: Path, store: str) -> bool:
    """Whether a process or thread is reading the store from disk; True if that can't be determined."""
    for path in (root / LOCKS).glob(f"{store}.*.reader.lock"):
        if not _is_unlocked(root, path.name.removesuffix(".lock")):
            return True
        path.unlink(missing_ok=True)  # left by a reader that was killed
    return False


def _is_unlocked(root: Path, name: str) -> bool:
    lock = Lock(root, name)
    free = lock.try_acquire()
    lock.release()
    return free


def _remove_reader_lock(lock: Lock, path: Path, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a forked child shares the lock and must not release its parent's
        lock.release()
        path.unlink(missing_ok=True)


def _list_file_sizes(folder: Path) -> list[tuple[str, int]]:
    """List the names and sizes of the files in a folder: they change while a run is writing."""
    try:
        return sorted((entry.name, entry.stat().st_size) for entry in os.scandir(folder))
    except OSError:
        return []
