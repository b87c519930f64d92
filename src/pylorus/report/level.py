"""All indices of one set of predictions, with intervals, at image level or at patient level."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.confusion import confusion_matrix
from pylorus.evaluation.index_intervals import IndexEstimates, indices_of_predictions
from pylorus.evaluation.patient import patient_level
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.proportion import ClassProportions, proportions_of_predictions
from pylorus.evaluation.ranking import RankingEstimates, ranking_of_predictions
from pylorus.report.options import CONFIDENCE

IMAGES, PATIENTS = "image-level", "patient-level"


@dataclass(frozen=True, eq=False)
class Level:
    """Performance of a set of predictions at one level.

    Attributes:
        name: `IMAGES` or `PATIENTS`.
        predictions: One row per image or per group.
        confusion: Counts of shape (classes, classes); rows are true, columns predicted.
        shares: Indices that are proportions, with Wilson intervals that allow for groups.
        indices: F1, balanced accuracy, macro averages, kappa and MCC, with intervals.
        ranking: AUROC and average precision, with intervals.
        left_out: Number of groups excluded because their images have several true classes; 0 at image level.
    """

    name: str
    predictions: Predictions
    confusion: NDArray[np.int64]
    shares: ClassProportions
    indices: IndexEstimates
    ranking: RankingEstimates
    left_out: int


def evaluate_images(predictions: Predictions) -> Level:
    """Evaluate predictions per image; intervals allow for images of one group."""
    return _evaluate_level(IMAGES, predictions, predictions.clusters, 0)


def group_by_patient(predictions: Predictions) -> tuple[Predictions, int] | None:
    """Reduce predictions to one row per group; None if no group has several images.

    Returns:
        The predictions, and the number of groups excluded because their images have several true classes. None also if
        all groups are excluded.
    """
    groups, images = np.unique(predictions.group, return_inverse=True)
    if len(groups) == len(predictions.true):
        return None
    lowest, highest = np.full(len(groups), predictions.classes), np.full(len(groups), -1)
    np.minimum.at(lowest, images, predictions.true)
    np.maximum.at(highest, images, predictions.true)
    if (lowest < highest).all():
        return None
    patients = patient_level(predictions, leave_out_mixed=True)
    return patients.predictions, len(patients.left_out)


def evaluate_patients(predictions: Predictions) -> Level | None:
    """Evaluate predictions per patient, by the mean of its images; None if that equals image level or is undefined."""
    patients = group_by_patient(predictions)
    return None if patients is None else _evaluate_level(PATIENTS, patients[0], None, patients[1])


def _evaluate_level(
    name: str,
    predictions: Predictions,
    groups: NDArray[np.generic] | None,
    left_out: int,
) -> Level:
    true, predicted, classes = predictions.true, predictions.predicted, predictions.classes
    return Level(
        name=name,
        predictions=predictions,
        confusion=confusion_matrix(true, predicted, classes),
        shares=proportions_of_predictions(true, predicted, groups, classes=classes, confidence=CONFIDENCE),
        indices=indices_of_predictions(true, predicted, groups, classes=classes, confidence=CONFIDENCE),
        ranking=ranking_of_predictions(true, predictions.probabilities, groups, confidence=CONFIDENCE),
        left_out=left_out,
    )
