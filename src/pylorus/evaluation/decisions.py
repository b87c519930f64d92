"""Performance of a model in decisions: thresholds, net benefit, abstention, prediction sets.

A threshold is fixed on validation images and applied unchanged to test images.

A prediction set holds the plausible classes of an image, and contains the true class with a given probability:
split-conformal calibration for each class separately (Vovk 2012, "Mondrian"), with the score 1 - probability of the
class (Sadinle, Lei and Wasserman 2019). Images of one patient are not exchangeable with those of others, but patients
are: each patient of a class has the same weight, divided among its images of that class, and one additional patient
with the worst score represents the new one (hierarchical conformal prediction; Lee, Barber and Willett 2023). With one
image per patient this is the usual quantile of rank ceil((n + 1) coverage).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.discrimination import compute_mean_share_above
from pylorus.evaluation.index_intervals import Proportion, clustered_wilson, wilson
from pylorus.evaluation.influence import compute_group_means, estimate_from_variance, estimate_mean_variance
from pylorus.evaluation.intervals import Estimate, check_confidence, compute_confidence_below, compute_upper_bound
from pylorus.evaluation.predictions import check_flags, check_labels, check_probabilities, check_scores, encode_groups

ROUNDING = 1e-5
"""Margin between a threshold and the score of the image that fixes it: rounding depends on the batch size."""


@dataclass(frozen=True)
class OperatingPoint:
    """Performance on one set of images if every image with score >= threshold is called positive.

    Attributes:
        threshold: Threshold of the score, fixed beforehand.
        sensitivity: Proportion of positives that are called positive; NaN without positives.
        specificity: Proportion of negatives that are called negative; NaN without negatives.
        precision: Proportion of true positives among those called positive; NaN if none is called positive.
        npv: Proportion of true negatives among those called negative; NaN if none is called negative.
    """

    threshold: float
    sensitivity: Proportion
    specificity: Proportion
    precision: Proportion
    npv: Proportion


@dataclass(frozen=True)
class SensitivityThreshold:
    """A threshold fixed on validation images, and the sensitivity that it guarantees for other patients.

    The sensitivity is that for one image of a new patient, with equal weight for each patient. It equals that over
    images unless patients with many images are easier or harder to classify than others.

    Attributes:
        threshold: Images with this score or a higher one are called positive.
        sensitivity: Requested sensitivity, in (0, 1].
        confidence: Requested confidence, in (0, 1).
        confidence_reached: Confidence with which the true sensitivity is at least the requested one, in [0, 1].
        sensitivity_reached: Highest sensitivity that is guaranteed at the requested confidence, in [0, 1].
        images: Number of validation images of the class.
        patients: Number of patients of these images.
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
        """Whether the requested sensitivity is guaranteed at the requested confidence."""
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
    """Find the highest threshold that guarantees the requested sensitivity at the requested confidence.

    It is a one-sided tolerance bound. With one image per patient it is the k-th lowest score of the n positives, with
    the largest k for which a binomial variable of n trials with probability 1 - sensitivity is at least k with the
    requested confidence (Wilks 1941). With several images per patient, the proportion of missed images of each patient
    replaces the single misses (see `pylorus.evaluation.intervals`).

    Pass validation images only, of patients like those that the threshold will be applied to. If there are too few
    positive patients for any threshold, the lowest score of the positives is used, and the result states the
    confidence that it reaches.

    Args:
        positive: Shape (n,): whether each validation image is of the class.
        scores: Shape (n,): the class's probability, or any score that increases with it.
        groups: Patient of each image, of shape (n,), or None if each image is its own group.
        sensitivity: Requested sensitivity, in (0, 1]; no number of patients can guarantee 1.
        confidence: Requested confidence, in (0, 1).
        margin: Subtracted from the threshold, >= 0, such as `ROUNDING`, but not below 0; a lower threshold misses no
            additional positives.

    Raises:
        ValueError: If the shapes differ, no image is positive, sensitivity is not in (0, 1], or confidence is not in
            (0, 1).

    Example:
        >>> scores = np.linspace(0.5, 0.99, 50)
        >>> fixed = threshold_at_sensitivity(np.ones(50, dtype=bool), scores, sensitivity=0.95, confidence=0.9)
        >>> fixed.threshold, fixed.is_guaranteed, round(fixed.confidence_reached, 3)
        (0.5, True, 0.923)
        >>> few = threshold_at_sensitivity(np.ones(20, dtype=bool), scores[:20], sensitivity=0.95, confidence=0.9)
        >>> few.threshold, few.is_guaranteed, round(few.confidence_reached, 3), few.patients_needed
        (0.5, False, 0.642, 45)
    """
    flags = check_flags(positive, name="positive")
    values = check_scores(scores, length=len(flags))
    codes = encode_groups(groups, length=len(flags))
    needed = patients_needed(sensitivity=sensitivity, confidence=confidence)
    if not flags.any():
        raise ValueError("no validation image is of the class, so no threshold can be fixed for it")
    values, codes = values[flags], codes[flags]

    def compute_missed_proportions(threshold: float) -> NDArray[np.float64]:
        return compute_group_means((values < threshold).astype(np.float64), codes)

    # The confidence falls as the threshold rises, so bisection finds the highest threshold. The lowest one misses
    # nothing and is always allowed.
    candidates = np.unique(values)
    low, high = 0, len(candidates)
    while high - low > 1:
        middle = (low + high) // 2
        enough = compute_confidence_below(compute_missed_proportions(candidates[middle]), 1 - sensitivity) >= confidence
        low, high = (middle, high) if enough else (low, middle)
    missed_proportions, lowest = compute_missed_proportions(candidates[low]), float(candidates[low])
    return SensitivityThreshold(
        threshold=max(lowest - margin, min(lowest, 0.0)),
        sensitivity=float(sensitivity),
        confidence=float(confidence),
        confidence_reached=compute_confidence_below(missed_proportions, 1 - sensitivity),
        sensitivity_reached=1 - compute_upper_bound(missed_proportions, confidence=confidence),
        images=len(values),
        patients=len(missed_proportions),
        patients_needed=needed,
    )


