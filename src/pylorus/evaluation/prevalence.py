"""Prevalence: how probabilities, thresholds and predictive values change where classes are more or less frequent.

All of it assumes that only the frequencies of the classes differ, not how the images of a class look: p(image | class)
is the same at both sites (label shift, or prior probability shift). Other endoscopes or other patients break that.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, optimize

from pylorus.evaluation.intervals import ONE_GROUP, Estimate, check_confidence, compute_quantile
from pylorus.evaluation.predictions import check_probabilities, encode_groups

MAX_ITERATIONS, TOLERANCE = 5000, 1e-9
"""When the search for the most likely prevalence ends: number of steps, and largest change in one step."""
MAX_FALL = 1e6
"""A fall of the log likelihood that counts as infinite."""


def adjust_to_prevalence(
    probabilities: NDArray[np.float64], *, original: ArrayLike, target: ArrayLike
) -> NDArray[np.float64]:
    """Correct probabilities for the prevalence of another site (Saerens, Latinne and Decaestecker 2002, equation 2.4).

    Args:
        probabilities: Shape (images, classes), each row with sum 1; calibrated at the original prevalence.
        original: Prevalence of each class where the probabilities were calibrated, of shape (classes,), each > 0.
        target: Prevalence of each class where the images come from, of shape (classes,), each >= 0.

    Returns:
        Shape (images, classes). The order of the images by the odds between two classes doesn't change.

    Raises:
        ValueError: If a prevalence is out of range, the prevalences don't sum to 1, or an image has a positive
            probability only of classes whose target prevalence is 0.

    Example:
        >>> even = np.array([[0.8, 0.2]])
        >>> adjust_to_prevalence(even, original=[0.5, 0.5], target=[0.1, 0.9]).round(3).tolist()
        [[0.308, 0.692]]
    """
    table = check_probabilities(probabilities)
    before = _check_prevalence(original, name="original", classes=table.shape[1], allows_zero=False)
    after = _check_prevalence(target, name="target", classes=table.shape[1])
    weighted = table * (after / before)
    totals = weighted.sum(axis=1, keepdims=True)
    if (totals == 0).any():
        raise ValueError(
            f"{int((totals == 0).sum())} images have a positive probability only of classes whose target prevalence is "
            "0; expected a positive prevalence of every class that occurs"
        )
    corrected: NDArray[np.float64] = weighted / totals
    return corrected


def adjust_threshold(threshold: float, *, original: float, target: float) -> float:
    """Return the threshold on corrected probabilities that answers as a threshold on the original ones does.

    A threshold that was chosen for its sensitivity keeps its sensitivity and specificity under label shift, if it
    moves with the probabilities; a threshold that stands for a trade-off of costs stays where it is instead.

    It is exact for two classes. For more, it is exact where the other classes keep their proportions to each other.

    Args:
        threshold: On the probability of the class, in [0, 1].
        original: Prevalence of the class where the threshold was chosen, in (0, 1).
        target: Prevalence of the class at the other site, in (0, 1).

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> round(adjust_threshold(0.8, original=0.5, target=0.1), 3)
        0.308
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"the threshold is {threshold}; expected a probability in [0, 1]")
    for name, prevalence in (("original", original), ("target", target)):
        if not 0 < prevalence < 1:
            raise ValueError(f"the {name} prevalence is {prevalence}; expected a proportion in (0, 1)")
    positive = threshold * target / original
    negative = (1 - threshold) * (1 - target) / (1 - original)
    return positive / (positive + negative)


@dataclass(frozen=True)
class PredictiveValues:
    """How often a positive and a negative answer are correct at a given prevalence.

    Attributes:
        prevalence: Proportion of positive images, in (0, 1).
        ppv: Positive predictive value, in [0, 1].
        npv: Negative predictive value, in [0, 1].
    """

    prevalence: float
    ppv: Estimate
    npv: Estimate


def predictive_values(sensitivity: Estimate, specificity: Estimate, *, prevalence: float) -> PredictiveValues:
    """Compute PPV and NPV at a given prevalence from sensitivity and specificity (Bayes' theorem).

    The intervals come from those of the likelihood ratios, which are combined from the two given intervals (MOVER-R,
    Donner and Zou, Stat Methods Med Res 2012;21:347); their confidence is that of the given intervals. The prevalence
    counts as known. Sensitivity and specificity count as independent, which they are if no patient has images of both
    kinds.

    Args:
        sensitivity: With its interval, from images of the class.
        specificity: With its interval and the same confidence, from the other images.
        prevalence: Proportion of positive images where the classifier is used, in (0, 1).

    Raises:
        ValueError: If the prevalence is out of range.

    Example:
        >>> from pylorus.evaluation import wilson
        >>> values = predictive_values(wilson(90, 100), wilson(180, 200), prevalence=0.1)
        >>> print(f"{values.ppv.value:.3f} ({values.ppv.low:.3f} to {values.ppv.high:.3f}), {values.npv.value:.3f}")
        0.500 (0.398 to 0.604), 0.988
    """
    if not 0 < prevalence < 1:
        raise ValueError(f"the prevalence is {prevalence}; expected a proportion in (0, 1)")
    odds = prevalence / (1 - prevalence)
    return PredictiveValues(
        prevalence,
        _convert_ratio(_divide_estimates(sensitivity, _subtract_from_one(specificity)), odds),
        _convert_ratio(_divide_estimates(specificity, _subtract_from_one(sensitivity)), 1 / odds),
    )


