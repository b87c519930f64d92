"""What files are, from their bytes alone: found in one pass, and found again by content in a second one.

Audit, catalog and the search for copies all take what they know of an image from here. What is kept lies in
`fact_store.py`, under the SHA-256 of the content, whatever a file's name: a second pass decodes nothing.
"""

import contextlib
import dataclasses
import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pylorus.data.content import Root, contents
from pylorus.data.fact_store import FactStore
from pylorus.data.fingerprint import SIDE, thumbnail
from pylorus.data.image import POLICY_VERSION, UnreadableImageError, decode
from pylorus.data.look import look_at
from pylorus.data.metadata import metadata_of

VERSION = 1
"""Counts up when the same file would give other facts."""
BLOCK = 1024
"""Files in hand at a time: what is computed is kept after each block, so an interrupted pass loses little."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What one file is.

    Attributes:
        sha256: Of the content; empty where the file itself can't be read.
        problem: Why it gives no image; empty where it gives one.
        format: By content; see `metadata`.
        mode: Pillow's colour mode.
        width: Pixels, upright; 0 where there is no image.
        height: Pixels, upright.
        orientation: Of EXIF, 1 to 8.
        personal: Names of tags that may name a person, joined by commas.
        pixels: SHA-256 of the decoded pixels.
        thumbnail: SIDE × SIDE grey levels; empty where there is no image.
        sharpness: See `look.Look`, as the next three.
        brightness: Mean grey level.
        border: Share of black border.
        letters: Shapes like letters in it.
    """

    sha256: str
    problem: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    orientation: int = 1
    personal: str = ""
    pixels: str = ""
    thumbnail: bytes = b""
    sharpness: float = 0.0
    brightness: float = 0.0
    border: float = 0.0
    letters: int = 0

    @property
    def readable(self) -> bool:
        """Whether the file gives an image."""
        return not self.problem


NAMES = tuple(field.name for field in dataclasses.fields(Facts) if field.name != "thumbnail")


class FactTable(Sequence[Facts]):
    """Facts of many files, held as columns: as objects a million of them would take twice the memory.

    Args:
        count: How many files; each begins as one that can't be read.
    """

    def __init__(self, count: int) -> None:
        self.thumbnails = np.zeros((count, SIDE, SIDE), dtype=np.uint8)
        blank = Facts("", problem="not read")
        self._columns: dict[str, Any] = {
            name: [value] * count if isinstance(value := getattr(blank, name), str) else np.full(count, value)
            for name in NAMES
        }
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Facts: ...
    @overload
    def __getitem__(self, index: slice) -> list[Facts]: ...
    def __getitem__(self, index: int | slice) -> Facts | list[Facts]:
        """The facts of a file, or of some."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(self._count))]
        values = ((name, column[index]) for name, column in self._columns.items())
        plain: dict[str, Any] = {name: value if isinstance(value, str) else value.item() for name, value in values}
        return Facts(**plain, thumbnail=b"" if plain["problem"] else self.thumbnails[index].tobytes())

    def __iter__(self) -> Iterator[Facts]:
        return (self[index] for index in range(self._count))

    def put(self, index: int, facts: Facts) -> None:
        """Sets the facts of a file."""
        for name, column in self._columns.items():
            value = getattr(facts, name)
            # Formats and modes are a handful of words: one object for all files.
            column[index] = sys.intern(value) if name in ("problem", "format", "mode", "personal") else value
        if facts.thumbnail:
            self.thumbnails[index] = np.frombuffer(facts.thumbnail, dtype=np.uint8).reshape(SIDE, SIDE)

    def column(self, name: str) -> Any:
        """One attribute of all files: a list of str, or an array of numbers, of shape (files,)."""
        return self._columns[name]


def column_of(facts: Sequence[Facts], name: str) -> Any:
    """One attribute of all files: a list of str, or an array of numbers, of shape (files,)."""
    if isinstance(facts, FactTable):
        return facts.column(name)
    found = [getattr(each, name) for each in facts]
    return found if all(isinstance(value, str) for value in found) else np.array(found)


def examine(content: bytes) -> Facts:
    """The facts of a file's content; a file that gives no image has a problem instead of measures."""
    sha256, head = hashlib.sha256(content).hexdigest(), metadata_of(content)
    said = Facts(
        sha256,
        format=head.format,
        mode=head.mode,
        orientation=head.orientation,
        personal=", ".join(head.personal),
    )
    try:
        image = decode(content)
    except UnreadableImageError as error:
        return dataclasses.replace(said, problem=str(error))
    height, width = image.shape[:2]
    grey = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    size = hashlib.sha256(f"{height} {width} ".encode())
    size.update(np.ascontiguousarray(image).data)
    return dataclasses.replace(
        said,
        width=width,
        height=height,
        pixels=size.hexdigest(),
        thumbnail=thumbnail(grey).tobytes(),
        **dataclasses.asdict(look_at(grey)),
    )


