"""A threshold for one class: fixed on validation images at a wanted sensitivity, applied to test images."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.inputs import checked_flags, checked_scores, group_codes
from pylorus.evaluation.proportion import Proportion, clustered_wilson, wilson


@dataclass(frozen=True)
class OperatingPoint:
    """What calling every image with score >= threshold positive gives on one set of images.

    Attributes:
        threshold: Of the score, as fixed before.
        sensitivity: Share of positives called positive; nan without positives.
        specificity: Share of negatives called negative; nan without negatives.
        precision: Share of those called positive that are; nan if none is called positive.
        npv: Share of those called negative that are; nan if none is called negative.
    """

    threshold: float
    sensitivity: Proportion
    specificity: Proportion
    precision: Proportion
    npv: Proportion


def threshold_at_sensitivity(positive: NDArray[np.bool_], scores: NDArray[np.float64], *, sensitivity: float) -> float:
    """The highest threshold at which at least the wanted share of these positives is called positive.

    Give validation images only. On other images the sensitivity will differ: it is an estimate from so many
    positives, and the test set's own interval (`operating_point`) says what was reached.

    Args:
        positive: Shape (n,): whether each validation image is of the class.
        scores: Shape (n,): the class's probability, or any score that is larger for likelier.
        sensitivity: Wanted share, in (0, 1].

    Returns:
        A score; images with that score or more are called positive.

    Raises:
        ValueError: If the arrays don't fit each other, no image is positive, or sensitivity is not in (0, 1].

    Example:
        >>> scores = np.array([0.9, 0.8, 0.6, 0.3, 0.7, 0.1])
        >>> positive = np.array([True, True, True, True, False, False])
        >>> threshold_at_sensitivity(positive, scores, sensitivity=0.75)
        0.6
    """
    flags = checked_flags(positive, name="positive")
    values = checked_scores(scores, length=len(flags))
    if not 0 < sensitivity <= 1:
        raise ValueError(f"sensitivity is {sensitivity}; expected a share in (0, 1], such as 0.95")
    if not flags.any():
        raise ValueError("no validation image is of the class: no threshold can be fixed for it")
    falling = np.sort(values[flags])[::-1]
    # 0.55 * 100 is 55.00000000000001 in floating point; a hair less asks for 55 positives, not for 56.
    wanted = math.ceil(sensitivity * len(falling) - 1e-9)
    return float(falling[max(wanted, 1) - 1])


def operating_point(
    positive: NDArray[np.bool_],
    scores: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    threshold: float,
    confidence: float = 0.95,
) -> OperatingPoint:
    """What a threshold fixed elsewhere gives on these images, with Wilson intervals that allow for groups.

    Args:
        positive: Shape (n,): whether each image is of the class.
        scores: Shape (n,): the same score that the threshold was fixed on.
        groups: Names of shape (n,) of what the images belong to, or None if each stands for itself.
        threshold: Images with this score or more are called positive.
        confidence: Coverage of the intervals, in (0, 1).

    Raises:
        ValueError: If the arrays don't fit each other, are empty, hold nan, or the threshold is nan.

    Example:
        >>> scores = np.array([0.9, 0.4, 0.7, 0.1])
        >>> point = operating_point(np.array([True, True, False, False]), scores, threshold=0.5)
        >>> point.sensitivity.value, point.specificity.value
        (0.5, 0.5)
    """
    flags = checked_flags(positive, name="positive")
    values = checked_scores(scores, length=len(flags))
    codes = group_codes(groups, length=len(flags))
    if math.isnan(threshold):
        raise ValueError("threshold is nan; fix it on validation images with threshold_at_sensitivity")
    called = values >= threshold

    def share(success: NDArray[np.bool_], among: NDArray[np.bool_]) -> Proportion:
        if not among.any():
            return wilson(0, 0, confidence=confidence)
        return clustered_wilson(success[among], codes[among], confidence=confidence)

    return OperatingPoint(
        threshold=float(threshold),
        sensitivity=share(called, flags),
        specificity=share(~called, ~flags),
        precision=share(flags, called),
        npv=share(~flags, ~called),
    )
