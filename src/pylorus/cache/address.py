"""Where a store lies on disk and what it is for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pylorus.files import write_json

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
