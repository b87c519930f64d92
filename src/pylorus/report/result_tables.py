"""Tables of all metrics with their intervals, of calibration and thresholds, and of paired comparisons."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pylorus.core.formatting import (
    format_number,
    format_percent,
    format_percent_at_least,
    format_threshold,
    join_names,
)
from pylorus.evaluation.calibration import CalibrationLine, calibration_line
from pylorus.evaluation.confusion import CLASS_METRICS, ClassMetric
from pylorus.evaluation.decisions import area_under_risk_coverage
from pylorus.evaluation.intervals import Estimate
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.wording import format_guarantee_sentence
from pylorus.report.candidate import FOLDS, SET, SPLITS
from pylorus.report.captions import format_test_basis, format_validation_images, is_validated_on_test
from pylorus.report.comparison import ACCURACY, AUROC, MACRO_F1, UNDEFINED, Comparison
from pylorus.report.results import CONFIDENCE, IMAGES, PATIENTS, Level, Result, ThresholdResult
from pylorus.report.table import (
    Cell,
    Column,
    Number,
    Row,
    Table,
    convert_to_number_cell,
    convert_to_p_value_cell,
    convert_to_percent_cell,
    create_text_columns,
)

METHODS = (
    "All confidence intervals account for clustering of images within groups. Precision, sensitivity, specificity, NPV "
    "and accuracy: Wilson interval at the effective number of images. F1: the same, for the overlap of predicted and "
    "true images. Averages over classes: combined from the intervals of the classes (MOVER). κ and MCC: Wilson "
    "interval of the errors that they count. AUROC: score interval with DeLong's variance or, with several images per "
    "group, Obuchowski's. Average precision: linearised variance."
)


OWN_METHOD = (
    "with the interval of a grouped jackknife (Student's t). It is symmetric, may exceed the metric's range, and is "
    "missing where leaving out one group makes the metric undefined or where leaving out any group changes nothing."
)

PAIR_METHODS = (
    "Accuracy: exact McNemar test that keeps the images of a group together. Macro F1: permutation test that exchanges "
    "the predictions of the two models for whole groups. AUROC: DeLong or, with several images per group, Obuchowski, "
    "with Student's t. Confidence intervals are combined from those of the two models (MOVER), so an interval and its "
    "p may disagree close to the significance level."
)
SEED_METHODS = (
    "Several seeds: means over the seeds. p (patients): exact sign-flip test by group on the mean over seeds; p "
    "(training) and its interval account for patients and for seeds (Obuchowski and Rockette 1995, Hillis 2014)."
)
FOLD_METHODS = (
    "Folds: p (patients) is from McNemar's test on the pooled out-of-fold predictions, which keeps the images of a "
    "group together; p (training) and its interval refer to the mean over folds and account for overlapping training "
    "sets (Nadeau and Bengio 2003). AUROC: mean over folds, since scores of different models are not on the same scale."
)
SPLIT_METHODS = (
    "Repeated splits: p (patients) is from an exact sign-flip test by group over all splits; p (training) and its "
    "interval account for overlapping training sets (Nadeau and Bengio 2003)."
)
DECISION_NOTE = "The larger of p (patients) and p (training) is corrected and decides."


def build_class_metric_table(results: Sequence[Result], *, level: str = IMAGES) -> Table:
    """Build the table of each class of one run, one block per stage.

    Args:
        results: At least one, all of one run.
        level: `image-level` or `patient-level`; every result must have it.
    """
    run = results[0].run
    unit = "patients" if level == PATIENTS else "images"
    own = list(dict.fromkeys(name for result in results for name in result.stage.own_metrics if level == IMAGES))
    return Table(
        key=f"classes-{run.stem}{_get_level_suffix(level)}",
        title=f"{run.label}: all metrics of each class",
        basis=format_test_basis(results, level=level),
        columns=(
            *create_text_columns("stage", "class"),
            Column(unit),
            *(Column(metric.label, unit="%") for metric in _list_metrics_with_intervals()),
            *(Column(name, unit="%") for name in own),
            Column("AUROC"),
            Column("average precision"),
        ),
        rows=tuple(
            row for result in results for row in _build_class_metric_rows(result, get_level(result, level), own)
        ),
        notes=(
            "Macro average: unweighted mean over the classes. AUROC and average precision: one class versus the rest.",
            METHODS,
            *([f"{join_names(own)}: defined by the user, {OWN_METHOD}"] if own else []),
        ),
    )


def build_overall_metric_table(results: Sequence[Result], *, level: str = IMAGES) -> Table:
    """Build the table of metrics over all classes, one row per run and stage.

    Args:
        results: At least one.
        level: `image-level` or `patient-level`; every result must have it.
    """
    return Table(
        key=f"overall{_get_level_suffix(level)}",
        title="Metrics over all classes",
        basis=format_test_basis(results, level=level),
        columns=(
            *create_text_columns("model", "stage"),
            Column("accuracy", unit="%"),
            Column("balanced accuracy", unit="%"),
            Column("macro F1", unit="%"),
            Column("macro AUROC"),
            Column("macro average precision"),
            Column("Cohen's κ"),
            Column("MCC"),
        ),
        rows=tuple(_build_overall_metric_row(result, get_level(result, level)) for result in results),
        notes=("Balanced accuracy: mean sensitivity over the classes. MCC: Matthews correlation coefficient.",),
    )


def get_level(result: Result, level: str) -> Level:
    """Return the metrics of a result at a level.

    Raises:
        ValueError: If it has no patient level.
    """
    metrics = result.images if level == IMAGES else result.patients
    if metrics is None:
        raise ValueError(f"{result.label} has no {level}")
    return metrics


def _list_metrics_with_intervals() -> list[ClassMetric]:
    return [metric for metric in CLASS_METRICS.values() if metric.share is not None]


def _build_class_metric_rows(result: Result, level: Level, own: Sequence[str]) -> list[Row]:
    stage, ranking, indices = result.stage.name, level.ranking, level.indices
    estimates = {metric.name: level.estimate_metric(metric) for metric in _list_metrics_with_intervals()}
    averages = {
        "precision": indices.macro_precision,
        "sensitivity": indices.balanced_accuracy,
        "f1": indices.macro_f1,
    }
    rows = [
        Row(
            (
                stage,
                name,
                int(level.confusion[index].sum()),
                *(convert_to_percent_cell(by_class[index]) for by_class in estimates.values()),
                *(convert_to_percent_cell(result.stage.get_own_estimate(metric, name)) for metric in own),
                convert_to_number_cell(ranking.auroc[index]),
                convert_to_number_cell(ranking.average_precision[index]),
            )
        )
        for index, name in enumerate(level.predictions.class_names)
    ]
    average = Row(
        (
            stage,
            "macro average",
            int(level.confusion.sum()),
            *(convert_to_percent_cell(averages[name]) if name in averages else "" for name in estimates),
            *("" for _ in own),
            convert_to_number_cell(ranking.macro_auroc),
            convert_to_number_cell(ranking.macro_average_precision),
        ),
        strong=True,
    )
    return [*rows, average]


def _build_overall_metric_row(result: Result, level: Level) -> Row:
    return Row(
        (
            result.run.label,
            result.stage.name,
            convert_to_percent_cell(level.shares.accuracy),
            convert_to_percent_cell(level.indices.balanced_accuracy),
            convert_to_percent_cell(level.indices.macro_f1),
            convert_to_number_cell(level.ranking.macro_auroc),
            convert_to_number_cell(level.ranking.macro_average_precision),
            convert_to_number_cell(level.indices.cohen_kappa),
            convert_to_number_cell(level.indices.mcc),
        )
    )


def _get_level_suffix(level: str) -> str:
    return "-patients" if level == PATIENTS else ""


def build_calibration_table(results: Sequence[Result], *, class_name: str | None = None) -> Table:
    """Build the table of calibration scores on test images before and after temperature scaling, two rows per result.

    Args:
        results: At least one, each with a calibration.
        class_name: Short name of the class whose calibration line is reported; None for no line.
    """
    rows, flat = [], []
    for result in results:
        calibration = result.calibration
        assert calibration is not None
        suffix = "" if calibration.temperature.identified else ", not identified"
        fitted = (
            f"temperature {format_number(calibration.temperature.temperature, 2)} "
            f"({calibration.temperature.images:,} images{suffix})"
        )
        labels = ("uncalibrated", fitted)
        sides = ((calibration.before, calibration.uncalibrated), (calibration.after, calibration.test))
        for label, (scores, predictions) in zip(labels, sides, strict=True):
            certainty = predictions.probabilities.max(axis=1)
            area = area_under_risk_coverage(predictions.correct, certainty, result.test.clusters, confidence=CONFIDENCE)
            cells: list[Cell] = [convert_to_number_cell(each) for each in (scores.ece, scores.brier, scores.nll, area)]
            if class_name in predictions.class_names:
                line = _fit_calibration_line(predictions, class_name, result.test.clusters)
                cells += [convert_to_number_cell(each, digits=2) for each in (line.slope, line.intercept)]
                flat += [f"{result.label} ({label.partition(' (')[0]})"] * line.is_flat
            elif class_name is not None:
                cells += ["", ""]
            rows.append(Row((result.run.label, result.stage.name, label, *cells)))
    notes = [
        "ECE: expected calibration error over ten bins with equal numbers of images; by chance it exceeds 0 even under "
        "perfect calibration, which its interval does not account for. Brier: squared error summed over classes. NLL: "
        "negative log likelihood, in nats. AURC: area under the risk-coverage curve, the mean error rate among the "
        "images on which the model is most confident. Lower is better for all four.",
    ]
    if class_name is not None:
        notes.append(
            f"Calibration line of {class_name}: log odds of the true class regressed on the log odds of the model. "
            "Slope 1 and intercept 0 are ideal; a slope below 1 indicates overconfidence, an intercept (with the "
            f"slope held at 1) above 0 means that {class_name} is more frequent than the model predicts."
        )
    if flat:
        where = "here" if len(flat) == len(rows) else f"of {join_names(flat, most=4)}"
        notes.append(
            f"The slope can't be interpreted {where}: the model gives all images nearly the same probability of "
            f"{class_name}."
        )
    if any(not result.calibration.temperature.identified for result in results if result.calibration is not None):
        notes.append(
            "Not identified: the images on which it is fitted do not determine a temperature, so the logits are left "
            "unchanged."
        )
    fitted_on = format_validation_images([result.run for result in results])
    return Table(
        key="calibration",
        title=f"Calibration on test images before and after scaling by a temperature fitted on {fitted_on}",
        basis=format_test_basis(results),
        columns=(
            *create_text_columns("model", "stage", "probabilities"),
            *(Column(title) for title in ("ECE", "Brier", "NLL", "AURC")),
            *(Column(title, heading=f"line of {class_name}") for title in ("slope", "intercept") if class_name),
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _fit_calibration_line(
    predictions: Predictions, class_name: str, groups: NDArray[np.generic] | None
) -> CalibrationLine:
    column = predictions.class_names.index(class_name)
    probability = np.clip(predictions.probabilities[:, column], 0, 1)
    return calibration_line(predictions.true == column, probability, groups, confidence=CONFIDENCE)


def build_threshold_table(results: Sequence[Result], *, level: str = IMAGES) -> Table:
    """Build the table of a threshold's performance on test images; it was fixed on the images used for validation.

    Args:
        results: At least one, each with a threshold at the level.
        level: `image-level` or `patient-level`.
    """
    points = [(result, point) for result in results for point in result.operating if point.level == level]
    first = points[0][1]
    target, confidence = (
        f"{format_percent(share, digits=None)} %" for share in (first.fixed.sensitivity, first.fixed.confidence)
    )
    unit = "patients" if level == PATIENTS else "images"
    runs = [result.run for result, _ in points]
    fixed_on = ("the patients of " if level == PATIENTS else "") + format_validation_images(runs)
    fixed_title = "fixed on" if all(map(is_validated_on_test, runs)) else "validation"
    applied = "" if all(map(is_validated_on_test, runs)) else f", applied unchanged to test {unit}"
    return Table(
        key=f"threshold{'-patients' if level == PATIENTS else ''}",
        title=(
            f"Threshold for {first.class_name}, fixed on {fixed_on} for a true sensitivity of at least {target} with "
            f"{confidence} confidence{applied}"
            + ("" if all(point.fixed.is_guaranteed for _, point in points) else "; not guaranteed, see below")
        ),
        basis=format_test_basis([result for result, _ in points], level=level),
        columns=(
            *create_text_columns("model", "stage"),
            Column("threshold"),
            Column("positives", heading=fixed_title),
            *([] if level == PATIENTS else [Column("positive groups", heading=fixed_title)]),
            Column(f"guaranteed sensitivity, {confidence} confidence", heading=fixed_title, unit="%"),
            Column("positives", heading="test"),
            *(Column(name, heading="test", unit="%") for name in ("sensitivity", "specificity", "precision", "NPV")),
        ),
        rows=tuple(_build_threshold_row(result, point) for result, point in points),
        notes=(
            f"A test {unit[:-1]} is classified as {first.class_name} if its calibrated probability reaches the "
            "threshold. The guaranteed sensitivity is a lower bound for new patients of the same hospitals, with "
            "equal weight for each patient; the test columns give the performance achieved.",
            *_format_guarantees(points, target, confidence),
        ),
    )


def _format_guarantees(points: Sequence[tuple[Result, ThresholdResult]], target: str, confidence: str) -> list[str]:
    """Say which thresholds guarantee the target sensitivity, and what the others guarantee."""
    result, point = points[0]
    patients = "patients" if point.level == PATIENTS or result.run.has_groups else "images"
    if len(points) == 1:
        split = "test" if is_validated_on_test(result.run) else "validation"
        return [
            format_guarantee_sentence(
                point.fixed, class_name=point.class_name, grouped=patients == "patients", part=split
            )
        ]
    guaranteed = [result.label for result, each in points if each.fixed.is_guaranteed]
    not_guaranteed = [
        f"{result.label} ({each.fixed.patients:,} {patients}; "
        f"{format_percent_at_least(each.fixed.confidence_reached)} % confidence of {target})"
        for result, each in points
        if not each.fixed.is_guaranteed
    ]
    sentences = (
        [f"{target} with {confidence} confidence is guaranteed for {', '.join(guaranteed)}."] if guaranteed else []
    )
    if not_guaranteed:
        needed = point.fixed.patients_needed
        requirement = "no number is sufficient" if needed is None else f"{needed:,} are needed"
        sentences.append(
            f"There are too few {patients} with {point.class_name} to guarantee {target} with {confidence} confidence "
            f"({requirement}), so the threshold is the lowest probability of {point.class_name} among them: "
            f"{', '.join(not_guaranteed)}."
        )
    if patients == "images":
        sentences.append("Patients are not known, so each image counts as one patient.")
    return sentences


def _build_threshold_row(result: Result, point: ThresholdResult) -> Row:
    tested, fixed = point.test, point.fixed
    return Row(
        (
            result.run.label,
            result.stage.name,
            Number(tested.threshold, words=format_threshold(tested.threshold)),
            fixed.images,
            *([] if point.level == PATIENTS else [fixed.patients]),
            Number(100 * fixed.sensitivity_reached, words=format_percent_at_least(fixed.sensitivity_reached)),
            tested.sensitivity.total,
            convert_to_percent_cell(tested.sensitivity),
            convert_to_percent_cell(tested.specificity),
            convert_to_percent_cell(tested.precision),
            convert_to_percent_cell(tested.npv),
        )
    )


def build_comparison_table(comparisons: Sequence[Comparison], *, class_name: str | None) -> Table:
    """Build the table of pairs that a research question asks about, first minus second, with p corrected per question.

    Args:
        comparisons: At least one.
        class_name: Short name of the class whose AUROC was compared, if any.
    """
    return _build_pair_table(
        comparisons,
        class_name,
        key="comparisons",
        title="Differences on the same test images, first minus second",
        notes=(
            "Winner: one configuration against each of the others. Stages: one stage against another of the same "
            "configuration. p in columns headed Holm is corrected by Holm's method within its question, over the "
            "number of tests given in its row; each index is a family of its own. Confidence intervals are not "
            "corrected.",
            "A difference is considered shown if the corrected p is below 0.05.",
        ),
        corrected=True,
    )


def build_unadjusted_table(comparisons: Sequence[Comparison], *, class_name: str | None) -> Table:
    """Build the table of all other pairs, without correction.

    Args:
        comparisons: At least one.
        class_name: Short name of the class whose AUROC was compared, if any.
    """
    return _build_pair_table(
        comparisons,
        class_name,
        key="comparisons-other",
        title="Appendix: all other pairs, UNADJUSTED for multiple testing",
        notes=(
            "UNADJUSTED: among so many pairs, some p-values are below 0.05 by chance alone. No statement in this "
            "report relies on them; they are intended for planning further studies.",
        ),
        corrected=False,
    )


def explain_comparisons(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """Describe how the pairs of a report were compared and corrected; empty if there are none."""
    if not comparisons:
        return ()
    corrected = (
        "Models are compared in pairs on the same test images. The p-values that answer one question are corrected "
        "together by Holm's method, for each index separately; those of other pairs are not corrected."
        if any(each.family > 1 for each in comparisons)
        else "Models are compared in pairs on the same test images. Each question is answered by a single test, so its "
        "p-value is not corrected; nor are those of other pairs."
    )
    return (corrected, *explain_comparison_methods(comparisons))


def explain_comparison_methods(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """Describe the methods of comparison for the kinds of pairs present."""
    methods = (
        (PAIR_METHODS, any(_is_single_pair(each) for each in comparisons)),
        (SEED_METHODS, any(each.pool.kind == SET and not _is_single_pair(each) for each in comparisons)),
        (FOLD_METHODS, any(each.pool.kind == FOLDS for each in comparisons)),
        (SPLIT_METHODS, any(each.pool.kind == SPLITS for each in comparisons)),
        (DECISION_NOTE, any(each.accuracy.training is not None for each in comparisons)),
    )
    return tuple(text for text, is_used in methods if is_used)


def _build_pair_table(
    comparisons: Sequence[Comparison],
    class_name: str | None,
    *,
    key: str,
    title: str,
    notes: Sequence[str],
    corrected: bool,
) -> Table:
    candidates = dict.fromkeys(each for pair in comparisons for each in (pair.first, pair.second))
    has_single_runs = any(each.images is not None for each in comparisons)
    has_training = any(each.accuracy.training is not None for each in comparisons)
    p_title = "p, Holm" if corrected else "p, unadjusted"
    return Table(
        key=key,
        title=title,
        basis=format_test_basis([result for each in candidates for result in each.results_used]),
        columns=(
            *(create_text_columns("question") if corrected else ()),
            *create_text_columns("first", "second"),
            *((Column("tests", heading="corrected for"),) if corrected else ()),
            *(
                (Column("only first", heading="correct images"), Column("only second", heading="correct images"))
                * has_single_runs
            ),
            Column("points", heading="accuracy, patients"),
            Column("p", heading="accuracy, patients"),
            *(
                (
                    Column("points", heading="accuracy, allowing for training"),
                    Column("p", heading="accuracy, allowing for training"),
                )
                * has_training
            ),
            *((Column(p_title, heading="accuracy"),) * (corrected or has_training)),
            Column("points", heading="macro F1"),
            Column(p_title, heading="macro F1"),
            Column("difference", heading=f"AUROC {class_name or ''}".strip()),
            Column(p_title, heading=f"AUROC {class_name or ''}".strip()),
        ),
        rows=tuple(
            Row(tuple(_build_pair_cells(each, corrected=corrected, single=has_single_runs, trained=has_training)))
            for each in comparisons
        ),
        notes=(*notes, *explain_comparison_methods(comparisons)),
    )


def _is_single_pair(comparison: Comparison) -> bool:
    return comparison.pool.kind == SET and comparison.images is not None


def _build_pair_cells(each: Comparison, *, corrected: bool, single: bool, trained: bool) -> list[Cell]:
    patients, training = each.accuracy.patients or UNDEFINED, each.accuracy.training or UNDEFINED
    auroc: Estimate = UNDEFINED if each.auroc is None else each.auroc.widest
    same_configuration = each.first.configuration == each.second.configuration
    cells: list[Cell] = ["stages" if same_configuration else "winner"] if corrected else []
    cells += [each.first.label, each.second.label]
    cells += [each.family] if corrected else []
    if single:
        cells += ["", ""] if each.images is None else [each.images.only_first, each.images.only_second]
    cells += [convert_to_percent_cell(patients), convert_to_p_value_cell(patients.p_value)]
    cells += [convert_to_percent_cell(training), convert_to_p_value_cell(training.p_value)] if trained else []
    cells += [convert_to_p_value_cell(each.corrected[ACCURACY])] if corrected or trained else []
    cells += [convert_to_percent_cell(each.macro_f1.widest), convert_to_p_value_cell(each.corrected[MACRO_F1])]
    return [*cells, convert_to_number_cell(auroc), convert_to_p_value_cell(each.corrected[AUROC])]
