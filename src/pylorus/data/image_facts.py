"""Facts of image files, computed from their bytes alone, in one pass over the files, and cached.

The audit, the catalog and the search for copies all use these facts. They are cached by the SHA-256 of the content,
independent of the file's name, so a second pass decodes nothing. The cache is a folder of immutable Parquet parts, to
which several processes may add at once: each writes a part of its own, and many small parts are merged before the old
ones are deleted. A part that is damaged or has another schema is ignored, and its facts are computed again.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import secrets
import sys
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from numpy.typing import NDArray
from tqdm import tqdm

from pylorus.core.io import write_atomically
from pylorus.data.decode import POLICY_VERSION, UnreadableImageError, decode_image
from pylorus.data.files import Root, read_image_bytes
from pylorus.data.image_measures import THUMBNAIL_SIDE, compute_thumbnail, measure_image, read_metadata

if TYPE_CHECKING:
    pass


VERSION = 1
"""Increment when the same file would give other facts."""
BLOCK = 1024
"""Files per block: facts are cached after each block, so an interrupted pass loses little."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts of one file.

    Attributes:
        sha256: Of the content; empty if the file itself can't be read.
        problem: Why the file can't be decoded; empty if it can.
        format: Format by content; see `metadata.Metadata`.
        mode: Pillow's colour mode.
        width: In pixels, upright; 0 if there is no image.
        height: In pixels, upright; 0 if there is no image.
        orientation: EXIF orientation, 1 to 8.
        personal: Names of tags that may identify a person, separated by commas.
        pixels: SHA-256 of the decoded pixels.
        thumbnail: SIDE × SIDE grey levels; empty if there is no image.
        sharpness: Variance of the Laplacian; see `look.Look` for this and the next three.
        brightness: Mean grey level, in [0, 255].
        border: Fraction of the frame that is black border, in [0, 1].
        letters: Number of letter-like shapes in the border.
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
        """Whether the file can be decoded."""
        return not self.problem


NAMES = tuple(field.name for field in dataclasses.fields(Facts) if field.name != "thumbnail")


