"""An image's bytes, from a file that holds still or from a shard: nothing here waits for ever or fills the memory."""

import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol

from pylorus.data.unreadable import UnreadableImageError

MOST_BYTES = 500_000_000
"""More than the largest image under the limit of pixels takes, with 16 bits and four channels and no compression."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# A pipe without a writer would hold up a plain open() for ever; Windows has none of these, but a text mode.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)


class Member(ABC):
    """An image that is no file of its own; as text, what messages call it."""

    @abstractmethod
    def contents(self) -> bytes:
        """All its bytes.

        Raises:
            UnreadableImageError: If they can't be had as they were catalogued; the message says why.
        """

    @abstractmethod
    def __str__(self) -> str: ...


Place = Path | Member
"""Where an image is."""


class Root(Protocol):
    """What images lie below: a folder, or anything else that gives a place for each path, as in `root / path`."""

    def __truediv__(self, path: str, /) -> Place: ...


def contents(path: Place) -> bytes:
    """All bytes of an image; symbolic links are followed.

    Raises:
        UnreadableImageError: If it is gone, may not be read, is a folder, a pipe or a device, has over `MOST_BYTES`,
            or changes while it is read; the message says which, without the file's name.
    """
    if isinstance(path, Member):
        return path.contents()
    try:
        _expect_plain(os.stat(path))  # noqa: PTH116 the same call as below, and before a device is opened
        descriptor = os.open(path, _FLAGS)
        with os.fdopen(descriptor, "rb") as file:
            before = os.fstat(descriptor)
            _expect_plain(before)
            content = file.read(before.st_size + 1)
            after = os.fstat(descriptor)
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error
    if len(content) != before.st_size or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UnreadableImageError("changed while it was read; is it still being copied?")
    return content


def _expect_plain(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no ordinary file")
        raise UnreadableImageError(f"is {kind}, expected an image file")
    if found.st_size > MOST_BYTES:
        raise UnreadableImageError(f"has {found.st_size:,} bytes, over the limit of {MOST_BYTES:,}")