def patients_needed(*, sensitivity: float, confidence: float) -> int | None:
    """Return the number of positive validation patients that a threshold needs to guarantee a sensitivity.

    It is the smallest n with sensitivity**n <= 1 - confidence: if the true sensitivity were lower, all n patients would
    be called positive with a probability of less than 1 - confidence.

    Args:
        sensitivity: Requested sensitivity, in (0, 1].
        confidence: Requested confidence, in (0, 1).

    Returns:
        Number of patients; None for a sensitivity of 1, which no number can guarantee.

    Raises:
        ValueError: If sensitivity is not in (0, 1], or confidence is not in (0, 1).

    Example:
        >>> patients_needed(sensitivity=0.95, confidence=0.9), patients_needed(sensitivity=0.95, confidence=0.95)
        (45, 59)
    """
    if not 0 < sensitivity <= 1:
        raise ValueError(f"sensitivity is {sensitivity}; expected a proportion in (0, 1], such as 0.95")
    check_confidence(confidence)
    if sensitivity == 1:
        return None
    # Tolerate rounding, which would require one patient more where both sides are equal (0.5, 0.75).
    return max(1, math.ceil(math.log1p(-confidence) / math.log(sensitivity) - 1e-9))


def operating_point(
    positive: NDArray[np.bool_],
    scores: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    threshold: float,
    confidence: float = 0.95,
) -> OperatingPoint:
    """Evaluate a threshold that was fixed on other images, with Wilson intervals that allow for groups.

    Args:
        positive: Shape (n,): whether each image is of the class.
        scores: Shape (n,): the same score that the threshold was fixed on.
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        threshold: Images with this score or a higher one are called positive.
        confidence: Coverage of the intervals, in (0, 1).

    Raises:
        ValueError: If the shapes differ, the arrays are empty, a score is NaN, or the threshold is NaN.

    Example:
        >>> scores = np.array([0.9, 0.4, 0.7, 0.1])
        >>> point = operating_point(np.array([True, True, False, False]), scores, threshold=0.5)
        >>> point.sensitivity.value, point.specificity.value
        (0.5, 0.5)
    """
    flags = check_flags(positive, name="positive")
    values = check_scores(scores, length=len(flags))
    codes = encode_groups(groups, length=len(flags))
    if math.isnan(threshold):
        raise ValueError("threshold is NaN; fix it on validation images with threshold_at_sensitivity")
    called = values >= threshold

    def estimate_share(success: NDArray[np.bool_], among: NDArray[np.bool_]) -> Proportion:
        if not among.any():
            return wilson(0, 0, confidence=confidence)
        return clustered_wilson(success[among], codes[among], confidence=confidence)

    return OperatingPoint(
        threshold=float(threshold),
        sensitivity=estimate_share(called, flags),
        specificity=estimate_share(~called, ~flags),
        precision=estimate_share(flags, called),
        npv=estimate_share(~flags, ~called),
    )


