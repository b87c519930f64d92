"""The records of one request, for random access."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pylorus.cache.source import Place, RecordSource


class Records:
    """All records of a request, in the order of its names.

    Attributes:
        kept: Number of distinct records that were found in the store.
        computed: Number of distinct records that had to be computed.
        place: Where they are held: "memory" or "disk".

    Args:
        source: The distinct records.
        numbers: Index of each name's record in `source`, shape (names,).
        kept: See above.
        computed: See above.
    """

    def __init__(self, source: RecordSource, numbers: NDArray[np.intp], *, kept: int, computed: int) -> None:
        self.kept = kept
        self.computed = computed
        self.place: Place = source.place
        self._source = source
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def select_rows(self, rows: NDArray[np.integer]) -> "Records":
        """Return the records at the given rows, in their order, as a request of their own."""
        return Records(self._source, self._numbers[rows], kept=self.kept, computed=self.computed)

    def read_rows(self, rows: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint8]:
        """Return the records of the names at `rows` as a new, writable array of shape (len(rows), record_bytes).

        Raises:
            IndexError: If a row is not an integer or out of range.
        """
        indices = np.asarray(rows)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise IndexError(f"rows: found {indices.dtype} of shape {indices.shape}, expected a 1D array of integers")
        return self._source.read_records(self._numbers[indices.astype(np.intp)])
