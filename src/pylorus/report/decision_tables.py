"""Tables of calibration before and after temperature scaling, and of thresholds fixed on validation images."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.calibration import calibration_line
from pylorus.evaluation.decisions import area_under_risk_coverage
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.sentence import format_guarantee_sentence, format_percent_at_least, format_threshold
from pylorus.report.basis import format_test_basis
from pylorus.report.level import IMAGES, PATIENTS
from pylorus.report.operating import ThresholdResult
from pylorus.report.options import CONFIDENCE
from pylorus.report.result import Result
from pylorus.report.run_facts import format_validation_images, is_validated_on_test
from pylorus.report.table import (
    Cell,
    Column,
    Number,
    Row,
    Table,
    convert_to_number_cell,
    convert_to_percent_cell,
    create_text_columns,
)


def build_calibration_table(results: Sequence[Result], *, class_name: str | None = None) -> Table:
    """Build the table of calibration scores on test images before and after temperature scaling, two rows per result.

    Args:
        results: At least one, each with a calibration.
        class_name: Short name of the class whose calibration line is reported; None for no line.
    """
    rows = []
    for result in results:
        calibration = result.calibration
        assert calibration is not None
        suffix = "" if calibration.temperature.identified else ", not identified"
        fitted = (
            f"temperature {calibration.temperature.temperature:.2f} ({calibration.temperature.images:,} images{suffix})"
        )
        labels = ("uncalibrated", fitted)
        sides = ((calibration.before, calibration.uncalibrated), (calibration.after, calibration.test))
        for label, (scores, predictions) in zip(labels, sides, strict=True):
            certainty = predictions.probabilities.max(axis=1)
            area = area_under_risk_coverage(predictions.correct, certainty, result.test.clusters, confidence=CONFIDENCE)
            cells: list[Cell] = [convert_to_number_cell(each) for each in (scores.ece, scores.brier, scores.nll, area)]
            cells += (
                _build_calibration_line_cells(predictions, class_name, result.test.clusters)
                if class_name is not None
                else []
            )
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
            *(Column(title, over=f"line of {class_name}") for title in ("slope", "intercept") if class_name),
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _build_calibration_line_cells(
    predictions: Predictions, class_name: str, groups: NDArray[np.generic] | None
) -> tuple[Number, Number] | tuple[str, str]:
    if class_name not in predictions.class_names:
        return "", ""
    column = predictions.class_names.index(class_name)
    probability = np.clip(predictions.probabilities[:, column], 0, 1)
    line = calibration_line(predictions.true == column, probability, groups, confidence=CONFIDENCE)
    return convert_to_number_cell(line.slope, digits=2), convert_to_number_cell(line.intercept, digits=2)


def build_threshold_table(results: Sequence[Result], *, level: str = IMAGES) -> Table:
    """Build the table of a threshold's performance on test images; it was fixed on the images used for validation.

    Args:
        results: At least one, each with a threshold at the level.
        level: `image-level` or `patient-level`.
    """
    points = [(result, point) for result in results for point in result.operating if point.level == level]
    first = points[0][1]
    target, confidence = f"{100 * first.fixed.sensitivity:g} %", f"{100 * first.fixed.confidence:g} %"
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
            Column("positives", over=fixed_title),
            *([] if level == PATIENTS else [Column("positive groups", over=fixed_title)]),
            Column(f"guaranteed sensitivity, {confidence} confidence", over=fixed_title, unit="%"),
            Column("positives", over="test"),
            *(Column(name, over="test", unit="%") for name in ("sensitivity", "specificity", "precision", "NPV")),
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
        f"{result.label} ({each.fixed.patients:,} {patients}; {format_percent_at_least(each.fixed.confidence_reached)} % "
        f"confidence of {target})"
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
