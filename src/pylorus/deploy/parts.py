"""Write a table that does not fit in memory: in parts beside the output file, merged once it is complete."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from pylorus.deploy.sources import build_item_key
from pylorus.errors import PylorusError
from pylorus.files import write_atomically, write_json

FORMATS = (".csv", ".parquet", ".json")
ABOUT = ".about.json"


class CompactKeySet:
    """A set of image keys that stores eight bytes per key: a million keys take 8 MB.

    Args:
        keys: The keys of the images; see `pylorus.deploy.sources.build_item_key`.
    """

    def __init__(self, keys: Iterator[str]) -> None:
        self._digests = np.sort(np.fromiter((_hash_key(key) for key in keys), dtype=np.uint64))

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, key: str) -> bool:
        digest = np.uint64(_hash_key(key))
        position = int(np.searchsorted(self._digests, digest))
        return position < len(self._digests) and bool(self._digests[position] == digest)


class ResumableTable:
    """The rows of an output file while they are being computed; an interrupted output can be resumed.

    Args:
        output: The final file: .csv, .parquet or .json.
        request: The options that determine the rows, as plain values.
        also: The options that are only applied to the complete table.

    Raises:
        PylorusError: If the file has another suffix.
    """

    def __init__(self, output: Path, request: Mapping[str, object], *, also: Mapping[str, object]) -> None:
        if output.suffix.lower() not in FORMATS:
            raise PylorusError(f"--output: found {output}, expected a file name that ends in {', '.join(FORMATS)}.")
        self.output = output
        self._of_rows = json.loads(json.dumps(request))
        self.request = {**self._of_rows, **json.loads(json.dumps(also))}
        self.folder = output.with_name(f".{output.name}.parts")
        self.about = output.with_name(output.name + ABOUT)
        self._written, self._complete = 0, False

    def load_record(self) -> dict[str, object] | None:
        """Return the record of a complete output, or None if the output is not complete.

        Raises:
            PylorusError: If the output file exists but was written for another request.
        """
        if self.output.is_file() and not self.folder.is_dir():
            record = json.loads(self.about.read_text(encoding="utf-8")) if self.about.is_file() else {}
            self._check_same_request(record.get("request"), self.request, self.output)
            return dict(record)
        return None

    @contextmanager
    def lock_parts(self) -> Iterator[None]:
        """Lock the parts for this process, so that no other process writes them.

        Raises:
            PylorusError: If another process has locked them, or if they belong to another request.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise PylorusError(
                f"{self.output}: another process is writing this file. Wait for it, or choose another --output."
            ) from None
        try:
            request = self.folder / "request.json"
            if request.is_file():
                self._check_same_request(json.loads(request.read_text(encoding="utf-8")), self._of_rows, self.folder)
            else:
                write_json(request, self._of_rows)
            for leftover in self.folder.glob(".part-*"):
                leftover.unlink()
            self._written = len(self.list_parts())
            yield
        finally:
            lock.release()
            if self._complete or not self.list_parts():
                shutil.rmtree(self.folder)

    def list_parts(self) -> list[Path]:
        """Return the files of the parts, in order."""
        return sorted(self.folder.glob("part-*.parquet"))

    def iter_tables(self) -> Iterator[pd.DataFrame]:
        """Read the rows, part by part."""
        for path in self.list_parts():
            yield pd.read_parquet(path)

    def read_finished_keys(self) -> CompactKeySet:
        """Return the keys of the images that are already predicted."""
        return CompactKeySet(
            build_item_key(path, None if pd.isna(second) else float(second))
            for table in self.iter_tables()
            for path, second in zip(table["path"], table["second"], strict=True)
        )

    def add_part(self, table: pd.DataFrame) -> None:
        """Write a part atomically."""
        with write_atomically(self.folder / f"part-{self._written:08d}.parquet") as temporary:
            table.to_parquet(temporary, index=False)
        self._written += 1

    def merge_parts(self, record: Mapping[str, object], *, columns: Sequence[str]) -> None:
        """Merge the parts into the output file; they are deleted once it is written.

        Args:
            record: What to write to the .about.json beside the request.
            columns: The columns to write.
        """
        with write_atomically(self.output) as temporary:
            _WRITERS[self.output.suffix.lower()](temporary, (table[list(columns)] for table in self.iter_tables()))
        write_json(self.about, {"request": self.request, **record})
        self._complete = True

    def _check_same_request(self, request: object, expected: dict[str, object], path: Path) -> None:
        if request != expected:
            existing = request if isinstance(request, dict) else {}
            differing = [name for name in expected if existing.get(name) != expected[name]]
            raise PylorusError(
                f"{path}: already exists, from another request (different: {', '.join(differing)}). "
                "Delete it, or choose another --output."
            )


def _write_csv(path: Path, tables: Iterator[pd.DataFrame]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        for number, table in enumerate(tables):
            table.to_csv(file, index=False, header=number == 0, float_format="%.9g", lineterminator="\n")


def _write_parquet(path: Path, tables: Iterator[pd.DataFrame]) -> None:
    writer = None
    try:
        for table in tables:
            rows = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
            writer = writer or pq.ParquetWriter(path, rows.schema)
            writer.write_table(rows.cast(writer.schema))
    finally:
        if writer is not None:
            writer.close()


def _write_json(path: Path, tables: Iterator[pd.DataFrame]) -> None:
    with path.open("w", encoding="utf-8") as file:
        separator = "[\n"
        for table in tables:
            for row in table.astype(object).where(table.notna(), None).to_dict("records"):
                file.write(separator + json.dumps(row, ensure_ascii=False, allow_nan=False))
                separator = ",\n"
        file.write("\n]\n" if separator == ",\n" else "[]\n")


_WRITERS = {".csv": _write_csv, ".parquet": _write_parquet, ".json": _write_json}


def _hash_key(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
