"""A table as plain values: caption, data basis and cells. Module `table_text` writes it as text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.sentence import format_p_value

DASH = "–"
"""Symbol for an undefined value."""


@dataclass(frozen=True)
class Number:
    """A number in a cell, with its confidence interval if the table has intervals.

    Attributes:
        value: The value, in the unit of its column; NaN if undefined.
        digits: Number of decimals shown.
        interval: Lower and upper limit, NaN if undefined; None in a table without intervals.
        words: Text shown instead of the rounded value where rounding would mislead, such as `< 0.001`.
        reason: Why there is no value or no interval, as a clause that follows "because"; empty if unknown.
    """

    value: float
    digits: int = 1
    interval: tuple[float, float] | None = None
    words: str | None = None
    reason: str = ""

    @property
    def value_text(self) -> str:
        """The value as shown: `–` if undefined.

        Example:
            >>> Number(90.888).value_text, Number(float("nan")).value_text, Number(-0.04, digits=2).value_text
            ('90.9', '–', '−0.04')
        """
        return _format_cell_value(self.value, self.digits) if self.words is None else self.words

    @property
    def interval_text(self) -> str:
        """The interval as shown; `–` if the value has none, empty if there is no value.

        Example:
            >>> Number(0.91, 2, (0.88, 0.932)).interval_text, Number(1.0, 1, (math.nan, math.nan)).interval_text
            ('0.88 to 0.93', '–')
        """
        if self.interval is None or math.isnan(self.value):
            return ""
        low, high = self.interval
        if math.isnan(low) or math.isnan(high):
            return DASH
        return f"{_format_cell_value(low, self.digits)} to {_format_cell_value(high, self.digits)}"

    @property
    def text(self) -> str:
        """Value and interval together, as shown."""
        return f"{self.value_text} ({self.interval_text})" if self.interval_text else self.value_text


Cell: TypeAlias = str | int | Number
"""Content of a cell; an empty string if the cell does not apply."""


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: Heading of the column.
        over: Spanning heading shared with neighbouring columns; may be empty.
        unit: Unit of its numbers, such as `%`; may be empty.
        text: Whether it contains text, which is left-aligned.
    """

    title: str
    over: str = ""
    unit: str = ""
    text: bool = False


@dataclass(frozen=True)
class Row:
    """A row with one cell per column; a strong row summarizes the rows above it."""

    cells: tuple[Cell, ...]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its caption.

    Attributes:
        key: Stem of its file names, unique in a report.
        title: Title, without a full stop.
        basis: The data it is based on (level, images and groups, split, caveats), in full sentences.
        columns: The columns; consecutive equal cells in the first one form a block of rows.
        rows: The rows.
        notes: Footnotes, in full sentences.
    """

    key: str
    title: str
    basis: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(
                    f"table {self.key}: found a row of {len(row.cells)} cells, expected {len(self.columns)}"
                )

    @property
    def numbers(self) -> list[Number]:
        """All numbers in the table."""
        return [cell for row in self.rows for cell in row.cells if isinstance(cell, Number)]

    @property
    def all_notes(self) -> tuple[str, ...]:
        """Its footnotes, including the meaning of dashes and brackets."""
        notes = list(self.notes)
        if any(number.interval is not None for number in self.numbers):
            notes.append("In parentheses or below a value: 95 % confidence interval.")
        undefined = [number for number in self.numbers if math.isnan(number.value)]
        if undefined:
            notes.append(f"{DASH}: undefined, because {_join_reasons(undefined, 'the denominator is zero')}.")
        unbounded = [number for number in self.numbers if number.interval_text == DASH]
        if unbounded:
            notes.append(
                f"({DASH}): no interval, because "
                f"{_join_reasons(unbounded, 'there was no variation among these images')}."
            )
        return tuple(notes)

    @property
    def blocks(self) -> list[tuple[Row, ...]]:
        """Rows grouped into blocks by consecutive equal first cells."""
        blocks: list[list[Row]] = []
        for row in self.rows:
            if blocks and blocks[-1][0].cells[0] == row.cells[0]:
                blocks[-1].append(row)
            else:
                blocks.append([row])
        return [tuple(block) for block in blocks]

    @property
    def heights(self) -> list[list[int]]:
        """Number of rows that each cell spans, of shape (rows, columns); 0 if a cell above spans it.

        Only leading text columns are merged, each within the merged cells of the column to its left.

        Example:
            >>> columns = (*create_text_columns("model", "stage"), Column("right"))
            >>> Table("t", "", "", columns, create_rows([("a", "x", 1), ("a", "y", 1), ("b", "y", 1)])).heights
            [[2, 1, 1], [0, 1, 1], [1, 1, 1]]
        """
        heights = [[1] * len(self.columns) for _ in self.rows]
        leading = next(
            (column_index for column_index, column in enumerate(self.columns) if not column.text), len(self.columns)
        )
        for column_index in range(leading):
            top = 0
            for row_index in range(1, len(self.rows)):
                if self.rows[row_index].cells[: column_index + 1] == self.rows[top].cells[: column_index + 1]:
                    heights[top][column_index] += 1
                    heights[row_index][column_index] = 0
                else:
                    top = row_index
        return heights

    @property
    def spans(self) -> list[tuple[str, int]]:
        """The spanning headings, and the number of columns that each spans."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.over and column.over:
                spans[-1] = (column.over, spans[-1][1] + 1)
            else:
                spans.append((column.over, 1))
        return spans


def convert_to_percent_cell(estimate: Estimate, *, interval: bool = True) -> Number:
    """Convert a proportion with its interval to a cell in %.

    Example:
        >>> convert_to_percent_cell(Estimate(0.909, 0.879, 0.932)).text
        '90.9 (87.9 to 93.2)'
    """
    limits = (100 * estimate.low, 100 * estimate.high) if interval else None
    return Number(100 * estimate.value, 1, limits, reason=estimate.reason)


def convert_to_number_cell(estimate: Estimate, *, digits: int = 3) -> Number:
    """Convert an estimate with its interval to a cell, without scaling."""
    return Number(estimate.value, digits, (estimate.low, estimate.high), reason=estimate.reason)


def convert_to_p_value_cell(value: float) -> Number:
    """Format a p-value for a column of p-values.

    Example:
        >>> convert_to_p_value_cell(0.33172).text, convert_to_p_value_cell(0.00002).text, convert_to_p_value_cell(math.nan).text
        ('0.33', '< 0.001', '–')
    """
    return Number(
        value, words=DASH if math.isnan(value) else format_p_value(value).removeprefix("p ").removeprefix("= ")
    )


def create_text_columns(*titles: str) -> tuple[Column, ...]:
    """Create text columns with the given titles."""
    return tuple(Column(title, text=True) for title in titles)


def format_cell(cell: Cell) -> str:
    """Format a cell as a reader sees it.

    Example:
        >>> format_cell(1234), format_cell("GC"), format_cell(Number(66.48))
        ('1,234', 'GC', '66.5')
    """
    if isinstance(cell, Number):
        return cell.text
    return f"{cell:,}" if isinstance(cell, int) else cell


def create_rows(cells: Sequence[Sequence[Cell]]) -> tuple[Row, ...]:
    """Create rows without emphasis."""
    return tuple(Row(tuple(row)) for row in cells)


def _join_reasons(numbers: Sequence[Number], otherwise: str) -> str:
    return ", or ".join(dict.fromkeys(number.reason or otherwise for number in numbers))


def _format_cell_value(value: float, digits: int) -> str:
    if math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")
