"""How much disk space the stores may take, and which of them are evicted to free space for another."""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pylorus.cache.lock import Lock, has_reader, is_in_use
from pylorus.core.formatting import format_bytes
from pylorus.core.io import write_json

FORMAT = 1
"""Part of every key. Increase it when the format of the shards changes, so that old shards are not read."""

KEY, USED = "key.json", "used"
"""Files of a store: what it is for, and when it was last used (the modification time)."""


@dataclass(frozen=True)
class Address:
    """Location of a store on disk.

    Attributes:
        root: Folder of all stores.
        kind: Subfolder of `root`.
        key: What the store is for, as JSON values.
        record_bytes: Size of one record in bytes.
    """

    root: Path
    kind: str
    key: Mapping[str, object]
    record_bytes: int

    @property
    def content(self) -> dict[str, object]:
        """The values from which the folder's name is derived."""
        return {"format": FORMAT, "kind": self.kind, "record_bytes": self.record_bytes, "key": dict(self.key)}

    @property
    def folder(self) -> Path:
        """The store's folder, named after the SHA-256 of its content.

        Raises:
            ValueError: If the key holds a number that is not finite.
            TypeError: If the key holds a value that JSON can't represent.
        """
        canonical = json.dumps(self.content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return self.root / self.kind / hashlib.sha256(canonical.encode()).hexdigest()[:24]

    @property
    def name(self) -> str:
        """The name under which the store is locked."""
        return get_store_name(self.folder)

    def prepare(self) -> None:
        """Create the folder if it does not exist, accessible to its owner only, and record the time of use.

        Raises:
            OSError: If the disk is full, read-only or unavailable.
        """
        for folder in (self.root, self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (self.folder / KEY).exists():
            write_json(self.folder / KEY, self.content)
        (self.folder / USED).touch()


def get_store_name(folder: Path) -> str:
    """Return the name under which the store in a folder is locked."""
    return f"{folder.parent.name}-{folder.name}"


log = logging.getLogger(__name__)

RESERVED = "reserved"
"""File in a store that is being written: the size in bytes that it will have."""

EVICTED = ".evicted-"
"""Prefix of the name of a folder that is being removed."""

_STORE = re.compile(r"[0-9a-f]{24}")


@dataclass(frozen=True)
class _OtherStore:
    """Another store below the same root.

    Attributes:
        folder: Its folder.
        size: Bytes on disk.
        pending: Bytes that its writer has reserved but not yet written.
        used: Time of its last use, in seconds since 1970.
        idle: Whether no run is writing or reading it.
    """

    folder: Path
    size: int
    pending: int
    used: float
    idle: bool


def ensure_space(root: Path, folder: Path, *, need: int, budget: int) -> str | None:
    """Reserve `need` more bytes for the store in `folder`, evicting idle stores where necessary.

    The least recently used stores are evicted first; none is evicted if that would not free enough. The bytes stay
    reserved until `clear_reservation`.

    Args:
        root: Folder of all stores.
        folder: The store that needs the space.
        need: Bytes that are going to be written.
        budget: Maximum bytes of everything below `root`.

    Returns:
        None if the space is reserved, otherwise the reason why there is not enough.

    Raises:
        OSError: If the folder can't be written to.
    """
    lock = Lock(root, "budget")
    lock.acquire(watched=root, holder="freeing cache space")
    try:
        (folder / RESERVED).write_text(str(sum_file_sizes(folder) + need))
        _remove_evicted_stores(root)
        stores = _list_other_stores(root, folder)
        shortage, reason = _calculate_shortage(root, stores, need, budget)
        idle = sorted((store for store in stores if store.idle), key=lambda store: store.used)
        if shortage <= sum(store.size for store in idle):
            for store in idle:
                if shortage > 0 and _evict_store(root, store):
                    shortage -= store.size
        if shortage <= 0:
            return None
        clear_reservation(folder)
        return reason
    finally:
        lock.release()


def clear_reservation(folder: Path) -> None:
    """Remove the reservation of `ensure_space`: the bytes have been written, or will not be."""
    try:
        (folder / RESERVED).unlink(missing_ok=True)
    except OSError as error:
        log.info("%s: can't remove the reservation: %s", folder, error)


def sum_file_sizes(folder: Path) -> int:
    """Sum the sizes in bytes of all files below a folder; files that disappear meanwhile are skipped."""
    total = 0
    try:
        for entry in os.scandir(folder):
            try:
                is_folder = entry.is_dir(follow_symlinks=False)
                total += sum_file_sizes(Path(entry.path)) if is_folder else entry.stat(follow_symlinks=False).st_size
            except OSError:
                continue
    except OSError:
        return total
    return total


def get_free_bytes(root: Path) -> int:
    """Return the bytes that may still be written to the disk of `root`.

    2 % of the disk, but at most 1 GiB, is kept free. The result may be negative.
    """
    disk = shutil.disk_usage(root)
    return disk.free - min(2**30, disk.total // 50)


def _calculate_shortage(root: Path, stores: list[_OtherStore], need: int, budget: int) -> tuple[int, str]:
    """Return the bytes missing before anything is evicted, and a message with the reason and the fix."""
    pending = sum(store.pending for store in stores)
    idle = sum(store.size for store in stores if store.idle)
    used, free = sum_file_sizes(root) + pending, get_free_bytes(root) - pending
    over_budget, over_disk = used + need - budget, need - free
    shortage = max(over_budget, over_disk)
    needed, more = f"{format_bytes(need)} must be written", format_bytes(shortage - idle)
    if over_budget >= over_disk:
        limit = f"cache.budget_gib is {format_bytes(budget)}, of which {format_bytes(used - idle)} is in use"
        return shortage, f"{needed}, but {limit}. Raise cache.budget_gib by at least {more}."
    limit = f"the disk of {root} has only {format_bytes(max(0, free))} available"
    return shortage, f"{needed}, but {limit}. Free {more} there, or set cache.folder to another disk."


def _list_other_stores(root: Path, own_folder: Path) -> list[_OtherStore]:
    stores = []
    for folder in root.glob("*/*"):
        # Only a folder that is certainly a store of Pylorus may ever be removed.
        if folder == own_folder or not _STORE.fullmatch(folder.name) or not (folder / KEY).is_file():
            continue
        size, idle = sum_file_sizes(folder), not is_in_use(root, get_store_name(folder))
        try:
            used = (folder / USED).stat().st_mtime
        except OSError:
            used = 0.0
        pending = 0 if idle else max(0, _read_reservation(folder) - size)
        stores.append(_OtherStore(folder, size, pending, used, idle))
    return stores


def _read_reservation(folder: Path) -> int:
    try:
        return int((folder / RESERVED).read_text())
    except (OSError, ValueError):
        return 0


def _evict_store(root: Path, store: _OtherStore) -> bool:
    name = get_store_name(store.folder)
    lock = Lock(root, name)
    try:
        if not lock.try_acquire() or has_reader(root, name):
            return False
        evicted = root / f"{EVICTED}{secrets.token_hex(6)}"
        store.folder.rename(evicted)  # atomic: no run ever sees half a store
        shutil.rmtree(evicted, ignore_errors=True)
    except OSError as error:
        log.warning("%s: can't evict this store to free space: %s", store.folder, error)
        return False
    finally:
        lock.release()
    log.info("%s: evicted to free %s.", store.folder, format_bytes(store.size))
    return True


def _remove_evicted_stores(root: Path) -> None:
    for folder in root.glob(f"{EVICTED}*"):
        shutil.rmtree(folder, ignore_errors=True)
