"""What a model is worth where something is decided by it: thresholds, net benefit, abstention.

A threshold is fixed on validation images and applied, untouched, to test images.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.bounded_mean import confidence_below, group_means, upper_bound
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.influence import estimate_from_variance, estimate_mean_variance
from pylorus.evaluation.inputs import checked_flags, checked_scores, group_codes
from pylorus.evaluation.interval import check_confidence
from pylorus.evaluation.proportion import Proportion, clustered_wilson, wilson
from pylorus.evaluation.ranking import compute_mean_share_above

ROUNDING = 1e-5
"""What lies between a threshold and the image that fixes it: batches of another size round otherwise."""


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
    margin: float = 0.0,
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
        margin: Taken off the threshold, such as `ROUNDING`, >= 0, but never beyond 0; a lower threshold misses no more.

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
    shares, lowest = missed(candidates[low]), float(candidates[low])
    return SensitivityThreshold(
        threshold=max(lowest - margin, min(lowest, 0.0)),
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


THRESHOLDS = np.arange(1, 100) / 100
"""Threshold probabilities unless told otherwise: 1 % to 99 %."""


@dataclass(frozen=True, eq=False)
class NetBenefit:
    """Net benefit in true positives an image; each array of shape (thresholds,).

    Attributes:
        threshold: Threshold probabilities, in (0, 1), rising.
        model: Of acting on images whose probability reaches the threshold; at most the class's share.
        treat_all: Of acting on every image.
        treat_none: Of never acting: 0.
        low: Lower end of the model's interval at each threshold.
        high: Upper end.
        prevalence: The class's share of the images, on which the whole curve rests: in a test set with as
            many cancers as ulcers it says little of a clinic where cancers are rare.
    """

    threshold: NDArray[np.float64]
    model: NDArray[np.float64]
    treat_all: NDArray[np.float64]
    treat_none: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    prevalence: float


def net_benefit(
    positive: NDArray[np.bool_],
    probability: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    confidence: float = 0.95,
    thresholds: NDArray[np.float64] = THRESHOLDS,
) -> NetBenefit:
    """Compute TP/n - FP/n * p / (1 - p) at each threshold probability p, with its interval.

    TP/n and FP/n are proportions; their Wilson intervals, which allow for groups, are combined with the correlation of
    the two (MOVER). The band holds at each threshold by itself, not along the whole curve at once.

    Args:
        positive: Shape (n,): whether each image is of the class.
        probability: Shape (n,): the class's probability, calibrated, in [0, 1].
        groups: Names of shape (n,) of what the images belong to, or None if each stands for itself.
        confidence: Coverage of the interval at each threshold, in (0, 1).
        thresholds: Threshold probabilities, each in (0, 1), rising.

    Raises:
        ValueError: If the arrays don't fit each other, are empty, or a probability or threshold is out of
            range.

    Example:
        >>> chance, steps = np.array([0.9, 0.3]), np.array([0.2, 0.5])
        >>> curve = net_benefit(np.array([True, False]), chance, thresholds=steps)
        >>> curve.model.tolist(), curve.treat_all.tolist()
        ([0.375, 0.5], [0.375, 0.0])
    """
    check_confidence(confidence)
    flags = checked_flags(positive, name="positive")
    chance = checked_scores(probability, length=len(flags))
    if ((chance < 0) | (chance > 1)).any():
        raise ValueError("a net benefit needs probabilities in [0, 1]; give calibrated ones, no logits")
    steps = np.asarray(thresholds, dtype=np.float64)
    if steps.ndim != 1 or not len(steps) or not ((steps > 0) & (steps < 1)).all() or (np.diff(steps) <= 0).any():
        raise ValueError("thresholds must be rising probabilities in (0, 1)")
    codes = group_codes(groups, length=len(flags))
    odds = steps / (1 - steps)
    share = float(flags.mean())
    model, low, high = zip(
        *(
            _estimate_benefit(flags, chance >= step, weight, codes, confidence)
            for step, weight in zip(steps, odds, strict=True)
        ),
        strict=True,
    )
    return NetBenefit(
        threshold=steps,
        model=np.array(model),
        treat_all=share - (1 - share) * odds,
        treat_none=np.zeros(len(steps)),
        low=np.array(low),
        high=np.array(high),
        prevalence=share,
    )


def _estimate_benefit(
    positive: NDArray[np.bool_], called: NDArray[np.bool_], odds: float, codes: NDArray[np.int64], confidence: float
) -> tuple[float, float, float]:
    """Net benefit at one threshold, and the ends of its interval."""
    kinds = (called & positive, called & ~positive)
    gain, loss = (clustered_wilson(kind, codes, confidence=confidence) for kind in kinds)
    added = np.array(
        [np.bincount(codes, weights=kind - share.value) for kind, share in zip(kinds, (gain, loss), strict=True)]
    )
    spread = added @ added.T
    scale = float(np.sqrt(spread[0, 0] * spread[1, 1]))
    correlation = float(spread[0, 1]) / scale if scale > 0 else 0.0

    def reach(one: float, two: float) -> float:
        return float(np.sqrt(max(0.0, one**2 + two**2 - 2 * correlation * one * two)))

    value = gain.value - odds * loss.value
    below = reach(gain.value - gain.low, odds * (loss.high - loss.value))
    above = reach(gain.high - gain.value, odds * (loss.value - loss.low))
    return value, value - below, value + above


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Points of the curve, from the surest images alone to all images; each array of shape (points,).

    Attributes:
        certainty: The least certainty at which the model still answers.
        coverage: Share of images answered, in (0, 1]; the last is 1.
        risk: Share of the answered images that are mistaken, in [0, 1]; the last is 1 - accuracy.
        area: Mean risk over images, each at its own coverage (AURC, Geifman and El-Yaniv 2017), in [0, 1]:
            lower is better, and 1 - accuracy is what certainty that says nothing gives on average.
    """

    certainty: NDArray[np.float64]
    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    area: float


