"""Calibration before and after the temperature, and the threshold that was fixed on validation images."""

from collections.abc import Sequence

from pylorus.report.basis import tested_on
from pylorus.report.level import IMAGES, PATIENTS
from pylorus.report.operating import Operating
from pylorus.report.result import Result
from pylorus.report.run_facts import validation_images
from pylorus.report.table import Cell, Column, Number, Row, Table, in_percent, text_columns


def calibration_table(results: Sequence[Result]) -> Table:
    """Scores of the test images' probabilities before and after the temperature.

    Args:
        results: At least one, each with a calibration.
    """
    scores = (("ece", "ECE"), ("brier", "Brier"), ("nll", "NLL"))
    rows = []
    unidentified = False
    for result in results:
        found = result.calibration
        assert found is not None
        unidentified |= not found.temperature.identified
        cells: list[Cell] = [Number(found.temperature.temperature, 2)]
        for name, _ in scores:
            cells += [Number(getattr(found.before, name), 3), Number(getattr(found.after, name), 3)]
        rows.append(Row((result.run.label, result.stage.name, found.temperature.images, *cells)))
    notes = [
        "ECE: expected calibration error over ten bins of equal mass, above 0 by chance even where calibration is "
        "perfect. Brier: squared error summed over classes. NLL: negative log likelihood, in nats. Lower is better.",
    ]
    if unidentified:
        notes.append(
            "A temperature of 1.00 with equal scores on both sides: the images that it is fitted on could not tell "
            "one, so the logits are left as they are."
        )
    return Table(
        key="calibration",
        title=(
            "Calibration of the test images before and after a temperature fitted on "
            + validation_images([result.run for result in results])
        ),
        basis=tested_on(results),
        columns=(
            *text_columns("model", "stage"),
            Column("fitted on images"),
            Column("temperature"),
            *(Column(side, over=title) for _, title in scores for side in ("before", "after")),
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def threshold_table(results: Sequence[Result], *, level: str = IMAGES) -> Table:
    """What a threshold fixed on validation images gives on test images.

    Args:
        results: At least one, each with a threshold at the level.
        level: `image-level` or `patient-level`.
    """
    points = [(result, point) for result in results for point in result.operating if point.level == level]
    first = points[0][1]
    unit = "patients" if level == PATIENTS else "images"
    return Table(
        key=f"threshold{'-patients' if level == PATIENTS else ''}",
        title=(
            f"A threshold for {first.class_name}, fixed on validation {unit} at a sensitivity of at least "
            f"{100 * first.wanted:g} %, applied untouched to test {unit}"
        ),
        basis=tested_on([result for result, _ in points], level=level),
        columns=(
            *text_columns("model", "stage"),
            Column("threshold"),
            Column("positives", over="validation"),
            Column("sensitivity", over="validation", unit="%"),
            Column("positives", over="test"),
            *(Column(name, over="test", unit="%") for name in ("sensitivity", "specificity", "precision", "NPV")),
        ),
        rows=tuple(_threshold_row(result, point) for result, point in points),
        notes=(
            f"A test {unit[:-1]} is called {first.class_name} where its calibrated probability reaches the threshold. "
            "With few validation positives the threshold is a rough one; the test interval says what was reached.",
        ),
    )


def _threshold_row(result: Result, point: Operating) -> Row:
    tested, fixed = point.test, point.validation
    return Row(
        (
            result.run.label,
            result.stage.name,
            Number(tested.threshold, words=f"{tested.threshold:.3g}"),
            fixed.sensitivity.total,
            in_percent(fixed.sensitivity),
            tested.sensitivity.total,
            in_percent(tested.sensitivity),
            in_percent(tested.specificity),
            in_percent(tested.precision),
            in_percent(tested.npv),
        )
    )
