"""Facts of images kept by content: a folder of Parquet parts, each written whole and never changed.

Several processes may use one store at once. Who finds something new adds a part of its own; the same content in two
parts does no harm. Many small parts are joined now and then: the new part is there before the old ones go. A part
that is damaged, half gone or of another shape counts as none, and its facts are computed anew.
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
from pylorus.files import whole

if TYPE_CHECKING:
    from pylorus.data.facts import Facts

log = logging.getLogger(__name__)

PART_ROWS = 16_384
"""Rows after which a part is written."""
SMALL_ROWS, MOST_SMALL = 1024, 32
"""More parts than this, of fewer rows than that, are joined."""
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
    """Facts of readable images below a folder.

    Args:
        folder: Where stores of all versions lie; made for its owner only, since thumbnails show patients' images.
        version: Of what facts are: others are not found.
    """

    def __init__(self, folder: Path, *, version: str) -> None:
        self.folder = folder / version
        self._new: list[Facts] = []

    def known(self) -> frozenset[bytes]:
        """The SHA-256, in 32 bytes, of every content that facts are kept of."""
        found: set[bytes] = set()
        for part in self._parts():
            table = _table(part, columns=["sha256"])
            if table is not None:
                found.update(table["sha256"].to_pylist())
        return frozenset(found)

    def rows(self, wanted: Container[str]) -> Iterator[dict[str, Any]]:
        """Facts of the contents wanted, by their SHA-256 in hexadecimal digits; some perhaps twice, some not at all."""
        for part in self._parts():
            table = _table(part)
            for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE) if table is not None else ():
                yield from (_plain(row) for row in batch.to_pylist() if row["sha256"].hex() in wanted)

    def add(self, facts: "Sequence[Facts]") -> None:
        """Keeps facts of readable images; they are on the disk once `PART_ROWS` are together or `close` is called."""
        self._new += facts
        if len(self._new) >= PART_ROWS:
            self._write()

    def close(self) -> None:
        """Writes what is new, and joins small parts where there are many."""
        if self._new:
            self._write()
            self._join_small_parts()

    def _write(self) -> None:
        columns: dict[str, list[Any]] = {name: [getattr(each, name) for each in self._new] for name in SCHEMA.names}
        for name in DIGESTS:
            columns[name] = [bytes.fromhex(value) for value in columns[name]]
        self._keep(pa.table(columns, schema=SCHEMA))
        self._new = []

    def _keep(self, table: pa.Table) -> bool:
        try:
            for folder in (self.folder.parent.parent, self.folder.parent, self.folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with whole(self.folder / f"{secrets.token_hex(8)}.parquet") as temporary:
                parquet.write_table(table, temporary, write_page_checksum=True, compression="zstd")
        except OSError as error:
            # A full or read-only disk costs the time of another pass, and nothing else.
            log.warning("%s: what was found of the images can't be kept (%s); a later run looks again.", folder, error)
            return False
        return True

    def _join_small_parts(self) -> None:
        """Makes one part of the small ones where there are many: else each run's few new images were a file."""
        sizes = {part: _table(part, columns=["sha256"]) for part in self._parts()}
        few = [part for part, table in sizes.items() if table is not None and len(table) < SMALL_ROWS]
        if len(few) <= MOST_SMALL:
            return
        small = [(part, table) for part in few if (table := _table(part)) is not None]
        if self._keep(pa.concat_tables([table for _, table in small])):
            for part, _ in small:
                with suppress(OSError):
                    part.unlink()

    def _parts(self) -> list[Path]:
        try:
            return sorted(path for path in self.folder.glob("*.parquet") if not path.name.startswith("."))
        except OSError:
            return []


def _table(part: Path, *, columns: list[str] | None = None) -> pa.Table | None:
    """A part, or some of its columns; None where it is gone, damaged or of another shape."""
    try:
        # The file is opened here: pyarrow would take a folder's name for a partition.
        with part.open("rb") as file:
            # Without threads of Arrow's own: now and then they outlived a short process, and it ended with an abort.
            held = parquet.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
            table = held.read(columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        log.info("%s: passed over: %s", part, error)
        return None
    wanted = SCHEMA if columns is None else pa.schema([SCHEMA.field(name) for name in columns])
    return table if table.schema.equals(wanted) else None


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value.hex() if name in DIGESTS else value for name, value in row.items()}
