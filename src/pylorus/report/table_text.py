"""A table as CSV, Markdown and LaTeX: the same cells, each in the way that its reader needs."""

import csv
import io
import math

from pylorus.report.table import DASH, Cell, Column, Number, Table, shown

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
"""Characters that mean something to LaTeX, or that its fonts lack."""

WIDEST = 84
"""Letters side by side beyond which a LaTeX table is scaled to the width of the text."""

PROSE = 60
"""Letters beyond which a cell is prose, which breaks into lines."""

LONGEST = 40
"""Rows beyond which a LaTeX table runs over several pages."""


def as_csv(table: Table) -> str:
    """Comma-separated values for a program: a head, then rows, and nothing else.

    Numbers are not rounded to what a page shows; an interval takes two more columns, low and high; `–` stands for
    what is undefined. The last column says what each row rests on, so that a row can't lose it.
    """
    with_interval = [any(_has_interval(row.cells[place]) for row in table.rows) for place in range(len(table.columns))]
    head: list[str] = []
    for column, wide in zip(table.columns, with_interval, strict=True):
        name = _flat_title(column)
        head += [name, f"{name}, low", f"{name}, high"] if wide else [name]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*head, "basis"])
    for row in table.rows:
        cells: list[str] = []
        for cell, wide in zip(row.cells, with_interval, strict=True):
            cells += _values(cell) if wide else _values(cell)[:1]
        writer.writerow([*cells, table.basis])
    return file.getvalue()


def as_markdown(table: Table) -> str:
    """A table that reads well as text and as Markdown, with its caption above and its notes below."""
    head = [_flat_title(column) for column in table.columns]
    body = [[shown(cell) for cell in row.cells] for row in table.rows]
    lines = [[cell.replace("|", r"\|") for cell in line] for line in [head, *body]]
    widths = [max(3, *(len(line[place]) for line in lines)) for place in range(len(head))]
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


def as_latex(table: Table) -> str:
    """A table with booktabs' rules: floating, or over several pages where it is long.

    Where it is wide, intervals stand below their values.
    """
    prose = any(len(shown(cell)) > PROSE for row in table.rows for cell in row.cells)
    long = prose or len(table.rows) > LONGEST
    stacked = _letters(table, stacked=False) > WIDEST
    wide = not long and _letters(table, stacked=stacked) > WIDEST
    caption = rf"\caption{{{escaped(f'{table.title}. {table.basis}'.strip())}}}"
    label = rf"\label{{tab:{table.key}}}"
    head = [r"\toprule", *_latex_head(table), r"\midrule"]
    columns = "".join(_latex_column(table, place, prose=prose) for place in range(len(table.columns)))
    rows = _latex_rows(table, stacked=stacked)
    notes = escaped(" ".join(table.all_notes))
    below = [rf"\par\smallskip{{\footnotesize {notes}}}"] if notes else []
    if long:
        lines = [rf"\begin{{longtable}}{{{columns}}}", rf"{caption}{label}\\", *head, r"\endhead"]
        lines += [*rows, r"\bottomrule", r"\end{longtable}", *below]
        return "\n".join([r"% Needs \usepackage{booktabs, longtable}.", *lines, ""])
    body = [rf"\begin{{tabular}}{{{columns}}}", *head, *rows, r"\bottomrule", r"\end{tabular}"]
    if wide:
        body = [r"\resizebox{\textwidth}{!}{%", *body[:-1], r"\end{tabular}}"]
    needs = "booktabs, graphicx" if wide else "booktabs"
    start = [rf"% Needs \usepackage{{{needs}}}.", r"\begin{table}[htbp]", r"\centering", caption, label]
    return "\n".join([*start, *body, *below, r"\end{table}", ""])


def _latex_rows(table: Table, *, stacked: bool) -> list[str]:
    """The rows; what a cell above says too is left out, and blocks are set apart."""
    lines: list[str] = []
    several = len(table.blocks) < len(table.rows)
    for number, (row, heights) in enumerate(zip(table.rows, table.heights, strict=True)):
        if number and several and heights[0]:
            lines.append(r"\addlinespace")
        cells = [
            escaped(_value(cell, stacked)) if height else "" for cell, height in zip(row.cells, heights, strict=True)
        ]
        lines.append(" & ".join(cells) + r" \\")
        below = [cell.interval_text if isinstance(cell, Number) else "" for cell in row.cells]
        if stacked and any(below):
            lines.append(" & ".join(rf"\scriptsize {escaped(text)}" if text else "" for text in below) + r" \\")
    return lines


def _value(cell: Cell, stacked: bool) -> str:
    return cell.value_text if stacked and isinstance(cell, Number) else shown(cell)


def _latex_column(table: Table, place: int, *, prose: bool) -> str:
    column = table.columns[place]
    if not column.text:
        return "r"
    longest = max((len(shown(row.cells[place])) for row in table.rows), default=0)
    if longest > PROSE:
        return r"p{0.5\textwidth}"
    return r"p{0.2\textwidth}" if prose and longest > PROSE / 4 else "l"


def _letters(table: Table, *, stacked: bool) -> int:
    """How many letters the widest cells of all columns have together, with two between columns."""
    return sum(
        2
        + max(
            [
                len(_title(column)),
                *(len(_value(row.cells[place], stacked)) for row in table.rows),
                *(_interval_letters(row.cells[place]) for row in table.rows),
            ]
        )
        for place, column in enumerate(table.columns)
    )


def _interval_letters(cell: Cell) -> int:
    """Letters of an interval below its value, in which three take the room of two."""
    return 2 * len(cell.interval_text) // 3 if isinstance(cell, Number) else 0


def escaped(text: str) -> str:
    r"""Text as LaTeX prints it.

    Example:
        >>> print(escaped("a_b, 5 % – p < 0.05"))
        a\_b, 5 \% -- p $<$ 0.05
    """
    return "".join(LATEX.get(character, character) for character in text)


def _latex_head(table: Table) -> list[str]:
    titles = " & ".join(escaped(_title(column)) for column in table.columns) + r" \\"
    if not any(column.over for column in table.columns):
        return [titles]
    spans, rules, first = [], [], 1
    for over, count in table.spans:
        spans.append(rf"\multicolumn{{{count}}}{{c}}{{{escaped(over)}}}" if over else "")
        if over:
            rules.append(rf"\cmidrule(lr){{{first}-{first + count - 1}}}")
        first += count
    return [" & ".join(spans) + r" \\", " ".join(rules), titles]


def _title(column: Column) -> str:
    return f"{column.title}, {column.unit}" if column.unit else column.title


def _flat_title(column: Column) -> str:
    return f"{column.over} {_title(column)}".strip()


def _has_interval(cell: Cell) -> bool:
    return isinstance(cell, Number) and cell.interval is not None


def _values(cell: Cell) -> list[str]:
    """Value, low and high as a program reads them."""
    if not isinstance(cell, Number):
        return [str(cell), "", ""]
    return [_plain(value) for value in (cell.value, *(cell.interval or (math.nan, math.nan)))]


def _plain(value: float) -> str:
    return DASH if math.isnan(value) else f"{value:.6g}"
