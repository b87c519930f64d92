"""Memory, shared memory, disks and the clock: what a run needs beside packages."""

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from pylorus.cache.budget import readable_size
from pylorus.config import PACKAGE, CacheConfig
from pylorus.doctor.check import Check, State
from pylorus.files import whole

AREA = "Memory and disk"
GIB = 2**30
FEW_MEMORY, LEAST_MEMORY = 4 * GIB, GIB
"""Free memory: less than a study's models like, and less than any run takes."""
FEW_SHARED = GIB
"""Shared memory: less does for a few processes only."""
FEW_DISK, LEAST_DISK = 10 * GIB, GIB
"""Free disk: VGG19 in both stages takes up to 6 GiB of checkpoints and bundle, the cache up to its budget."""
SKEW = 5.0
"""Seconds that a disk's clock may differ: by more, a run's heartbeat seems to come late."""

SHARED_MEMORY = Path("/dev/shm")
LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
"""Where Linux states a container's limit and use, in its second and its first version of control groups."""


def check_space() -> Iterator[Check]:
    """Memory, shared memory, disks, whether results can be written, and the clock."""
    yield check_memory(*_memory())
    if SHARED_MEMORY.is_dir():
        yield check_shared_memory(shutil.disk_usage(SHARED_MEMORY).free)
    results, cache = Path("outputs"), Path(CacheConfig().folder)
    yield check_disk("outputs", results)
    if _there(results).stat().st_dev != _there(cache).stat().st_dev:
        yield check_disk("cache", cache)
    yield check_writable(results)
    yield check_clock(time.time(), (PACKAGE / "__init__.py").stat().st_mtime)


def _memory() -> tuple[int, int]:
    """Bytes free and in all, of the machine or of the container."""
    import psutil

    machine = psutil.virtual_memory()
    free, total = int(machine.available), int(machine.total)
    for limit, used in LIMITS:
        try:
            allowed = int(limit.read_text())  # "max": no limit
            free, total = min(free, allowed - int(used.read_text())), min(total, allowed)
        except (OSError, ValueError):
            continue
    return max(0, free), total


def check_memory(free: int, total: int) -> Check:
    """Whether a run finds memory; both in bytes."""
    found = f"{readable_size(free)} free of {readable_size(total)}"
    if free >= FEW_MEMORY:
        return Check(AREA, "memory", State.GOOD, found)
    state = State.WRONG if free < LEAST_MEMORY else State.WARNING
    mend = "End other programs, or take a smaller trainer.batch_size, data.image_size or model."
    return Check(AREA, "memory", state, f"{found}; the study's models like {readable_size(FEW_MEMORY)}", mend)


def check_shared_memory(free: int) -> Check:
    """Whether processes that decode images can hand them over; in bytes."""
    found = f"{readable_size(free)} free in {SHARED_MEMORY}"
    if free >= FEW_SHARED:
        return Check(AREA, "shared memory", State.GOOD, found)
    mend = "In a container: docker run --shm-size=8g. Or data.workers=0, which needs none and gives the same result."
    return Check(AREA, "shared memory", State.WARNING, f"{found}, too little for many data.workers", mend)


def check_disk(name: str, folder: Path) -> Check:
    """Whether there is room where `folder` lies or would be made."""
    free = shutil.disk_usage(_there(folder)).free
    found = f"{readable_size(free)} free where {folder} lies ({_there(folder)})"
    if free >= FEW_DISK:
        return Check(AREA, f"disk of {name}", State.GOOD, found)
    state = State.WRONG if free < LEAST_DISK else State.WARNING
    mend = "Make room, work in a folder on another disk, or set cache.folder there and a smaller cache.budget_gib."
    return Check(AREA, f"disk of {name}", state, found, mend)


def _there(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def check_writable(folder: Path) -> Check:
    """Writes a small file as a run does, reads it back and removes it; compares the disk's clock with ours."""
    place = _there(folder)
    file = place / f".pylorus-doctor-{secrets.token_hex(4)}.txt"
    mend = f"Work in a folder that is yours, or: chown -R $USER {place}"
    if not place.is_dir():
        return Check(AREA, "results", State.WRONG, f"{place} is no folder", f"Rename {place}: runs are kept there.")
    try:
        with whole(file) as temporary:
            temporary.write_text("pylorus", encoding="utf-8")
        kept = file.read_text(encoding="utf-8")
        skew = file.stat().st_mtime - time.time()
    except OSError as error:
        return Check(AREA, "results", State.WRONG, f"no file can be written in {place}: {error.strerror}", mend)
    finally:
        if os.access(file, os.F_OK):
            file.unlink()
    if kept != "pylorus":
        return Check(AREA, "results", State.WRONG, f"{place} does not give back what was written", "Take another disk.")
    if abs(skew) > SKEW:
        found = f"{place} can be written, but its clock differs by {skew:+.0f} s"
        return Check(AREA, "results", State.WARNING, found, "Set the clocks of this machine and its file server (NTP).")
    return Check(AREA, "results", State.GOOD, f"{place} can be written")


def check_clock(now: float, installed: float) -> Check:
    """Whether the time can be true; both in seconds since 1970.

    Example:
        >>> check_clock(0.0, 1.7e9).state
        <State.WARNING: 'warning'>
    """
    told = datetime.fromtimestamp(now).astimezone().isoformat(" ", "minutes")
    if now >= installed - 24 * 3600:
        return Check(AREA, "clock", State.GOOD, told)
    mend = "Set the clock (date, or NTP): folders of runs are named by it."
    return Check(AREA, "clock", State.WARNING, f"{told}, before Pylorus was installed", mend)
