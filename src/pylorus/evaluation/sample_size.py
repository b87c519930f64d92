"""How many images a test set needs: for an interval of a given width, or to show a difference or non-inferiority.

The formulas are those of the cited papers, for independent images. Images that come in groups (patients) need more: the
argument `effect` multiplies the number by a design effect, from `compute_design_effect`.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from pylorus.evaluation.discrimination import PRIOR, compute_binormal_variance, compute_score_interval
from pylorus.evaluation.intervals import check_confidence, compute_quantile

MAX_IMAGES = 10**9
"""Larger numbers are refused as impossible."""
MIN_DISTANCE = 1e-12
"""A smaller distance from the margin is a rounding error."""


def plan_proportion(value: float, *, width: float, confidence: float = 0.95, effect: float = 1.0) -> int:
    """Compute the number of images for an interval of a proportion, such as a sensitivity (Buderer 1996).

    n = 4 z² p (1 - p) / width². For a sensitivity these are images of the class, for a specificity those of the others.

    Args:
        value: The expected proportion, in (0, 1).
        width: Distance of the interval's ends, in (0, 1).
        confidence: Coverage of the interval, in (0, 1).
        effect: Design effect, >= 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> plan_proportion(0.9, width=0.1), plan_proportion(0.9, width=0.1, effect=2.0)
        (139, 277)
    """
    _check_fraction(value, "the proportion")
    _check_fraction(width, "the width")
    check_confidence(confidence)
    return _round_up(4 * compute_quantile(confidence) ** 2 * value * (1 - value) / width**2, effect)


def plan_proportion_test(
    value: float,
    *,
    reference: float,
    margin: float | None = None,
    power: float = 0.8,
    level: float = 0.05,
    effect: float = 1.0,
) -> int:
    """Compute the number of images that show a proportion to differ from a figure, or to be no worse by a margin.

    n = (z_α √(r (1 - r)) + z_β √(p (1 - p)))² / (p - r)² for the figure r (Fleiss, Levin and Paik 2003, chapter 2).
    With a margin m, r is the edge that is to be excluded, the figure less m: Wilson's interval excludes it if the score
    test rejects it. z_α is that of a two-sided level, which for non-inferiority is one-sided at half of it.

    Args:
        value: The expected proportion, in (0, 1).
        reference: The figure to compare with, in (0, 1).
        margin: The largest difference that counts as no worse, in (0, 1); None: a difference is to be shown.
        power: Probability of a significant result if the proportion is as expected, in (0, 1).
        level: Two-sided significance level, in (0, 1).
        effect: Design effect, >= 1.

    Raises:
        ValueError: If an argument is out of range, or what is expected is not what is to be shown.

    Example:
        >>> plan_proportion_test(0.9, reference=0.8), plan_proportion_test(0.9, reference=0.9, margin=0.05)
        (108, 363)
    """
    _check_fraction(value, "the proportion")
    _check_fraction(reference, "the figure to compare with")
    _check_test(margin, power, level)
    _check_distance(value, reference, margin)
    edge = reference - (margin or 0.0)
    if not edge > 0:
        raise ValueError(
            f"the margin of {margin:g} reaches from {reference:g} down to 0 or below, so every proportion is no worse; "
            "expected a smaller margin"
        )
    spreads = math.sqrt(edge * (1 - edge)), math.sqrt(value * (1 - value))
    return _plan_test(value - reference, spreads, margin=margin, power=power, level=level, effect=effect)


def plan_auroc(area: float, *, prevalence: float, width: float, confidence: float = 0.95, effect: float = 1.0) -> int:
    """Compute the number of images for an interval of an area under the ROC curve (Newcombe 2006; Riley 2021).

    The smallest n with 2 z SE <= width, where SE² = A (1 - A) (1 + (n/2 - 1) (1 - A) / (2 - A) + (n/2 - 1) A / (1 + A))
    / (n² φ (1 - φ)) for the area A and the prevalence φ.

    Args:
        area: The expected area, in (0.5, 1).
        prevalence: Fraction of the class among all images, in (0, 1).
        width: Distance of the interval's ends, in (0, 1).
        confidence: Coverage of the interval, in (0, 1).
        effect: Design effect, >= 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> plan_auroc(0.8, prevalence=0.3, width=0.1)
        359
    """
    _check_area(area, "the area")
    _check_fraction(prevalence, "the prevalence")
    _check_fraction(width, "the width")
    check_confidence(confidence)
    return _find_images(
        lambda n: 2 * compute_quantile(confidence) * _compute_area_error(area, n, prevalence) - width, effect
    )


def plan_auroc_test(
    area: float,
    *,
    reference: float,
    prevalence: float,
    margin: float | None = None,
    power: float = 0.8,
    level: float = 0.05,
    effect: float = 1.0,
) -> int:
    """Compute the number of images that show an AUROC to differ from a figure, or to be no worse by a margin.

    The smallest n with t_α SE(r) + z_β SE(A) <= |A - r| for the area A and the figure r, and with a margin m,
    t_α SE(r - m) + z_β SE(A) <= A - r + m (Obuchowski and McClish, Stat Med 1997;16:1529), with the binormal standard
    error (Bamber, J Math Psychol 1975;12:387). The test is the interval of `auroc`, so t_α is Student's, and SE(r) is
    multiplied by the factor that `auroc` is expected to use. t_α is that of a two-sided level, which for
    non-inferiority is one-sided at half of it.

    Args:
        area: The expected area, in (0.5, 1).
        reference: The figure to compare with, in [0.5, 1).
        prevalence: Fraction of the class among all images, in (0, 1).
        margin: The largest difference that counts as no worse, in (0, 1); None: a difference is to be shown.
        power: Probability of a significant result if the area is as expected, in (0, 1).
        level: Two-sided significance level, in (0, 1).
        effect: Design effect, >= 1.

    Raises:
        ValueError: If an argument is out of range, or what is expected is not what is to be shown.

    Example:
        >>> plan_auroc_test(0.9, reference=0.8, prevalence=0.3)
        161
    """
    _check_area(area, "the area")
    if not 0.5 <= reference < 1:
        raise ValueError(f"the figure to compare with is {reference:g}; expected an AUROC in [0.5, 1), such as 0.8")
    _check_fraction(prevalence, "the prevalence")
    _check_distance(area, reference, margin)
    _check_test(margin, power, level)

    edge = reference if margin is None else max(0.5, reference - margin)

    def compute_gap(n: float) -> float:
        sizes = _compute_sizes(n, prevalence)
        critical, error = (
            _compute_score_reach(area, sizes, level=level),
            math.sqrt(compute_binormal_variance(area, sizes)),
        )
        reach = critical * math.sqrt(compute_binormal_variance(edge, sizes)) + float(special.ndtri(power)) * error
        return max(0.0, reach) - abs(area - reference + (margin or 0.0))

    return _find_images(compute_gap, effect, prevalence)


def plan_paired_auroc(
    first: float,
    second: float,
    *,
    correlation: float,
    prevalence: float,
    margin: float | None = None,
    power: float = 0.8,
    level: float = 0.05,
    effect: float = 1.0,
) -> int:
    """Compute the number of images that show two models' AUROCs to differ on the same images, or non-inferiority.

    The smallest n with t_α SD + z_β SE <= |δ| for the difference δ of the areas, first minus second, and
    SE² = SE₁² + SE₂² - 2 r SE₁ SE₂ (Hanley and McNeil, Radiology 1983;148:839), with the binormal standard errors of
    `plan_auroc_test`. SD is the error that DeLong's variance is expected to state, which for few images is larger than
    SE, and t_α has the degrees of freedom of `delong_test`. With a margin m it is w + z_β SE' <= δ + m, where w is the
    expected distance of the lower end of the interval of `delong_test` from the difference, and SE' includes its error.

    Args:
        first: Expected area of the first (new) model, in (0.5, 1).
        second: Expected area of the second one, in [0.5, 1).
        correlation: Correlation r of the two estimated areas, in [0, 1).
        prevalence: Fraction of the class among all images, in (0, 1).
        margin: The largest difference by which the first model may be worse, in (0, 1); None: a difference is to be
            shown.
        power: Probability of a significant result if the areas are as expected, in (0, 1).
        level: Two-sided significance level, in (0, 1).
        effect: Design effect, >= 1.

    Raises:
        ValueError: If an argument is out of range, or what is expected is not what is to be shown.

    Example:
        >>> plan_paired_auroc(0.9, 0.85, correlation=0.5, prevalence=0.3)
        448
    """
    _check_area(first, "the first area")
    if second != 0.5:  # a reference that only guesses
        _check_area(second, "the second area")
    if not 0 <= correlation < 1:
        raise ValueError(f"the correlation of the areas is {correlation:g}; expected a number in [0, 1), such as 0.5")
    _check_fraction(prevalence, "the prevalence")
    _check_distance(first, second, margin)
    _check_test(margin, power, level)

    def compute_gap(n: float) -> float:
        sizes = _compute_sizes(n, prevalence)
        errors = tuple(math.sqrt(compute_binormal_variance(area, sizes)) for area in (first, second))
        error = _compute_paired_distance(errors, correlation)
        if margin is None:
            stated = tuple(math.sqrt(_compute_delong_variance(area, sizes)) for area in (first, second))
            critical = compute_quantile(1 - level, freedom=_compute_freedom(sizes))
            reach = critical * _compute_paired_distance(stated, correlation)
        else:  # as the interval of the difference is combined from those of the areas (MOVER)
            ends = (
                first - _compute_score_interval(first, sizes, level=level)[0],
                _compute_score_interval(second, sizes, level=level)[1] - second,
            )
            reach = _compute_paired_distance(ends, correlation)
            tails = max(3.0, *map(_compute_kurtosis, (first, second)))
            freedom = _compute_freedom(sizes, tails)
            error = _combine_errors(error, reach / math.sqrt(2 * freedom))
        reach += float(special.ndtri(power)) * error
        return max(0.0, reach) - abs(first - second + (margin or 0.0))

    return _find_images(compute_gap, effect, prevalence)


def plan_observed_expected(prevalence: float, *, width: float, confidence: float = 0.95, effect: float = 1.0) -> int:
    """Compute the number of images for an interval of the ratio of observed to expected images of a class.

    n = (1 - φ) / (φ SE²) for the prevalence φ, with exp(z SE) - exp(-z SE) = width around a ratio of 1 (criterion 1 of
    Riley et al., Stat Med 2021;40:4230, BMJ 2024;384:e074821). It counts the expected number as known.

    Args:
        prevalence: Fraction of the class among all images, in (0, 1).
        width: Distance of the interval's ends, in (0, 1).
        confidence: Coverage of the interval, in (0, 1).
        effect: Design effect, >= 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> plan_observed_expected(0.3, width=0.2)
        900
    """
    _check_fraction(prevalence, "the prevalence")
    _check_fraction(width, "the width")
    check_confidence(confidence)
    error = math.asinh(width / 2) / compute_quantile(confidence)
    return _round_up((1 - prevalence) / (prevalence * error**2), effect)


def plan_calibration_slope(
    log_odds: NDArray[np.float64],
    *,
    weights: NDArray[np.float64] | None = None,
    width: float,
    confidence: float = 0.95,
    effect: float = 1.0,
) -> int:
    """Compute the number of images for an interval of the calibration slope, around a slope of 1.

    n = a / (SE² (a c - b²)), where a, b and c are the means of p (1 - p), times 1, the log-odds, and their square
    (criterion 2 of Riley et al., Stat Med 2021;40:4230, BMJ 2024;384:e074821).

    Args:
        log_odds: Logarithm of the odds of the class's probability in such images, of shape (n,): those of a pilot run,
            or those that `compute_binormal_log_odds` expects.
        weights: Weight of each of them, of shape (n,), >= 0; None: equal.
        width: Distance of the interval's ends, in (0, 1).
        confidence: Coverage of the interval, in (0, 1).
        effect: Design effect, >= 1.

    Raises:
        ValueError: If an argument is out of range, or the log-odds do not vary.

    Example:
        >>> from pylorus.evaluation.pilot import compute_binormal_log_odds
        >>> values, weights = compute_binormal_log_odds(0.8, prevalence=0.3)
        >>> plan_calibration_slope(values, weights=weights, width=0.2)
        2176
    """
    _check_fraction(width, "the width")
    check_confidence(confidence)
    share = np.ones(len(log_odds)) if weights is None else np.asarray(weights, dtype=np.float64)
    # Centred, so that a c - b² keeps its digits.
    information = share / share.sum() * special.expit(log_odds) * special.expit(-log_odds)
    amount = float(information.sum())
    centred = log_odds - float(information @ log_odds) / amount if amount > 0 else log_odds
    slope = float(information @ centred**2)
    if not slope > MIN_DISTANCE:
        raise ValueError("all images have nearly the same probability; expected probabilities that differ")
    error = width / (2 * compute_quantile(confidence))
    return _round_up(1 / (error**2 * slope), effect)


def plan_paired_difference(
    only_first: float,
    only_second: float,
    *,
    margin: float | None = None,
    power: float = 0.8,
    level: float = 0.05,
    effect: float = 1.0,
) -> int:
    """Compute the number of images that show a difference of two models on the same images, or non-inferiority.

    n = (z_α √ψ + z_β √(ψ - δ²))² / δ² for McNemar's test (Connor 1987), where ψ is the fraction on which the models
    disagree and δ their difference, first minus second; with a margin m,
    n = (z_α + z_β)² (ψ - δ²) / (δ + m)² (Liu et al. 2002). z_α is that of a two-sided level, which for
    non-inferiority is one-sided at half of it.

    Args:
        only_first: Fraction of images that only the first model classifies correctly, in [0, 1].
        only_second: Fraction that only the second one does, in [0, 1].
        margin: The largest difference by which the first model may be worse, in (0, 1); None: a difference is to be
            shown.
        power: Probability of a significant result if the fractions are as stated, in (0, 1).
        level: Two-sided significance level, in (0, 1).
        effect: Design effect, >= 1.

    Raises:
        ValueError: If an argument is out of range, or what is expected is not what is to be shown.

    Example:
        >>> plan_paired_difference(0.10, 0.05), plan_paired_difference(0.05, 0.05, margin=0.05)
        (469, 314)
    """
    difference, disagreement = only_first - only_second, only_first + only_second
    if not (only_first >= 0 and only_second >= 0 and 0 < disagreement <= 1):
        raise ValueError(f"found {only_first:g} and {only_second:g}; expected two fractions with a sum in (0, 1]")
    _check_test(margin, power, level)
    if margin is None and difference == 0:
        raise ValueError(f"found {only_first:g} and {only_second:g}; expected two fractions that differ")
    if margin is not None and not difference + margin > MIN_DISTANCE:
        raise ValueError(
            f"found {only_first:g} and {only_second:g}: the first model is worse by the margin of {margin:g} or more; "
            "expected it to be worse by less, or a larger margin"
        )
    expected = math.sqrt(max(0.0, disagreement - difference**2))
    spreads = (math.sqrt(disagreement) if margin is None else expected), expected
    return _plan_test(difference, spreads, margin=margin, power=power, level=level, effect=effect)


def _plan_test(
    difference: float,
    spreads: tuple[float, float],
    *,
    margin: float | None,
    power: float,
    level: float,
    effect: float,
) -> int:
    """Compute the number of images for a test of a mean difference, or of one that may be down to minus the margin.

    Args:
        difference: The expected difference.
        spreads: Standard deviation of an image's difference at the edge of what is to be shown, and as expected.
        margin: See `plan_proportion_test`, as all others.
        power: Likewise.
        level: Likewise.
        effect: Likewise.
    """
    reach = _compute_reach(spreads, power=power, level=level)
    return _round_up(reach**2 / (difference + (margin or 0.0)) ** 2, effect)


def _compute_reach(errors: tuple[float, ...], *, power: float, level: float) -> float:
    """Return z_α times the error at the edge of what is to be shown, plus z_β times that of what is expected.

    A negative sum is 0: the power is reached with any number of images.
    """
    edge, expected = errors
    return max(0.0, compute_quantile(1 - level) * edge + float(special.ndtri(power)) * expected)


def _compute_area_error(area: float, images: float, prevalence: float) -> float:
    """Compute the standard error of an area by Hanley and McNeil, in Newcombe's form for any prevalence.

    SE² = A (1 - A) (1 + (n/2 - 1) (1 - A) / (2 - A) + (n/2 - 1) A / (1 + A)) / (n² φ (1 - φ)).
    """
    slope = (1 - area) / (2 - area) + area / (1 + area)
    factor = max(0.0, 1 + (images / 2 - 1) * slope)
    return math.sqrt(area * (1 - area) * factor / (prevalence * (1 - prevalence))) / images


def _compute_sizes(images: float, prevalence: float) -> tuple[float, float]:
    """Return the numbers of images of the class and of others."""
    return images * prevalence, images * (1 - prevalence)


def _compute_freedom(sizes: tuple[float, float], kurtosis: float = 3.0) -> float:
    """Compute the degrees of freedom of DeLong's variance: Welch's for its two parts, Satterthwaite's for each.

    The kurtosis is that of the placements. A sample has a smaller one the fewer images it has; that correction was
    found by simulation (`benchmarks/sample_size.py`).
    """
    parts = []
    for size in sizes:
        observed = kurtosis / (1 + 2 * kurtosis / size) if kurtosis > 3 else kurtosis
        own = min(size - 1, 2 * size / (observed - 1 + 2 / size))
        parts.append((1 / size) ** 2 / max(own, 0.5))
    return max(1.0, sum(1 / size for size in sizes) ** 2 / sum(parts))


@lru_cache(maxsize=64)
def _compute_kurtosis(area: float) -> float:
    """Compute the kurtosis of the placements of images of one kind among those of the other, if scores are normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    placements = special.ndtr(nodes + math.sqrt(2) * float(special.ndtri(area)))
    deviations = placements - float(weights @ placements) / weights.sum()
    return float(weights @ deviations**4 * weights.sum() / (weights @ deviations**2) ** 2)


