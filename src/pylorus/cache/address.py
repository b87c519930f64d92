"""Where a store lies and what it is for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pylorus.files import write_json

FORMAT = 1
"""Part of every key: raised when shards are written in another way, so that old ones are not read."""

KEY, USED = "key.json", "used"
"""Files of a store: what it is for, and when it was last used (its time)."""


@dataclass(frozen=True)
class Address:
    """Where a store lies.

    Attributes:
        root: Folder of all stores.
        kind: Folder below it.
        key: What the store is for, as JSON values.
        record_bytes: Bytes of one record.
    """

    root: Path
    kind: str
    key: Mapping[str, object]
    record_bytes: int

    @property
    def content(self) -> dict[str, object]:
        """What the folder's name is derived from."""
        return {"format": FORMAT, "kind": self.kind, "record_bytes": self.record_bytes, "key": dict(self.key)}

    @property
    def folder(self) -> Path:
        """The store's folder.

        Raises:
            ValueError: If the key holds a number that is not finite.
            TypeError: If the key holds a value that JSON does not know.
        """
        canonical = json.dumps(self.content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return self.root / self.kind / hashlib.sha256(canonical.encode()).hexdigest()[:24]

    @property
    def name(self) -> str:
        """The name under which the store is locked."""
        return store_name(self.folder)

    def prepare(self) -> None:
        """Makes the folder if it is not there, for its owner only, and notes that it is used now.

        Raises:
            OSError: If the disk is full, read-only or gone.
        """
        for folder in (self.root, self.folder.parent, self.folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (self.folder / KEY).exists():
            write_json(self.folder / KEY, self.content)
        (self.folder / USED).touch()


def store_name(folder: Path) -> str:
    """The name under which the store of a folder is locked."""
    return f"{folder.parent.name}-{folder.name}"
