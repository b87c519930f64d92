"""A store of records on disk that runs share: each record is computed once, by whichever run needs it first.

A run that finds records missing locks the store, computes and writes them; other runs wait and then read them. A run
whose disk is full continues in memory. A record from the store is complete and verified, or it is recomputed.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from pylorus.cache.address import Address
from pylorus.cache.filling import Compute, DoesNotFitError, StoreFiller
from pylorus.cache.records import Records
from pylorus.cache.source import InMemorySource, OnDiskSource, RecordSource, load_missing_records
from pylorus.parallel.processes import ALONE, Processes

__all__ = ["Compute", "DoesNotFitError", "RecordStore", "Records"]


class RecordStore:
    """Records of one kind that were all computed in the same way.

    Args:
        root: Folder of all stores. Files are accessible to their owner only, since the records derive from patients'
            images.
        kind: Subfolder, such as "features": lower-case letters, digits, - and _.
        key: Everything that the content of a record depends on besides its name, as plain JSON values.
        record_bytes: Size of one record in bytes.
        budget_bytes: Maximum bytes of everything below `root`.

    Raises:
        ValueError: If `kind` or `record_bytes` is invalid, or `key` holds a number that is not finite.
        TypeError: If `key` holds a value that JSON can't represent.
    """

    def __init__(
        self, root: Path, *, kind: str, key: Mapping[str, object], record_bytes: int, budget_bytes: int
    ) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", kind):
            raise ValueError(f"kind: found {kind!r}, expected lower-case letters, digits, - and _")
        if record_bytes < 1:
            raise ValueError(f"record_bytes: found {record_bytes}, expected at least 1")
        self._address = Address(root.absolute(), kind, key, record_bytes)
        self._budget_bytes = budget_bytes
        self.folder = self._address.folder

    def load_or_compute(
        self, names: Sequence[str], compute: Compute, *, memory_bytes: int, processes: Processes = ALONE
    ) -> Records:
        """Load the records of `names`; those that are missing are computed and stored.

        Args:
            names: One per record. If a name occurs twice, both share one record.
            compute: Computes missing records; see `Compute`. It is called at most once, and in every process
                or in none.
            memory_bytes: Maximum bytes of records to hold in memory; larger requests stay on disk and are mapped.
            processes: The processes that request the same names at the same time; each computes its share of the
                missing records.

        Raises:
            DoesNotFitError: If the missing records don't fit on disk, nor all records in `memory_bytes`.
            ValueError: If `compute` yields something other than the records it was asked for.
            Exception: Whatever `compute` raises; the shards that it completed stay in the store.
        """
        numbers: dict[str, int] = {}
        rows = np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.intp, len(names))
        with suppress(OSError):  # existing records can still be read; writing reports what is wrong
            self._address.prepare()
        source: RecordSource
        if len(numbers) * self._address.record_bytes <= memory_bytes:
            source = InMemorySource(numbers, self._address.record_bytes)
        else:
            source = OnDiskSource(numbers, self._address.record_bytes, self._address.root, self._address.name)
        load_missing_records(source, self.folder)
        computed = 0
        if any(processes.reduce_any(len(source.missing) > 0)):
            filling = StoreFiller(
                self._address,
                source,
                names=list(numbers),
                positions=np.unique(rows, return_index=True)[1],
                budget_bytes=self._budget_bytes,
                memory_bytes=memory_bytes,
                processes=processes,
            )
            computed = filling.run(compute)
        return Records(source, rows, kept=len(numbers) - computed, computed=computed)
