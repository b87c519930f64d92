"""Write a report: tables, figures and the page, each file either complete or absent."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pylorus import __version__
from pylorus.files import whole, write_json, write_text
from pylorus.report.audit_section import audit_section
from pylorus.report.drawing import Drawing, as_png, as_svg
from pylorus.report.evidence import Evidence, gather
from pylorus.report.figure_sections import network_section, tested_section, training_section
from pylorus.report.options import ReportOptions
from pylorus.report.page import render
from pylorus.report.record_sections import (
    checklist_section,
    configuration_section,
    data_section,
    method_section,
    mistake_section,
)
from pylorus.report.result_sections import (
    comparison_section,
    decision_section,
    index_section,
    published_section,
    study_section,
)
from pylorus.report.saved_json import read_json
from pylorus.report.scope import scope_of
from pylorus.report.section import FileOnly, Section
from pylorus.report.subgroup_tables import subgroup_section
from pylorus.report.summary import summarize
from pylorus.report.table import Table
from pylorus.report.table_text import as_csv, as_latex, as_markdown

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
    scope = scope_of(paths, output)
    evidence = gather(scope.folders, options or ReportOptions())
    sections = sections_of(evidence)
    written = [scope.output / name for name in _write_tables(scope.output, sections)]
    pictures: dict[str, bytes] = {}
    for drawing in _drawings(sections):
        pictures[drawing.key] = as_svg(drawing)
        for kind, content in (("svg", pictures[drawing.key]), ("png", as_png(drawing))):
            written.append(scope.output / "figures" / f"{drawing.key}.{kind}")
            with whole(written[-1]) as temporary:
                temporary.write_bytes(content)
    page = scope.output / PAGE
    write_text(page, render(summarize(evidence, kind=scope.kind), sections, pictures))
    _clear(scope.output, [*written, page])
    return page


def sections_of(evidence: Evidence) -> tuple[Section, ...]:
    """Build the sections in the order of the page."""
    return (
        study_section(evidence),
        published_section(evidence),
        comparison_section(evidence),
        index_section(evidence),
        subgroup_section(evidence),
        decision_section(evidence),
        training_section(evidence),
        tested_section(evidence),
        mistake_section(evidence),
        network_section(evidence),
        audit_section(evidence),
        data_section(evidence),
        configuration_section(evidence),
        checklist_section(evidence),
        method_section(evidence),
    )


def _write_tables(output: Path, sections: Sequence[Section]) -> Iterator[str]:
    for table in _tables(sections):
        for suffix, text in (("csv", as_csv(table)), ("md", as_markdown(table)), ("tex", as_latex(table))):
            name = f"tables/{table.key}.{suffix}"
            write_text(output / name, text)
            yield name


def _tables(sections: Sequence[Section]) -> Iterator[Table]:
    for section in sections:
        for item in section.items:
            if isinstance(item, Table | FileOnly):
                yield item if isinstance(item, Table) else item.table


def _drawings(sections: Sequence[Section]) -> Iterator[Drawing]:
    for section in sections:
        for item in section.items:
            if isinstance(item, Drawing):
                yield item


def _clear(output: Path, written: Sequence[Path]) -> None:
    """Delete files of an earlier report that this report did not write, so that they are not taken for its own."""
    names = sorted(path.relative_to(output).as_posix() for path in written)
    previous = read_json(output / WRITTEN) or {}
    for name in set(map(str, previous.get("files", []))) - set(names):
        stale = output / name
        # Only inside the folders of a report: an edited list must not delete anything elsewhere.
        if stale.parent in (output / "tables", output / "figures") and stale.name == Path(name).name:
            stale.unlink(missing_ok=True)
    write_json(output / WRITTEN, {"pylorus": __version__, "files": names})
