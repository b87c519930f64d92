"""Draft of a manuscript as blocks: text whose numbers link to the cells of tables, tables, figures and references.

Word, LaTeX and HTML are written from these blocks (`pylorus.report.manuscript_files`). A sentence is only written if
the runs support it; every number among the results is taken from a cell of a table and says which. What only the author
knows is a gap, marked FOR THE AUTHOR.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pylorus.core.formatting import join_names
from pylorus.report import checklist_answers, checklists
from pylorus.report.candidate import FOLDS, Candidate
from pylorus.report.captions import collect_caveats
from pylorus.report.checklists import GUIDELINES, build_guideline_table
from pylorus.report.evidence import Evidence, Winner
from pylorus.report.figure_style import Drawing
from pylorus.report.manuscript_blocks import (
    AUTHOR,
    Block,
    CellFinder,
    Citation,
    FigureReference,
    Gap,
    Heading,
    LinkedNumber,
    Manuscript,
    Paragraph,
    Span,
    Spans,
    TableReference,
    fill,
    join_clauses,
)
from pylorus.report.manuscript_methods import (
    MAX_DESCRIBED_RUNS,
    collect_references,
    describe_scope,
    iter_method_blocks,
    select_splits,
)
from pylorus.report.mistakes import Section, iter_tables
from pylorus.report.participants import build_flow_table, plot_flow
from pylorus.report.results import LEVEL, PATIENTS, Result
from pylorus.report.table import Number, Table
from pylorus.runs.predictions import explain_degenerate_predictions
from pylorus.runs.reading import SavedRun

MAX_PAIRS = 6
"""Maximum number of comparisons in the text; the table has all."""

MAX_CLASSES = 8
"""Sensitivity of more classes than this is only given by its table."""

SHOWN_TABLES = (
    "flow-",
    "characteristics-",
    "training-settings",
    "accuracy",
    "overall",
    "classes-",
    "confusion-matrices",
    "calibration",
    "threshold",
    "comparisons",
    "margins",
    "replicates",
    "fold",
    "subgroups-",
    "class-subgroups-",
    "subgroup-differences-",
)
"""Beginnings of the keys of the tables in a manuscript, in this order."""

SHOWN_FIGURES = ("flow-", "roc", "reliability")


OVERALL_METRICS = (
    ("accuracy", "an accuracy of"),
    ("balanced accuracy", "a balanced accuracy of"),
    ("macro F1", "a macro F1 of"),
    ("macro AUROC", "a macro AUROC of"),
    ("Cohen's κ", "a Cohen's κ of"),
    ("MCC", "an MCC of"),
)
"""Titles of columns, and the words before their values in a sentence."""


def build_manuscript(evidence: Evidence, sections: Sequence[Section]) -> Manuscript:
    """Build the draft of a manuscript from the results and the sections of their report.

    Args:
        evidence: The results.
        sections: The sections of the report, whose tables and figures are reused.
    """
    runs = _select_runs(evidence)
    flows = [run for run in select_splits(runs) if run.split is not None]
    tables = {table.key: table for table in iter_tables(sections)} | {
        table.key: table for table in map(build_flow_table, flows)
    }
    drawings = {
        drawing.key: drawing for section in sections for drawing in section.items if isinstance(drawing, Drawing)
    }
    drawings |= {drawing.key: drawing for drawing in map(plot_flow, flows)}
    finder = CellFinder(tables)
    text: list[Block] = [
        *_build_head(evidence),
        Heading("Methods"),
        *iter_method_blocks(evidence, sections, runs, finder),
        Heading("Results"),
        *_build_results(evidence, flows, finder),
        Heading("Discussion"),
        Paragraph(fill(Gap("principal findings, interpretation, other studies"))),
        Paragraph((f"Limitations. {checklist_answers.report_limitations(evidence)} ", Gap("further limitations"))),
        *_build_statements(evidence),
    ]
    shown = _select_tables(tables, runs, text)
    figures = [drawing for start in SHOWN_FIGURES for key, drawing in drawings.items() if key.startswith(start)]
    blocks: list[Block] = [*text, Heading("Figures"), *figures] if figures else text
    blocks += [Heading("Tables"), *shown] if shown else []
    blocks.append(Heading("Checklists"))
    blocks += [_mark_gaps(build_guideline_table(guideline, evidence)) for guideline in GUIDELINES]
    return Manuscript(_build_title(runs), tuple(blocks), _order_references(text, evidence.runs))


def _select_runs(evidence: Evidence) -> tuple[SavedRun, ...]:
    """Return one run per configuration, those of the winners first; all runs if there are no results."""
    results = [winner.headline_result or winner.best[0] for winner in evidence.winners]
    results += [configuration.shipped.representative for configuration in evidence.configurations]
    return tuple(dict.fromkeys(result.run for result in results)) or evidence.runs


def _select_tables(tables: Mapping[str, Table], runs: Sequence[SavedRun], text: Sequence[Block]) -> list[Table]:
    """Return the tables that the text refers to, and those of the selected runs that a reader looks for."""
    spans = [span for block in text if isinstance(block, Paragraph) for span in block.spans]
    cited = {span.key for span in spans if isinstance(span, TableReference)}
    cited |= {span.table for span in spans if isinstance(span, LinkedNumber)}
    stems = {run.stem for run in runs[:MAX_DESCRIBED_RUNS]}
    order = []
    for start in SHOWN_TABLES:
        for key, table in tables.items():
            is_of_run = start.endswith("-")
            is_selected = not is_of_run or any(key.removeprefix(start).startswith(stem) for stem in stems)
            if key.startswith(start) and (key in cited or is_selected) and table not in order:
                order.append(table)
    return order


def _mark_gaps(table: Table) -> Table:
    """Write the blanks of a checklist as the gaps of the manuscript are."""
    rows = tuple(
        replace(
            row,
            cells=tuple(
                cell.replace(checklists.AUTHOR, AUTHOR) if isinstance(cell, str) else cell for cell in row.cells
            ),
        )
        for row in table.rows
    )
    return replace(table, rows=rows)


def _order_references(text: Sequence[Block], runs: Sequence[SavedRun]) -> dict[str, str]:
    """Return the cited references in the order of citation, then the rest of the software."""
    references = collect_references(runs)
    spans = [span for block in text if isinstance(block, Paragraph) for span in block.spans]
    keys = [key for span in spans if isinstance(span, Citation) for key in span.keys]
    keys += [key for key in references if key.startswith("software-")]
    return {key: references[key] for key in dict.fromkeys(keys)}


def _build_title(runs: Sequence[SavedRun]) -> Spans:
    names = list(dict.fromkeys(run.model.partition(".")[0] for run in runs))
    classes = list(dict.fromkeys(name.replace("_", " ") for run in runs for name in run.class_names))
    networks = join_names(names, most=4)
    subject = f"Classification of {join_names(classes, most=6)} by deep learning with {networks}: " if classes else ""
    return (subject, Gap("title with population, diagnosis and kind of study")) if subject else (Gap("title"),)


def _build_head(evidence: Evidence) -> list[Block]:
    blocks: list[Block] = [
        Paragraph(
            (
                "Draft, written by a program from the records of the runs. Each number among the results links to the "
                "cell of the table that it is taken from. What the runs do not document is marked ",
                Gap("…"),
                ". Read, check and complete every sentence before you use it.",
            )
        )
    ]
    caveats = dict.fromkeys(caveat for run in evidence.runs for caveat in collect_caveats(run))
    blocks += [Paragraph((f"{caveat.word}. {caveat.meaning}",)) for caveat in caveats]
    for heading, text in (
        ("Abstract", "structured abstract"),
        ("Introduction", "background, intended use, objectives"),
    ):
        blocks += [Heading(heading), Paragraph((Gap(text),))]
    return blocks


def _build_statements(evidence: Evidence) -> list[Block]:
    guidelines: list[Span] = ["Drafts of the checklists of "]
    for number, guideline in enumerate(GUIDELINES):
        guidelines += [", " if 0 < number < len(GUIDELINES) - 1 else " and " if number else ""]
        guidelines += [guideline.name, Citation((f"guideline-{guideline.key}",))]
    return [
        Heading("Statements"),
        Paragraph((*(span for span in guidelines if span), " are at the end of this draft.")),
        Paragraph(
            (
                f"Code and data. {checklist_answers.report_availability(evidence)} ",
                Gap("where code, trained model and data are available"),
            )
        ),
        Paragraph(
            (Gap("ethics approval and consent; registration; protocol; funding; interests; patients and public"),)
        ),
    ]


def _build_results(evidence: Evidence, flows: Sequence[SavedRun], finder: CellFinder) -> Iterator[Block]:
    yield Heading("Patients and images", 2)
    for run in flows:
        start = describe_scope(evidence, run) or (f"{run.label}: " if len(flows) > 1 else "")
        yield Paragraph(_describe_participants(run, finder, start=start))
    yield Heading("Accuracy", 2)
    if not evidence.results:
        yield Paragraph((Gap("results; no stage has test predictions yet"),))
        return
    for winner in evidence.winners:
        yield Paragraph(_describe_accuracy(winner, evidence, flows, finder))
    comparisons = [_describe_comparisons(winner, finder) for winner in evidence.winners]
    margins = [_describe_margins(finder)]
    subgroups = [_describe_subgroups(winner, finder) for winner in evidence.winners]
    for title, paragraphs in (
        ("Comparisons", comparisons),
        ("Non-inferiority and equivalence", margins),
        ("Subgroups", subgroups),
    ):
        if any(paragraphs):
            yield Heading(title, 2)
            yield from (Paragraph(spans) for spans in paragraphs if spans)


def _describe_participants(run: SavedRun, finder: CellFinder, *, start: str) -> Spans:
    key = f"flow-{run.stem}"
    files, included = (finder.find(key, [step], "images") for step in ("image files", "included"))
    if files is not None and included is not None and files.text == included.text:
        opening = f"{start}all " if start else "All "
        spans = fill(opening, included, " image files that were found were included")
    else:
        opening = f"{start}of " if start else "Of "
        spans = fill(opening, files, " image files, ", included, " were included")
        spans = spans or fill(start, included, " images were included")
    table = finder.tables[key]
    reasons = [row.cells[0] for row in table.rows if str(row.cells[0]).startswith("left out: ")]
    spans += (
        "; " if reasons else "",
        *join_clauses(
            [
                fill(finder.find(key, [str(reason)], "images"), f" {str(reason).removeprefix('left out: ')}")
                for reason in reasons
            ]
        ),
    )
    parts = join_clauses(
        [
            fill(
                f"the {part} part had ",
                finder.find(key, [part], "images"),
                " images of ",
                finder.find(key, [part], "patients"),
                " patients",
            )
            or fill(f"the {part} part had ", finder.find(key, [part], "images"), " images")
            for part in ("training", "validation", "test")
        ]
    )
    spans += (". By part, ", *parts, " (", FigureReference(key), ", ", TableReference(key), "). ")
    return tuple(span for span in spans if span) + _describe_characteristics(run, finder)


def _describe_characteristics(run: SavedRun, finder: CellFinder) -> Spans:
    key = f"characteristics-{run.stem}"
    table = finder.tables.get(key)
    if table is None:
        return (
            "The run records no characteristics of the patients. ",
            Gap("age, sex, endoscope and site of the patients of each part"),
        )
    spans: list[Span] = []
    parts = list(dict.fromkeys(column.heading for column in table.columns if column.heading))
    for name in dict.fromkeys(str(row.cells[0]) for row in table.rows if row.cells[1] == "median"):
        medians = [
            fill(
                finder.find(key, [name, "median"], "number", heading=part),
                f" in the {part} part (quartiles ",
                finder.find(key, [name, "lower quartile"], "number", heading=part),
                " and ",
                finder.find(key, [name, "upper quartile"], "number", heading=part),
                ")",
            )
            for part in parts
        ]
        spans += [f"The median of {name} was ", *join_clauses(medians), ". "] if any(medians) else []
    return (*spans, "Characteristics of each part are given in ", TableReference(key), ".")


def _describe_accuracy(winner: Winner, evidence: Evidence, flows: Sequence[SavedRun], finder: CellFinder) -> Spans:
    candidate = winner.preferred or winner.leaders[0]
    if candidate.replicates > 1:
        return _describe_replicates(candidate, finder)
    result = candidate.representative
    same_split = next((run.stem for run in flows if run.split and run.split.short_hash == result.split), "")
    spans = _describe_overall(result, f"flow-{same_split}", finder)
    spans += _describe_class(result, evidence.class_name, finder)
    spans += _describe_decision(result, finder)
    matrices = [key for key in finder.tables if key.startswith("confusion-matrices")]
    return (*spans, "The confusion matrix is in ", TableReference(matrices[0]), ".") if matrices else spans


def _describe_overall(result: Result, flow: str, finder: CellFinder) -> Spans:
    run, stage = result.run, result.stage.name
    images, patients = finder.find(flow, ["test"], "images"), finder.find(flow, ["test"], "patients")
    spans = fill("On ", images, " test images of ", patients, f" patients, {result.label} had ") or fill(
        "On ", images, f" test images, {result.label} had "
    )
    spans += join_clauses(
        [fill(f"{words} ", finder.find("overall", [run.label, stage], title)) for title, words in OVERALL_METRICS]
    )
    spans += (" (", TableReference("overall"), "). ")
    table, accuracy = result.images.predictions, result.images.shares.accuracy
    for text in explain_degenerate_predictions(table.true, table.predicted, table.class_names, accuracy):
        # The rate of the most frequent class is in no table, so it is left out.
        spans += (f"{text.rpartition(', ')[0]}. " if "always answering" in text else f"{text} ",)
    validation = finder.find("accuracy", [run.label, stage], "validation")
    if validation is not None:
        spans += (
            *fill("Its accuracy on the validation images was ", validation, " ("),
            TableReference("accuracy"),
            "). ",
        )
    if result.patients is not None:
        clauses = [
            fill(f"{title} ", finder.find("overall-patients", [run.label, stage], title))
            for title in ("accuracy", "macro F1", "macro AUROC")
        ]
        mixed = ", leaving out patients with images of several classes" if result.patients.left_out else ""
        spans += (f"By patient, from the mean probability of the images{mixed}: ", *join_clauses(clauses), " (")
        spans += (TableReference("overall-patients"), "). ")
    return spans


def _describe_class(result: Result, class_name: str | None, finder: CellFinder) -> Spans:
    key, stage = f"classes-{result.run.stem}", result.stage.name
    names = result.images.predictions.class_names
    spans: Spans = ()
    if class_name in names:
        titles = ("sensitivity", "specificity", "precision", "NPV", "AUROC", "average precision")
        clauses = [fill(f"{title} ", finder.find(key, [stage, str(class_name)], title)) for title in titles]
        spans += (
            f"For {class_name} against the other classes: ",
            *join_clauses(clauses),
            " (",
            TableReference(key),
            "). ",
        )
    others = [name for name in names if name != class_name]
    if len(names) <= MAX_CLASSES:
        clauses = [fill(finder.find(key, [stage, name], "sensitivity"), f" for {name}") for name in others]
        spans += ("Sensitivity was ", *join_clauses(clauses), ". ") if any(clauses) else ()
    return spans


def _describe_decision(result: Result, finder: CellFinder) -> Spans:
    head = [result.run.label, result.stage.name]
    spans: Spans = ()
    if result.calibration is not None:
        clauses = [
            fill(f"{words} ", finder.find("calibration", [*head, "temperature*"], title))
            for title, words in (
                ("ECE", "an expected calibration error of"),
                ("Brier", "a Brier score of"),
                ("NLL", "a negative log likelihood of"),
            )
        ]
        if any(clauses):
            spans += (
                "Calibrated probabilities had ",
                *join_clauses(clauses),
                " (",
                TableReference("calibration"),
                "). ",
            )
    for point in result.operating:
        key = "threshold-patients" if point.level == PATIENTS else "threshold"
        unit = "patients" if point.level == PATIENTS else "images"
        clauses = [
            fill(f"{title} ", finder.find(key, head, title, heading="test"))
            for title in ("sensitivity", "specificity", "precision", "NPV")
        ]
        start = fill(
            "At the threshold of ", finder.find(key, head, "threshold"), f" for {point.class_name}, test {unit} gave "
        )
        if not start or not any(clauses):
            continue
        ending = (
            "; the threshold guarantees the sensitivity that was asked for"
            if point.fixed.is_guaranteed
            else "; the threshold does not guarantee the sensitivity that was asked for, as its table explains"
        )
        spans += (*start, *join_clauses(clauses), f"{ending} (", TableReference(key), "). ")
    return spans


def _describe_replicates(candidate: Candidate, finder: CellFinder) -> Spans:
    """Describe a configuration of several runs by the pooled folds, or by mean and standard deviation."""
    head = [candidate.configuration, candidate.stage]
    spans: Spans = ()
    pooled = [key for key in finder.tables if key == "folds" or key.startswith("folds-")]
    has_row = [key for key in pooled if finder.find(key, head, "accuracy") is not None]
    if (
        candidate.kind == FOLDS
        and has_row
        and not any(column.title == "repeat" for column in finder.tables[has_row[0]].columns)
    ):
        key = has_row[0]
        clauses = [
            fill(f"{words} ", finder.find(key, head, title))
            for title, words in OVERALL_METRICS
            if title != "macro AUROC"
        ]
        images = finder.find(key, head, "images")
        spans += fill("On the ", images, f" test images of all folds together, {candidate.label} had ")
        spans += (*join_clauses(clauses), " (", TableReference(key), "). ")
        names = candidate.round_predictions[0].class_names
        if len(names) <= MAX_CLASSES:
            clauses = [fill(finder.find(key, head, name, heading="sensitivity"), f" for {name}") for name in names]
            spans += ("Sensitivity was ", *join_clauses(clauses), ". ") if any(clauses) else ()
    rows = [*head, candidate.replicate_text]
    clauses = [
        fill(
            f"{words} ",
            finder.find("replicates", [*rows, index], "mean", unit="%" if index.endswith("%") else ""),
            " with a standard deviation of ",
            finder.find("replicates", [*rows, index], "SD"),
        )
        for index, words in (
            ("accuracy, %", "a mean accuracy of"),
            ("balanced accuracy, %", "a mean balanced accuracy of"),
            ("macro F1, %", "a mean macro F1 of"),
            ("macro AUROC", "a mean macro AUROC of"),
        )
    ]
    if any(clauses):
        kinds = finder.find("replicates", [*rows, "accuracy, %"], "replicates")
        spans += fill("Over ", kinds, f", {candidate.label} had ")
        spans += (*join_clauses(clauses), " (", TableReference("replicates"), "). ")
    return spans or (Gap(f"results of {candidate.label}; see the report"),)


def _describe_comparisons(winner: Winner, finder: CellFinder) -> Spans:
    table = finder.tables.get("comparisons")
    spans: Spans = ()
    if table is None:
        return spans
    for each in winner.comparisons[:MAX_PAIRS]:
        row = next(
            (row for row in table.rows if [row.cells[1], row.cells[2]] == [each.first.label, each.second.label]), None
        )
        if row is None:
            continue
        head = [str(row.cells[0]), each.first.label, each.second.label]
        points = finder.find("comparisons", head, "points", heading="accuracy, patients")
        p_value = finder.find("comparisons", head, "p, Holm", heading="accuracy")
        if points is None or p_value is None:
            continue
        equal = "" if p_value.text.startswith("<") else "= "
        significant = each.is_significant
        words = (
            f"The accuracy of {each.first.label} and {each.second.label} differed"
            if significant
            else f"No difference in accuracy between {each.first.label} and {each.second.label} was shown"
        )
        corrected = "corrected p" if each.family > 1 else "p"
        spans += fill(f"{words}: first minus second ", points, f", {corrected} {equal}", p_value, ". ")
    if not spans:
        return ()
    left_out = " has the other pairs" if len(winner.comparisons) > MAX_PAIRS else " has all indices"
    return (*spans, TableReference("comparisons"), f"{left_out}.")


def _describe_margins(finder: CellFinder) -> Spans:
    """Describe the comparisons with a margin; none if the report has none."""
    table = finder.tables.get("margins")
    if table is None:
        return ()
    spans: Spans = ()
    for row in table.rows[:MAX_PAIRS]:
        model, reference, index, decision = map(str, row.cells[:4])
        head, unit = [model, reference, index], "" if index.startswith("AUROC") else "points"
        difference = finder.find("margins", head, "difference", unit=unit)
        is_figure = reference.startswith("the given ")  # its number is linked, too
        other = finder.find("margins", head, "compared with") if is_figure else reference
        words = {
            "equivalent": "was equivalent to",
            "not inferior": "was not inferior to",
            "inferior": "was inferior to",
        }.get(decision, "was not shown to be non-inferior to")
        start = f"{index[0].upper()}{index[1:]}: {model} {words} "
        spans += fill(start, other, ", difference ", difference, ". ")
    left_out = "Further comparisons and the" if len(table.rows) > MAX_PAIRS else "The"
    return (*spans, f"{left_out} corrected p-values are in ", TableReference("margins"), ".") if spans else ()


def _describe_subgroups(winner: Winner, finder: CellFinder) -> Spans:
    result = (winner.preferred or winner.leaders[0]).representative
    key = f"subgroup-differences-{result.run.stem}-{result.stage.name}"
    table = finder.tables.get(key)
    if table is None:
        return ()
    by_answer: dict[tuple[str, bool], list[Spans]] = {}
    for row in table.rows:
        index, column, corrected = str(row.cells[0]), str(row.cells[1]), row.cells[-1]
        number = finder.find(key, [index, column], "p, corrected")
        if number is not None and isinstance(corrected, Number):
            equal = "" if number.text.startswith("<") else "= "
            clause = fill(f"{column} (corrected p {equal}", number, ")")
            by_answer.setdefault((index, corrected.value < LEVEL), []).append(clause)
    spans: Spans = ()
    for (index, differs), clauses in by_answer.items():
        words = "differed" if differs else "was not shown to differ"
        spans = (*spans, f"The {index} {words} between the subgroups of ", *join_clauses(clauses), ". ")
    return (*spans, "Tests of the subgroups are given in ", TableReference(key), ".") if spans else ()
