"""A table as plain values: what it shows, what it rests on, its cells. How it is written stands in `table_text`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.sentence import p_text

DASH = "–"
"""What stands for an undefined value."""


@dataclass(frozen=True)
class Number:
    """A number in a cell, with its interval where the table gives intervals.

    Attributes:
        value: In the unit of its column; nan where undefined.
        digits: Decimals shown.
        interval: Its ends, nan where they can't be told; None in a table without intervals.
        words: How the value is shown where rounding would mislead, as `< 0.001`; None: rounded.
        reason: Why there is no value or no interval, in words that follow "since"; empty where that is not known.
    """

    value: float
    digits: int = 1
    interval: tuple[float, float] | None = None
    words: str | None = None
    reason: str = ""

    @property
    def value_text(self) -> str:
        """The value as shown: `–` where undefined.

        Example:
            >>> Number(90.888).value_text, Number(float("nan")).value_text, Number(-0.04, digits=2).value_text
            ('90.9', '–', '−0.04')
        """
        return _shown(self.value, self.digits) if self.words is None else self.words

    @property
    def interval_text(self) -> str:
        """The interval as shown; `–` where there is a value without one, nothing where there is no value.

        Example:
            >>> Number(0.91, 2, (0.88, 0.932)).interval_text, Number(1.0, 1, (math.nan, math.nan)).interval_text
            ('0.88 to 0.93', '–')
        """
        if self.interval is None or math.isnan(self.value):
            return ""
        low, high = self.interval
        if math.isnan(low) or math.isnan(high):
            return DASH
        return f"{_shown(low, self.digits)} to {_shown(high, self.digits)}"

    @property
    def text(self) -> str:
        """Value and interval in one."""
        return f"{self.value_text} ({self.interval_text})" if self.interval_text else self.value_text


Cell: TypeAlias = str | int | Number
"""What stands in a cell; an empty text where nothing belongs there."""


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: At its head.
        over: What stands above it and its neighbours of the same word; may be empty.
        unit: Of its numbers, such as `%`; may be empty.
        text: Whether it holds words, which stand at the left.
    """

    title: str
    over: str = ""
    unit: str = ""
    text: bool = False


@dataclass(frozen=True)
class Row:
    """A row of as many cells as there are columns; a strong one sums up those above it."""

    cells: tuple[Cell, ...]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its caption.

    Attributes:
        key: Name of its files, unique in a report.
        title: What it shows, without a full stop.
        basis: What it rests on: level, images and groups, split, marks; whole sentences.
        columns: Its columns; equal cells below each other in the first one belong together.
        rows: Its rows.
        notes: Sentences below it.
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
                raise ValueError(f"table {self.key}: found a row of {len(row.cells)}, expected {len(self.columns)}")

    @property
    def numbers(self) -> list[Number]:
        """All numbers in it."""
        return [cell for row in self.rows for cell in row.cells if isinstance(cell, Number)]

    @property
    def all_notes(self) -> tuple[str, ...]:
        """Its notes, and what its dashes and brackets mean."""
        found = list(self.notes)
        if any(number.interval is not None for number in self.numbers):
            found.append("In brackets, or below a value: 95 % confidence interval.")
        undefined = [number for number in self.numbers if math.isnan(number.value)]
        if undefined:
            found.append(f"{DASH}: undefined, since {_list_reasons(undefined, 'it would divide zero by zero')}.")
        unbounded = [number for number in self.numbers if number.interval_text == DASH]
        if unbounded:
            found.append(f"({DASH}): no interval, since {_list_reasons(unbounded, 'nothing varied in these images')}.")
        return tuple(found)

    @property
    def blocks(self) -> list[tuple[Row, ...]]:
        """Rows that belong together, by their first cell."""
        blocks: list[list[Row]] = []
        for row in self.rows:
            if blocks and blocks[-1][0].cells[0] == row.cells[0]:
                blocks[-1].append(row)
            else:
                blocks.append([row])
        return [tuple(block) for block in blocks]

    @property
    def heights(self) -> list[list[int]]:
        """How many rows each cell stands for, of shape (rows, columns); 0 where a cell above stands for it too.

        Only leading columns of words are united, each within what the column before it unites.

        Example:
            >>> columns = (*text_columns("model", "stage"), Column("right"))
            >>> Table("t", "", "", columns, rows_of([("a", "x", 1), ("a", "y", 1), ("b", "y", 1)])).heights
            [[2, 1, 1], [0, 1, 1], [1, 1, 1]]
        """
        heights = [[1] * len(self.columns) for _ in self.rows]
        leading = next((place for place, column in enumerate(self.columns) if not column.text), len(self.columns))
        for place in range(leading):
            top = 0
            for number in range(1, len(self.rows)):
                if self.rows[number].cells[: place + 1] == self.rows[top].cells[: place + 1]:
                    heights[top][place] += 1
                    heights[number][place] = 0
                else:
                    top = number
        return heights

    @property
    def spans(self) -> list[tuple[str, int]]:
        """The words above the heads, and how many columns each spans."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.over and column.over:
                spans[-1] = (column.over, spans[-1][1] + 1)
            else:
                spans.append((column.over, 1))
        return spans


def in_percent(estimate: Estimate, *, interval: bool = True) -> Number:
    """A share with its interval, in %.

    Example:
        >>> in_percent(Estimate(0.909, 0.879, 0.932)).text
        '90.9 (87.9 to 93.2)'
    """
    ends = (100 * estimate.low, 100 * estimate.high) if interval else None
    return Number(100 * estimate.value, 1, ends, reason=estimate.reason)


def as_number(estimate: Estimate, *, digits: int = 3) -> Number:
    """An estimate with its interval, as it is."""
    return Number(estimate.value, digits, (estimate.low, estimate.high), reason=estimate.reason)


def p_value(value: float) -> Number:
    """A p in a column of its own.

    Example:
        >>> p_value(0.33172).text, p_value(0.00002).text, p_value(math.nan).text
        ('0.33', '< 0.001', '–')
    """
    return Number(value, words=DASH if math.isnan(value) else p_text(value).removeprefix("p ").removeprefix("= "))


def text_columns(*titles: str) -> tuple[Column, ...]:
    """Columns of words."""
    return tuple(Column(title, text=True) for title in titles)


def shown(cell: Cell) -> str:
    """A cell as a reader sees it.

    Example:
        >>> shown(1234), shown("GC"), shown(Number(66.48))
        ('1,234', 'GC', '66.5')
    """
    if isinstance(cell, Number):
        return cell.text
    return f"{cell:,}" if isinstance(cell, int) else cell


def rows_of(cells: Sequence[Sequence[Cell]]) -> tuple[Row, ...]:
    """Plain rows."""
    return tuple(Row(tuple(row)) for row in cells)


def _list_reasons(numbers: Sequence[Number], otherwise: str) -> str:
    return ", or ".join(dict.fromkeys(number.reason or otherwise for number in numbers))


def _shown(value: float, digits: int) -> str:
    if math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")
