"""Read the bytes of an image from a file or a shard, without ever blocking on a pipe or exhausting memory."""

import os
import stat
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol

from pylorus.data.unreadable import UnreadableImageError

MOST_BYTES = 500_000_000
"""More than any image within the pixel limit needs, even uncompressed with four channels of 16 bits."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# A plain open() of a pipe without a writer would block forever. Windows has none of these flags, but a text mode.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)


class Member(ABC):
    """An image inside a larger file. Its string form is what messages call it."""

    @abstractmethod
    def read_content(self) -> bytes:
        """Return all bytes of the image.

        Raises:
            UnreadableImageError: If they are missing or differ from the catalogued content; the message says why.
        """

    @abstractmethod
    def __str__(self) -> str: ...


ImageLocation = Path | Member
"""Location of an image."""


class Root(Protocol):
    """What image paths are relative to: a folder, or anything that maps a path to a location by `root / path`."""

    def __truediv__(self, path: str, /) -> ImageLocation: ...


def read_image_bytes(path: ImageLocation) -> bytes:
    """Read all bytes of an image; symbolic links are followed.

    Raises:
        UnreadableImageError: If the file is missing, may not be read, is a folder, pipe or device, exceeds
            `MOST_BYTES`, or changes while it is read; the message says which, without the file's name.
    """
    if isinstance(path, Member):
        return path.read_content()
    try:
        _check_regular_file(os.stat(path))  # noqa: PTH116 as fstat below, but before a device is opened
        descriptor = os.open(path, _FLAGS)
        with os.fdopen(descriptor, "rb") as file:
            before = os.fstat(descriptor)
            _check_regular_file(before)
            content = file.read(before.st_size + 1)
            after = os.fstat(descriptor)
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error
    if len(content) != before.st_size or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UnreadableImageError("changed while it was being read; is it still being copied?")
    return content


def _check_regular_file(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")
        raise UnreadableImageError(f"is {kind}, expected an image file")
    if status.st_size > MOST_BYTES:
        raise UnreadableImageError(f"has {status.st_size:,} bytes, over the limit of {MOST_BYTES:,}")
