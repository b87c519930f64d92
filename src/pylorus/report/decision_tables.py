"""Calibration before and after the temperature, and what a threshold that was fixed on validation images gives."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.calibration import calibration_line
from pylorus.evaluation.decisions import area_under_risk_coverage
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.sentence import guarantee_sentence, percent_at_least, threshold_text
from pylorus.report.basis import tested_on
from pylorus.report.level import IMAGES, PATIENTS
from pylorus.report.operating import Operating
from pylorus.report.options import CONFIDENCE
from pylorus.report.result import Result
from pylorus.report.run_facts import is_validated_on_test, validation_images
from pylorus.report.table import Cell, Column, Number, Row, Table, as_number, in_percent, text_columns


def calibration_table(results: Sequence[Result], *, class_name: str | None = None) -> Table:
    """List scores of the test images' probabilities before and after the temperature, two rows a result.

    Args:
        results: At least one, each with a calibration.
        class_name: Short name of the class whose calibration line is given; None for no line.
    """
    rows = []
    for result in results:
        found = result.calibration
        assert found is not None
        doubt = "" if found.temperature.identified else ", not identified"
        fitted = f"temperature {found.temperature.temperature:.2f} ({found.temperature.images:,} images{doubt})"
        labels = ("as computed", fitted)
        sides = ((found.before, found.uncalibrated), (found.after, found.test))
        for label, (scores, predictions) in zip(labels, sides, strict=True):
            certainty = predictions.probabilities.max(axis=1)
            area = area_under_risk_coverage(predictions.correct, certainty, result.test.clusters, confidence=CONFIDENCE)
            cells: list[Cell] = [as_number(each) for each in (scores.ece, scores.brier, scores.nll, area)]
            cells += _line_cells(predictions, class_name, result.test.clusters) if class_name is not None else []
            rows.append(Row((result.run.label, result.stage.name, label, *cells)))
    notes = [
        "ECE: expected calibration error over ten bins of equal mass, above 0 by chance even where calibration is "
        "perfect; its interval leaves that out. Brier: squared error summed over classes. NLL: negative log "
        "likelihood, in nats. AURC: area under the risk-coverage curve, the mean share of errors among the images of "
        "which the model is surest. Lower is better for each.",
    ]
    if class_name is not None:
        notes.append(
            f"Calibration line of {class_name}: log odds of the truth against log odds of the model. Slope 1 and "
            "intercept 0 are perfect; a slope below 1 is overconfidence, an intercept (with the slope held at 1) above "
            f"0 means that {class_name} is more frequent than the model says."
        )
    if any(not result.calibration.temperature.identified for result in results if result.calibration is not None):
        notes.append(
            "Not identified: the images that it is fitted on single out no temperature, so the logits are left as "
            "they are."
        )
    fitted_on = validation_images([result.run for result in results])
    return Table(
        key="calibration",
        title=f"Calibration of the test images before and after a temperature fitted on {fitted_on}",
        basis=tested_on(results),
        columns=(
            *text_columns("model", "stage", "probabilities"),
            *(Column(title) for title in ("ECE", "Brier", "NLL", "AURC")),
            *(Column(title, over=f"line of {class_name}") for title in ("slope", "intercept") if class_name),
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _line_cells(
    predictions: Predictions, class_name: str, groups: NDArray[np.generic] | None
) -> tuple[Number, Number] | tuple[str, str]:
    if class_name not in predictions.class_names:
        return "", ""
    column = predictions.class_names.index(class_name)
    chance = np.clip(predictions.probabilities[:, column], 0, 1)
    line = calibration_line(predictions.true == column, chance, groups, confidence=CONFIDENCE)
    return as_number(line.slope, digits=2), as_number(line.intercept, digits=2)


def threshold_table(results: Sequence[Result], *, level: str = IMAGES) -> Table:
    """List what a threshold gives on test images, fixed on validation images or, where these are the same, on them.

    Args:
        results: At least one, each with a threshold at the level.
        level: `image-level` or `patient-level`.
    """
    points = [(result, point) for result in results for point in result.operating if point.level == level]
    first = points[0][1]
    wanted, sure = f"{100 * first.fixed.sensitivity:g} %", f"{100 * first.fixed.confidence:g} %"
    unit = "patients" if level == PATIENTS else "images"
    runs = [result.run for result, _ in points]
    fixed_on = ("the patients of " if level == PATIENTS else "") + validation_images(runs)
    fixing = "fixed on" if all(map(is_validated_on_test, runs)) else "validation"
    applied = "" if all(map(is_validated_on_test, runs)) else f", applied untouched to test {unit}"
    return Table(
        key=f"threshold{'-patients' if level == PATIENTS else ''}",
        title=(
            f"A threshold for {first.class_name}, fixed on {fixed_on} for a true sensitivity of at least {wanted} with "
            f"{sure} confidence{applied}"
            + ("" if all(point.fixed.is_guaranteed for _, point in points) else "; not guaranteed, see below")
        ),
        basis=tested_on([result for result, _ in points], level=level),
        columns=(
            *text_columns("model", "stage"),
            Column("threshold"),
            Column("positives", over=fixing),
            *([] if level == PATIENTS else [Column("positive groups", over=fixing)]),
            Column(f"guaranteed sensitivity, {sure} confidence", over=fixing, unit="%"),
            Column("positives", over="test"),
            *(Column(name, over="test", unit="%") for name in ("sensitivity", "specificity", "precision", "NPV")),
        ),
        rows=tuple(_threshold_row(result, point) for result, point in points),
        notes=(
            f"A test {unit[:-1]} is called {first.class_name} where its calibrated probability reaches the threshold. "
            "What is guaranteed is a lower bound for new patients of the same hospitals, each patient counting the "
            "same; the test interval says what was reached.",
            *_guarantees(points, wanted, sure),
        ),
    )


def _guarantees(points: Sequence[tuple[Result, Operating]], wanted: str, sure: str) -> list[str]:
    """Which thresholds guarantee what was asked for, and what the others guarantee."""
    result, point = points[0]
    patients = "patients" if point.level == PATIENTS or result.run.grouped else "images"
    if len(points) == 1:
        part = "test" if is_validated_on_test(result.run) else "validation"
        return [guarantee_sentence(point.fixed, class_name=point.class_name, grouped=patients == "patients", part=part)]
    kept = [result.label for result, each in points if each.fixed.is_guaranteed]
    few = [
        f"{result.label} ({each.fixed.patients:,} {patients}; {percent_at_least(each.fixed.confidence_reached)} % "
        f"confidence of {wanted})"
        for result, each in points
        if not each.fixed.is_guaranteed
    ]
    sentences = [f"{wanted} with {sure} confidence is guaranteed for {', '.join(kept)}."] if kept else []
    if few:
        needed = point.fixed.patients_needed
        enough = "no number is enough" if needed is None else f"{needed:,} are needed"
        sentences.append(
            f"There are too few {patients} with {point.class_name} to guarantee {wanted} with {sure} confidence "
            f"({enough}), so that the threshold is the lowest probability of {point.class_name} among them: "
            f"{', '.join(few)}."
        )
    if patients == "images":
        sentences.append("Patients are not known, so that each image counts as one.")
    return sentences


def _threshold_row(result: Result, point: Operating) -> Row:
    tested, fixed = point.test, point.fixed
    return Row(
        (
            result.run.label,
            result.stage.name,
            Number(tested.threshold, words=threshold_text(tested.threshold)),
            fixed.images,
            *([] if point.level == PATIENTS else [fixed.patients]),
            Number(100 * fixed.sensitivity_reached, words=percent_at_least(fixed.sensitivity_reached)),
            tested.sensitivity.total,
            in_percent(tested.sensitivity),
            in_percent(tested.specificity),
            in_percent(tested.precision),
            in_percent(tested.npv),
        )
    )
