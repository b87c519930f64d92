"""Format a table as CSV, Markdown and LaTeX with the same cells."""

import csv
import io
import math

from pylorus.report.table import DASH, Cell, Column, Number, Table, format_cell

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

WIDEST = 84
"""A LaTeX table with more characters per row than this is scaled to the text width."""

PROSE = 60
"""A cell with more characters than this is prose, whose lines are wrapped."""

LONGEST = 40
"""A LaTeX table with more rows than this may span several pages."""


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
    writer.writerow([*header, "basis"])
    for row in table.rows:
        cells: list[str] = []
        for cell, is_interval in zip(row.cells, has_interval, strict=True):
            cells += _format_csv_values(cell) if is_interval else _format_csv_values(cell)[:1]
        writer.writerow([*cells, table.basis])
    return file.getvalue()


def format_markdown(table: Table) -> str:
    """Format a table as aligned Markdown that is also readable as plain text, with caption above and notes below."""
    header = [_format_flat_title(column) for column in table.columns]
    body = [[format_cell(cell) for cell in row.cells] for row in table.rows]
    lines = [[cell.replace("|", r"\|") for cell in line] for line in [header, *body]]
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


def format_latex(table: Table) -> str:
    """Format a table as LaTeX with booktabs rules: floating, or a longtable if it is long.

    In a wide table, intervals are placed below their values.
    """
    has_prose = any(len(format_cell(cell)) > PROSE for row in table.rows for cell in row.cells)
    is_long = has_prose or len(table.rows) > LONGEST
    is_stacked = _count_row_characters(table, stacked=False) > WIDEST
    is_scaled = not is_long and _count_row_characters(table, stacked=is_stacked) > WIDEST
    caption = rf"\caption{{{escape_latex(f'{table.title}. {table.basis}'.strip())}}}"
    label = rf"\label{{tab:{table.key}}}"
    header = [r"\toprule", *_format_latex_head(table), r"\midrule"]
    columns = "".join(_format_latex_column(table, index, prose=has_prose) for index in range(len(table.columns)))
    rows = _format_latex_rows(table, stacked=is_stacked)
    notes = escape_latex(" ".join(table.all_notes))
    footnotes = [rf"\par\smallskip{{\footnotesize {notes}}}"] if notes else []
    if is_long:
        lines = [rf"\begin{{longtable}}{{{columns}}}", rf"{caption}{label}\\", *header, r"\endhead"]
        lines += [*rows, r"\bottomrule", r"\end{longtable}", *footnotes]
        return "\n".join([r"% Needs \usepackage{booktabs, longtable}.", *lines, ""])
    body = [rf"\begin{{tabular}}{{{columns}}}", *header, *rows, r"\bottomrule", r"\end{tabular}"]
    if is_scaled:
        body = [r"\resizebox{\textwidth}{!}{%", *body[:-1], r"\end{tabular}}"]
    packages = "booktabs, graphicx" if is_scaled else "booktabs"
    start = [rf"% Needs \usepackage{{{packages}}}.", r"\begin{table}[htbp]", r"\centering", caption, label]
    return "\n".join([*start, *body, *footnotes, r"\end{table}", ""])


def _format_latex_rows(table: Table, *, stacked: bool) -> list[str]:
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
    if longest > PROSE:
        return r"p{0.5\textwidth}"
    return r"p{0.2\textwidth}" if prose and longest > PROSE / 4 else "l"


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
    titles = " & ".join(escape_latex(_format_column_title(column)) for column in table.columns) + r" \\"
    if not any(column.over for column in table.columns):
        return [titles]
    spans, rules, first = [], [], 1
    for over, count in table.spans:
        spans.append(rf"\multicolumn{{{count}}}{{c}}{{{escape_latex(over)}}}" if over else "")
        if over:
            rules.append(rf"\cmidrule(lr){{{first}-{first + count - 1}}}")
        first += count
    return [" & ".join(spans) + r" \\", " ".join(rules), titles]


def _format_column_title(column: Column) -> str:
    return f"{column.title}, {column.unit}" if column.unit else column.title


def _format_flat_title(column: Column) -> str:
    return f"{column.over} {_format_column_title(column)}".strip()


def _has_interval(cell: Cell) -> bool:
    return isinstance(cell, Number) and cell.interval is not None


def _format_csv_values(cell: Cell) -> list[str]:
    """Format value, low and high for CSV."""
    if not isinstance(cell, Number):
        return [str(cell), "", ""]
    return [_format_csv_number(value) for value in (cell.value, *(cell.interval or (math.nan, math.nan)))]


def _format_csv_number(value: float) -> str:
    return DASH if math.isnan(value) else f"{value:.6g}"
