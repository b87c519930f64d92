"""Facts of image files, computed from their bytes alone, in one pass over the files, and cached.

The audit, the catalog and the search for copies all use these facts (`fact_store.py`). The same decoded image also
gives the network's input, where that is cached: each file is read and decoded once.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from pylorus.core.distributed import map_items
from pylorus.core.formatting import open_progress_bar
from pylorus.data.decode import DECODER_VERSION, UnreadableImageError, decode_image
from pylorus.data.fact_store import Facts, FactStore, FactTable, FileIndex
from pylorus.data.field_of_view import FINDER, find_field
from pylorus.data.field_shape import FieldOfView
from pylorus.data.files import RGB, Root, read_image_bytes
from pylorus.data.image_measures import compute_thumbnail, measure_image, read_metadata, reduce_image

VERSION = f"4.{FINDER}"
"""Increment when the same file would give other facts; the field finder has a version of its own."""
BLOCK = 128
"""Files after which new facts and images are passed on to their caches: an interrupted pass loses little.

Writing them must not take longer than the processes that read need for what they compute in advance.
"""


class PreparedImages(Protocol):
    """Where the network's input goes that a pass over the files computes as well."""

    def prepare(self, image: RGB, half: RGB | None, field: FieldOfView | None) -> RGB | None:
        """Return an image as the network's input; None if it is not worth caching.

        Args:
            image: RGB, uint8 of shape (height, width, 3).
            half: The image halved, if that is known already.
            field: Its field of view, if that is known already.
        """

    def save(self, digests: Sequence[str], images: Sequence[RGB]) -> None:
        """Save prepared images by the SHA-256 of their files' content; it is called even if there are none."""


def compute_facts(content: bytes) -> Facts:
    """Compute the facts of a file's content; if it can't be decoded, `problem` says why and there are no measures."""
    return analyze_content(content)[0]


@dataclass(frozen=True)
class DecodedImage:
    """A decoded image, the same halved by averaging 2 × 2 pixels, if its facts were measured there, and its field."""

    pixels: RGB
    half: RGB | None
    field: FieldOfView