THRESHOLDS = np.arange(1, 100) / 100
"""Default threshold probabilities: 1 % to 99 %."""


@dataclass(frozen=True, eq=False)
class NetBenefit:
    """Net benefit in true positives per image; each array has shape (thresholds,).

    Attributes:
        threshold: Threshold probabilities, in (0, 1), increasing.
        model: Net benefit of treating images whose probability reaches the threshold; at most the prevalence.
        treat_all: Net benefit of treating every image.
        treat_none: Net benefit of treating no image: 0.
        low: Lower end of the model's interval at each threshold.
        high: Upper end of the model's interval at each threshold.
        prevalence: Proportion of images of the class, on which the whole curve depends: a test set with as many
            cancers as ulcers says little about a clinic where cancers are rare.
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
    the two (MOVER). The band is pointwise: it holds at each threshold, not for the whole curve at once.

    Args:
        positive: Shape (n,): whether each image is of the class.
        probability: Shape (n,): the class's probability, calibrated, in [0, 1].
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        confidence: Coverage of the interval at each threshold, in (0, 1).
        thresholds: Threshold probabilities, each in (0, 1), increasing.

    Raises:
        ValueError: If the shapes differ, the arrays are empty, or a probability or threshold is out of range.

    Example:
        >>> probability, steps = np.array([0.9, 0.3]), np.array([0.2, 0.5])
        >>> curve = net_benefit(np.array([True, False]), probability, thresholds=steps)
        >>> curve.model.tolist(), curve.treat_all.tolist()
        ([0.375, 0.5], [0.375, 0.0])
    """
    check_confidence(confidence)
    flags = check_flags(positive, name="positive")
    values = check_scores(probability, length=len(flags))
    if ((values < 0) | (values > 1)).any():
        raise ValueError("net benefit needs probabilities in [0, 1]; pass calibrated probabilities, not logits")
    steps = np.asarray(thresholds, dtype=np.float64)
    if steps.ndim != 1 or not len(steps) or not ((steps > 0) & (steps < 1)).all() or (np.diff(steps) <= 0).any():
        raise ValueError("thresholds must be increasing probabilities in (0, 1)")
    codes = encode_groups(groups, length=len(flags))
    odds = steps / (1 - steps)
    prevalence = float(flags.mean())
    model, low, high = zip(
        *(
            _estimate_benefit(flags, values >= step, weight, codes, confidence)
            for step, weight in zip(steps, odds, strict=True)
        ),
        strict=True,
    )
    return NetBenefit(
        threshold=steps,
        model=np.array(model),
        treat_all=prevalence - (1 - prevalence) * odds,
        treat_none=np.zeros(len(steps)),
        low=np.array(low),
        high=np.array(high),
        prevalence=prevalence,
    )


