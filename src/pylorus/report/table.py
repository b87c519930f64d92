"""A table as plain values (caption, data basis and cells), and its text as CSV, Markdown and LaTeX."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from pylorus.core.formatting import DASH, defuse_formula, format_number, format_p_value
from pylorus.evaluation.intervals import Estimate

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': "''",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "∞": r"$\infty$",
    "→": r"$\to$",
    "κ": r"$\kappa$",
    "·": r"$\cdot$",
    "…": r"\dots{}",
}
"""Replacements of characters that are special in LaTeX or missing from its fonts."""

MAX_LATEX_WIDTH = 84
"""A LaTeX table with more characters per row than this is scaled to the text width."""

MAX_CELL_LENGTH = 60
"""A cell with more characters than this is prose, whose lines are wrapped."""

MAX_LATEX_TITLE = 30
"""A column title with more characters than this is wrapped."""

MAX_LATEX_ROWS = 40
"""A LaTeX table with more rows than this may span several pages."""


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
        return format_number(self.value, self.digits) if self.words is None else self.words

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
        return f"{format_number(low, self.digits)} to {format_number(high, self.digits)}"

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
        heading: Spanning heading shared with neighbouring columns; may be empty.
        unit: Unit of its numbers, such as `%`; may be empty.
        text: Whether it contains text, which is left-aligned.
    """

    title: str
    heading: str = ""
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
            if spans and spans[-1][0] == column.heading and column.heading:
                spans[-1] = (column.heading, spans[-1][1] + 1)
            else:
                spans.append((column.heading, 1))
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
        >>> [convert_to_p_value_cell(p).text for p in (0.33172, 0.00002, math.nan)]
        ['0.33', '< 0.001', '–']
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


def format_csv(table: Table) -> str:
    """Format a table as machine-readable CSV: a header, then rows, and nothing else.

    Numbers have six significant digits; an interval adds two columns, low and high; `–` marks undefined values. The
    last column repeats the basis, so that no row can lose it.
    """
    has_interval = [any(_has_interval(row.cells[index]) for row in table.rows) for index in range(len(table.columns))]
    header: list[str] = []
    for column, is_interval in zip(table.columns, has_interval, strict=True):
        name = _format_flat_title(column)
        header += [name, f"{name}, low", f"{name}, high"] if is_interval else [name]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(defuse_formula, [*header, "basis"]))
    for row in table.rows:
        cells: list[str] = []
        for cell, is_interval in zip(row.cells, has_interval, strict=True):
            cells += _format_csv_values(cell) if is_interval else _format_csv_values(cell)[:1]
        writer.writerow(map(defuse_formula, [*cells, table.basis]))
    return file.getvalue()


MARKDOWN = re.compile(r"[|$*`]|(?<!\w)_|_(?!\w)|<(?=[A-Za-z/!?])")
"""What Markdown would take for columns, formulas, emphasis or HTML in the name of a class."""


def format_markdown(table: Table) -> str:
    """Format a table as aligned Markdown that is also readable as plain text, with caption above and notes below."""
    header = [_format_flat_title(column) for column in table.columns]
    body = [[format_cell(cell) for cell in row.cells] for row in table.rows]
    lines = [[MARKDOWN.sub(r"\\\g<0>", cell) for cell in line] for line in [header, *body]]
    widths = [max(3, *(len(line[index]) for line in lines)) for index in range(len(header))]
    aligned = [
        [
            cell.ljust(width) if column.text else cell.rjust(width)
            for cell, width, column in zip(line, widths, table.columns, strict=True)
        ]
        for line in lines
    ]
    rule = [
        "-" * width if column.text else f"{'-' * (width - 1)}:"
        for width, column in zip(widths, table.columns, strict=True)
    ]
    rows = [f"| {' | '.join(line)} |" for line in [aligned[0], rule, *aligned[1:]]]
    notes = [f"{note}  " for note in table.all_notes]
    return "\n".join([f"**{table.title}.** {table.basis}", "", *rows, *([""] if notes else []), *notes]).rstrip() + "\n"


def format_latex(table: Table, *, targets: Mapping[tuple[int, int], str] | None = None) -> str:
    """Format a table as LaTeX with booktabs rules: floating, or a longtable if it is long.

    In a wide table, intervals are placed below their values.

    Args:
        table: The table.
        targets: Names of the cells that text links to (package hyperref), by row and column.
    """
    has_prose = any(len(format_cell(cell)) > MAX_CELL_LENGTH for row in table.rows for cell in row.cells)
    has_numbers = any(not column.text for column in table.columns)
    is_long = (has_prose and not has_numbers) or len(table.rows) > MAX_LATEX_ROWS
    is_stacked = _count_row_characters(table, stacked=False) > MAX_LATEX_WIDTH
    is_scaled = not is_long and _count_row_characters(table, stacked=is_stacked) > MAX_LATEX_WIDTH
    caption = rf"\caption{{{escape_latex(f'{table.title}. {table.basis}'.strip())}}}"
    label = rf"\label{{tab:{table.key}}}"
    header = [r"\toprule", *_format_latex_head(table), r"\midrule"]
    columns = "".join(
        _format_latex_column(table, index, prose=has_prose and not has_numbers) for index in range(len(table.columns))
    )
    rows = _format_latex_rows(table, stacked=is_stacked, targets=targets or {})
    notes = escape_latex(" ".join(table.all_notes))
    footnotes = [rf"\par\smallskip{{\footnotesize {notes}}}"] if notes else []
    if is_long:
        lines = [rf"\begin{{longtable}}{{{columns}}}", rf"{caption}{label}\\", *header, r"\endfirsthead"]
        lines += [*header, r"\endhead"]
        lines += [*rows, r"\bottomrule", r"\end{longtable}", *footnotes]
        return "\n".join([r"% Needs \usepackage{booktabs, longtable}.", *lines, ""])
    body = [rf"\begin{{tabular}}{{{columns}}}", *header, *rows, r"\bottomrule", r"\end{tabular}"]
    if is_scaled:
        body = [r"\resizebox{\textwidth}{!}{%", *body[:-1], r"\end{tabular}}"]
    packages = "booktabs, graphicx" if is_scaled else "booktabs"
    start = [rf"% Needs \usepackage{{{packages}}}.", r"\begin{table}[htbp]", r"\centering", caption, label]
    return "\n".join([*start, *body, *footnotes, r"\end{table}", ""])