def _compute_delong_variance(area: float, sizes: tuple[float, float]) -> float:
    """Compute the expected value of DeLong's variance of an area between two normal distributions.

    The variance of an area has a part for the positives, one for the negatives, and one for their pairs, which is the
    variance with one image each. DeLong's variance counts the last one twice, once with either kind of images.
    """
    positives, negatives = sizes
    single = area * (1 - area)
    excess = compute_binormal_variance(area, (1.0, 2.0)) * 2 - single  # covariance of two pairs that share an image
    return compute_binormal_variance(area, sizes) + max(0.0, single - 2 * excess) / (positives * negatives)


def _compute_score_reach(area: float, sizes: tuple[float, float], *, level: float) -> float:
    """Compute by how many binormal standard errors the interval of `auroc` is expected to reach.

    `auroc` combines DeLong's variance with the larger one of it and the binormal one; the expected value of the larger
    one is that of a normal variable and a constant.
    """
    freedom = _compute_freedom(sizes, max(3.0, _compute_kurtosis(area)))
    ratio = _compute_delong_variance(area, sizes) / compute_binormal_variance(area, sizes)
    spread = ratio * math.sqrt(2 / freedom)
    excess = (ratio - 1) / spread
    larger = 1 + spread * (excess * float(special.ndtr(excess)) + math.exp(-(excess**2) / 2) / math.sqrt(2 * math.pi))
    factor = (freedom * ratio + PRIOR * larger) / (freedom + PRIOR)
    return compute_quantile(1 - level, freedom=freedom + 1) * math.sqrt(factor)


