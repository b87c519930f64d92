"""Images in shards, read one by one from where they lie: the same seam as files, `content.contents`."""

import hashlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.data.content import Member, Place
from pylorus.data.shards_places import Shard, is_remote, read_range
from pylorus.data.unreadable import UnreadableImageError


@dataclass(frozen=True, slots=True)
class ShardMember(Member):
    """An image in a shard.

    Attributes:
        shard: The tar file.
        path: Of the member in it.
        offset: Where its bytes begin.
        size: How many there are.
        digest: Their SHA-256, of 32 bytes.
    """

    shard: Shard
    path: str
    offset: int
    size: int
    digest: bytes

    def contents(self) -> bytes:
        """Its bytes, compared with the index: of a shard that was changed or cut since, none are given."""
        try:
            content = read_range(self.shard, self.offset, self.size)
        except Exception as error:  # each of fsspec's stores has errors of its own
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UnreadableImageError(f"shard {self.shard.name} can't be read: {reason}") from error
        if hashlib.sha256(content).digest() != self.digest:
            found = f"ends within {self.path}" if len(content) < self.size else f"holds another {self.path}"
            raise UnreadableImageError(f"shard {self.shard.name} has changed since it was indexed: it {found}")
        return content

    def __str__(self) -> str:
        return f"{self.shard.name}: {self.path}"


class Shards:
    """What the paths of a catalog of shards lie below; held as arrays, which processes share.

    Args:
        root: As the user gave it.
        shards: The tar files.
        members: One row an image: path, place of its shard among them, offset, size and sha256.
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
        """Whether they are fetched over a network."""
        return is_remote(self.root)

    def __truediv__(self, path: str, /) -> Place:
        """The image of a path.

        Raises:
            KeyError: If no shard holds it.
        """
        place = int(self._places([path])[0])
        return ShardMember(
            self.shards[self._shard[place]],
            path,
            int(self._offset[place]),
            int(self._size[place]),
            self._digest[place].tobytes(),
        )

    def __str__(self) -> str:
        return self.root

    def numbers(self, paths: list[str]) -> NDArray[np.int32]:
        """Which shard each path lies in, of shape (paths,)."""
        return self._shard[self._places(paths)]

    def _places(self, paths: list[str]) -> NDArray[np.intp]:
        wanted = np.array([path.encode() for path in paths], dtype=np.bytes_)
        places = np.minimum(np.searchsorted(self._names, wanted), len(self._names) - 1)
        lost = np.flatnonzero(self._names[places] != wanted)
        if len(lost):
            raise KeyError(f"{self.root}: no shard holds {paths[int(lost[0])]}")
        return places
