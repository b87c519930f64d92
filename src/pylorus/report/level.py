"""All indices of one set of predictions, with intervals, at one level: of images or of patients."""

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
    """What predictions are worth at one level.

    Attributes:
        name: `IMAGES` or `PATIENTS`.
        predictions: One row an image, or a group.
        confusion: Counts of shape (classes, classes); rows are true, columns predicted.
        shares: Indices that are shares, with Wilson intervals that allow for groups.
        indices: F1, balanced accuracy, macro averages, kappa and MCC, with intervals.
        ranking: AUROC and average precision, with intervals.
        left_out: Groups left out because their images carry several true classes; 0 at image level.
    """

    name: str
    predictions: Predictions
    confusion: NDArray[np.int64]
    shares: ClassProportions
    indices: IndexEstimates
    ranking: RankingEstimates
    left_out: int


def image_level(predictions: Predictions) -> Level:
    """Each image counts; intervals keep the images of a group together."""
    return _level(IMAGES, predictions, predictions.clusters, 0)


def patients_of(predictions: Predictions) -> tuple[Predictions, int] | None:
    """Predictions of one row a group, and how many groups have no one truth; None if no group holds several images.

    Groups whose images carry several true classes are left out, and counted.
    """
    groups, images = np.unique(predictions.group, return_inverse=True)
    if len(groups) == len(predictions.true):
        return None
    lowest, highest = np.full(len(groups), predictions.classes), np.full(len(groups), -1)
    np.minimum.at(lowest, images, predictions.true)
    np.maximum.at(highest, images, predictions.true)
    if (lowest < highest).all():
        return None
    found = patient_level(predictions, leave_out_mixed=True)
    return found.predictions, len(found.left_out)


def patients_level(predictions: Predictions) -> Level | None:
    """Each patient counts once, by the mean of what was said of its images; None where that is nothing new."""
    found = patients_of(predictions)
    return None if found is None else _level(PATIENTS, found[0], None, found[1])


def _level(
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
