"""The page: one HTML file with everything in it, that opens offline and needs no script."""

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
from pylorus.report.table import Cell, Number, Table, shown

SCALE = 1.18
"""How much larger than printed a figure is shown."""

WARNINGS = re.compile("|".join(re.escape(mark.word) for mark in (marks.OPTIMISTIC, marks.DRAWN, marks.LEAKING)))

BLANKS = re.compile(r"\[author: [^\]]*\]")
"""What is left to the author."""


def render(summary: Summary, sections: Sequence[Section], pictures: dict[str, bytes]) -> str:
    """The page as HTML.

    Args:
        summary: Its head.
        sections: In their order.
        pictures: Each figure as SVG, by its key.
    """
    tables = [item.key for section in sections for item in section.items if isinstance(item, Table)]
    figures = [item.key for section in sections for item in section.items if isinstance(item, Drawing)]
    return template("page.html.j2").render(
        summary=summary,
        sections=sections,
        table_numbers={key: number for number, key in enumerate(tables, start=1)},
        figure_numbers={key: number for number, key in enumerate(figures, start=1)},
        pictures={key: base64.b64encode(svg).decode() for key, svg in pictures.items()},
        style=Markup(file("page.css")),
        version=__version__,
    )


@cache
def template(name: str) -> jinja2.Template:
    """A page's template, beside this file; what is filled in is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(file),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"marked": _marked, "cell": _cell, "kind": _kind, "width": _width}
    return environment.get_template(name)


def file(name: str) -> str:
    """The text of a file beside this one."""
    return resources.files("pylorus.report").joinpath(name).read_text(encoding="utf-8")


def _marked(text: str) -> Markup:
    """Text in which the marks stand out."""
    return Markup(WARNINGS.sub(lambda found: f'<strong class="mark">{found[0]}</strong>', str(escape(text))))


def _cell(cell: Cell) -> Markup:
    """A cell: the value, and its interval below."""
    if isinstance(cell, Number) and cell.interval_text:
        interval = f"({cell.interval_text})" if cell.interval_text == "–" else cell.interval_text
        return Markup('{}<span class="ci">{}</span>').format(cell.value_text, interval)
    return Markup(BLANKS.sub(r'<span class="blank">\g<0></span>', str(escape(shown(cell)))))


def _kind(item: object) -> str:
    return type(item).__name__


def _width(drawing: Drawing) -> int:
    """Pixels that a figure takes where there is room."""
    return round(float(drawing.figure.get_figwidth()) * 96 * SCALE)
