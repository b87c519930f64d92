"""How much disk the stores may take, and which of them make room for another."""

import logging
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from pylorus.cache.address import KEY, USED, store_name
from pylorus.cache.lock import Lock, has_reader, in_use

log = logging.getLogger(__name__)

RESERVED = "reserved"
"""File of a store that is being written: how big it will be."""

EVICTED = ".evicted-"
"""How the name of a folder begins that is being removed."""

_STORE = re.compile(r"[0-9a-f]{24}")


@dataclass(frozen=True)
class _Neighbour:
    """Another store below the same root.

    Attributes:
        folder: Where it lies.
        size: Bytes that it takes.
        coming: Bytes that its writer has yet to write.
        used: When it was last used, in seconds since 1970.
        idle: Whether no run writes or reads it.
    """

    folder: Path
    size: int
    coming: int
    used: float
    idle: bool


def make_room(root: Path, folder: Path, *, need: int, budget: int) -> str | None:
    """Makes room for `need` more bytes in the store `folder`, for which it evicts stores that lie idle.

    The least recently used go first, and none if that would not suffice. The bytes are reserved until `release_room`.

    Returns:
        Nothing, or why there is no room.

    Raises:
        OSError: If the folder can't be written to.
    """
    turn = Lock(root, "budget")
    turn.acquire(watched=root, holder="making room")
    try:
        (folder / RESERVED).write_text(str(bytes_below(folder) + need))
        _finish_evictions(root)
        neighbours = _neighbours(root, folder)
        lacking, reason = _lacking(root, neighbours, need, budget)
        idle = sorted((store for store in neighbours if store.idle), key=lambda store: store.used)
        if lacking <= sum(store.size for store in idle):
            for store in idle:
                if lacking > 0 and _evict(root, store):
                    lacking -= store.size
        if lacking <= 0:
            return None
        release_room(folder)
        return reason
    finally:
        turn.release()


def release_room(folder: Path) -> None:
    """Takes back what `make_room` reserved: it is written, or will not be."""
    try:
        (folder / RESERVED).unlink(missing_ok=True)
    except OSError as error:
        log.info("%s: the reservation can't be removed: %s", folder, error)


def bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder; what vanishes meanwhile is left out."""
    total = 0
    try:
        for entry in os.scandir(folder):
            try:
                inside = entry.is_dir(follow_symlinks=False)
                total += bytes_below(Path(entry.path)) if inside else entry.stat(follow_symlinks=False).st_size
            except OSError:
                continue
    except OSError:
        return total
    return total


def readable_size(count: float) -> str:
    """A number of bytes for people.

    Example:
        >>> readable_size(1536), readable_size(3 * 2**30)
        ('1.5 KiB', '3.0 GiB')
    """
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def free_bytes(root: Path) -> int:
    """Bytes that may still be written to the disk; 2 % of it, 1 GiB at most, are left alone. May be below zero."""
    disk = shutil.disk_usage(root)
    return disk.free - min(2**30, disk.total // 50)


def _lacking(root: Path, neighbours: list[_Neighbour], need: int, budget: int) -> tuple[int, str]:
    """Bytes that are too many before anything is evicted, and sentences that say so and how to mend it."""
    coming = sum(store.coming for store in neighbours)
    idle = sum(store.size for store in neighbours if store.idle)
    taken, free = bytes_below(root) + coming, free_bytes(root) - coming
    over, short = taken + need - budget, need - free
    lacking = max(over, short)
    needed, more = f"{readable_size(need)} are to be written", readable_size(lacking - idle)
    if over >= short:
        limit = f"cache.budget_gib is {readable_size(budget)}, of which {readable_size(taken - idle)} are in use"
        return lacking, f"{needed}, but {limit}. Raise cache.budget_gib by {more} at least."
    limit = f"the disk of {root} has {readable_size(max(0, free))} to spare"
    return lacking, f"{needed}, but {limit}. Free {more} there, or set cache.folder to another disk."


def _neighbours(root: Path, own: Path) -> list[_Neighbour]:
    found = []
    for folder in root.glob("*/*"):
        # Only what is surely a store of ours may ever be removed.
        if folder == own or not _STORE.fullmatch(folder.name) or not (folder / KEY).is_file():
            continue
        size, idle = bytes_below(folder), not in_use(root, store_name(folder))
        try:
            used = (folder / USED).stat().st_mtime
        except OSError:
            used = 0.0
        coming = 0 if idle else max(0, _reserved(folder) - size)
        found.append(_Neighbour(folder, size, coming, used, idle))
    return found


def _reserved(folder: Path) -> int:
    try:
        return int((folder / RESERVED).read_text())
    except (OSError, ValueError):
        return 0


def _evict(root: Path, store: _Neighbour) -> bool:
    name = store_name(store.folder)
    lock = Lock(root, name)
    try:
        if not lock.attempt() or has_reader(root, name):
            return False
        doomed = root / f"{EVICTED}{secrets.token_hex(6)}"
        store.folder.rename(doomed)  # in one step: nobody finds half a store
        shutil.rmtree(doomed, ignore_errors=True)
    except OSError as error:
        log.warning("%s: this store can't be removed to make room: %s", store.folder, error)
        return False
    finally:
        lock.release()
    log.info("%s: removed to make room; it took %s.", store.folder, readable_size(store.size))
    return True


def _finish_evictions(root: Path) -> None:
    for folder in root.glob(f"{EVICTED}*"):
        shutil.rmtree(folder, ignore_errors=True)
