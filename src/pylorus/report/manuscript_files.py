"""Write a manuscript as Word, LaTeX and HTML: the same blocks, with numbers that link to the cells of their tables."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from pylorus.core.errors import PylorusError
from pylorus.core.io import write_atomically, write_text
from pylorus.report.figure_style import Drawing
from pylorus.report.manuscript_blocks import (
    AUTHOR,
    Block,
    Citation,
    FigureReference,
    Gap,
    Heading,
    LinkedNumber,
    Manuscript,
    Numbering,
    Paragraph,
    Spans,
    TableReference,
    number_manuscript,
)
from pylorus.report.table import Cell, Number, Table, escape_latex, format_cell, format_latex

STEM = "manuscript"
"""Stem of the names of the files."""

MANUSCRIPT_FILES = tuple(f"{STEM}.{suffix}" for suffix in ("html", "tex", "docx"))
"""Names of the files in the folder of a report."""

PAGE_WIDTH, LANDSCAPE_WIDTH = 6.3, 9.5
"""Width of the text in inches, upright and across."""
MARGIN = 1.0
SMALL, NARROW = 8.0, 7.0
"""Font sizes of tables in points: usual, and with many columns."""
MANY_COLUMNS = 9
MAX_ROWS_ACROSS = 12
"""A wide table with more rows than this stays upright in LaTeX: across, it would be higher than the page."""
MAX_LINE = 110
"""A column of a table in Word need not be wider than this many characters."""


def write_manuscript(
    manuscript: Manuscript, output: Path, pictures: Mapping[str, bytes], *, docx: bool, latex: bool
) -> list[Path]:
    """Write a manuscript as HTML and, as asked, as Word and LaTeX.

    Args:
        manuscript: The manuscript.
        output: Folder of the report; LaTeX reads the figures in its folder figures.
        pictures: PNG of each figure, by key.
        docx: Whether to write Word.
        latex: Whether to write LaTeX.

    Returns:
        Paths of the files.

    Raises:
        PylorusError: If Word is asked for and python-docx is not installed.
    """
    paths = [output / f"{STEM}.html"]
    write_text(paths[0], format_html(manuscript))
    if latex:
        paths.append(output / f"{STEM}.tex")
        write_text(paths[-1], format_latex_document(manuscript))
    if docx:
        paths.append(output / f"{STEM}.docx")
        content = render_docx(manuscript, pictures)
        with write_atomically(paths[-1]) as temporary:
            temporary.write_bytes(content)
    return paths


def check_docx() -> None:
    """Raise an error if python-docx is missing, before anything is computed.

    Raises:
        PylorusError: If python-docx cannot be imported.
    """
    _import_docx()


def _import_docx() -> Any:
    try:
        import docx
    except ImportError as error:
        raise PylorusError(
            f"--docx: needs python-docx, which can't be imported ({error}). Run pip install 'pylorus[docx]' or, in a "
            "clone, pip install -e '.[docx]'."
        ) from error
    return docx


HTML_STYLE = (
    "body{font:16px/1.5 Georgia,serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#1f2933;background:#fff}"
    "h1,h2,h3{line-height:1.2}table{border-collapse:collapse;font:13px/1.35 system-ui,sans-serif}"
    ".wide{overflow-x:auto}td,th{padding:.2rem .5rem;text-align:right;border-bottom:1px solid #e4e7eb;"
    "vertical-align:top}td.text,th.text{text-align:left}caption{text-align:left;font-weight:600;padding:.4rem 0}"
    ".notes{font-size:13px;color:#52606d}td:target{background:#ffe8a3}mark{background:#fff3c4}"
    "figure{margin:1.5rem 0}figcaption{font-size:14px}img{max-width:100%}a{color:#0b5cad}"
)


def format_html(manuscript: Manuscript) -> str:
    """Format a manuscript as one HTML page, whose figures are the report's SVG files."""
    numbering = number_manuscript(manuscript)
    title = "".join(numbering.format_span(span) for span in manuscript.title)
    body = [Markup("<h1>{}</h1>").format(_format_html_spans(manuscript.title, numbering))]
    body += [_format_html_block(block, numbering) for block in manuscript.blocks]
    items = Markup("").join(
        Markup('<li id="reference_{}">{}</li>').format(number, _mark_html_gaps(text))
        for number, text in enumerate(manuscript.references.values(), start=1)
    )
    body.append(Markup("<h2>References</h2><ol>{}</ol>").format(items))
    head = Markup(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>{}</title><style>{}</style></head>'
    ).format(title, Markup(HTML_STYLE))
    return str(Markup("{}<body>{}</body></html>\n").format(head, Markup("\n").join(body)))