class FactTable(Sequence[Facts]):
    """Facts of many files, stored as columns: a million objects would take twice the memory.

    Args:
        count: Number of files; initially, each is marked as unreadable.
    """

    def __init__(self, count: int) -> None:
        self.thumbnails = np.zeros((count, THUMBNAIL_SIDE, THUMBNAIL_SIDE), dtype=np.uint8)
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
        """Return the facts of one file, or of a slice of files."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(self._count))]
        cells = ((name, column[index]) for name, column in self._columns.items())
        attributes: dict[str, Any] = {name: value if isinstance(value, str) else value.item() for name, value in cells}
        return Facts(**attributes, thumbnail=b"" if attributes["problem"] else self.thumbnails[index].tobytes())

    def __iter__(self) -> Iterator[Facts]:
        return (self[index] for index in range(self._count))

    def put(self, index: int, facts: Facts) -> None:
        """Set the facts of the file at `index`."""
        for name, column in self._columns.items():
            value = getattr(facts, name)
            # These columns have few distinct values: share one object among all files.
            column[index] = sys.intern(value) if name in ("problem", "format", "mode", "personal") else value
        if facts.thumbnail:
            self.thumbnails[index] = np.frombuffer(facts.thumbnail, dtype=np.uint8).reshape(
                THUMBNAIL_SIDE, THUMBNAIL_SIDE
            )

    def get_column(self, name: str) -> Any:
        """Return one attribute of all files: a list of str, or an array of numbers of shape (files,)."""
        return self._columns[name]


def extract_fact_column(facts: Sequence[Facts], name: str) -> Any:
    """Return one attribute of all files: a list of str, or an array of numbers of shape (files,)."""
    if isinstance(facts, FactTable):
        return facts.get_column(name)
    values = [getattr(each, name) for each in facts]
    return values if all(isinstance(value, str) for value in values) else np.array(values)


def compute_facts(content: bytes) -> Facts:
    """Compute the facts of a file's content; if it can't be decoded, `problem` says why and there are no measures."""
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
        return dataclasses.replace(facts, problem=str(error))
    height, width = image.shape[:2]
    grey = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    pixel_hash = hashlib.sha256(f"{height} {width} ".encode())
    pixel_hash.update(np.ascontiguousarray(image).data)
    return dataclasses.replace(
        facts,
        width=width,
        height=height,
        pixels=pixel_hash.hexdigest(),
        thumbnail=compute_thumbnail(grey).tobytes(),
        **dataclasses.asdict(measure_image(grey)),
    )


def load_or_compute_facts(
    root: Root, paths: Sequence[str], *, store: Path | None, digests: Sequence[str] | None = None
) -> FactTable:
    """Return the facts of files, in their order.

    Each file is read once, on all cores, with a progress bar on a terminal.

    Args:
        root: What the paths are relative to.
        paths: Paths of the files.
        store: Folder of the cache of facts; None: nothing is cached.
        digests: SHA-256 of each content, if on record: files whose facts are cached are then not read at all.
    """
    table = FactTable(len(paths))
    cache = FactStore(store, version=f"{VERSION}-{POLICY_VERSION}") if store is not None else None
    cached = cache.read_digests() if cache is not None else frozenset()
    pending = _read_new_files(root, paths, range(len(paths)), table, cache, cached, digests)
    if cache is not None and pending:
        for row in cache.iter_facts(pending):
            facts = Facts(**row)
            for index in pending.pop(facts.sha256, ()):
                table.put(index, facts)
        # Compute again what another process deleted or damaged meanwhile.
        missing = [index for indices in pending.values() for index in indices]
        _read_new_files(root, paths, missing, table, cache, frozenset())
    return table


def extract_thumbnails(facts: Sequence[Facts], indices: Sequence[int] | None = None) -> NDArray[np.uint8]:
    """Return the thumbnails of readable images, of shape (images, SIDE, SIDE).

    Args:
        facts: Facts of files.
        indices: Indices into `facts`; None: all. All of these files must be readable.
    """
    if isinstance(facts, FactTable):
        if indices is None or (len(indices) == len(facts) and list(indices) == list(range(len(facts)))):
            return facts.thumbnails
        return facts.thumbnails[np.asarray(indices, dtype=np.int64)]
    joined = b"".join(each.thumbnail for each in (facts if indices is None else [facts[index] for index in indices]))
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE)


def _read_new_files(
    root: Root,
    paths: Sequence[str],
    indices: Sequence[int],
    table: FactTable,
    cache: "FactStore | None",
    cached: frozenset[bytes],
    digests: Sequence[str] | None = None,
) -> dict[str, list[int]]:
    """Read files and compute the facts that are not cached yet.

    Args:
        root: What the paths are relative to.
        paths: Paths of all files.
        indices: Indices of the files to read.
        table: Table that new facts are put into.
        cache: Cache that new facts are added to.
        cached: Digests of the contents in the cache.
        digests: SHA-256 of each content, if on record.

    Returns:
        Indices of the files whose facts are in the cache, by the SHA-256 of their content.
    """

    def compute_one(index: int) -> Facts | str:
        if digests is not None and bytes.fromhex(digests[index]) in cached:
            return digests[index]
        try:
            content = read_image_bytes(root / paths[index])
        except UnreadableImageError as error:
            return Facts("", problem=str(error))
        digest = hashlib.sha256(content)
        return digest.hexdigest() if digest.digest() in cached else compute_facts(content)

    pending: dict[str, list[int]] = {}
    quiet = not sys.stderr.isatty() or not len(indices)
    bar = tqdm(total=len(indices), desc="reading images", unit="", disable=quiet, leave=False)
    with bar, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool, contextlib.ExitStack() as at_end:
        if cache is not None:
            at_end.callback(cache.close)  # also if interrupted: what was computed is saved
        for start in range(0, len(indices), BLOCK):
            block = indices[start : start + BLOCK]
            fresh: dict[str, Facts] = {}
            for index, facts in zip(block, pool.map(compute_one, block), strict=True):
                if isinstance(facts, str):
                    pending.setdefault(facts, []).append(index)
                    continue
                table.put(index, facts)
                if facts.readable:  # don't cache failures: the file may only need a plugin
                    fresh[facts.sha256] = facts
            if cache is not None and fresh:
                cache.add(list(fresh.values()))
            bar.update(len(block))
    return pending


log = logging.getLogger(__name__)

PART_ROWS = 16_384
"""Rows that are collected before a part is written."""
SMALL_ROWS, MAX_SMALL_PARTS = 1024, 32
"""If more than MOST_SMALL parts have fewer than SMALL_ROWS rows, they are merged."""
ROWS_PER_BATCH = 4096

DIGEST, WORD = pa.binary(32), pa.string()
SCHEMA = pa.schema(
    {
        "sha256": DIGEST,
        "format": WORD,
        "mode": WORD,
        "width": pa.int32(),
        "height": pa.int32(),
        "orientation": pa.int32(),
        "personal": WORD,
        "pixels": DIGEST,
        "thumbnail": pa.binary(THUMBNAIL_SIDE * THUMBNAIL_SIDE),
        "sharpness": pa.float64(),
        "brightness": pa.float64(),
        "border": pa.float64(),
        "letters": pa.int32(),
    }
)
DIGESTS = tuple(field.name for field in SCHEMA if field.type == DIGEST)


class FactStore:
    """Cached facts of readable images.

    Args:
        folder: Folder of the stores of all versions. Created with access for its owner only, since thumbnails show
            patients' images.
        version: Version of the facts; facts of other versions are not found.
    """

    def __init__(self, folder: Path, *, version: str) -> None:
        self.folder = folder / version
        self._new: list[Facts] = []

    def read_digests(self) -> frozenset[bytes]:
        """Return the SHA-256 digests, of 32 bytes, of all contents in the store."""
        digests: set[bytes] = set()
        for part in self._list_parts():
            table = _read_table(part, columns=["sha256"])
            if table is not None:
                digests.update(table["sha256"].to_pylist())
        return frozenset(digests)

    def iter_facts(self, wanted: Container[str]) -> Iterator[dict[str, Any]]:
        """Yield the facts of contents by their SHA-256 in hexadecimal digits; some may come twice, some not at all."""
        for part in self._list_parts():
            table = _read_table(part)
            for batch in table.to_batches(max_chunksize=ROWS_PER_BATCH) if table is not None else ():
                yield from (_convert_row(row) for row in batch.to_pylist() if row["sha256"].hex() in wanted)

    def add(self, facts: "Sequence[Facts]") -> None:
        """Add facts of readable images; they are written once there are `PART_ROWS` of them or `close` is called."""
        self._new += facts
        if len(self._new) >= PART_ROWS:
            self._write()

    def close(self) -> None:
        """Write what is new, and merge small parts if there are many."""
        if self._new:
            self._write()
            self._merge_small_parts()

    def _write(self) -> None:
        columns: dict[str, list[Any]] = {name: [getattr(each, name) for each in self._new] for name in SCHEMA.names}
        for name in DIGESTS:
            columns[name] = [bytes.fromhex(value) for value in columns[name]]
        self._save_table(pa.table(columns, schema=SCHEMA))
        self._new = []

    def _save_table(self, table: pa.Table) -> bool:
        try:
            for folder in (self.folder.parent.parent, self.folder.parent, self.folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with write_atomically(self.folder / f"{secrets.token_hex(8)}.parquet") as temporary:
                parquet.write_table(table, temporary, write_page_checksum=True, compression="zstd")
        except OSError as error:
            # On a full or read-only disk, later runs lose time and nothing else.
            log.warning(
                "%s: can't cache what was found in the images (%s); a later run will read them again.", folder, error
            )
            return False
        return True

    def _merge_small_parts(self) -> None:
        """Merge the small parts if there are many: runs with few new images add one small file each."""
        digests = {part: _read_table(part, columns=["sha256"]) for part in self._list_parts()}
        small_parts = [part for part, table in digests.items() if table is not None and len(table) < SMALL_ROWS]
        if len(small_parts) <= MAX_SMALL_PARTS:
            return
        small_tables = [(part, table) for part in small_parts if (table := _read_table(part)) is not None]
        if self._save_table(pa.concat_tables([table for _, table in small_tables])):
            for part, _ in small_tables:
                with suppress(OSError):
                    part.unlink()

    def _list_parts(self) -> list[Path]:
        try:
            return sorted(path for path in self.folder.glob("*.parquet") if not path.name.startswith("."))
        except OSError:
            return []


def _read_table(part: Path, *, columns: list[str] | None = None) -> pa.Table | None:
    """Read a part, or some of its columns; return None if it is missing, damaged or has another schema."""
    try:
        # Open the file here: pyarrow would interpret a folder's name as a partition.
        with part.open("rb") as file:
            # Without Arrow's own threads: they sometimes outlived a short process, which then aborted.
            part_file = parquet.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
            table = part_file.read(columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        log.info("%s: ignored: %s", part, error)
        return None
    expected_schema = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    return table if table.schema.equals(expected_schema) else None


def _convert_row(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.hex() if name in DIGESTS else value for name, value in row.items()}
