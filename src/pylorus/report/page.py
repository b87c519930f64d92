"""The HTML page of a report: a single self-contained file that opens offline and needs no script."""

import base64
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources

import jinja2
from markupsafe import Markup, escape

from pylorus import __version__
from pylorus.report import marks
from pylorus.report.drawing import Drawing
from pylorus.report.section import Section
from pylorus.report.summary import Summary
from pylorus.report.table import Cell, Number, Table, format_cell

SCALE = 1.18
"""Size of a figure on the page relative to its size in print."""

WARNINGS = re.compile("|".join(re.escape(mark.word) for mark in (marks.OPTIMISTIC, marks.DRAWN, marks.LEAKING)))

BLANKS = re.compile(r"\[author: [^\]]*\]")
"""Pattern of blanks that the author fills in."""


def render_page(summary: Summary, sections: Sequence[Section], pictures: dict[str, bytes]) -> str:
    """Render the page as HTML.

    Args:
        summary: Head of the page.
        sections: Sections in the order of the page; those without items are omitted.
        pictures: SVG of each figure by its key.
    """
    tables = [item.key for section in sections for item in section.items if isinstance(item, Table)]
    figures = [item.key for section in sections for item in section.items if isinstance(item, Drawing)]
    return load_template("page.html.j2").render(
        summary=summary,
        sections=sections,
        table_numbers={key: number for number, key in enumerate(tables, start=1)},
        figure_numbers={key: number for number, key in enumerate(figures, start=1)},
        pictures={key: base64.b64encode(svg).decode() for key, svg in pictures.items()},
        style=Markup(read_package_file("page.css")),
        version=__version__,
    )


@cache
def load_template(name: str) -> jinja2.Template:
    """Load a page template from this package; every value inserted into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read_package_file),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "marked": _render_caveats,
        "cell": _render_cell,
        "kind": _get_type_name,
        "width": _compute_figure_width,
    }
    return environment.get_template(name)


def read_package_file(name: str) -> str:
    """Read a text file from this package."""
    return resources.files("pylorus.report").joinpath(name).read_text(encoding="utf-8")


def _render_caveats(text: str) -> Markup:
    """Highlight caveats in a text."""
    return Markup(WARNINGS.sub(lambda match: f'<strong class="mark">{match[0]}</strong>', str(escape(text))))


def _render_cell(cell: Cell) -> Markup:
    """Render a cell: the value with its interval below."""
    if isinstance(cell, Number) and cell.interval_text:
        interval = f"({cell.interval_text})" if cell.interval_text == "–" else cell.interval_text
        return Markup('{}<span class="ci">{}</span>').format(cell.value_text, interval)
    return Markup(BLANKS.sub(r'<span class="blank">\g<0></span>', str(escape(format_cell(cell)))))


def _get_type_name(item: object) -> str:
    return type(item).__name__


def _compute_figure_width(drawing: Drawing) -> int:
    """Return the natural width of a figure on the page, in pixels."""
    return round(float(drawing.figure.get_figwidth()) * 96 * SCALE)
