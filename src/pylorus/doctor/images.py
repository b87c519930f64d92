"""Check the user's images: count the classes and read a sample. `pylorus audit` examines every image."""

import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pylorus.data.catalog import list_class_images
from pylorus.data.image import UnreadableImageError, read_image
from pylorus.doctor.check import Check, State
from pylorus.errors import PylorusError

IMAGES = "Images"
TRIED = 24
"""Number of images that are read."""

_scanned = cache(list_class_images)


def check_images(root: Path) -> Iterator[Check]:
    """Count the images of each class folder and read a sample of them."""
    if not root.is_dir():
        fix = "Pass a folder with one subfolder per class: --data DIR"
        yield Check(IMAGES, "folder", State.WRONG, f"{root} is not a folder", fix)
        return
    shards = len(list(root.glob("*.tar")))
    if shards:
        summary = f"{shards} shard{'' if shards == 1 else 's'} in {root}"
        yield Check(IMAGES, "folder", State.GOOD, summary, f"train with data=shards data.root={root}")
        return
    try:
        rows, _ = _scanned(root)
    except PylorusError as error:
        fix = f"Put the images into {root}/CLASS/…, or list them in a manifest (docs/data.md)."
        yield Check(IMAGES, "folder", State.WRONG, " ".join(str(error).split()), fix)
        return
    counts = Counter(row[1] for row in rows)
    classes = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    yield Check(IMAGES, "folder", State.GOOD, f"{len(rows)} images in {root}: {classes}")
    yield check_sample([root / row[0] for row in rows[:: max(1, len(rows) // TRIED)]][:TRIED])


def check_sample(paths: list[Path]) -> Check:
    """Read the images as a run does and time it."""
    unreadable: list[str] = []
    start = time.perf_counter()
    for path in paths:
        try:
            read_image(path)
        except UnreadableImageError as error:
            unreadable.append(str(error))
    seconds = time.perf_counter() - start
    if unreadable:
        summary = f"{len(unreadable)} of {len(paths)} sampled images can't be read, e.g. {unreadable[0]}"
        return Check(
            IMAGES,
            "reading",
            State.WARNING,
            summary,
            "List all of them: pylorus audit DIR. Train without them: data.on_error=quarantine",
        )
    speed = f"{seconds / max(1, len(paths)) * 1000:.0f} ms each"
    return Check(IMAGES, "reading", State.GOOD, f"all {len(paths)} sampled images can be read, {speed}")


def list_class_names(root: Path) -> list[str]:
    """Return the class names of a folder; an empty list if it does not exist or holds no class folders."""
    if not root.is_dir() or list(root.glob("*.tar")):
        return []
    try:
        rows, _ = _scanned(root)
    except PylorusError:
        return []
    return sorted({row[1] for row in rows})