def _format_html_block(block: Block, numbering: Numbering) -> Markup:
    if isinstance(block, Heading):
        return Markup("<h{0}>{1}</h{0}>").format(block.level + 1, block.text)
    if isinstance(block, Paragraph):
        return Markup("<p>{}</p>").format(_format_html_spans(block.spans, numbering))
    if isinstance(block, Drawing):
        number = numbering.figures[block.key]
        return Markup(
            '<figure id="figure_{}"><img src="figures/{}.svg" alt="{}"><figcaption>{}</figcaption></figure>'
        ).format(number, block.key, block.alt, _format_figure_caption(block, number))
    return _format_html_table(block, numbering)


def _format_html_spans(spans: Spans, numbering: Numbering) -> Markup:
    parts = []
    for span in spans:
        text, target = numbering.format_span(span), numbering.get_target(span)
        link = Markup('<a href="#{}">{}</a>').format(target, text.strip()) if target else _mark_html_gaps(text)
        parts.append(Markup(" {}").format(link) if isinstance(span, Citation) else link)
    return Markup("").join(parts)


def _mark_html_gaps(text: str) -> Markup:
    return Markup(GAP.sub(r"<mark>\g<0></mark>", str(escape(text))))


GAP = re.compile(re.escape(AUTHOR) + r"[^\]]*\]")


def _format_html_table(table: Table, numbering: Numbering) -> Markup:
    kinds = [Markup(' class="text"') if column.text else Markup("") for column in table.columns]
    heads = []
    if any(column.heading for column in table.columns):
        spans = [Markup('<th colspan="{}">{}</th>').format(count, over) for over, count in table.spans]
        heads.append(Markup("<tr>{}</tr>").format(Markup("").join(spans)))
    titles = [
        Markup("<th{}>{}</th>").format(kind, _format_column_title(table, index)) for index, kind in enumerate(kinds)
    ]
    heads.append(Markup("<tr>{}</tr>").format(Markup("").join(titles)))
    rows = []
    for row_index, row in enumerate(table.rows):
        cells = []
        for index, (cell, kind) in enumerate(zip(row.cells, kinds, strict=True)):
            name = numbering.cells.get((table.key, row_index, index))
            anchor = Markup(' id="{}"').format(name) if name else Markup("")
            cells.append(Markup("<td{}{}>{}</td>").format(anchor, kind, _mark_html_gaps(format_cell(cell))))
        rows.append(Markup("<tr>{}</tr>").format(Markup("").join(cells)))
    number = numbering.tables[table.key]
    return Markup(
        '<div class="wide"><table id="table_{}" data-table="{}"><caption>{}</caption>'
        '<thead>{}</thead><tbody>{}</tbody></table></div><p class="notes">{}</p>'
    ).format(
        number,
        table.key,
        _format_table_caption(table, number),
        Markup("").join(heads),
        Markup("").join(rows),
        " ".join(table.all_notes),
    )


def _format_column_title(table: Table, index: int) -> str:
    column = table.columns[index]
    return f"{column.title}, {column.unit}" if column.unit else column.title


def _format_table_caption(table: Table, number: int) -> str:
    return f"Table {number}. {table.title}. {table.basis}".strip()


def _format_figure_caption(drawing: Drawing, number: int) -> str:
    return " ".join([f"Figure {number}. {drawing.title}.", drawing.basis, *drawing.notes]).replace("  ", " ")


LATEX_PREAMBLE = r"""\documentclass[11pt]{article}
\usepackage{iftex}
\ifPDFTeX
\usepackage{cmap}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\IfFileExists{lmodern.sty}{\usepackage{lmodern}}{}
\else
\usepackage{fontspec}
\fi
\usepackage[a4paper,margin=25mm]{geometry}
\usepackage{booktabs,longtable,graphicx,array,pdflscape}
\usepackage[colorlinks=true,allcolors=blue]{hyperref}
\setlength{\LTleft}{0pt}
\setlength{\emergencystretch}{3em}
"""