def analyze_content(content: bytes) -> tuple[Facts, DecodedImage | None]:
    """Compute the facts of a file's content; return them with the decoded image, None if it can't be decoded."""
    sha256, metadata = hashlib.sha256(content).hexdigest(), read_metadata(content)
    facts = Facts(
        sha256,
        format=metadata.format,
        mode=metadata.mode,
        orientation=metadata.orientation,
        personal=", ".join(metadata.personal),
    )
    try:
        image = decode_image(content)
    except UnreadableImageError as error:
        return dataclasses.replace(facts, problem=str(error)), None
    height, width = image.shape[:2]
    reduced, field = reduce_image(image), find_field(image)
    grey = np.asarray(cv2.cvtColor(reduced, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    measured = dataclasses.replace(
        facts,
        width=width,
        height=height,
        pixels=_hash_pixels(image, grey),
        thumbnail=compute_thumbnail(grey).tobytes(),
        field=field.outcome,
        visible=field.support,
        outside=1 - field.measure_area() / (height * width),
        **dataclasses.asdict(measure_image(image, reduced, grey)),
    )
    return measured, DecodedImage(
        image, reduced if (2 * len(reduced), 2 * reduced.shape[1]) == (height, width) else None, field
    )


def _hash_pixels(image: RGB, grey: NDArray[np.uint8]) -> str:
    """Hash an image's size and pixels.

    SHA-256 covers the reduced image, and a multilinear hash modulo 2^64 all pixels (Carter and Wegman 1979): SHA-256 of
    all pixels takes eight times as long, half as long as decoding them. `einsum` has a faster loop for integers than
    `dot`.
    """
    pixels = np.ascontiguousarray(image).reshape(-1)
    words = pixels[: len(pixels) // 8 * 8].view(np.uint64)
    checksum = int(np.einsum("i,i", words, _generate_weights(len(words))))
    digest = hashlib.sha256(f"{image.shape[:2]} {checksum} ".encode())
    digest.update(pixels[len(words) * 8 :].data)
    digest.update(grey.data)
    return digest.hexdigest()


@lru_cache(maxsize=8)
def _generate_weights(count: int) -> NDArray[np.uint64]:
    return np.random.default_rng(0).integers(0, 2**63, count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def find_fact_folder(store: Path) -> Path:
    """Return the folder of a cache that holds the facts of this version, and the index of known files."""
    return FactStore(store, version=f"{VERSION}-{DECODER_VERSION}").folder


def load_or_compute_facts(
    root: Root,
    paths: Sequence[str],
    *,
    store: Path | None,
    digests: Sequence[str] | None = None,
    verify: str = "time",
    images: PreparedImages | None = None,
) -> FactTable:
    """Return the facts of files, in their order.

    Each file is read once, on all cores, with a progress bar on a terminal. A file whose size and times are those of an
    earlier pass is not read again.

    Args:
        root: What the paths are relative to.
        paths: Paths of the files.
        store: Folder of the cache of facts; None: nothing is cached.
        digests: SHA-256 of each content, if on record: files whose facts are cached are then not read at all.
        verify: `time`: a file with the size and times of an earlier pass has the same content; `content`: every file is
            read, to compare its SHA-256.
        images: Receives the network's input of files that are decoded; None: nothing does.
    """
    table = FactTable(len(paths))
    if store is None:
        _read_new_files(_Reader(root, paths, frozenset(), images), range(len(paths)), table, None)
        return table
    cache = FactStore(store, version=f"{VERSION}-{DECODER_VERSION}")
    files = FileIndex(cache.folder, root, paths) if digests is None and isinstance(root, Path) else None
    contents = np.full(len(paths), "", dtype=object)
    if digests is not None:
        contents[:] = digests
    elif files is not None and verify == "time":
        contents = files.find_digests()
    known = np.flatnonzero(contents != "")
    missing = cache.load_facts(table, known, contents[known])
    unread = np.sort(np.concatenate([np.flatnonzero(contents == ""), missing]))
    if len(unread):
        pending = _read_new_files(_Reader(root, paths, cache.read_digests(), images), unread, table, cache)
        indices = np.fromiter(pending, np.int64, len(pending))
        # Compute again what another process deleted or damaged meanwhile.
        missing = cache.load_facts(table, indices, np.array(list(pending.values()), dtype=object))
        _read_new_files(_Reader(root, paths, frozenset(), images), missing, table, cache)
        if files is not None:
            files.save_digests(table)
    return table


@dataclass(frozen=True)
class _Reader:
    """Reads one file at a time; a process that reads has its own copy.

    Attributes:
        root: What the paths are relative to.
        paths: Paths of all files.
        cached: Digests of the contents whose facts are cached.
        images: See `load_or_compute_facts`.
    """

    root: Root
    paths: Sequence[str]
    cached: frozenset[bytes]
    images: PreparedImages | None

    def __call__(self, index: int) -> tuple[Facts | str, RGB | None]:
        """Return a file's facts, or its digest if they are cached, and the network's input if it is to be saved."""
        try:
            content = read_image_bytes(self.root / self.paths[index])
        except UnreadableImageError as error:
            return Facts("", problem=str(error)), None
        if self.cached and (digest := hashlib.sha256(content)).digest() in self.cached:
            return digest.hexdigest(), None
        facts, image = analyze_content(content)
        if self.images is None or image is None:
            return facts, None
        return facts, self.images.prepare(image.pixels, image.half, image.field)


def _read_new_files(
    reader: _Reader, indices: Sequence[int] | NDArray[np.integer], table: FactTable, cache: FactStore | None
) -> dict[int, str]:
    """Read files and compute the facts that are not cached yet.

    Args:
        reader: Reads one file.
        indices: Indices of the files to read.
        table: Table that new facts are put into.
        cache: Cache that new facts are added to.

    Returns:
        The SHA-256 of each content whose facts are in the cache, by the file's index.
    """
    pending: dict[int, str] = {}
    fresh: dict[str, tuple[Facts, RGB | None]] = {}

    def pass_on() -> None:
        # Failures are not cached: the file may only need a plugin.
        if cache is not None and fresh:
            cache.add([facts for facts, _ in fresh.values()])
        prepared = {digest: image for digest, (_, image) in fresh.items() if image is not None}
        if reader.images is not None:
            reader.images.save(list(prepared), list(prepared.values()))
        fresh.clear()

    def report_failure(_: int, reason: str) -> tuple[Facts | str, RGB | None]:
        return Facts("", problem=reason), None

    numbers = [int(index) for index in indices]
    with (
        open_progress_bar("reading images", len(numbers), shown=bool(numbers)) as bar,
        contextlib.ExitStack() as at_end,
    ):
        if cache is not None:
            at_end.callback(cache.close)  # also if interrupted: what was computed is saved
        at_end.callback(pass_on)
        results = map_items(reader, numbers, name=reader.paths.__getitem__, on_failure=report_failure)
        for index, (facts, image) in zip(numbers, results, strict=True):
            bar.update()
            if isinstance(facts, str):
                pending[index] = facts
                continue
            table.put(index, facts)
            if facts.readable:
                fresh[facts.sha256] = facts, image
            if len(fresh) >= BLOCK:
                pass_on()
    return pending
