"""Other populations and parts of one: other prevalences of the classes, calibration in the large, subgroups.

What corrects probabilities, thresholds and predictive values for another prevalence assumes that only the frequencies
of the classes differ, not how the images of a class look: p(image | class) is the same at both sites (label shift, or
prior probability shift). Other endoscopes or other patients break that.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg, optimize

from pylorus.evaluation.intervals import ONE_GROUP, Estimate, check_confidence, compute_quantile
from pylorus.evaluation.predictions import check_flags, check_probabilities, check_scores, encode_groups

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
    return float(optimize.brentq(compute_excess, value, bound, xtol=1e-5))


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


PERMUTATIONS = 1999
"""Default number of permutations of a test, whose p is then never below 1 / 2000."""


@dataclass(frozen=True)
class SubgroupTest:
    """Result of a permutation test of whether a proportion differs between subgroups.

    Attributes:
        statistic: Sum over subgroups of the squared deviation from the common proportion divided by its variance; NaN
            if all or no images have the property or there is only one subgroup, since then nothing can differ.
        p_value: In (0, 1]; NaN if the statistic is NaN.
        subgroups: Number of subgroups that were compared.
        groups: Number of groups (patients) of the images.
    """

    statistic: float
    p_value: float
    subgroups: int
    groups: int


def calibration_in_the_large(
    positive: NDArray[np.bool_],
    probability: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Compute the observed proportion of a class minus its mean predicted probability; 0 if correct on average.

    The variance is that of a mean of residuals with sampling of whole groups, and at least the one that the
    probabilities imply, since a few images without a rare event would otherwise appear conclusive. The uncertainty of
    two groups is added, as Agresti and Coull do for a proportion, and the degrees of freedom are the effective number
    of groups, (sum of sizes)² / sum of squared sizes, minus one. In simulations with 10 to 200 groups of 1 to 30
    images and intra-group correlations of 0 to 0.6, the 95 % interval covers 0 in 94 to 99 % of calibrated sets.

    Args:
        positive: Shape (n,), n >= 1: whether each image is of the class.
        probability: Predicted probability of the class, in [0, 1], of shape (n,).
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The difference with its interval, each in [-1, 1]; no interval if there is only one group.

    Raises:
        ValueError: If the shapes differ, there are no images, or a probability or the confidence is out of range.

    Example:
        >>> difference = calibration_in_the_large(np.array([True, False, False, False]), np.array([0.5, 0.4, 0.3, 0.2]))
        >>> round(difference.value, 3), difference.low < 0 < difference.high
        (-0.1, True)
    """
    check_confidence(confidence)
    flags, predicted = check_flags(positive, name="positive"), check_scores(probability, length=len(positive))
    if (predicted < 0).any() or (predicted > 1).any():
        raise ValueError("probabilities are out of range; expected values in [0, 1]")
    codes = encode_groups(groups, length=len(flags))
    sizes = np.bincount(codes).astype(np.float64)
    images, count = len(flags), len(sizes)
    residuals = flags - predicted
    value = float(residuals.mean())
    if count == 1:
        return Estimate(value, math.nan, math.nan, reason=ONE_GROUP)
    sums = np.bincount(codes, residuals - value, minlength=count)
    empirical = count / (count - 1) * float((sums**2).sum()) / images**2
    implied = float((predicted * (1 - predicted)).sum()) / images**2
    effective = images**2 / float((sizes**2).sum())
    observed = (float(flags.sum()) + 1) / (images + 2)
    variance = max(empirical, implied) + 2 * observed * (1 - observed) / effective**2
    reach = compute_quantile(confidence, freedom=max(effective - 1, 1.0)) * math.sqrt(variance)
    return Estimate(value, max(-1.0, value - reach), min(1.0, value + reach))


