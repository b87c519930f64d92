"""Cache of image facts by content hash: a folder of immutable Parquet parts, each written atomically.

Several processes may use one store at once. Each adds new facts as a part of its own; the same content in two parts
does no harm. If there are many small parts, they are merged: the new part exists before the old ones are deleted. A
part that is damaged, truncated or has another schema is ignored, and its facts are computed again.
"""

import logging
import secrets
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as parquet

from pylorus.data.fingerprint import SIDE
from pylorus.files import write_atomically

if TYPE_CHECKING:
    from pylorus.data.facts import Facts

log = logging.getLogger(__name__)

PART_ROWS = 16_384
"""Rows that are collected before a part is written."""
SMALL_ROWS, MOST_SMALL = 1024, 32
"""If more than MOST_SMALL parts have fewer than SMALL_ROWS rows, they are merged."""
ROWS_AT_ONCE = 4096

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
        "thumbnail": pa.binary(SIDE * SIDE),
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
            for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE) if table is not None else ():
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
        if len(small_parts) <= MOST_SMALL:
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