def _estimate_benefit(
    positive: NDArray[np.bool_], called: NDArray[np.bool_], odds: float, codes: NDArray[np.int64], confidence: float
) -> tuple[float, float, float]:
    """Compute the net benefit at one threshold, and the ends of its interval."""
    kinds = (called & positive, called & ~positive)
    gain, loss = (clustered_wilson(kind, codes, confidence=confidence) for kind in kinds)
    contributions = np.array(
        [np.bincount(codes, weights=kind - share.value) for kind, share in zip(kinds, (gain, loss), strict=True)]
    )
    covariance = contributions @ contributions.T
    scale = float(np.sqrt(covariance[0, 0] * covariance[1, 1]))
    correlation = float(covariance[0, 1]) / scale if scale > 0 else 0.0

    def compute_reach(one: float, two: float) -> float:
        return float(np.sqrt(max(0.0, one**2 + two**2 - 2 * correlation * one * two)))

    value = gain.value - odds * loss.value
    below = compute_reach(gain.value - gain.low, odds * (loss.high - loss.value))
    above = compute_reach(gain.high - gain.value, odds * (loss.value - loss.low))
    return value, value - below, value + above


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Points of the curve, from the most confident images only to all images; each array has shape (points,).

    Attributes:
        certainty: Lowest certainty at which the model still answers.
        coverage: Proportion of images that are answered, in (0, 1]; the last is 1.
        risk: Proportion of the answered images that are misclassified, in [0, 1]; the last is 1 - accuracy.
        area: Mean risk over images, each at its own coverage (AURC, Geifman and El-Yaniv 2017), in [0, 1];
            lower is better, and uninformative certainty gives 1 - accuracy on average.
    """

    certainty: NDArray[np.float64]
    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    area: float


def risk_coverage(correct: NDArray[np.bool_], certainty: NDArray[np.float64]) -> RiskCoverage:
    """Compute the risk-coverage curve: the error rate if only the most confident images are answered.

    Images of equal certainty are answered together, so the curve does not depend on their order.

    Args:
        correct: Shape (n,): whether each image is classified correctly.
        certainty: Shape (n,): certainty of the model, such as the largest probability; any finite numbers.

    Raises:
        ValueError: If the shapes differ, the arrays are empty, or a value is NaN.

    Example:
        >>> curve = risk_coverage(np.array([True, False, True, True]), np.array([0.9, 0.4, 0.8, 0.8]))
        >>> curve.coverage.tolist(), curve.risk.tolist()
        ([0.25, 0.75, 1.0], [0.0, 0.0, 0.25])
    """
    flags = check_flags(correct, name="correct")
    values = check_scores(certainty, length=len(flags))
    levels, member, images = np.unique(-values, return_inverse=True, return_counts=True)
    answered = np.cumsum(images)
    errors = np.cumsum(np.bincount(member, weights=~flags))
    risk = errors / answered
    return RiskCoverage(
        certainty=-levels,
        coverage=answered / len(flags),
        risk=risk,
        area=float((risk * images).sum() / len(flags)),
    )


def area_under_risk_coverage(
    correct: NDArray[np.bool_],
    certainty: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Compute the area under the risk-coverage curve with an interval that allows for groups.

    It is the Wilson interval at the number of independent images with the area's linearised variance, with Student's t.

    Args:
        correct: Shape (n,): whether each image is classified correctly.
        certainty: Shape (n,): certainty of the model; any finite numbers.
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The area, in [0, 1]; its value is the `area` of `risk_coverage`.

    Raises:
        ValueError: If the shapes differ, the arrays are empty, or a value is NaN.

    Example:
        >>> area = area_under_risk_coverage(np.array([True, False, True, True]), np.array([0.9, 0.4, 0.8, 0.8]))
        >>> round(area.value, 4), area.low < area.value < area.high
        (0.0625, True)
    """
    check_confidence(confidence)
    flags = check_flags(correct, name="correct")
    values = check_scores(certainty, length=len(flags))
    codes = encode_groups(groups, length=len(flags))
    area = compute_mean_share_above(~flags, np.ones(len(flags), dtype=np.bool_), values)
    variance = estimate_mean_variance(area.contributions * len(flags), codes)
    return estimate_from_variance(area.value, variance, codes, confidence=confidence)


@dataclass(frozen=True)
class SetLimits:
    """Lowest probabilities with which a class is in the prediction set, calibrated on validation images.

    Attributes:
        coverage: Proportion of each class's images whose set contains that class, with equal weight for each patient,
            in (0, 1).
        lowest: Lowest probability with which each class is in the set, in the order of the classes. None if the class
            has too few patients: it is then in every set.
        patients: Number of patients that each class was calibrated on.
    """

    coverage: float
    lowest: tuple[float | None, ...]
    patients: tuple[int, ...]