def subgroup_difference(
    success: NDArray[np.bool_],
    subgroup: NDArray[np.generic],
    groups: NDArray[np.generic] | None = None,
    *,
    seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> SubgroupTest:
    """Test whether a proportion of images (accuracy, sensitivity) differs between subgroups, by permuting patients.

    Subgroups are permuted among the groups whose images are all in one subgroup, and among the images of each group
    that is in several. Under the null hypothesis that subgroups do not matter, the test is exact for any number of
    groups. The statistic is a chi-square of the subgroups' deviations from the common proportion, whose variance allows
    for the correlation of the images of a group (method of moments).

    Args:
        success: Shape (n,), n >= 1: whether each image has the property.
        subgroup: Subgroup of each image, of shape (n,).
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        seed: Random seed of the permutations.
        permutations: Number of permutations, >= 1.

    Raises:
        ValueError: If the shapes differ, there are no images, or permutations is below 1.

    Example:
        >>> correct = np.repeat([True, False], [30, 30])
        >>> subgroup_difference(correct, np.repeat(["A", "B"], 30)).p_value
        0.0005
        >>> subgroup_difference(correct, np.tile(["A", "B"], 30)).p_value
        1.0
    """
    flags = check_flags(success, name="success")
    if permutations < 1:
        raise ValueError(f"permutations is {permutations}; expected at least 1")
    codes, parts = encode_groups(groups, length=len(flags)), encode_groups(subgroup, length=len(flags))
    count, kinds = int(codes.max()) + 1, int(parts.max()) + 1
    if kinds == 1 or flags.all() or not flags.any():
        return SubgroupTest(math.nan, math.nan, kinds, count)
    order = np.argsort(codes, kind="stable")
    images = _SubgroupResiduals(codes[order], parts[order], (flags - flags.mean())[order])
    observed, generator = images.compute_chi_square(), np.random.default_rng(seed)
    # Tolerate rounding, by which equal arrangements differ.
    as_large = sum(images.compute_chi_square(generator) >= observed * (1 - 1e-9) for _ in range(permutations))
    return SubgroupTest(observed, (1 + as_large) / (1 + permutations), kinds, count)


class _SubgroupResiduals:
    """Residuals of images in subgroups, with the statistic of the observed or of permuted subgroups.

    A group whose images are all in one subgroup is permuted as a whole, so only its sums are stored.

    Args:
        codes: Group of each image, from 0, ascending, of shape (n,).
        parts: Subgroup of each image, from 0, of shape (n,).
        residuals: Success of each image minus the common proportion, of shape (n,).
    """

    def __init__(self, codes: NDArray[np.int64], parts: NDArray[np.int64], residuals: NDArray[np.float64]) -> None:
        first = np.flatnonzero(np.diff(codes, prepend=-1))
        single = np.maximum.reduceat(parts, first) == np.minimum.reduceat(parts, first)
        mixed = ~single[codes]
        self._kinds, self._variance = int(parts.max()) + 1, float((residuals**2).mean())
        self._correlation = _estimate_correlation(residuals, codes)
        self._parts, self._sums = parts[first][single], np.bincount(codes, residuals)[single]
        self._spread = self._compute_sum_variance(np.bincount(codes)[single])
        self._mixed_parts, self._mixed_residuals = parts[mixed], residuals[mixed]
        self._mixed_codes = np.unique(codes[mixed], return_inverse=True)[1].astype(np.int64)

    def compute_chi_square(self, generator: np.random.Generator | None = None) -> float:
        """Sum, over subgroups, the squared sum of residuals divided by its variance.

        Args:
            generator: Source of a random permutation; None for the observed subgroups.
        """
        parts, mixed = self._parts, self._mixed_parts
        if generator is not None:
            parts = generator.permutation(parts)
            mixed = mixed[np.argsort(self._mixed_codes + generator.random(len(mixed)))]
        sums, spread = np.zeros(self._kinds), np.zeros(self._kinds)
        if len(parts):
            sums += np.bincount(parts, self._sums, minlength=self._kinds)
            spread += np.bincount(parts, self._spread, minlength=self._kinds)
        if len(mixed):
            sums += np.bincount(mixed, self._mixed_residuals, minlength=self._kinds)
            cells = np.bincount(self._mixed_codes * self._kinds + mixed)
            spread += np.bincount(
                np.arange(len(cells)) % self._kinds, self._compute_sum_variance(cells), minlength=self._kinds
            )
        return float((sums**2 / (spread * self._variance)).sum())

    def _compute_sum_variance(self, images: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the variance of a sum over this many images of one group, in units of that of one image."""
        return images * (1 + (images - 1) * self._correlation)


def _estimate_correlation(residuals: NDArray[np.float64], codes: NDArray[np.int64]) -> float:
    """Estimate the correlation of two images of a group by the method of moments, in [0, 1]; 0 without such a pair."""
    sizes = np.bincount(codes)
    pairs = float((sizes * (sizes - 1)).sum())
    if not pairs:
        return 0.0
    sums = np.bincount(codes, residuals)
    products = float((sums**2).sum() - (residuals**2).sum())
    return min(1.0, max(0.0, products / (pairs * float((residuals**2).mean()))))