@dataclass(frozen=True)
class PrevalenceEstimate:
    """Prevalence of each class, estimated without labels.

    Attributes:
        prevalence: With intervals, in the order of the classes; the values sum to 1.
        original: Prevalence at which the probabilities were calibrated.
        design_effect: By how much the similarity of a group's images widens the intervals' variance, per class, >= 1.
    """

    prevalence: tuple[Estimate, ...]
    original: tuple[float, ...]
    design_effect: tuple[float, ...]


def estimate_prevalence(
    probabilities: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    original: ArrayLike,
    confidence: float = 0.95,
) -> PrevalenceEstimate:
    """Estimate how frequent the classes are among unlabelled images, from calibrated probabilities.

    The estimate maximizes the likelihood by expectation maximization (Saerens, Latinne and Decaestecker 2002). The
    intervals are those of the profile likelihood, whose quantile is multiplied by the ratio of the sandwich variance
    over groups to the variance without groups. They do not include that the calibration is itself an estimate.

    Args:
        probabilities: Shape (images, classes), each row with sum 1; calibrated at the original prevalence.
        groups: Group (patient) of each image, of shape (images,), or None if each image is its own group.
        original: Prevalence of each class where the probabilities were calibrated, of shape (classes,), each > 0.
        confidence: Coverage of each interval, in (0, 1).

    Raises:
        ValueError: If shapes differ, a prevalence is out of range or confidence is not in (0, 1).

    Example:
        >>> sharp = np.repeat([[0.9, 0.1], [0.1, 0.9]], [20, 80], axis=0)
        >>> gc, other = estimate_prevalence(sharp, original=[0.5, 0.5]).prevalence
        >>> print(f"{gc.value:.3f} ({gc.low:.3f} to {gc.high:.3f}), {other.value:.3f}")
        0.125 (0.036 to 0.234), 0.875
    """
    check_confidence(confidence)
    table = check_probabilities(probabilities)
    before = _check_prevalence(original, name="original", classes=table.shape[1], allows_zero=False)
    codes = encode_groups(groups, length=len(table))
    ratios = table / before
    best = _maximize_likelihood(ratios, before)
    count = int(codes.max()) + 1
    effects = _compute_design_effects(ratios, best, codes) if count > 1 else None
    highest = _compute_log_likelihood(ratios, best)
    estimates = []
    for index, value in enumerate(best):
        if effects is None:
            reason = ONE_GROUP if count == 1 else "the classes can't be distinguished by their probabilities"
            estimates.append(Estimate(float(value), math.nan, math.nan, reason=reason))
            continue
        lowest = highest - effects[index] * compute_quantile(confidence, freedom=count - 1) ** 2 / 2
        low, high = (_find_end(ratios, best, index, bound, lowest) for bound in (0.0, 1.0))
        estimates.append(Estimate(float(value), low, high))
    shown = (math.nan,) * len(best) if effects is None else tuple(map(float, effects))
    return PrevalenceEstimate(tuple(estimates), tuple(map(float, before)), shown)


def _check_prevalence(
    prevalence: ArrayLike, *, name: str, classes: int, allows_zero: bool = True
) -> NDArray[np.float64]:
    values = np.array(prevalence, dtype=np.float64)
    if values.shape != (classes,):
        raise ValueError(f"the {name} prevalence has shape {values.shape}; expected {(classes,)}, one value per class")
    if not (np.isfinite(values).all() and (values >= 0).all() and abs(values.sum() - 1) < 1e-6):
        raise ValueError(
            f"the {name} prevalence is {values.tolist()} with sum {values.sum():g}; expected proportions with sum 1"
        )
    if not allows_zero and (values == 0).any():
        raise ValueError(f"the {name} prevalence is {values.tolist()}; expected values above 0")
    values /= values.sum()
    return values


def _subtract_from_one(estimate: Estimate) -> Estimate:
    return Estimate(1 - estimate.value, 1 - estimate.high, 1 - estimate.low, reason=estimate.reason)


