"""Write a report: its tables, figures and page, each file either complete or absent.

The page is a single self-contained file that opens offline and needs no script.
"""

import base64
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from pylorus import __version__
from pylorus.core.distributed import compute_in_processes
from pylorus.core.io import read_json, write_atomically, write_json, write_text
from pylorus.report import captions
from pylorus.report.evidence import Evidence, collect_evidence
from pylorus.report.figure_style import Drawing, render_png, render_svg
from pylorus.report.mistakes import FileOnly, Section
from pylorus.report.record_sections import (
    build_audit_section,
    build_checklist_section,
    build_configuration_section,
    build_data_section,
    build_method_section,
    build_mistake_section,
)
from pylorus.report.result_sections import (
    build_comparison_section,
    build_decision_section,
    build_index_section,
    build_network_section,
    build_published_section,
    build_study_section,
    build_test_figure_section,
    build_training_section,
)
from pylorus.report.results import ReportOptions
from pylorus.report.subgroup_tables import build_subgroup_section
from pylorus.report.summary import Summary, build_summary
from pylorus.report.table import Cell, Number, Table, format_cell, format_csv, format_latex, format_markdown
from pylorus.runs.reading import resolve_scope

FIGURE_SCALE = 1.18
"""Size of a figure on the page relative to its size in print."""

WARNINGS = re.compile(
    "|".join(re.escape(mark.word) for mark in (captions.OPTIMISTIC, captions.SYNTHETIC, captions.LEAKING))
)

BLANK = re.compile(r"\[author: [^\]]*\]")
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
    return Markup(BLANK.sub(r'<span class="blank">\g<0></span>', str(escape(format_cell(cell)))))


def _get_type_name(item: object) -> str:
    return type(item).__name__


def _compute_figure_width(drawing: Drawing) -> int:
    """Return the natural width of a figure on the page, in pixels."""
    return round(float(drawing.figure.get_figwidth()) * 96 * FIGURE_SCALE)


PAGE = "report.html"
FILE_LIST = "files.json"
"""File that lists the files of a report, so that the next report can delete those that it does not write again."""


def write_report(
    paths: str | Path | Sequence[str | Path],
    output: str | Path | None = None,
    *,
    options: ReportOptions | None = None,
    parallel: bool = False,
) -> Path:
    """Write the report of a run, a sweep or several runs from their saved files.

    Args:
        paths: Folder of a run or of a sweep, or several.
        output: Output folder; None: `report` inside a single run or sweep, or in the current folder for several paths.
        options: Options of the report; None: the defaults.
        parallel: Whether to render the figures in forked processes, on all cores.

    Returns:
        Path of the HTML page.

    Raises:
        PylorusError: If a path is not a run or sweep, or a file is damaged; the message names it.
    """
    folders = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    scope = resolve_scope(folders, None if output is None else Path(output))
    evidence = collect_evidence(scope.folders, options or ReportOptions())
    sections = build_sections(evidence)
    written = [scope.output / name for name in _write_tables(scope.output, sections)]
    drawings = list(_iter_drawings(sections))

    def render_drawing(index: int) -> tuple[bytes, bytes]:
        return render_svg(drawings[index]), render_png(drawings[index])

    compute = compute_in_processes if parallel else map
    rendered = compute(render_drawing, range(len(drawings)))
    pictures: dict[str, bytes] = {}
    for drawing, (svg, png) in zip(drawings, rendered, strict=True):
        pictures[drawing.key] = svg
        for kind, content in (("svg", svg), ("png", png)):
            written.append(scope.output / "figures" / f"{drawing.key}.{kind}")
            with write_atomically(written[-1]) as temporary:
                temporary.write_bytes(content)
    page = scope.output / PAGE
    write_text(page, render_page(build_summary(evidence, kind=scope.kind), sections, pictures))
    _delete_stale_files(scope.output, [*written, page])
    return page


def build_sections(evidence: Evidence) -> tuple[Section, ...]:
    """Build the sections in the order of the page."""
    return (
        build_study_section(evidence),
        build_published_section(evidence),
        build_comparison_section(evidence),
        build_index_section(evidence),
        build_subgroup_section(evidence),
        build_decision_section(evidence),
        build_training_section(evidence),
        build_test_figure_section(evidence),
        build_mistake_section(evidence),
        build_network_section(evidence),
        build_audit_section(evidence),
        build_data_section(evidence),
        build_configuration_section(evidence),
        build_checklist_section(evidence),
        build_method_section(evidence),
    )


def _write_tables(output: Path, sections: Sequence[Section]) -> Iterator[str]:
    for table in _iter_tables(sections):
        for suffix, text in (("csv", format_csv(table)), ("md", format_markdown(table)), ("tex", format_latex(table))):
            name = f"tables/{table.key}.{suffix}"
            write_text(output / name, text)
            yield name


def _iter_tables(sections: Sequence[Section]) -> Iterator[Table]:
    for section in sections:
        for item in section.items:
            if isinstance(item, Table | FileOnly):
                yield item if isinstance(item, Table) else item.table


def _iter_drawings(sections: Sequence[Section]) -> Iterator[Drawing]:
    for section in sections:
        for item in section.items:
            if isinstance(item, Drawing):
                yield item


def _delete_stale_files(output: Path, written: Sequence[Path]) -> None:
    """Delete files of an earlier report that this report did not write, so that they are not mistaken for its own."""
    names = sorted(path.relative_to(output).as_posix() for path in written)
    previous = read_json(output / FILE_LIST) or {}
    for name in set(map(str, previous.get("files", []))) - set(names):
        stale = output / name
        # Only inside the folders of a report: an edited list must not delete anything elsewhere.
        if stale.parent in (output / "tables", output / "figures") and stale.name == Path(name).name:
            stale.unlink(missing_ok=True)
    write_json(output / FILE_LIST, {"pylorus": __version__, "files": names})
