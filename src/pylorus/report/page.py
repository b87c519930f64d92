"""Write a report: its sections of results, tables, figures and page, each file either complete or absent.

The page is a single self-contained file that opens offline and needs no script.
"""

import base64
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from pylorus import __version__
from pylorus.core.distributed import compute_in_processes
from pylorus.core.io import is_incomplete, read_json, write_atomically, write_json, write_text
from pylorus.evaluation.wording import format_paired_sentence
from pylorus.report import captions
from pylorus.report.captions import format_validation_images
from pylorus.report.comparison import AUROC, MACRO_F1, Comparison, IndexComparison
from pylorus.report.curve_figures import (
    build_training_section,
    plot_net_benefit,
    plot_risk_coverage,
)
from pylorus.report.evidence import Evidence, collect_evidence
from pylorus.report.figure_style import Drawing, render_png, render_svg
from pylorus.report.headline import format_answered_images
from pylorus.report.manuscript import build_manuscript
from pylorus.report.manuscript_blocks import Manuscript
from pylorus.report.manuscript_files import MANUSCRIPT_FILES, check_docx, write_manuscript
from pylorus.report.margins import build_margin_section
from pylorus.report.mistakes import FileOnly, Item, Section, Sentences, iter_tables
from pylorus.report.network_figure import build_network_section
from pylorus.report.record_sections import (
    build_audit_section,
    build_checklist_section,
    build_configuration_section,
    build_data_section,
    build_method_section,
    build_mistake_section,
    build_picture_section,
    build_stress_section,
)
from pylorus.report.replicate_tables import (
    build_fold_training_table,
    build_pooled_fold_table,
    build_replicate_table,
    build_single_fold_table,
    collect_fold_pools,
    has_replicates,
)
from pylorus.report.result_figures import (
    plot_confusion_matrices,
    plot_published_confusion_matrices,
    plot_reliability_diagrams,
    plot_roc_curves,
)
from pylorus.report.result_tables import (
    build_calibration_table,
    build_class_metric_table,
    build_comparison_table,
    build_overall_metric_table,
    build_threshold_table,
    build_unadjusted_table,
)
from pylorus.report.results import IMAGES, LEVEL, PATIENTS, ReportOptions, Result
from pylorus.report.study_tables import (
    STUDY,
    build_accuracy_table,
    build_confusion_table,
    build_published_comparison_table,
    build_published_confusion_table,
    build_published_metric_table,
    build_study_metric_table,
    compare_with_published,
)
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
    sections = [section for section in sections if section.items]
    tables = [item.key for section in sections for item in section.items if isinstance(item, Table)]
    figures = [item.key for section in sections for item in section.items if isinstance(item, Drawing)]
    return load_template("page.html.j2").render(
        summary=summary,
        short=[section for section in sections if not section.is_appendix],
        appendix=[section for section in sections if section.is_appendix],
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
    options = options or ReportOptions()
    if options.docx:
        check_docx()
    folders = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    scope = resolve_scope(folders, None if output is None else Path(output))
    evidence = collect_evidence(scope.folders, options)
    summary, sections = build_summary(evidence, kind=scope.kind), build_sections(evidence)
    draft = build_manuscript(evidence, sections) if options.docx or options.latex else None
    return write_page(scope.output, summary, sections, draft=draft, options=options, parallel=parallel)


def write_page(
    output: Path,
    summary: Summary,
    sections: Sequence[Section],
    *,
    draft: Manuscript | None = None,
    options: ReportOptions | None = None,
    parallel: bool = False,
) -> Path:
    """Write a report's tables, figures and page, and delete those of an earlier report in the same folder.

    Args:
        output: Folder to write to.
        summary: Head of the page.
        sections: Sections in the order of the page.
        draft: Draft of a manuscript to write beside the page, in the formats that the options ask for.
        options: Options of the report; only those formats are read.
        parallel: Whether to render the figures in forked processes, on all cores.

    Returns:
        Path of the HTML page.
    """
    tables = {each.key: each for each in (*iter_tables(sections), *(draft.tables if draft else ()))}
    written = [output / name for name in _write_tables(output, tables.values())]
    by_key = {each.key: each for each in (*_iter_drawings(sections), *(draft.drawings if draft else ()))}
    drawings = list(by_key.values())

    def render_drawing(index: int) -> tuple[bytes, bytes]:
        return render_svg(drawings[index]), render_png(drawings[index])

    compute = compute_in_processes if parallel else map
    rendered = list(compute(render_drawing, range(len(drawings))))
    pictures: dict[str, bytes] = {}
    for drawing, (svg, png) in zip(drawings, rendered, strict=True):
        pictures[drawing.key] = svg
        for kind, content in (("svg", svg), ("png", png)):
            written.append(output / "figures" / f"{drawing.key}.{kind}")
            with write_atomically(written[-1]) as temporary:
                temporary.write_bytes(content)
    if draft is not None and options is not None:
        images = {drawing.key: png for drawing, (_, png) in zip(drawings, rendered, strict=True)}
        written += write_manuscript(draft, output, images, docx=options.docx, latex=options.latex)
    page = output / PAGE
    write_text(page, render_page(summary, sections, pictures))
    _delete_stale_files(output, [*written, page])
    return page


def build_sections(evidence: Evidence) -> tuple[Section, ...]:
    """Build the sections in the order of the page."""
    return (
        build_study_section(evidence),
        build_comparison_section(evidence),
        build_margin_section(evidence),
        build_published_section(evidence),
        build_run_section(evidence),
        build_index_section(evidence),
        build_subgroup_section(evidence),
        build_decision_section(evidence),
        build_stress_section(evidence),
        build_training_section(evidence),
        build_test_figure_section(evidence),
        build_mistake_section(evidence),
        build_picture_section(evidence),
        build_network_section(evidence),
        build_audit_section(evidence),
        build_data_section(evidence),
        build_configuration_section(evidence),
        build_checklist_section(evidence),
        build_method_section(evidence),
    )


def _write_tables(output: Path, tables: Iterable[Table]) -> Iterator[str]:
    for table in tables:
        for suffix, text in (("csv", format_csv(table)), ("md", format_markdown(table)), ("tex", format_latex(table))):
            name = f"tables/{table.key}.{suffix}"
            write_text(output / name, text)
            yield name


def _iter_drawings(sections: Sequence[Section]) -> Iterator[Drawing]:
    for section in sections:
        for item in section.items:
            if isinstance(item, Drawing):
                yield item


INCOMPLETE_SECONDS = 60.0
"""A file that a report is writing is younger than that."""


def _delete_stale_files(output: Path, written: Sequence[Path]) -> None:
    """Delete files of an earlier report that this report did not write, so that they are not mistaken for its own."""
    for path in filter(is_incomplete, [*output.glob(".*"), *output.glob("*/.*")]):
        with suppress(OSError):  # of a report that was killed; another one may be writing its own
            if time.time() - path.stat().st_mtime > INCOMPLETE_SECONDS:
                path.unlink()
    names = sorted(path.relative_to(output).as_posix() for path in written)
    previous = read_json(output / FILE_LIST) or {}
    for name in set(map(str, previous.get("files", []))) - set(names):
        stale = output / name
        # Only inside the folders of a report: an edited list must not delete anything elsewhere.
        folders = (output / "tables", output / "figures")
        if (stale.parent in folders or name in MANUSCRIPT_FILES) and stale.name == Path(name).name:
            stale.unlink(missing_ok=True)
    write_json(output / FILE_LIST, {"pylorus": __version__, "files": names})


MAX_SHORT_RUNS = 3
"""Maximum number of runs whose tables are in the short report; those of more runs are in the appendix."""

MAX_PAIRS = 24
"""Maximum number of pairs shown on the page; further pairs are only in the CSV file."""


def build_study_section(evidence: Evidence) -> Section:
    """Build the main results: the study's winner, pooled replicates and folds, accuracy, tables 1 to 4 of the study."""
    items: list[Item] = []
    rules = tuple(winner.rule for winner in evidence.winners)
    items += [Sentences(rules, is_list=len(rules) > 1)] if rules else []
    items += _build_pooled_tables(evidence)
    items += [build_accuracy_table(evidence.results)] if evidence.results else []
    items += _build_run_tables(evidence) if len(evidence.runs) <= MAX_SHORT_RUNS else []
    return Section("results", "Results in the format of the study", tuple(items), is_appendix=False)


def build_run_section(evidence: Evidence) -> Section:
    """Build the section of the study's tables of each run, for a report of too many runs to show them first."""
    items = _build_run_tables(evidence) if len(evidence.runs) > MAX_SHORT_RUNS else []
    return Section("runs-in-detail", "Precision, sensitivity, F1 and confusion matrix of each run", tuple(items))


def _build_run_tables(evidence: Evidence) -> list[Item]:
    items: list[Item] = [
        build_study_metric_table(results) for run in evidence.runs if (results := evidence.get_run_results(run))
    ]
    for number, group in enumerate(_group_by_classes(evidence.results), start=1):
        items.append(build_confusion_table(group, number=number))
    return items


def _build_pooled_tables(evidence: Evidence) -> list[Item]:
    """Build the tables that pool the replicates or folds of each configuration, shown before those of single runs."""
    candidates = [candidate for each in evidence.configurations for candidate in each.candidates]
    replicated = [candidate for candidate in candidates if has_replicates(candidate)]
    items: list[Item] = [build_replicate_table(replicated)] if replicated else []
    folds = collect_fold_pools(evidence.configurations)
    for number, names in enumerate(dict.fromkeys(each.class_names for each in folds), start=1):
        same_classes = [each for each in folds if each.class_names == names]
        tables = [build_pooled_fold_table(same_classes, level=level, number=number) for level in (IMAGES, PATIENTS)]
        items += [table for table in tables if table is not None]
        items += [
            build_fold_training_table(same_classes, number=number),
            build_single_fold_table(same_classes, number=number),
        ]
    return items


def build_published_section(evidence: Evidence) -> Section:
    """Build the section of the published results, if requested, and how ours differ from them."""
    if not evidence.options.published:
        return Section("published", "", ())
    models = dict.fromkeys(result.model for result in STUDY.results)
    items: list[Item] = [
        Sentences((f"{STUDY.title}. {STUDY.source}, DOI {STUDY.doi}.",)),
        *(build_published_metric_table(model) for model in models),
        build_published_confusion_table(),
        plot_published_confusion_matrices(),
        Sentences(
            ("Its training curves were published as figures only, not as numbers, and are not reproduced here.",)
        ),
    ]
    compared = compare_with_published(evidence.results)
    if compared:
        items += [
            build_published_comparison_table(compared),
            Sentences(tuple(each.sentence for each in compared), True),
        ]
    elif evidence.results:
        items.append(
            Sentences(("The classes of these runs differ from those of the study, so the results cannot be compared.",))
        )
    return Section("published", "Comparison with the published study", tuple(items), is_appendix=False)


def build_index_section(evidence: Evidence) -> Section:
    """Build the section of all indices with their intervals, at image level and patient level."""
    results = evidence.results
    patients = [result for result in results if result.patients is not None]
    items: list[Item] = [build_overall_metric_table(results)] if results else []
    items += [build_overall_metric_table(patients, level=PATIENTS)] if patients else []
    for run in evidence.runs:
        for level in (IMAGES, PATIENTS):
            shown = [
                result for result in evidence.get_run_results(run) if level == IMAGES or result.patients is not None
            ]
            items += [build_class_metric_table(shown, level=level)] if shown else []
    for number, group in enumerate(_group_by_classes(patients), start=1):
        items.append(build_confusion_table(group, level=PATIENTS, number=number))
    return Section("indices", "All indices with 95 % confidence intervals", tuple(items))


def build_comparison_section(evidence: Evidence) -> Section:
    """Build the section of comparisons between configurations and between stages, then all other pairs, unadjusted."""
    questions, others = evidence.comparisons, evidence.other_comparisons
    if not questions:
        return Section("comparisons", "", ())
    pairs = questions if len(questions) <= MAX_PAIRS else _filter_winner_pairs(evidence)
    indices = [("macro F1", MACRO_F1)]
    indices += [(f"AUROC of {evidence.class_name}", AUROC)] if any(each.auroc for each in questions) else []
    items: list[Item] = [
        Sentences((_format_families(questions, others=bool(others)),)),
        Sentences(tuple(each.sentence for each in pairs), is_list=True),
        Sentences(tuple(_format_differences(pairs, title, key) for title, key in indices)),
    ]
    if pairs is not questions:
        items.append(
            Sentences(
                (
                    f"Of {len(questions)} pairs, only those with the winner are shown; tables/comparisons.csv "
                    "contains all.",
                )
            )
        )
    table = build_comparison_table(questions, class_name=evidence.class_name)
    items.append(table if pairs is questions else FileOnly(table))
    if others:
        appendix = build_unadjusted_table(others, class_name=evidence.class_name)
        items.append(appendix if len(others) <= MAX_PAIRS else FileOnly(appendix))
    return Section("comparisons", "Comparisons between models", tuple(items), is_appendix=False)


def _filter_winner_pairs(evidence: Evidence) -> tuple[Comparison, ...]:
    """Return the pairs that include a winner, for reports with too many pairs to show."""
    return tuple(dict.fromkeys(each for winner in evidence.winners for each in winner.comparisons))


def _format_families(comparisons: Sequence[Comparison], *, others: bool) -> str:
    """State the research questions and the number of tests for which each is corrected."""
    families = dict.fromkeys((each.question, each.family) for each in comparisons)
    questions = [f"{question} ({_format_test_count(size)})" for question, size in families]
    sentence = (
        f"Research questions, each a separate family of tests for Holm's correction: {'; '.join(questions)}."
        if len(questions) > 1
        else f"Research question, whose tests form the family for Holm's correction: {questions[0]}."
    )
    return sentence + (" All other pairs are listed in the appendix below, unadjusted." if others else "")


def _format_test_count(size: int) -> str:
    return "1 test, no correction needed" if size == 1 else f"{size} tests"


def _format_differences(comparisons: Sequence[Comparison], index: str, key: str) -> str:
    """State which pairs differ significantly in macro F1 or in AUROC, by the corrected p-value."""
    sentences, remaining = [], 0
    for each in comparisons:
        compared: IndexComparison | None = each.macro_f1 if key == MACRO_F1 else each.auroc
        if compared is None:  # the candidates lack this class
            continue
        if not each.corrected[key] < LEVEL:
            remaining += 1
            continue
        corrected = replace(compared.widest, p_value=each.corrected[key])
        names = (each.first.label, each.second.label)
        sentences.append(
            format_paired_sentence(
                *names, corrected, index=index, images=each.pool.images, level=LEVEL, in_points=key == MACRO_F1
            )
        )
    if not sentences:
        pairs = "This pair does not differ" if remaining == 1 else "None of these pairs differs"
        return f"{pairs} significantly in {index}."
    return " ".join(sentences) + (f" No other pair differs significantly in {index}." if remaining else "")


def build_decision_section(evidence: Evidence) -> Section:
    """Build the section of calibration and thresholds."""
    calibrated = [result for result in evidence.results if result.calibration is not None]
    items: list[Item] = [build_calibration_table(calibrated, class_name=evidence.class_name)] if calibrated else []
    for level in (IMAGES, PATIENTS):
        with_threshold = [
            result for result in evidence.results if any(point.level == level for point in result.operating)
        ]
        items += [build_threshold_table(with_threshold, level=level)] if with_threshold else []
    items += [Sentences((sentence,)) for sentence in _explain_missing_thresholds(calibrated, evidence.class_name)]
    if len(calibrated) < len(evidence.results):
        missing = ", ".join(result.label for result in evidence.results if result.calibration is None)
        items.append(Sentences((f"Not calibrated, because there are no validation predictions: {missing}.",)))
    answered = [sentence for result in evidence.results if (sentence := format_answered_images(result))]
    items += [Sentences(tuple(answered))] if answered else []
    return Section("decisions", "Calibration and threshold", tuple(items))


def _explain_missing_thresholds(results: Sequence[Result], class_name: str | None) -> list[str]:
    """Explain why some results have no threshold."""
    without = [result for result in results if not result.operating]
    lacking_class = [result for result in without if class_name not in result.images.predictions.class_names]
    lacking_images = [result for result in without if result not in lacking_class]
    sentences = []
    if lacking_images:
        images = format_validation_images([result.run for result in lacking_images])
        labels = ", ".join(result.label for result in lacking_images)
        sentences.append(f"No threshold can be fixed for {labels}: none of {images} is of class {class_name}.")
    if lacking_class:
        labels = ", ".join(result.label for result in lacking_class)
        sentences.append(f"There is no threshold for {labels}, whose classes do not include {class_name}.")
    return sentences


def _group_by_classes(results: Sequence[Result]) -> list[list[Result]]:
    """Group results that have the same classes in the same order and can share a table."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(result.images.predictions.class_names, []).append(result)
    return list(groups.values())


def build_test_figure_section(evidence: Evidence) -> Section:
    """Build the section of figures on the test images."""
    results, candidates = evidence.results, evidence.candidates
    if not results:
        return Section("test-figures", "", ())
    items: list[Item] = [*plot_confusion_matrices(results), plot_roc_curves(candidates)]
    calibrated = [result for result in results if result.calibration is not None]
    items += plot_reliability_diagrams(calibrated) if calibrated else []
    items.append(plot_risk_coverage(candidates))
    deciding = [
        candidate
        for candidate in candidates
        if all(
            result.calibration is not None and evidence.class_name in result.images.predictions.class_names
            for result in candidate.results
        )
    ]
    items += [plot_net_benefit(deciding, str(evidence.class_name))] if deciding else []
    return Section("test-figures", "Figures on the test images", tuple(items))
