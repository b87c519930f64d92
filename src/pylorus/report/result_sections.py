"""Sections with the results of a report: the study's tables, all indices, comparisons, decisions, and the figures."""

from collections.abc import Sequence
from dataclasses import replace

from pylorus.evaluation.wording import format_paired_sentence
from pylorus.report.captions import format_validation_images
from pylorus.report.comparison import AUROC, MACRO_F1, Comparison, IndexComparison
from pylorus.report.curve_figures import (
    collect_curves,
    plot_class_metric_curves,
    plot_net_benefit,
    plot_risk_coverage,
    plot_training_curves,
)
from pylorus.report.evidence import Evidence
from pylorus.report.mistakes import FileOnly, Item, Section, Sentences
from pylorus.report.network_figure import build_network_table, plot_network_structure, read_network_blocks
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
from pylorus.report.results import IMAGES, LEVEL, PATIENTS, Result, make_file_stems
from pylorus.report.study_tables import (
    STUDY,
    build_confusion_table,
    build_published_comparison_table,
    build_published_confusion_table,
    build_published_metric_table,
    build_study_metric_table,
    compare_with_published,
)
from pylorus.report.summary import build_accuracy_table
from pylorus.runs.reading import SavedRun

MAX_PAIRS = 24
"""Maximum number of pairs shown on the page; further pairs are only in the CSV file."""


def build_study_section(evidence: Evidence) -> Section:
    """Build the main results: pooled replicates and folds, tables 1 to 4 of the study, then accuracy."""
    items = [
        *_build_pooled_tables(evidence),
        *(build_study_metric_table(results) for run in evidence.runs if (results := evidence.get_run_results(run))),
    ]
    for number, group in enumerate(_group_by_classes(evidence.results), start=1):
        items.append(build_confusion_table(group, number=number))
    items += [build_accuracy_table(evidence.results)] if evidence.results else []
    return Section("results", "Results in the format of the study", tuple(items))


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
    return Section("published", "Comparison with the published study", tuple(items))


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
    return Section("comparisons", "Comparisons between models", tuple(items))


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
        sentences.append(format_paired_sentence(*names, corrected, index=index, images=each.pool.images, level=LEVEL))
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


def build_training_section(evidence: Evidence) -> Section:
    """Build the section of training curves: all models in one plot per stage, then the classes of each model."""
    curves = collect_curves(evidence.runs)
    labels = {run: label for label, runs in evidence.replicates.items() for run in runs}
    stages = dict.fromkeys(each.stage.name for each in curves)
    items: list[Item] = [
        plot_training_curves([each for each in curves if each.stage.name == stage], labels=labels) for stage in stages
    ]
    stems = make_file_stems(list(evidence.replicates))
    for stem, (label, runs) in zip(stems, evidence.replicates.items(), strict=True):
        for stage in stages:
            own = [each for each in curves if each.stage.name == stage and each.run in runs]
            if own:
                items.append(plot_class_metric_curves(own, own[0].run.short_names, label=label, stem=stem))
    without = [f"{run.label} {stage.name}" for run in evidence.runs for stage in run.stages if stage.curves is None]
    if without:
        items.append(Sentences((f"No training curves, because metrics.csv is missing: {'; '.join(without)}.",)))
    return Section("training", "Training", tuple(items))


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


def build_network_section(evidence: Evidence) -> Section:
    """Build the section of network structures, each shown once."""
    distinct: dict[str, SavedRun] = {}
    for run in evidence.runs:
        if run.network:
            distinct.setdefault(f"{run.model} {read_network_blocks(run)}", run)
    items: list[Item] = []
    for run in distinct.values():
        items += [plot_network_structure(run), FileOnly(build_network_table(run))]
    without = [run.label for run in evidence.runs if not run.network]
    if without:
        items.append(Sentences((f"No figure of the network, because network.json is missing: {', '.join(without)}.",)))
    return Section("networks", "Networks", tuple(items))
