"""The records of a request, to take from in any order."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pylorus.cache.source import Place, Source


class Records:
    """All records of a request, in the order of its names.

    Attributes:
        kept: How many distinct records were found.
        computed: How many distinct records had to be computed.
        place: Where they are: "memory" or "disk".

    Args:
        source: The distinct records.
        numbers: Which of them each name stands for, shape (names,).
        kept: See above.
        computed: See above.
    """

    def __init__(self, source: Source, numbers: NDArray[np.intp], *, kept: int, computed: int) -> None:
        self.kept = kept
        self.computed = computed
        self.place: Place = source.place
        self._source = source
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def chosen(self, rows: NDArray[np.integer]) -> "Records":
        """Those at some rows, in their order, as a request of their own."""
        return Records(self._source, self._numbers[rows], kept=self.kept, computed=self.computed)

    def take(self, rows: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint8]:
        """The records of the names at `rows`, a fresh array (len(rows), record_bytes) that may be written to.

        Raises:
            IndexError: If a row is not a whole number or there is no such name.
        """
        wanted = np.asarray(rows)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise IndexError(f"rows: found {wanted.dtype} of shape {wanted.shape}, expected whole numbers in a row")
        return self._source.take(self._numbers[wanted.astype(np.intp)])
