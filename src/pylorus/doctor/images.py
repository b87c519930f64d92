"""The user's images at a glance: classes, and whether some of them can be read. `pylorus audit` looks at all."""

import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pylorus.data.catalog import scan_folders
from pylorus.data.image import UnreadableImageError, read
from pylorus.doctor.check import Check, State
from pylorus.errors import PylorusError

AREA = "Images"
TRIED = 24
"""Images that are read."""

_scanned = cache(scan_folders)


def check_images(root: Path) -> Iterator[Check]:
    """What lies in a folder of class folders, and whether a sample of it can be read."""
    if not root.is_dir():
        mend = "Give --data a folder of class folders."
        yield Check(AREA, "folder", State.WRONG, f"{root} is no folder that exists", mend)
        return
    shards = len(list(root.glob("*.tar")))
    if shards:
        found = f"{shards} shards in {root}"
        yield Check(AREA, "folder", State.GOOD, found, f"train with data=shards data.root={root}")
        return
    try:
        rows, _ = _scanned(root)
    except PylorusError as error:
        mend = f"Put the images into {root}/CLASS/…, or list them in a manifest (docs/data.md)."
        yield Check(AREA, "folder", State.WRONG, " ".join(str(error).split()), mend)
        return
    counts = Counter(row[1] for row in rows)
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    yield Check(AREA, "folder", State.GOOD, f"{len(rows)} images in {root}: {listed}")
    yield check_sample([root / row[0] for row in rows[:: max(1, len(rows) // TRIED)]][:TRIED])


def check_sample(paths: list[Path]) -> Check:
    """Reads some images as a run does."""
    unreadable: list[str] = []
    began = time.perf_counter()
    for path in paths:
        try:
            read(path)
        except UnreadableImageError as error:
            unreadable.append(str(error))
    seconds = time.perf_counter() - began
    if unreadable:
        found = f"{len(unreadable)} of {len(paths)} that were tried can't be read, such as {unreadable[0]}"
        return Check(AREA, "reading", State.WARNING, found, "pylorus audit lists all; data.on_error=quarantine")
    each = f"{seconds / max(1, len(paths)) * 1000:.0f} ms each"
    return Check(AREA, "reading", State.GOOD, f"{len(paths)} were tried, all can be read, {each}")


def class_names(root: Path) -> list[str]:
    """Names of the classes in a folder; none where there is no such folder or it holds something else."""
    if not root.is_dir() or list(root.glob("*.tar")):
        return []
    try:
        rows, _ = _scanned(root)
    except PylorusError:
        return []
    return sorted({row[1] for row in rows})
