"""Write a report: tables, figures and the page, each file either complete or absent."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pylorus import __version__
from pylorus.files import write_atomically, write_json, write_text
from pylorus.report.audit_section import build_audit_section
from pylorus.report.drawing import Drawing, render_png, render_svg
from pylorus.report.evidence import Evidence, collect_evidence
from pylorus.report.figure_sections import build_network_section, build_test_figure_section, build_training_section
from pylorus.report.options import ReportOptions
from pylorus.report.page import render_page
from pylorus.report.record_sections import (
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
    build_published_section,
    build_study_section,
)
from pylorus.report.saved_json import read_json
from pylorus.report.scope import resolve_scope
from pylorus.report.section import FileOnly, Section
from pylorus.report.subgroup_tables import build_subgroup_section
from pylorus.report.summary import build_summary
from pylorus.report.table import Table
from pylorus.report.table_text import format_csv, format_latex, format_markdown

PAGE = "report.html"
WRITTEN = "files.json"
"""File that lists the files of a report, so that the next report can delete those that it does not write again."""


def write_report(paths: Sequence[Path], output: Path | None = None, *, options: ReportOptions | None = None) -> Path:
    """Write the report of a run, a sweep or several runs from their saved files.

    Args:
        paths: Folders of runs or of sweeps.
        output: Output folder; None: `report` inside a single run or sweep, or in the current folder for several paths.
        options: Options of the report; None: the defaults.

    Returns:
        Path of the HTML page.

    Raises:
        PylorusError: If a path is not a run or sweep, or a file is damaged; the message names it.
    """
    scope = resolve_scope(paths, output)
    evidence = collect_evidence(scope.folders, options or ReportOptions())
    sections = build_sections(evidence)
    written = [scope.output / name for name in _write_tables(scope.output, sections)]
    pictures: dict[str, bytes] = {}
    for drawing in _iter_drawings(sections):
        pictures[drawing.key] = render_svg(drawing)
        for kind, content in (("svg", pictures[drawing.key]), ("png", render_png(drawing))):
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
    """Delete files of an earlier report that this report did not write, so that they are not taken for its own."""
    names = sorted(path.relative_to(output).as_posix() for path in written)
    previous = read_json(output / WRITTEN) or {}
    for name in set(map(str, previous.get("files", []))) - set(names):
        stale = output / name
        # Only inside the folders of a report: an edited list must not delete anything elsewhere.
        if stale.parent in (output / "tables", output / "figures") and stale.name == Path(name).name:
            stale.unlink(missing_ok=True)
    write_json(output / WRITTEN, {"pylorus": __version__, "files": names})
