"""A file's bytes, from ordinary files that hold still: nothing here can wait for ever or fill the memory."""

import os
import stat
from pathlib import Path

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


def contents(path: Path) -> bytes:
    """All bytes of a file; symbolic links are followed.

    Raises:
        UnreadableImageError: If it is gone, may not be read, is a folder, a pipe or a device, has over `MOST_BYTES`,
            or changes while it is read; the message says which, without the file's name.
    """
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
