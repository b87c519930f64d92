"""Who writes a store, and who reads one that lies on disk: locks that vanish with the process that holds them.

They lie in `.locks` beside the stores, never in them: a store can so be removed while its lock is held.
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
"""A holder below whose folder nothing has changed for so long hangs: one no longer waits for it."""

POLL_SECONDS = 1.0
"""How often a run that waits looks whether the holder still makes progress."""

_unlockable: set[Path] = set()
"""Folders of locks of which it was said that they can't be locked."""


class Lock:
    """An exclusive lock among processes and threads.

    Attributes:
        held: Whether this object holds it.

    Args:
        root: Folder that holds the stores.
        name: What is locked; one file below `.locks`.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.held = False
        self._possible = True
        self._folder = root / LOCKS
        self._lock = FileLock(self._folder / f"{name}.lock", thread_local=False)

    def acquire(self, *, watched: Path, holder: str) -> None:
        """Waits for the lock, but not for a holder that hangs, nor where locking can't be; see `held`.

        Args:
            watched: Folder in which the holder's progress shows.
            holder: What the holder is doing, for the log.
        """
        seen, since, told = _contents(watched), time.monotonic(), False
        while not (self.held or self.attempt(POLL_SECONDS)):
            if not self._possible:
                return
            if not told:
                log.info("Another run is %s in %s; waiting for it.", holder, watched)
                told = True
            if (now := _contents(watched)) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE_SECONDS:
                log.warning(
                    "The run that is %s in %s has written nothing for %.0f s: it is not waited for any longer.",
                    holder,
                    watched,
                    time.monotonic() - since,
                )
                return

    def attempt(self, seconds: float = 0.0) -> bool:
        """Takes the lock if it gets free within `seconds`; no where another holds it or locking can't be."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire(timeout=seconds, poll_interval=0.1)
            self.held = True
        except Timeout:
            pass
        except (OSError, NotImplementedError) as error:
            self._possible = False
            if self._folder not in _unlockable:
                log.warning("%s: nothing can be locked here (%s); going on without.", self._folder, error)
                _unlockable.add(self._folder)
        return self.held

    def release(self) -> None:
        """Gives the lock back if it is held."""
        if self.held:
            self.held = False
            self._lock.release()


class Lease:
    """Says, as long as it lives, that a store is being read from disk and must not be removed.

    Args:
        root: Folder that holds the stores.
        store: The store's name.
    """

    def __init__(self, root: Path, store: str) -> None:
        name = f"{store}.{secrets.token_hex(6)}.reader"
        lock = Lock(root, name)
        if lock.attempt(1.0):
            weakref.finalize(self, _give_back, lock, root / LOCKS / f"{name}.lock", os.getpid())


def in_use(root: Path, store: str) -> bool:
    """Whether a process or thread writes the store or reads it from disk; yes where this can't be told."""
    return not _free(root, store) or has_reader(root, store)


def has_reader(root: Path, store: str) -> bool:
    """Whether a process or thread reads the store from disk; yes where this can't be told."""
    for path in (root / LOCKS).glob(f"{store}.*.reader.lock"):
        if not _free(root, path.name.removesuffix(".lock")):
            return True
        path.unlink(missing_ok=True)  # its reader was killed
    return False


def _free(root: Path, name: str) -> bool:
    lock = Lock(root, name)
    free = lock.attempt()
    lock.release()
    return free


def _give_back(lock: Lock, path: Path, process: int) -> None:
    if os.getpid() == process:  # a forked child shares the lock and must not open it for its parent
        lock.release()
        path.unlink(missing_ok=True)


def _contents(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of the files in a folder: they change while somebody writes."""
    try:
        return sorted((entry.name, entry.stat().st_size) for entry in os.scandir(folder))
    except OSError:
        return []
