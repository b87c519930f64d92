"""A store of records on disk that several runs share: each record is computed once, by whichever run comes first.

A run that finds records missing locks the store, computes and writes them; the others wait and then find them. A run
whose disk is full goes on in memory. What is found is complete and checked, or it is computed anew.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from pylorus.cache.address import Address
from pylorus.cache.filling import Compute, DoesNotFitError, Filling
from pylorus.cache.records import Records
from pylorus.cache.source import InMemory, OnDisk, Source, gather
from pylorus.parallel.processes import ALONE, Processes

__all__ = ["Compute", "DoesNotFitError", "RecordStore", "Records"]


class RecordStore:
    """Records of one kind that were made in one way.

    Args:
        root: Folder of all stores. What is made here is for its owner only: the records stem from patients' images.
        kind: Folder below it, such as "features": small letters, digits, - and _.
        key: All that the content of a record depends on besides its name, as plain values that JSON knows.
        record_bytes: Bytes of one record.
        budget_bytes: Most bytes that everything below `root` may take.

    Raises:
        ValueError: If `kind` or `record_bytes` is none, or `key` holds a number that is not finite.
        TypeError: If `key` holds a value that JSON does not know.
    """

    def __init__(
        self, root: Path, *, kind: str, key: Mapping[str, object], record_bytes: int, budget_bytes: int
    ) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", kind):
            raise ValueError(f"kind: found {kind!r}, expected small letters, digits, - and _")
        if record_bytes < 1:
            raise ValueError(f"record_bytes: found {record_bytes}, expected at least 1")
        self._address = Address(root.absolute(), kind, key, record_bytes)
        self._budget_bytes = budget_bytes
        self.folder = self._address.folder

    def records(
        self, names: Sequence[str], compute: Compute, *, memory_bytes: int, processes: Processes = ALONE
    ) -> Records:
        """The records of `names`; those that are not found are computed and kept.

        Args:
            names: One a record. Where a name comes twice, one record serves both.
            compute: Computes missing records; see `Compute`. It is called once, or not at all; in every process, or in
                none.
            memory_bytes: Most bytes of records to hold in memory; more than that stay on disk and are mapped.
            processes: Who asks for the same names at the same time: each computes its share of what is missing.

        Raises:
            DoesNotFitError: If the missing records have no room on disk, nor all records in `memory_bytes`.
            ValueError: If `compute` yields other than it was asked for.
            Exception: What `compute` raises; the shards that it filled are kept.
        """
        numbers: dict[str, int] = {}
        rows = np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.intp, len(names))
        with suppress(OSError):  # what is there can be read all the same; who has to write says what is wrong
            self._address.prepare()
        source: Source
        if len(numbers) * self._address.record_bytes <= memory_bytes:
            source = InMemory(numbers, self._address.record_bytes)
        else:
            source = OnDisk(numbers, self._address.record_bytes, self._address.root, self._address.name)
        gather(source, self.folder)
        computed = 0
        if any(processes.any(len(source.missing) > 0)):
            filling = Filling(
                self._address,
                source,
                names=list(numbers),
                places=np.unique(rows, return_index=True)[1],
                budget_bytes=self._budget_bytes,
                memory_bytes=memory_bytes,
                processes=processes,
            )
            computed = filling.run(compute)
        return Records(source, rows, kept=len(numbers) - computed, computed=computed)
