"""Facts of image files as a table, and the cache where a later run finds them again.

They are cached by the SHA-256 of the content, independent of the file's name, so a second pass decodes nothing. The
cache is a folder of immutable Parquet parts, to which several processes may add at once: each writes a part of its own,
and many small parts are merged before the old ones are deleted. A part that is damaged or has another schema is
ignored, and its facts are computed again. An index of each root says which content a path had, by size and times.
"""

import dataclasses
import hashlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet
from numpy.typing import NDArray

from pylorus.core.io import create_private_folder, write_atomically
from pylorus.data.image_measures import THUMBNAIL_SIDE

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
        "text": pa.int32(),
        "covered": pa.float64(),
        "places": DIGEST,
        "field": WORD,
        "visible": pa.float64(),
        "outside": pa.float64(),
    }
)
DIGESTS = tuple(field.name for field in SCHEMA if field.type == DIGEST)
WORDS = [field.name for field in SCHEMA if field.type == WORD]
COMPRESSION = {field.name: "none" if field.name == "thumbnail" else "zstd" for field in SCHEMA}
"""Thumbnails take most of the time to read if they are compressed, and become smaller by a third only."""
ENTRY = np.dtype([("path", "<u8", 2), ("size", "<i8"), ("times", "<i8", 2), ("inode", "<u8"), ("sha256", "u1", 32)])
"""One file of an earlier pass. Of its path, which may name a patient, only a hash is stored."""
SETTLED_NS = 2_000_000_000
"""A file changed less than this long ago may change again without another modification time."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts of one file.

    Attributes:
        sha256: Of the content; empty if the file itself can't be read.
        problem: Why the file can't be decoded; empty if it can.
        format: Format by content; see `pylorus.data.image_measures.Metadata`.
        mode: Pillow's colour mode.
        width: In pixels, upright; 0 if there is no image.
        height: In pixels, upright; 0 if there is no image.
        orientation: EXIF orientation, 1 to 8.
        personal: Names of tags that may identify a person, separated by commas.
        pixels: Hash of the decoded pixels.
        thumbnail: SIDE × SIDE grey levels; empty if there is no image.
        sharpness: Variance of the Laplacian; see `image_measures.ImageMeasures` for this and the next five.
        brightness: Mean grey level, in [0, 255].
        border: Fraction of the frame that is black border, in [0, 1].
        text: Number of rows of text that a console has written into the frame.
        covered: Fraction of the frame that data.mask=overlays covers, in [0, 1].
        places: Where text may stand; see `image_measures.locate_text`.
        field: What data.crop=auto finds: a shape in words, `whole` if there is nothing to crop, or `unclear`.
        visible: Fraction of the field's border at which an edge is visible, in [0, 1].
        outside: Fraction of the frame that lies outside the field, in [0, 1].
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
    text: int = 0
    covered: float = 0.0
    places: str = ""
    field: str = ""
    visible: float = 0.0
    outside: float = 0.0

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
        self._columns: dict[str, NDArray[Any]] = {
            name: np.full(count, value := getattr(blank, name), object if isinstance(value, str) else None)
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

    def put_rows(self, indices: NDArray[np.integer], rows: pa.Table) -> None:
        """Set the facts of readable images from rows of a store, one for each index."""
        for name, column in self._columns.items():
            if name == "problem":
                column[indices] = ""
            elif name in DIGESTS:
                column[indices] = _convert_to_hexadecimal(rows[name])
            elif rows.schema.field(name).type == WORD:
                column[indices] = _convert_words(rows[name])
            else:
                column[indices] = rows[name].to_numpy()
        self.thumbnails[indices] = _view_bytes(rows["thumbnail"], THUMBNAIL_SIDE * THUMBNAIL_SIDE).reshape(
            -1, THUMBNAIL_SIDE, THUMBNAIL_SIDE
        )

    def get_column(self, name: str) -> NDArray[Any]:
        """Return one attribute of all files: an array of str or of numbers, of shape (files,)."""
        return self._columns[name]


def extract_fact_column(facts: Sequence[Facts], name: str) -> NDArray[Any]:
    """Return one attribute of all files: an array of str (as objects) or of numbers, of shape (files,)."""
    if isinstance(facts, FactTable):
        return facts.get_column(name)
    values = [getattr(each, name) for each in facts]
    return np.array(values, dtype=object if all(isinstance(value, str) for value in values) else None)


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

    def load_facts(
        self, table: FactTable, indices: NDArray[np.integer], contents: NDArray[np.object_]
    ) -> NDArray[np.integer]:
        """Put the facts of contents into a table.

        Args:
            table: Table that the facts are put into.
            indices: Index of each file in the table, of shape (files,).
            contents: SHA-256 of each file's content in hexadecimal digits, of shape (files,).

        Returns:
            The indices of the files whose content is not in the store.
        """
        for part in self._list_parts() if len(indices) else ():
            rows = _read_table(part)
            if rows is None:
                continue
            wanted = pa.FixedSizeBinaryArray.from_buffers(
                DIGEST, len(contents), [None, pa.py_buffer(bytes.fromhex("".join(contents)))]
            )
            positions = compute.index_in(wanted, value_set=rows["sha256"].combine_chunks())
            is_found = positions.is_valid().to_numpy(zero_copy_only=False)
            for start in range(0, len(found := np.flatnonzero(is_found)), ROWS_PER_BATCH):
                block = found[start : start + ROWS_PER_BATCH]
                chosen = positions.take(pa.array(block))
                is_all = len(block) == len(rows) and np.array_equal(chosen.to_numpy(), np.arange(len(rows)))
                table.put_rows(indices[block], rows if is_all else rows.take(chosen))
            indices, contents = indices[~is_found], contents[~is_found]
            if not len(indices):
                break
        return indices

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
            create_private_folder(self.folder, levels=3)
            part = self.folder / f"{secrets.token_hex(8)}.parquet"
            with write_atomically(part, durable=False) as temporary:  # its pages have checksums
                parquet.write_table(
                    table, temporary, write_page_checksum=True, compression=COMPRESSION, use_dictionary=WORDS
                )
        except OSError as error:
            # On a full or read-only disk, later runs lose time and nothing else.
            log.warning(
                "%s: can't cache what was found in the images (%s); a later run will read them again.",
                self.folder,
                error,
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


def _view_bytes(column: pa.ChunkedArray, width: int) -> NDArray[np.uint8]:
    """Return binary values of one width as an array of shape (values, width)."""
    array = column.combine_chunks()
    data = np.frombuffer(array.buffers()[1], dtype=np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)


def _convert_words(column: pa.ChunkedArray) -> NDArray[np.object_]:
    """Return texts, of which few are distinct, as an array in which equal ones are one object."""
    encoded = column.combine_chunks().dictionary_encode()
    words = np.array(encoded.dictionary.to_pylist(), dtype=object)
    return np.asarray(words[encoded.indices.to_numpy()])


def _convert_to_hexadecimal(column: pa.ChunkedArray) -> NDArray[np.object_]:
    digits = _view_bytes(column, 32).tobytes().hex()
    return np.array([digits[start : start + 64] for start in range(0, len(digits), 64)], dtype=object)


class FileIndex:
    """The content of the files of a root, by path, size and times, as earlier passes read them.

    Both the modification time and the time of the last change of the inode count, so a file that was replaced by one
    with its size and modification time is read again.

    Args:
        folder: Folder of the cache of facts.
        root: The root of the paths.
        paths: Paths of the files; their sizes and times are those of the moment when this object is made.
    """

    def __init__(self, folder: Path, root: Path, paths: Sequence[str]) -> None:
        absolute = os.path.abspath(root)  # noqa: PTH100 Path.resolve would follow links, which may change
        self._path = _find_index_file(folder, absolute)
        keys, inodes, numbers = list[bytes](), list[int](), list[tuple[int, int, int]]()
        latest = time.time_ns() - SETTLED_NS
        for path in paths:
            try:
                status = os.stat(f"{absolute}/{path}")  # noqa: PTH116 a Path for each file takes as long again
            except (OSError, ValueError):
                keys.append(bytes(16))
                inodes.append(0)
                numbers.append((0, 0, latest))
                continue
            keys.append(hashlib.blake2b(os.fsencode(path), digest_size=16).digest())
            inodes.append(status.st_ino)
            numbers.append((status.st_size, status.st_mtime_ns, status.st_ctime_ns))
        columns = np.array(numbers, dtype=np.int64).reshape(-1, 3)
        self._now = np.zeros(len(paths), ENTRY)
        self._now["path"] = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        self._now["size"], self._now["times"] = columns[:, 0], columns[:, 1:]
        self._now["inode"] = np.array(inodes, dtype=np.uint64)
        self._is_settled = columns[:, 1:].max(axis=1) < latest

    def find_digests(self) -> NDArray[np.object_]:
        """Return the SHA-256 of each file in hexadecimal digits, empty where the file is unknown or has changed."""
        found = np.full(len(self._now), "", dtype=object)
        earlier = _load_entries(self._path)
        if not len(earlier):
            return found
        position = np.searchsorted(earlier["path"][:, 0], self._now["path"][:, 0])
        earlier = earlier[np.minimum(position, len(earlier) - 1)]
        is_same = self._is_settled.copy()
        for name in ("path", "size", "times", "inode"):
            is_same &= (earlier[name] == self._now[name]).reshape(len(is_same), -1).all(axis=1)
        digits = np.ascontiguousarray(earlier["sha256"][is_same]).tobytes().hex()
        found[is_same] = [digits[start : start + 64] for start in range(0, len(digits), 64)]
        return found

    def save_digests(self, table: FactTable) -> None:
        """Save the contents of all readable files in a table, for the next pass over this root."""
        digests = table.get_column("sha256")
        is_known = self._is_settled & (table.get_column("problem") == "") & (digests != "")
        entries = self._now[is_known]
        entries["sha256"] = np.frombuffer(bytes.fromhex("".join(digests[is_known])), np.uint8).reshape(-1, 32)
        earlier = _load_entries(self._path)
        others = earlier[~np.isin(earlier["path"][:, 0], entries["path"][:, 0])]
        entries = np.concatenate([others, entries])
        with suppress(OSError):  # `FactStore` has logged a warning about a folder that can't be written to
            create_private_folder(self._path.parent, levels=4)
            with write_atomically(self._path) as temporary, temporary.open("wb") as file:
                np.save(file, entries[np.argsort(entries["path"][:, 0], kind="stable")])


def _find_index_file(folder: Path, root: str) -> Path:
    return folder / "files" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:24]}.npy"


def _load_entries(path: Path) -> NDArray[np.void]:
    try:
        entries = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return np.zeros(0, ENTRY)
    return entries if entries.dtype == ENTRY and entries.ndim == 1 else np.zeros(0, ENTRY)


class KnownFiles:
    """The images of a root that an earlier pass has read: they need not be opened to see that they are images.

    Args:
        folder: Folder of the cache of facts.
        root: The root of the paths.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self._root = os.path.abspath(root)  # noqa: PTH100 as in `FileIndex`
        self._path = _find_index_file(folder, self._root)

    @cached_property
    def _entries(self) -> dict[bytes, tuple[int, ...]]:
        entries = _load_entries(self._path)
        keys = entries["path"].tobytes()
        states = np.column_stack([entries["size"], entries["times"], entries["inode"].astype(np.int64)]).tolist()
        return {keys[16 * row : 16 * row + 16]: tuple(state) for row, state in enumerate(states)}

    def is_unchanged(self, path: str) -> bool:
        """Return whether a file is a readable image of an earlier pass and has the size and times that it had then."""
        state = self._entries.get(hashlib.blake2b(os.fsencode(path), digest_size=16).digest())
        if state is None:
            return False
        try:
            status = os.stat(os.path.join(self._root, path))  # noqa: PTH116, PTH118
        except OSError:
            return False
        return state == (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