def _divide_estimates(first: Estimate, second: Estimate) -> Estimate:
    """Divide two independent estimates >= 0 by MOVER-R; the ratio is infinite where the second is 0."""
    value = first.value / second.value if second.value else math.inf if first.value else math.nan
    if not (first.has_interval and second.has_interval):
        return Estimate(value, math.nan, math.nan, reason=first.reason or second.reason)
    if math.isnan(value):
        return Estimate(value, math.nan, math.nan, reason="the classifier never gives this answer")
    product = first.value * second.value

    def compute_root(numerator: float, denominator: float) -> float:
        terms = numerator * (2 * first.value - numerator), denominator * (2 * second.value - denominator)
        return math.sqrt(max(0.0, product**2 - terms[0] * terms[1]))

    low, high = 0.0, math.inf
    if first.low > 0:  # the quotient's other form, which does not cancel
        low = first.low * (2 * first.value - first.low) / (product + compute_root(first.low, second.high))
    if second.low > 0:
        top = product + compute_root(first.high, second.low)
        high = top / (second.low * (2 * second.value - second.low))
    return Estimate(value, low, high)


def _convert_ratio(ratio: Estimate, odds: float) -> Estimate:
    """Convert a likelihood ratio to a predictive value at prior odds."""
    ends = (ratio.value, ratio.low, ratio.high)
    value, low, high = (1.0 if math.isinf(end) else odds * end / (1 + odds * end) for end in ends)
    return Estimate(value, low, high, reason=ratio.reason)


def _maximize_likelihood(
    ratios: NDArray[np.float64], start: NDArray[np.float64], *, index: int = 0, fixed: float | None = None
) -> NDArray[np.float64]:
    """Find the most likely prevalence, of shape (classes,), by expectation maximization.

    Args:
        ratios: Shape (images, classes): p(image | class), each row up to a factor.
        start: First guess, of shape (classes,).
        index: The class whose prevalence is fixed, if one is.
        fixed: Its prevalence, in [0, 1].
    """
    prevalence = np.maximum(start, 1e-6)
    others = np.arange(len(start)) != index
    if fixed is not None:
        prevalence[index] = fixed
        prevalence[others] *= (1 - fixed) / prevalence[others].sum()
        if others.sum() == 1:
            return prevalence
    for _ in range(MAX_ITERATIONS):
        joint = ratios * prevalence
        total = joint.sum(axis=1, keepdims=True)
        expected = np.divide(joint, total, out=np.zeros_like(joint), where=total > 0).mean(axis=0)
        if fixed is not None:
            sum_of_others = expected[others].sum()
            expected[others] *= (1 - fixed) / sum_of_others if sum_of_others else 0.0
            expected[index] = fixed
        change = np.abs(expected - prevalence).max()
        prevalence = expected
        if change < TOLERANCE:
            break
    return prevalence


def _compute_log_likelihood(ratios: NDArray[np.float64], prevalence: NDArray[np.float64]) -> float:
    with np.errstate(divide="ignore"):
        return float(np.log(ratios @ prevalence).sum())


def _find_end(ratios: NDArray[np.float64], best: NDArray[np.float64], index: int, bound: float, lowest: float) -> float:
    """Find where, between the estimate and a bound, 0 or 1, the profile of the log likelihood falls to the lowest."""

    def compute_excess(fixed: float) -> float:
        profile = _maximize_likelihood(ratios, best, index=index, fixed=fixed)
        return max(_compute_log_likelihood(ratios, profile) - lowest, -MAX_FALL)

    value = float(best[index])
    if value == bound or compute_excess(bound) >= 0:
        return bound
    return float(optimize.bisect(compute_excess, value, bound, xtol=1e-5))


def _compute_design_effects(
    ratios: NDArray[np.float64], prevalence: NDArray[np.float64], codes: NDArray[np.int64]
) -> NDArray[np.float64] | None:
    """Compute the ratio of the variances with and without groups, of shape (classes,); None if there is no variance."""
    scores = ratios / (ratios @ prevalence)[:, np.newaxis]
    basis = linalg.null_space(np.ones((1, len(prevalence))))
    scores = scores @ basis
    information = scores.T @ scores
    if np.linalg.eigvalsh(information)[0] < 1e-8 * len(scores):
        return None
    inverse = np.linalg.inv(information)
    scores = scores - scores.mean(axis=0)
    count = int(codes.max()) + 1
    sums = np.stack([np.bincount(codes, column, minlength=count) for column in scores.T], axis=1)
    robust = inverse @ (count / (count - 1) * sums.T @ sums) @ inverse
    plain, clustered = (np.diag(basis @ covariance @ basis.T) for covariance in (inverse, robust))
    return np.maximum(1.0, clustered / plain)