def format_latex_document(manuscript: Manuscript) -> str:
    """Format a manuscript as a LaTeX document, which reads the PNG files in the folder figures."""
    numbering = number_manuscript(manuscript)
    title = _format_latex_spans(manuscript.title, numbering)
    lines = [LATEX_PREAMBLE, rf"\title{{{title}}}", r"\author{}", r"\date{}", r"\begin{document}", r"\maketitle", ""]
    for block in manuscript.blocks:
        lines += [_format_latex_block(block, numbering), ""]
    lines += [r"\clearpage", r"\begin{thebibliography}{99}"]
    lines += [
        rf"\bibitem{{{_make_latex_key(key)}}} {escape_latex(text)}" for key, text in manuscript.references.items()
    ]
    return "\n".join([*lines, r"\end{thebibliography}", r"\end{document}", ""])


def _format_latex_block(block: Block, numbering: Numbering) -> str:
    if isinstance(block, Heading):
        kind = "section" if block.level == 1 else "subsection"
        start = "\\clearpage\n" if block.text in ("Figures", "Tables", "Checklists") else ""
        return rf"{start}\{kind}*{{{escape_latex(block.text)}}}"
    if isinstance(block, Paragraph):
        return _format_latex_spans(block.spans, numbering)
    if isinstance(block, Drawing):
        caption = " ".join([f"{block.title}.", block.basis, *block.notes]).replace("  ", " ")
        lines = [r"\begin{figure}[htbp]", r"\centering"]
        lines += [
            rf"\includegraphics[width=\textwidth,height=0.75\textheight,keepaspectratio]{{figures/{block.key}.png}}"
        ]
        lines += [rf"\caption{{{escape_latex(caption)}}}\label{{fig:{block.key}}}", r"\end{figure}"]
        return "\n".join(lines)
    targets = {(row, column): name for (key, row, column), name in numbering.cells.items() if key == block.key}
    table = format_latex(block, targets=targets)
    if r"\resizebox" not in table:
        return table
    # A table is made smaller, but not larger; across, the width of a line is that of the page.
    width = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}"
    table = table.replace(r"\resizebox{\textwidth}", width)
    if len(block.rows) > MAX_ROWS_ACROSS:
        return table
    return "\n".join([r"\begin{landscape}", table, r"\end{landscape}"])


def _format_latex_spans(spans: Spans, numbering: Numbering) -> str:
    parts = []
    for span in spans:
        text = escape_latex(numbering.format_span(span))
        if isinstance(span, LinkedNumber):
            parts.append(rf"\hyperlink{{{numbering.get_target(span)}}}{{{text}}}")
        elif isinstance(span, TableReference):
            parts.append(rf"\hyperref[tab:{span.key}]{{Table~\ref*{{tab:{span.key}}}}}")
        elif isinstance(span, FigureReference):
            parts.append(rf"\hyperref[fig:{span.key}]{{Figure~\ref*{{fig:{span.key}}}}}")
        elif isinstance(span, Citation):
            parts.append(rf"~\cite{{{','.join(map(_make_latex_key, span.keys))}}}")
        else:
            parts.append(rf"\textbf{{{text}}}" if isinstance(span, Gap) else text)
    return "".join(parts)