def _format_latex_rows(table: Table, *, stacked: bool, targets: Mapping[tuple[int, int], str]) -> list[str]:
    """Format the rows; merged cells are left empty, and blocks are separated by space."""
    lines: list[str] = []
    has_blocks = len(table.blocks) < len(table.rows)
    for number, (row, heights) in enumerate(zip(table.rows, table.heights, strict=True)):
        if number and has_blocks and heights[0]:
            lines.append(r"\addlinespace")
        cells = [
            escape_latex(_format_latex_value(cell, stacked)) if height else ""
            for cell, height in zip(row.cells, heights, strict=True)
        ]
        for column in range(len(cells)):
            if (number, column) in targets:
                cells[column] = rf"\hypertarget{{{targets[number, column]}}}{{{cells[column]}}}"
        lines.append(" & ".join(cells) + r" \\")
        intervals = [cell.interval_text if isinstance(cell, Number) else "" for cell in row.cells]
        if stacked and any(intervals):
            lines.append(
                " & ".join(rf"\scriptsize {escape_latex(text)}" if text else "" for text in intervals) + r" \\"
            )
    return lines


def _format_latex_value(cell: Cell, stacked: bool) -> str:
    return cell.value_text if stacked and isinstance(cell, Number) else format_cell(cell)


def _format_latex_column(table: Table, index: int, *, prose: bool) -> str:
    column = table.columns[index]
    if not column.text:
        return "r"
    longest = max((len(format_cell(row.cells[index])) for row in table.rows), default=0)
    if longest > MAX_CELL_LENGTH:
        return r"p{0.5\textwidth}" if prose else r"p{0.4\textwidth}"
    return r"p{0.2\textwidth}" if prose and longest > MAX_CELL_LENGTH / 4 else "l"


def _count_row_characters(table: Table, *, stacked: bool) -> int:
    """Count the characters of the widest cells of all columns together, plus two between columns."""
    return sum(
        2
        + max(
            [
                len(_format_column_title(column)),
                *(len(_format_latex_value(row.cells[index], stacked)) for row in table.rows),
                *(_count_interval_characters(row.cells[index]) for row in table.rows),
            ]
        )
        for index, column in enumerate(table.columns)
    )


def _count_interval_characters(cell: Cell) -> int:
    """Return the width of an interval below its value, whose small print fits three characters in the space of two."""
    return 2 * len(cell.interval_text) // 3 if isinstance(cell, Number) else 0


def escape_latex(text: str) -> str:
    r"""Escape text for LaTeX.

    Example:
        >>> print(escape_latex("a_b, 5 % – p < 0.05"))
        a\_b, 5 \% -- p $<$ 0.05
    """
    return "".join(LATEX.get(character, character) for character in text)


def _format_latex_head(table: Table) -> list[str]:
    titles = " & ".join(map(_format_latex_title, table.columns)) + r" \\"
    if not any(column.heading for column in table.columns):
        return [titles]
    spans, rules, first = [], [], 1
    for over, count in table.spans:
        spans.append(rf"\multicolumn{{{count}}}{{c}}{{{escape_latex(over)}}}" if over else "")
        if over:
            rules.append(rf"\cmidrule(lr){{{first}-{first + count - 1}}}")
        first += count
    return [" & ".join(spans) + r" \\", " ".join(rules), titles]


def _format_latex_title(column: Column) -> str:
    title = escape_latex(_format_column_title(column))
    if len(_format_column_title(column)) <= MAX_LATEX_TITLE:
        return title
    return rf"\parbox[b]{{0.2\textwidth}}{{\raggedright {title}}}"


def _format_column_title(column: Column) -> str:
    return f"{column.title}, {column.unit}" if column.unit else column.title


def _format_flat_title(column: Column) -> str:
    return f"{column.heading} {_format_column_title(column)}".strip()


def _has_interval(cell: Cell) -> bool:
    return isinstance(cell, Number) and cell.interval is not None


def _format_csv_values(cell: Cell) -> list[str]:
    """Format value, low and high for CSV."""
    if not isinstance(cell, Number):
        return [str(cell), "", ""]
    return [_format_csv_number(value) for value in (cell.value, *(cell.interval or (math.nan, math.nan)))]


def _format_csv_number(value: float) -> str:
    return DASH if math.isnan(value) else f"{value:.6g}"
