"""What a disk refuses, in words for its user: a run's faults and what ends it before it begins share them.

Nothing here imports torch.
"""

import errno
import shutil
from pathlib import Path

from pylorus.cache.budget import readable_size

FULL = {errno.ENOSPC, errno.EDQUOT}
SHUT = {errno.EROFS, errno.EACCES, errno.EPERM}
LOST = {errno.ESTALE, errno.EIO, errno.ENODEV, errno.ENOTCONN, errno.ENXIO}
NO_FOLDER = {errno.EEXIST, errno.ENOTDIR}

ELSEWHERE = "take another place: hydra.run.dir=DIR, of a sweep hydra.sweep.dir=DIR."


def refused(error: OSError) -> str | None:
    """Why no run can begin, or be summed up, where an error says it; None of an error that is none of the disk's."""
    place = named(error) or "the output folder"
    folder = _nearest(Path(place) if named(error) else Path.cwd())
    if error.errno in FULL:
        return f"{full(place, folder)}\nFree some space, or {ELSEWHERE}"
    if error.errno in SHUT:
        return f"{shut(error, place, folder)}\nOr {ELSEWHERE}"
    if error.errno in LOST:
        return f"{lost(error, place)}\nMend the drive or the network, or {ELSEWHERE}"
    if error.errno in NO_FOLDER:
        return f"{place}: found a file of that name, or of a folder above it, expected a folder. Or {ELSEWHERE}"
    if error.errno == errno.ENAMETOOLONG:
        return f"{place}: the name is too long for this disk. Shorten it, or {ELSEWHERE}"
    return None


def named(error: BaseException) -> str | None:
    """The file that an error names."""
    found = error.filename2 or error.filename if isinstance(error, OSError) else None
    return str(found) if found else None


def full(place: str, folder: Path) -> str:
    """Of a full disk: what could not be written, and how much is free where `folder` lies."""
    return f"the disk is full: {place} could not be written{_free(folder)}."


def shut(error: OSError, place: str, folder: Path) -> str:
    """Of what may not be written to, and how to find out why."""
    return (
        f"{place} can't be written to: {error.strerror}.\n"
        f"Make the folder writable (who owns it: ls -ld {folder}; whether its drive is mounted read-only: "
        f"findmnt -T {folder})."
    )


def lost(error: OSError, place: str) -> str:
    """Of a drive that went."""
    return f"{place} can't be reached: {error.strerror}."


def _free(folder: Path) -> str:
    try:
        return f" ({readable_size(shutil.disk_usage(folder).free)} are free)"
    except OSError:
        return ""


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next((one for one in (path, *path.parents) if one.is_dir()), path)