def _make_latex_key(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", key)


def render_docx(manuscript: Manuscript, pictures: Mapping[str, bytes]) -> bytes:
    """Render a manuscript as a Word file: text upright, tables and checklists across, numbers linked to bookmarks.

    Args:
        manuscript: The manuscript.
        pictures: PNG of each figure, by key.

    Raises:
        PylorusError: If python-docx is not installed.
    """
    _import_docx()
    writer = _DocxWriter(number_manuscript(manuscript), pictures)
    writer.add_title(manuscript.title)
    for block in manuscript.blocks:
        writer.add_block(block)
    writer.add_references(manuscript.references)
    return writer.save()


class _DocxWriter:
    """Adds the blocks of a manuscript to a Word document."""

    def __init__(self, numbering: Numbering, pictures: Mapping[str, bytes]) -> None:
        from docx import Document
        from docx.shared import Inches, Pt

        self.numbering, self.pictures = numbering, pictures
        self.document = Document()
        self.bookmarks = 0
        self.width = PAGE_WIDTH
        self.document.core_properties.author = ""
        self.document.core_properties.title = "Draft of a manuscript"
        style: Any = self.document.styles["Normal"]
        style.font.name, style.font.size = "Calibri", Pt(11)
        section = self.document.sections[0]
        section.page_width, section.page_height = Inches(8.27), Inches(11.69)
        for side in ("left_margin", "right_margin", "top_margin", "bottom_margin"):
            setattr(section, side, Inches(MARGIN))

    def save(self) -> bytes:
        """Return the bytes of the file."""
        file = io.BytesIO()
        self.document.save(file)
        return file.getvalue()

    def add_title(self, title: Spans) -> None:
        """Add the title."""
        paragraph = self.document.add_heading(level=0)
        self._add_spans(paragraph, title)

    def add_block(self, block: Block) -> None:
        """Add a block."""
        if isinstance(block, Heading):
            if block.text == "Tables":
                self._turn_page()
            elif block.text == "Figures":
                self.document.add_page_break()
            self.document.add_heading(block.text, level=block.level)
        elif isinstance(block, Paragraph):
            self._add_spans(self.document.add_paragraph(), block.spans)
        elif isinstance(block, Drawing):
            self._add_drawing(block)
        else:
            self._add_table(block)

    def add_references(self, references: Mapping[str, str]) -> None:
        """Add the list of references."""
        self.document.add_heading("References", level=1)
        for number, text in enumerate(references.values(), start=1):
            paragraph = self.document.add_paragraph()
            self._add_bookmark(paragraph, f"reference_{number}", f"{number}. ")
            self._add_text(paragraph, text)

    def _turn_page(self) -> None:
        from docx.enum.section import WD_ORIENT, WD_SECTION

        section = self.document.add_section(WD_SECTION.NEW_PAGE)
        section.orientation = WD_ORIENT.LANDSCAPE
        section.page_width, section.page_height = section.page_height, section.page_width
        self.width = LANDSCAPE_WIDTH

    def _add_spans(self, paragraph: Any, spans: Spans) -> None:
        for span in spans:
            text, target = self.numbering.format_span(span), self.numbering.get_target(span)
            if target:
                self._add_link(paragraph, text, target)
            else:
                self._add_text(paragraph, text)

    def _add_text(self, paragraph: Any, text: str, size: float | None = None) -> None:
        """Add text, in which gaps are highlighted."""
        from docx.enum.text import WD_COLOR_INDEX
        from docx.shared import Pt

        position = 0
        for match in [*GAP.finditer(text), None]:
            for part, is_gap in (
                (text[position : match.start() if match else None], False),
                (match and match[0], True),
            ):
                if part:
                    run = paragraph.add_run(part)
                    run.font.size = Pt(size) if size else None
                    run.font.highlight_color = WD_COLOR_INDEX.YELLOW if is_gap else None
            position = match.end() if match else position

    def _add_link(self, paragraph: Any, text: str, target: str) -> None:
        """Add text that links to a bookmark."""
        from docx.oxml import OxmlElement
        from docx.oxml.ns import qn
        from docx.shared import RGBColor

        link = OxmlElement("w:hyperlink")
        link.set(qn("w:anchor"), target)
        link.set(qn("w:history"), "1")
        run = paragraph.add_run(text)
        run.font.color.rgb = RGBColor(0x0B, 0x5C, 0xAD)
        paragraph._p.append(link)
        link.append(run._r)

    def _add_bookmark(self, paragraph: Any, name: str, text: str, size: float | None = None) -> None:
        """Add text with a bookmark to a paragraph."""
        from docx.oxml import OxmlElement
        from docx.oxml.ns import qn

        self.bookmarks += 1
        start, end = OxmlElement("w:bookmarkStart"), OxmlElement("w:bookmarkEnd")
        for element in (start, end):
            element.set(qn("w:id"), str(self.bookmarks))
        start.set(qn("w:name"), name)
        paragraph._p.append(start)
        self._add_text(paragraph, text, size)
        paragraph._p.append(end)

    def _add_drawing(self, drawing: Drawing) -> None:
        from docx.shared import Inches, Pt

        number = self.numbering.figures[drawing.key]
        ratio = float(drawing.figure.get_figheight() / drawing.figure.get_figwidth())
        width = min(self.width, 8.2 / ratio)
        paragraph = self.document.add_paragraph()
        paragraph.paragraph_format.keep_with_next = True
        shape = paragraph.add_run().add_picture(io.BytesIO(self.pictures[drawing.key]), width=Inches(width))
        shape._inline.docPr.set("descr", drawing.alt)
        caption = self.document.add_paragraph()
        self._add_bookmark(caption, f"figure_{number}", f"Figure {number}. ", 9)
        caption.runs[0].bold = True
        rest = _format_figure_caption(drawing, number).removeprefix(f"Figure {number}. ")
        caption.add_run(rest).font.size = Pt(9)

    def _add_table(self, table: Table) -> None:
        from docx.shared import Pt

        number = self.numbering.tables[table.key]
        caption = self.document.add_paragraph()
        caption.paragraph_format.keep_with_next = True
        caption.paragraph_format.space_before = Pt(14)
        self._add_bookmark(caption, f"table_{number}", f"Table {number}. ", 9)
        caption.runs[0].bold = True
        caption.add_run(_format_table_caption(table, number).removeprefix(f"Table {number}. ")).font.size = Pt(9)
        has_spans = any(column.heading for column in table.columns)
        grid: Any = self.document.add_table(rows=1 + has_spans, cols=len(table.columns))
        grid.style = "Table Grid" if "Table Grid" in [style.name for style in self.document.styles] else None
        size = NARROW if len(table.columns) >= MANY_COLUMNS else SMALL
        if has_spans:
            self._fill_spans(grid, table, size)
        for index in range(len(table.columns)):
            self._fill_cell(grid.rows[-1].cells[index], _format_column_title(table, index), size, bold=True)
        for row in grid.rows:
            self._set_row_property(row, "w:tblHeader")  # repeated on each page that the table goes on to
        for row_index, row in enumerate(table.rows):
            added = grid.add_row()
            self._set_row_property(added, "w:cantSplit")
            cells = added.cells
            for index, cell in enumerate(row.cells):
                name = self.numbering.cells.get((table.key, row_index, index), "")
                self._fill_cell(
                    cells[index],
                    _format_stacked(cell),
                    size,
                    bold=row.strong,
                    right=not table.columns[index].text,
                    bookmark=name,
                )
        self._set_widths(grid, table, size)
        notes = self.document.add_paragraph()
        self._add_text(notes, " ".join(table.all_notes), 8.5)

    def _fill_spans(self, grid: Any, table: Table, size: float) -> None:
        first = 0
        for over, count in table.spans:
            cell = grid.rows[0].cells[first]
            if count > 1:
                cell = cell.merge(grid.rows[0].cells[first + count - 1])
            self._fill_cell(cell, over, size, bold=True)
            first += count

    def _fill_cell(
        self, cell: Any, text: str, size: float, *, bold: bool = False, right: bool = False, bookmark: str = ""
    ) -> None:
        from docx.enum.text import WD_ALIGN_PARAGRAPH
        from docx.shared import Pt

        paragraph = cell.paragraphs[0]
        paragraph.paragraph_format.space_after = Pt(0)
        paragraph.alignment = WD_ALIGN_PARAGRAPH.RIGHT if right else None
        if bookmark:
            self._add_bookmark(paragraph, bookmark, text, size)
        else:
            self._add_text(paragraph, text, size)
        for run in paragraph.runs:
            run.bold = bold or None

    def _set_row_property(self, row: Any, name: str) -> None:
        """Set a property of a row that is true or absent."""
        from docx.oxml import OxmlElement
        from docx.oxml.ns import qn

        element = OxmlElement(name)
        element.set(qn("w:val"), "true")
        row._tr.get_or_add_trPr().append(element)

    def _set_widths(self, grid: Any, table: Table, size: float) -> None:
        """Give each column its longest word, and share the rest of the page by the length of the texts."""
        from docx.shared import Inches

        words: list[float] = []
        lengths: list[int] = []
        spanned = {over: count for over, count in table.spans if over}
        for index, column in enumerate(table.columns):
            texts = [_format_column_title(table, index), *(_format_stacked(row.cells[index]) for row in table.rows)]
            over = max([len(word) for word in column.heading.split()], default=0) / spanned.get(column.heading, 1)
            words.append(max(over, *(len(word) for text in texts for word in (text.split() or [""]))))
            lines = [line for text in texts[1:] for line in text.split("\n")]
            lengths.append(min(MAX_LINE, max([len(line) for line in lines], default=1)))
        letter, padding = 0.7 * size / 72, 0.2
        least = [letter * word + padding for word in words]
        wanted = [max(low, letter * length + padding) for low, length in zip(least, lengths, strict=True)]
        spare, missing = self.width - sum(least), sum(wanted) - sum(least)
        share = max(0.0, min(1.0, spare / missing)) if missing > 0 else 0.0
        scale = min(1.0, self.width / sum(least))
        grid.autofit = False
        for index, (low, want) in enumerate(zip(least, wanted, strict=True)):
            width = Inches(scale * (low + share * (want - low)))
            grid.columns[index].width = width
            for cell in grid.columns[index].cells:
                cell.width = width


def _format_stacked(cell: Cell) -> str:
    """Format a cell with its interval below the value."""
    if isinstance(cell, Number) and cell.interval_text:
        return f"{cell.value_text}\n({cell.interval_text})"
    return format_cell(cell)
