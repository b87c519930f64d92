"""A threshold for one class: fixed on validation images for a guaranteed sensitivity, applied to test images."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.bounded_mean import confidence_below, group_means, upper_bound
from pylorus.evaluation.inputs import checked_flags, checked_scores, group_codes
from pylorus.evaluation.interval import check_confidence
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


@dataclass(frozen=True)
class SensitivityThreshold:
    """A threshold fixed on validation images, and what it guarantees of the sensitivity for other patients.

    The sensitivity meant is that for one image of a new patient, in which each patient counts the same. It is that
    of images too, unless patients with many images are easier or harder to recognise than others.

    Attributes:
        threshold: Images with this score or more are called positive.
        sensitivity: The sensitivity asked for, in (0, 1].
        confidence: The confidence asked for, in (0, 1).
        confidence_reached: The confidence with which the true sensitivity is at least the one asked for, in [0, 1].
        sensitivity_reached: The highest sensitivity that is guaranteed at the confidence asked for, in [0, 1].
        images: How many validation images are of the class.
        patients: How many patients these are of.
        patients_needed: See `patients_needed`.
    """

    threshold: float
    sensitivity: float
    confidence: float
    confidence_reached: float
    sensitivity_reached: float
    images: int
    patients: int
    patients_needed: int | None

    @property
    def is_guaranteed(self) -> bool:
        """Whether the sensitivity asked for is reached at the confidence asked for."""
        return self.confidence_reached >= self.confidence


def threshold_at_sensitivity(
    positive: NDArray[np.bool_],
    scores: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    sensitivity: float,
    confidence: float,
) -> SensitivityThreshold:
    """The highest threshold whose true sensitivity is at least the one asked for, at the confidence asked for.

    It is a one-sided tolerance bound. With one image a patient it is the k-th lowest score of the n positives, with
    the largest k for which a binomial variable of n trials and chance 1 - sensitivity is at least k with the
    confidence asked for (Wilks 1941). With several images a patient, the share of missed images of each patient takes
    the place of the single misses (see `pylorus.evaluation.bounded_mean`).

    Give validation images only, and of patients like those whose images it will be applied to. Where there are too
    few positive patients for any threshold, the lowest score of the positives is taken, and the result says what
    confidence it reaches.

    Args:
        positive: Shape (n,): whether each validation image is of the class.
        scores: Shape (n,): the class's probability, or any score that is larger for likelier.
        groups: Names of shape (n,) of the images' patients, or None if each image stands for itself.
        sensitivity: In (0, 1]; 1 can be guaranteed by no number of patients.
        confidence: In (0, 1).

    Raises:
        ValueError: If the arrays don't fit each other, no image is positive, sensitivity is not in (0, 1], or
            confidence is not in (0, 1).

    Example:
        >>> scores = np.linspace(0.5, 0.99, 50)
        >>> found = threshold_at_sensitivity(np.ones(50, dtype=bool), scores, sensitivity=0.95, confidence=0.9)
        >>> found.threshold, found.is_guaranteed, round(found.confidence_reached, 3)
        (0.5, True, 0.923)
        >>> few = threshold_at_sensitivity(np.ones(20, dtype=bool), scores[:20], sensitivity=0.95, confidence=0.9)
        >>> few.threshold, few.is_guaranteed, round(few.confidence_reached, 3), few.patients_needed
        (0.5, False, 0.642, 45)
    """
    flags = checked_flags(positive, name="positive")
    values = checked_scores(scores, length=len(flags))
    codes = group_codes(groups, length=len(flags))
    needed = patients_needed(sensitivity=sensitivity, confidence=confidence)
    if not flags.any():
        raise ValueError("no validation image is of the class: no threshold can be fixed for it")
    values, codes = values[flags], codes[flags]

    def missed(threshold: float) -> NDArray[np.float64]:
        return group_means((values < threshold).astype(np.float64), codes)

    # The confidence falls as the threshold rises, so that the highest threshold is found by halving. The lowest one
    # misses nothing and is taken in any case.
    candidates = np.unique(values)
    low, high = 0, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        enough = confidence_below(missed(candidates[middle]), 1 - sensitivity) >= confidence
        low, high = (middle, high) if enough else (low, middle)
    shares = missed(candidates[low])
    return SensitivityThreshold(
        threshold=float(candidates[low]),
        sensitivity=float(sensitivity),
        confidence=float(confidence),
        confidence_reached=confidence_below(shares, 1 - sensitivity),
        sensitivity_reached=1 - upper_bound(shares, confidence=confidence),
        images=len(values),
        patients=len(shares),
        patients_needed=needed,
    )


def patients_needed(*, sensitivity: float, confidence: float) -> int | None:
    """How many positive patients the validation set must have so that a threshold can guarantee a sensitivity.

    It is the smallest n with sensitivity**n <= 1 - confidence: were the true sensitivity lower, all n patients would
    be called positive with a chance of less than 1 - confidence.

    Args:
        sensitivity: In (0, 1].
        confidence: In (0, 1).

    Returns:
        A number of patients; None for a sensitivity of 1, which no number guarantees.

    Raises:
        ValueError: If sensitivity is not in (0, 1], or confidence is not in (0, 1).

    Example:
        >>> patients_needed(sensitivity=0.95, confidence=0.9), patients_needed(sensitivity=0.95, confidence=0.95)
        (45, 59)
    """
    if not 0 < sensitivity <= 1:
        raise ValueError(f"sensitivity is {sensitivity}; expected a share in (0, 1], such as 0.95")
    check_confidence(confidence)
    if sensitivity == 1:
        return None
    # A hair less, so that rounding does not ask for one patient more where the two sides are equal (0.5, 0.75).
    return max(1, math.ceil(math.log1p(-confidence) / math.log(sensitivity) - 1e-9))


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