def fit_set_limits(
    probabilities: NDArray[np.float64],
    true: NDArray[np.int64],
    groups: NDArray[np.generic] | None = None,
    *,
    coverage: float,
) -> SetLimits:
    """Calibrate prediction sets on validation images.

    For one image of a new patient, of any class, the set then contains the true class with a probability of at least
    `coverage`, if the patient is exchangeable with the validation patients of that class.

    Args:
        probabilities: Probabilities of the validation images, of shape (n, classes); rows sum to one.
        true: Their true classes, of shape (n,).
        groups: Patient of each image, of shape (n,), or None if each image is its own group.
        coverage: Target coverage, in (0, 1).

    Raises:
        ValueError: If the shapes differ, the arrays are empty, or coverage is not in (0, 1).

    Example:
        >>> first = np.linspace(0.1, 0.9, 9)
        >>> table = np.stack([first, 1 - first], axis=1)
        >>> limits = fit_set_limits(table, np.zeros(9, dtype=int), coverage=0.8)
        >>> limits.lowest, limits.patients
        ((0.2, None), (9, 0))
        >>> prediction_sets(np.array([[0.15, 0.85], [0.2, 0.8]]), limits).tolist()
        [[False, True], [True, True]]
    """
    table = check_probabilities(probabilities)
    truth = check_labels(true, table.shape[1], name="true")
    if len(truth) != len(table):
        raise ValueError(f"found {len(truth)} true labels and probabilities of {len(table)} images; expected as many")
    if not 0 < coverage < 1:
        raise ValueError(f"coverage is {coverage}; expected a proportion in (0, 1), such as 0.9")
    codes = encode_groups(groups, length=len(truth))
    lowest, patients = [], []
    for column in range(table.shape[1]):
        in_class = truth == column
        count = len(np.unique(codes[in_class]))
        lowest.append(
            _find_lowest_probability(table[in_class, column], codes[in_class], patients=count, coverage=coverage)
        )
        patients.append(count)
    return SetLimits(float(coverage), tuple(lowest), tuple(patients))


def prediction_sets(probabilities: NDArray[np.float64], limits: SetLimits) -> NDArray[np.bool_]:
    """Determine which classes are in the prediction set of each image.

    Args:
        probabilities: Shape (n, classes), in the order of the limits.
        limits: Result of `fit_set_limits`.

    Returns:
        Membership, of shape (n, classes). A set may be empty: no class is as probable as usual for its own images.

    Raises:
        ValueError: If the number of columns differs from that of the limits, or a value is not a probability.
    """
    table = check_probabilities(probabilities)
    if table.ndim != 2 or table.shape[1] != len(limits.lowest):
        raise ValueError(f"probabilities have shape {table.shape}; expected (n, {len(limits.lowest)})")
    members: NDArray[np.bool_] = table >= np.array([0.0 if low is None else low for low in limits.lowest])
    return members


def count_patients_needed_for_sets(coverage: float) -> int:
    """Return how many patients of a class are needed before a set can exclude that class: n / (n + 1) >= coverage.

    Example:
        >>> count_patients_needed_for_sets(0.9), count_patients_needed_for_sets(0.95)
        (9, 19)
    """
    return max(1, int(np.ceil(coverage / (1 - coverage) - 1e-9)))


def _find_lowest_probability(
    probabilities: NDArray[np.float64], codes: NDArray[np.int64], *, patients: int, coverage: float
) -> float | None:
    """Return the highest limit that a weight of `coverage` * (patients + 1) reaches; None if all weigh too little."""
    _, member, images = np.unique(codes, return_inverse=True, return_counts=True)
    weights = 1 / images[member]
    order = np.argsort(-probabilities, kind="stable")
    # Tolerate rounding: 0.9 * 10 patients are 9 patients, even if their weights are sums of thirds.
    enough = np.cumsum(weights[order]) >= coverage * (patients + 1) - 1e-9
    return float(probabilities[order][np.argmax(enough)]) if enough.any() else None