def facts_of(
    root: Root, paths: Sequence[str], *, store: Path | None, digests: Sequence[str] | None = None
) -> FactTable:
    """The facts of files, in their order; each is read once, on all cores, with a bar on a terminal.

    Args:
        root: What the paths lie below.
        paths: Of the files.
        store: Folder to keep facts in, and to find those of an earlier pass; None: nothing is kept.
        digests: SHA-256 of each content, where it is on record: what is known by it is not read again.
    """
    found = FactTable(len(paths))
    kept = FactStore(store, version=f"{VERSION}-{POLICY_VERSION}") if store is not None else None
    known = kept.known() if kept is not None else frozenset()
    later = _read(root, paths, range(len(paths)), found, kept, known, digests)
    if kept is not None and later:
        for row in kept.rows(later):
            facts = Facts(**row)
            for index in later.pop(facts.sha256, ()):
                found.put(index, facts)
        # What another process took away or damaged meanwhile is computed anew.
        _read(root, paths, [index for places in later.values() for index in places], found, kept, frozenset())
    return found


def thumbnails_of(facts: Sequence[Facts], places: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """The thumbnails of readable images, of shape (images, SIDE, SIDE).

    Args:
        facts: Of files.
        places: Which of them; None: all. None may be unreadable.
    """
    if isinstance(facts, FactTable):
        if places is None or (len(places) == len(facts) and list(places) == list(range(len(facts)))):
            return facts.thumbnails
        return facts.thumbnails[np.asarray(places, dtype=np.int64)]
    joined = b"".join(each.thumbnail for each in (facts if places is None else [facts[place] for place in places]))
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, SIDE, SIDE)


def _read(
    root: Root,
    paths: Sequence[str],
    places: Sequence[int],
    found: FactTable,
    kept: FactStore | None,
    known: frozenset[bytes],
    digests: Sequence[str] | None = None,
) -> dict[str, list[int]]:
    """Reads the files at some places and computes what is not known; gives the places of what is, by content."""

    def of(place: int) -> Facts | str:
        if digests is not None and bytes.fromhex(digests[place]) in known:
            return digests[place]
        try:
            content = contents(root / paths[place])
        except UnreadableImageError as error:
            return Facts("", problem=str(error))
        digest = hashlib.sha256(content)
        return digest.hexdigest() if digest.digest() in known else examine(content)

    later: dict[str, list[int]] = {}
    quiet = not sys.stderr.isatty() or not len(places)
    bar = tqdm(total=len(places), desc="looking at images", unit="", disable=quiet, leave=False)
    with bar, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool, contextlib.ExitStack() as at_end:
        if kept is not None:
            at_end.callback(kept.close)  # also of an interrupted pass: what was found is kept
        for start in range(0, len(places), BLOCK):
            block = places[start : start + BLOCK]
            fresh: dict[str, Facts] = {}
            for place, facts in zip(block, pool.map(of, block), strict=True):
                if isinstance(facts, str):
                    later.setdefault(facts, []).append(place)
                    continue
                found.put(place, facts)
                if facts.readable:  # what is unreadable today may only lack a plugin
                    fresh[facts.sha256] = facts
            if kept is not None and fresh:
                kept.add(list(fresh.values()))
            bar.update(len(block))
    return later
