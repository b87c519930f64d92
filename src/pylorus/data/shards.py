"""Images in shards, read one at a time where they are stored, like files through `content.contents`."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.data.content import ImageLocation, Member
from pylorus.data.shards_places import Shard, is_remote, read_range
from pylorus.data.unreadable import UnreadableImageError


@dataclass(frozen=True, slots=True)
class ShardMember(Member):
    """An image in a shard.

    Attributes:
        shard: The tar file.
        path: Path of the member inside it.
        offset: Position of its first byte.
        size: Number of bytes.
        digest: SHA-256 of its bytes, 32 bytes long.
    """

    shard: Shard
    path: str
    offset: int
    size: int
    digest: bytes

    def read_content(self) -> bytes:
        """Read its bytes and verify them against the index.

        Raises:
            UnreadableImageError: If the shard can't be read, or has been changed or truncated since it was indexed.
        """
        try:
            content = read_range(self.shard, self.offset, self.size)
        except Exception as error:  # each storage backend of fsspec raises its own errors
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnreadableImageError(f"can't read shard {self.shard.name}: {reason}") from error
        if hashlib.sha256(content).digest() != self.digest:
            mismatch = f"ends within {self.path}" if len(content) < self.size else f"contains a different {self.path}"
            raise UnreadableImageError(f"shard {self.shard.name} has changed since it was indexed: it {mismatch}")
        return content

    def __str__(self) -> str:
        return f"{self.shard.name}: {self.path}"


class Shards:
    """The root of the paths in a catalog of shards; held as arrays, which worker processes share.

    Args:
        root: The root as the user specified it.
        shards: The tar files.
        members: One row per image: path, index of its shard in `shards`, offset, size and sha256.
    """

    def __init__(self, root: str, shards: list[Shard], members: pd.DataFrame) -> None:
        self.root, self.shards = root, shards
        names = np.array([path.encode() for path in members["path"]], dtype=np.bytes_)
        order = np.argsort(names)
        self._names: NDArray[np.bytes_] = names[order]
        self._shard: NDArray[np.int32] = members["shard"].to_numpy(dtype=np.int32)[order]
        self._offset: NDArray[np.int64] = members["offset"].to_numpy(dtype=np.int64)[order]
        self._size: NDArray[np.int64] = members["size"].to_numpy(dtype=np.int64)[order]
        digests = np.frombuffer(bytes.fromhex("".join(members["sha256"])), dtype=np.uint8)
        self._digest: NDArray[np.uint8] = digests.reshape(-1, 32)[order]

    @property
    def remote(self) -> bool:
        """Whether the shards are read over a network."""
        return is_remote(self.root)

    def __truediv__(self, path: str, /) -> ImageLocation:
        """Return the image at a path.

        Raises:
            KeyError: If no shard holds it.
        """
        index = int(self._find_indices([path])[0])
        return ShardMember(
            self.shards[self._shard[index]],
            path,
            int(self._offset[index]),
            int(self._size[index]),
            self._digest[index].tobytes(),
        )

    def __str__(self) -> str:
        return self.root

    def get_shard_numbers(self, paths: list[str]) -> NDArray[np.int32]:
        """Return the index of the shard that holds each path, of shape (paths,)."""
        return self._shard[self._find_indices(paths)]

    def _find_indices(self, paths: list[str]) -> NDArray[np.intp]:
        names = np.array([path.encode() for path in paths], dtype=np.bytes_)
        indices = np.minimum(np.searchsorted(self._names, names), len(self._names) - 1)
        missing = np.flatnonzero(self._names[indices] != names)
        if len(missing):
            raise KeyError(f"{self.root}: no shard contains {paths[int(missing[0])]}")
        return indices