def _compute_score_interval(area: float, sizes: tuple[float, float], *, level: float) -> tuple[float, float]:
    """Compute the expected interval of `auroc`."""
    return compute_score_interval(area, sizes, 1.0, _compute_score_reach(area, sizes, level=level))


def _compute_paired_distance(distances: tuple[float, ...], correlation: float) -> float:
    """Combine distances of two correlated areas (standard errors, or ends of intervals) to that of their difference."""
    one, two = distances
    return math.sqrt(max(0.0, one**2 + two**2 - 2 * correlation * one * two))


def _combine_errors(error: float, of_width: float) -> float:
    """Combine the standard error of a difference and that of the distance to the lower end of its interval.

    The lower the difference, the longer is that distance; their correlation of about 0.3 was found by simulation.
    """
    return math.sqrt(error**2 + of_width**2 + 0.6 * error * of_width)


def _find_images(compute_gap: Callable[[float], float], effect: float, prevalence: float = 0.5) -> int:
    """Find the number of images, at least two of each kind, at which a gap that decreases with it is closed."""
    if not compute_gap(MAX_IMAGES) < 0:
        raise ValueError(f"more than {MAX_IMAGES:,} images would be needed")
    least = 2.0 / min(prevalence, 1 - prevalence)
    images = least if compute_gap(least) <= 0 else float(optimize.brentq(compute_gap, least, MAX_IMAGES, xtol=1e-9))
    return _round_up(images, effect)


