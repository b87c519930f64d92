"""The worst errors: the misclassified test images on which the model was most confident, for a failure analysis."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pylorus.evaluation.predictions import Predictions
from pylorus.report.basis import format_test_basis
from pylorus.report.result import Result
from pylorus.report.table import Cell, Column, Number, Row, Table, create_text_columns

WORST = 12
"""Maximum number of errors shown."""


@dataclass(frozen=True)
class Misclassification:
    """A misclassified test image.

    Attributes:
        sample: Id of the image.
        true: Short name of the true class.
        predicted: Short name of the predicted class.
        certainty: Calibrated probability of the predicted class, in [0, 1].
        chance: Calibrated probability of the true class, in [0, 1].
        missed_by: Number of compared results that misclassify it, including this one.
    """

    sample: str
    true: str
    predicted: str
    certainty: float
    chance: float
    missed_by: int


def find_worst_mistakes(result: Result, peers: Sequence[Result]) -> tuple[Misclassification, ...]:
    """Return the misclassified images of one result, most confident first, at most `WORST`.

    Args:
        result: The result whose errors are returned.
        peers: Results on the same test images, including this one.
    """
    predictions = result.test.predictions
    rows = np.arange(len(predictions.true))
    confidence, true_probability = (
        predictions.probabilities.max(axis=1),
        predictions.probabilities[rows, predictions.true],
    )
    error_counts = dict.fromkeys(predictions.sample.tolist(), 0)
    for peer in peers:
        for name in peer.test.predictions.sample[~peer.test.predictions.correct].tolist():
            error_counts[name] += 1
    return tuple(
        Misclassification(
            sample=str(predictions.sample[row]),
            true=predictions.class_names[predictions.true[row]],
            predicted=predictions.class_names[predictions.predicted[row]],
            certainty=float(confidence[row]),
            chance=float(true_probability[row]),
            missed_by=error_counts[str(predictions.sample[row])],
        )
        for row in find_confident_errors(predictions)
    )


def find_confident_errors(predictions: Predictions) -> list[int]:
    """Return the row indices of misclassified images, most confident first, at most `WORST`."""
    confidence = predictions.probabilities.max(axis=1)
    # Ties are broken by sample id, so that the order does not depend on the order in the file.
    order = sorted(
        np.flatnonzero(~predictions.correct), key=lambda row: (-confidence[row], str(predictions.sample[row]))
    )
    return [int(row) for row in order[:WORST]]


def build_mistake_table(
    result: Result, mistakes: Sequence[Misclassification], *, peers: int, names: bool, number: int = 1
) -> Table:
    """Build the table of the worst errors; with `names` also with file and group, which may identify a patient.

    Args:
        result: The result whose errors are listed.
        mistakes: From `find_worst_mistakes`.
        peers: Number of results on the same images.
        names: Whether file and group are shown.
        number: Number of the table if the report has several.
    """
    total = int((~result.test.predictions.correct).sum())
    return Table(
        key="worst-mistakes" + (f"-{number}" if number > 1 else ""),
        title=f"{result.label}: the {len(mistakes)} most confident of {total} misclassifications",
        basis=format_test_basis([result]),
        columns=(
            *create_text_columns("sample"),
            *(create_text_columns("file", "group") if names else ()),
            *create_text_columns("true", "taken for"),
            Column("certainty", unit="%"),
            Column("probability of the true class", unit="%"),
            *((Column(f"mistaken, of {peers} results"),) if peers > 1 else ()),
        ),
        rows=tuple(Row(tuple(_build_mistake_cells(result, each, peers, names))) for each in mistakes),
        notes=(
            "Samples are identified by an id that does not reveal the file name; use --names to include file names.",
        )
        if not names
        else (),
    )


def _build_mistake_cells(result: Result, mistake: Misclassification, peers: int, names: bool) -> list[Cell]:
    cells: list[Cell] = [mistake.sample]
    if names:
        assert result.run.split is not None
        row = result.run.split.table.set_index("sample_id").loc[mistake.sample]
        cells += [str(row["path"]), str(row["group"])]
    cells += [mistake.true, mistake.predicted, Number(100 * mistake.certainty), Number(100 * mistake.chance)]
    return [*cells, mistake.missed_by] if peers > 1 else cells
