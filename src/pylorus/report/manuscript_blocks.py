"""Parts of a manuscript: text with links to the cells of tables, tables and figures, and the finder of these cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pylorus.core.formatting import DASH
from pylorus.report.figure_style import Drawing
from pylorus.report.table import Cell, Number, Row, Table, format_cell

AUTHOR = "[FOR THE AUTHOR: "
"""Opening of a gap in the manuscript that only the author can fill."""


@dataclass(frozen=True)
class LinkedNumber:
    """A number as written in the text, and the cell that it is taken from.

    Attributes:
        text: Value with its unit and its confidence interval.
        table: Key of the table.
        row: Position of the row.
        column: Position of the column.
    """

    text: str
    table: str
    row: int
    column: int


@dataclass(frozen=True)
class TableReference:
    """A reference to a table by its key, written as its number."""

    key: str


@dataclass(frozen=True)
class FigureReference:
    """A reference to a figure by its key, written as its number."""

    key: str


@dataclass(frozen=True)
class Citation:
    """Citations of references by their keys, written as their numbers."""

    keys: tuple[str, ...]


@dataclass(frozen=True)
class Gap:
    """Something that only the author knows."""

    text: str

    @property
    def words(self) -> str:
        """The gap as written."""
        return f"{AUTHOR}{self.text}]"


Span: TypeAlias = str | LinkedNumber | TableReference | FigureReference | Citation | Gap


Spans: TypeAlias = tuple[Span, ...]


@dataclass(frozen=True)
class Heading:
    """A heading of a level from 1 to 2."""

    text: str
    level: int = 1


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    spans: Spans


Block: TypeAlias = Heading | Paragraph | Table | Drawing


@dataclass(frozen=True)
class Manuscript:
    """A draft of a manuscript.

    Attributes:
        title: Title, with a gap.
        blocks: The text, tables and figures, in order.
        references: References by key, in the order of their numbers.
    """

    title: Spans
    blocks: tuple[Block, ...]
    references: Mapping[str, str]

    @property
    def tables(self) -> list[Table]:
        """The tables, in the order of their numbers."""
        return [block for block in self.blocks if isinstance(block, Table)]

    @property
    def drawings(self) -> list[Drawing]:
        """The figures, in the order of their numbers."""
        return [block for block in self.blocks if isinstance(block, Drawing)]

    @property
    def links(self) -> list[LinkedNumber]:
        """All linked numbers of the text."""
        paragraphs = (block for block in self.blocks if isinstance(block, Paragraph))
        return [span for block in paragraphs for span in block.spans if isinstance(span, LinkedNumber)]


@dataclass(frozen=True)
class CellFinder:
    """Finds numbers in tables by key, row and column."""

    tables: Mapping[str, Table]

    def find(
        self, key: str, head: Sequence[str], title: str, *, heading: str | None = None, unit: str | None = None
    ) -> LinkedNumber | None:
        """Return the number of a cell; None if there is no such table, row, column or value.

        Args:
            key: Key of the table.
            head: Text of the first cells of the row; a text that ends with * needs to match up to there only.
            title: Title of the column.
            heading: Spanning heading of the column; None for any.
            unit: Unit of the number; None: that of the column.
        """
        table = self.tables.get(key)
        if table is None:
            return None
        columns = [
            index
            for index, column in enumerate(table.columns)
            if column.title == title and (heading is None or column.heading == heading)
        ]
        rows = [index for index, row in enumerate(table.rows) if _has_head(row, head)]
        if not columns or not rows:
            return None
        column = table.columns[columns[0]]
        text = format_linked_cell(table.rows[rows[0]].cells[columns[0]], unit or column.unit or column.title)
        return LinkedNumber(text, key, rows[0], columns[0]) if text else None


def _has_head(row: Row, head: Sequence[str]) -> bool:
    cells = [format_cell(cell) for cell in row.cells[: len(head)]]
    return all(
        cell.startswith(text[:-1]) if text.endswith("*") else cell == text
        for cell, text in zip(cells, head, strict=True)
    )


def format_linked_cell(cell: Cell, unit: str) -> str:
    """Write a cell as in a sentence; empty if it is undefined.

    Example:
        >>> format_linked_cell(Number(90.888, 1, (87.9, 93.2)), "%")
        '90.9 % (95 % CI 87.9 to 93.2)'
        >>> format_linked_cell(1234, "")
        '1,234'
    """
    if not isinstance(cell, Number):
        return format_cell(cell)
    if cell.value_text == DASH:
        return ""
    value = cell.value_text + {"%": " %", "points": " percentage points"}.get(unit, "")
    interval = cell.interval_text
    if not interval:
        return value
    return f"{value} (95 % CI {interval})" if interval != DASH else f"{value} (no confidence interval)"


def fill(*spans: Span | None) -> Spans:
    """Return the spans of a clause, or none of them if one is None: a clause without its number is not written.

    Example:
        >>> fill("an accuracy of ", None, " was reached")
        ()
    """
    return tuple(span for span in spans if span) if None not in spans else ()


def join_clauses(clauses: Sequence[Spans]) -> Spans:
    """Join clauses by commas and "and", leaving out empty ones."""
    present = [clause for clause in clauses if clause]
    spans: list[Span] = []
    for number, clause in enumerate(present):
        if number:
            spans.append(" and " if number == len(present) - 1 else ", ")
        spans += clause
    return tuple(spans)


@dataclass(frozen=True)
class Numbering:
    """Numbers of the tables, figures and references of a manuscript, and the names of its link targets."""

    tables: Mapping[str, int]
    figures: Mapping[str, int]
    references: Mapping[str, int]
    cells: Mapping[tuple[str, int, int], str]

    def format_span(self, span: Span) -> str:
        """Return the text of a span."""
        if isinstance(span, LinkedNumber):
            return span.text
        if isinstance(span, TableReference):
            return f"Table {self.tables[span.key]}"
        if isinstance(span, FigureReference):
            return f"Figure {self.figures[span.key]}"
        if isinstance(span, Citation):
            return f" [{', '.join(str(self.references[key]) for key in span.keys)}]"
        return span.words if isinstance(span, Gap) else span

    def get_target(self, span: Span) -> str:
        """Return the name of the place that a span links to; empty if it is no link."""
        if isinstance(span, LinkedNumber):
            return self.cells[span.table, span.row, span.column]
        if isinstance(span, TableReference):
            return f"table_{self.tables[span.key]}"
        if isinstance(span, FigureReference):
            return f"figure_{self.figures[span.key]}"
        if isinstance(span, Citation):
            return f"reference_{self.references[span.keys[0]]}"
        return ""


def number_manuscript(manuscript: Manuscript) -> Numbering:
    """Number the tables, figures and references in their order, and name each cell that is linked to."""
    tables = {table.key: number for number, table in enumerate(manuscript.tables, start=1)}
    cells = dict.fromkeys((link.table, link.row, link.column) for link in manuscript.links)
    return Numbering(
        tables=tables,
        figures={drawing.key: number for number, drawing in enumerate(manuscript.drawings, start=1)},
        references={key: number for number, key in enumerate(manuscript.references, start=1)},
        cells={(key, row, column): f"cell_{tables[key]}_{row + 1}_{column + 1}" for key, row, column in cells},
    )