def _check_area(value: float, name: str) -> None:
    if not 0.5 < value < 1:
        raise ValueError(f"{name} is {value:g}; expected a number in (0.5, 1), such as 0.9")


def _check_distance(value: float, reference: float, margin: float | None) -> None:
    """Check that what is expected is what is to be shown.

    Raises:
        ValueError: If the two are equal and no margin is given, or the value is worse by the margin.
    """
    if margin is None and value == reference:
        raise ValueError(f"found {value:g} and {reference:g}; expected two figures that differ, or a margin")
    if margin is not None and not value - reference + margin > MIN_DISTANCE:
        raise ValueError(
            f"{value:.4g} is worse than {reference:.4g} by the margin of {margin:g} or more; expected one "
            "that is worse by less, or a larger margin"
        )


def _check_test(margin: float | None, power: float, level: float) -> None:
    _check_fraction(power, "the power")
    _check_fraction(level, "the level")
    if margin is not None:
        _check_fraction(margin, "the margin")


def _check_fraction(value: float, name: str) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value:g}; expected a number in (0, 1), such as 0.1")


def _round_up(images: float, effect: float) -> int:
    """Round up to whole images, but not because of a rounding error."""
    if not effect >= 1:
        raise ValueError(f"the design effect is {effect:g}; expected at least 1")
    if not images * effect < MAX_IMAGES:
        raise ValueError(f"more than {MAX_IMAGES:,} images would be needed")
    return max(1, math.ceil(images * effect - 1e-9))