def risk_coverage(correct: NDArray[np.bool_], certainty: NDArray[np.float64]) -> RiskCoverage:
    """Answer the surest images first and count mistakes.

    Images of equal certainty are answered together, so the curve does not depend on their order.

    Args:
        correct: Shape (n,): whether each image is recognised.
        certainty: Shape (n,): how sure the model was, such as the largest probability; any finite numbers.

    Raises:
        ValueError: If the arrays don't fit each other, are empty, or hold nan.

    Example:
        >>> curve = risk_coverage(np.array([True, False, True, True]), np.array([0.9, 0.4, 0.8, 0.8]))
        >>> curve.coverage.tolist(), curve.risk.tolist()
        ([0.25, 0.75, 1.0], [0.0, 0.0, 0.25])
    """
    right = checked_flags(correct, name="correct")
    sure = checked_scores(certainty, length=len(right))
    levels, member, images = np.unique(-sure, return_inverse=True, return_counts=True)
    answered = np.cumsum(images)
    mistakes = np.cumsum(np.bincount(member, weights=~right))
    risk = mistakes / answered
    return RiskCoverage(
        certainty=-levels,
        coverage=answered / len(right),
        risk=risk,
        area=float((risk * images).sum() / len(right)),
    )


def area_under_risk_coverage(
    correct: NDArray[np.bool_],
    certainty: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Compute the area under the risk-coverage curve with an interval that keeps groups together.

    The interval is the Wilson interval of as many images as have the area's linearised variance, with Student's t.

    Args:
        correct: Shape (n,): whether each image is recognised.
        certainty: Shape (n,): how sure the model was; any finite numbers.
        groups: Names of shape (n,) of what the images belong to, or None if each stands for itself.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        In [0, 1]; the value is the `area` of `risk_coverage`.

    Raises:
        ValueError: If the arrays don't fit each other, are empty, or hold NaN.

    Example:
        >>> found = area_under_risk_coverage(np.array([True, False, True, True]), np.array([0.9, 0.4, 0.8, 0.8]))
        >>> round(found.value, 4), found.low < found.value < found.high
        (0.0625, True)
    """
    check_confidence(confidence)
    right = checked_flags(correct, name="correct")
    sure = checked_scores(certainty, length=len(right))
    codes = group_codes(groups, length=len(right))
    found = compute_mean_share_above(~right, np.ones(len(right), dtype=np.bool_), sure)
    spread = estimate_mean_variance(found.contributions * len(right), codes)
    return estimate_from_variance(found.value, spread, codes, confidence=confidence)
