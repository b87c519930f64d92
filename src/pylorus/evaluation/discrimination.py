"""Discrimination: how well probabilities rank images, by the area under the ROC curve and by average precision.

DeLong, DeLong and Clarke-Pearson (Biometrics 1988;44:837) write the area as a mean over positives and a mean over
negatives (structural components) and derive its variance from theirs. Obuchowski (Biometrics 1997;53:567) sums the
components within each group first; with one image per group this is DeLong's variance, so one function computes both.
Average precision is a mean over positives, and the area under the risk-coverage curve one over images; one function
computes the value and the contribution of each image to its deviation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from pylorus.evaluation.confusion import ALL_IMAGES, NO_IMAGES
from pylorus.evaluation.influence import (
    MeanVariance,
    compute_copies,
    compute_correlation,
    compute_mean_estimate,
    estimate_from_variance,
    estimate_mean_variance,
)
from pylorus.evaluation.intervals import (
    Estimate,
    check_confidence,
    compute_quantile,
    create_undefined_estimate,
)
from pylorus.evaluation.predictions import (
    check_flags,
    check_labels,
    check_probabilities,
    check_scores,
    encode_groups,
    handle_deprecated_arguments,
)


@dataclass(frozen=True, eq=False)
class MeanShareAbove:
    """The mean, over some images, of the proportion of hits among all images that score as high or higher.

    Attributes:
        value: The mean, in [0, 1].
        contributions: Contribution of each image to the deviation of the value, of shape (n,); they sum to 0.
    """

    value: float
    contributions: NDArray[np.float64]


def compute_mean_share_above(
    hit: NDArray[np.bool_], counted: NDArray[np.bool_], scores: NDArray[np.float64]
) -> MeanShareAbove:
    """Compute the mean proportion of hits above each counted image, including itself and equal scores.

    Average precision is that of positives above positives; the area under the risk-coverage curve is that of errors
    above each image.

    Args:
        hit: Shape (n,): whether each image is a hit.
        counted: Shape (n,): whether the mean includes each image, at least one.
        scores: Shape (n,), finite.

    Example:
        >>> flags = np.array([True, False, True])
        >>> round(compute_mean_share_above(flags, flags, np.array([0.9, 0.5, 0.1])).value, 4)
        0.8333
    """
    level = np.unique(-scores, return_inverse=True)[1]  # 0 is the highest score
    above = np.cumsum(np.bincount(level)).astype(np.float64)
    hits = np.cumsum(np.bincount(level, weights=hit))
    weight = np.bincount(level, weights=counted)
    proportion = hits / above
    count = float(counted.sum())
    value = float((weight * proportion).sum() / count)
    # An image changes the proportion of every counted image that scores as high or lower.
    hit_effect = np.cumsum((weight / above)[::-1])[::-1]
    image_effect = np.cumsum((weight * proportion / above)[::-1])[::-1]
    changes = counted * (proportion[level] - value) + hit * hit_effect[level] - image_effect[level]
    return MeanShareAbove(value, changes / count)


PRIOR = 20.0
"""Weight of the binormal variance of an area, in degrees of freedom, when it is combined with DeLong's."""


@dataclass(frozen=True)
class AreaEstimate(Estimate):
    """An area under the ROC curve with its interval, in [0, 1]; NaN without positives or negatives.

    Attributes:
        standard_error: By DeLong, with groups by Obuchowski; NaN if fewer than two groups have positives
            (negatives), 0 if every positive ranks above every negative.
        positives: Number of images of the class.
        negatives: Number of all other images.
    """

    standard_error: float
    positives: int
    negatives: int


@dataclass(frozen=True, eq=False)
class StructuralComponents:
    """Structural components of one or more areas over the same images, summed within groups.

    Attributes:
        areas: The areas, of shape (scores,).
        of_positives: Deviations from the area, summed over each group's positives, of shape (scores, groups).
        of_negatives: The same for negatives.
        positives: Number of images of the class.
        negatives: Number of all other images.
        positive_groups: Number of groups that have a positive.
        negative_groups: Number of groups that have a negative.
    """

    areas: NDArray[np.float64]
    of_positives: NDArray[np.float64]
    of_negatives: NDArray[np.float64]
    positives: int
    negatives: int
    positive_groups: int
    negative_groups: int

    @property
    def contributions(self) -> NDArray[np.float64]:
        """Contribution of each group to the deviation of each area, of shape (scores, groups)."""
        return self.of_positives / self.positives + self.of_negatives / self.negatives


def auroc(
    positive: NDArray[np.bool_],
    scores: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    confidence: float = 0.95,
) -> AreaEstimate:
    """Compute the area under the ROC curve: the probability that a positive scores above a negative (ties count half).

    The interval is a score interval: it contains the areas that, each with its own standard error, are compatible with
    the observed one. The binormal model gives the dependence of the standard error on the area, DeLong's variance its
    size, with Student's t. Degrees of freedom are Welch's for the variances among positives and among negatives, each
    with Satterthwaite's for its groups, so that few positive patients count as few, however many others there are.
    DeLong's variance for few positives is usually too small; it is therefore combined with the binormal one if that
    is larger, as if that were known with `PRIOR` degrees of freedom, which has no weight once there are many.
    `benchmarks/coverage.py` compares the coverage with the nominal one.

    If DeLong's variance carries no information (every positive scores above every negative, one group has all
    positives, all scores are equal), only the binormal one is used, and the images of a group count as copies of one
    another.

    Args:
        positive: Shape (n,): whether each image is of the class.
        scores: Shape (n,): higher for more probable positives; any finite numbers.
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        confidence: Coverage of the interval, in (0, 1).

    Raises:
        ValueError: If the shapes differ, the arrays are empty, or a score is not finite.

    Example:
        >>> area = auroc(np.array([True, True, False, False]), np.array([0.9, 0.4, 0.5, 0.1]))
        >>> area.value, area.low < 0.75 < area.high
        (0.75, True)
    """
    check_confidence(confidence)
    flags = check_flags(positive, name="positive")
    positives, negatives = int(flags.sum()), int((~flags).sum())
    if not positives or not negatives:
        reason = ALL_IMAGES if positives else NO_IMAGES
        return AreaEstimate(math.nan, math.nan, math.nan, math.nan, positives, negatives, reason=reason)
    codes = encode_groups(groups, length=len(flags))
    placements = compute_placements(flags, check_scores(scores, length=len(flags)))
    area = estimate_area_variance(flags, placements, codes)
    kinds = (flags, ~flags)
    copies = [compute_copies(codes[kind]) for kind in kinds]
    if area.mean in (0.0, 1.0) or not area.variance > 0:
        low, high = compute_score_interval(area.mean, copies, 1.0, compute_quantile(confidence))
        return AreaEstimate(area.mean, low, high, math.sqrt(area.variance), positives, negatives)
    sizes = [
        _compute_effective_size(placements[kind], codes[kind], least) for kind, least in zip(kinds, copies, strict=True)
    ]
    expected = compute_binormal_variance(area.mean, sizes)
    moderated = (area.freedom * area.variance + PRIOR * max(area.variance, expected)) / (area.freedom + PRIOR)
    errors = compute_quantile(confidence, freedom=area.freedom + 1)
    low, high = compute_score_interval(area.mean, sizes, moderated / expected, errors)
    return AreaEstimate(area.mean, low, high, math.sqrt(area.variance), positives, negatives)


@dataclass(frozen=True)
class AreaVariance:
    """An area, or a difference of two areas over the same images, with its sampling variance.

    Attributes:
        mean: The area, or the difference.
        variance: Its variance; NaN if fewer than two groups have positives (negatives).
        freedom: Degrees of freedom of the variance, at least 1.
    """

    mean: float
    variance: float
    freedom: float


def compute_placements(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute, for each image, the proportion of images of the other kind with which it is in the correct order.

    Args:
        positive: Shape (n,), with at least one image of each kind.
        scores: Shape (n,), finite.

    Returns:
        Proportions of shape (n,), in [0, 1], ties counting half; their mean over positives, and that over negatives,
        is the area.

    Example:
        >>> compute_placements(np.array([True, True, False]), np.array([0.9, 0.2, 0.5])).tolist()
        [1.0, 0.0, 0.5]
    """
    placements = np.empty(len(scores))
    placements[positive] = _compute_ranks(scores[positive], scores[~positive])
    placements[~positive] = 1 - _compute_ranks(scores[~positive], scores[positive])
    return placements


def estimate_area_variance(
    positive: NDArray[np.bool_], placements: NDArray[np.float64], codes: NDArray[np.int64]
) -> AreaVariance:
    """Estimate the variance of an area from its placements, or of a difference from the differences of placements.

    Args:
        positive: Shape (n,), with at least one image of each kind.
        placements: From `compute_placements`, or the difference of two such arrays, of shape (n,).
        codes: Group of each image, whole numbers >= 0, of shape (n,).

    Example:
        >>> positive = np.array([True, True, False, False])
        >>> placements = compute_placements(positive, np.array([0.9, 0.4, 0.5, 0.1]))
        >>> area = estimate_area_variance(positive, placements, np.arange(4))
        >>> area.mean, area.variance, area.freedom
        (0.75, 0.125, 2.0)
    """
    mean = float(placements[positive].mean())
    kinds = [estimate_mean_variance(placements[kind], codes[kind]) for kind in (positive, ~positive)]
    up, down = (
        np.bincount(codes[kind], weights=placements[kind] - mean, minlength=int(codes.max()) + 1) / kind.sum()
        for kind in (positive, ~positive)
    )
    groups = len(np.unique(codes))
    shared = 2 * groups / (groups - 1) * float(up @ down) if groups > 1 else math.nan
    parts = sum(kind.variance for kind in kinds)
    variance = max(parts + shared, 0.0)
    scale = sum(kind.variance**2 / kind.freedom for kind in kinds)
    freedom = max(1.0, parts**2 / scale) if scale > 0 else 1.0
    return AreaVariance(mean, variance, freedom)


def compute_structural_components(
    positive: NDArray[np.bool_],
    scores: list[NDArray[np.float64]],
    groups: NDArray[np.generic] | None,
) -> StructuralComponents:
    """Split the area of each score into the contributions of the groups.

    Args:
        positive: Shape (n,), with at least one image of each kind.
        scores: One array of shape (n,) per model.
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.

    Raises:
        ValueError: If the shapes differ, or there are no positives or no negatives.

    Example:
        >>> flags = np.array([True, True, False])
        >>> compute_structural_components(flags, [np.array([0.9, 0.2, 0.5])], None).areas.tolist()
        [0.5]
    """
    flags = check_flags(positive, name="positive")
    if flags.all() or not flags.any():
        raise ValueError(
            f"{int(flags.sum())} of {len(flags)} images are positive; an area needs positives and negatives"
        )
    codes = encode_groups(groups, length=len(flags))
    count = int(codes.max()) + 1
    areas, of_positives, of_negatives = [], [], []
    for each in scores:
        placements = compute_placements(flags, check_scores(each, length=len(flags)))
        area = float(placements[flags].mean())
        areas.append(area)
        of_positives.append(np.bincount(codes[flags], weights=placements[flags] - area, minlength=count))
        of_negatives.append(np.bincount(codes[~flags], weights=placements[~flags] - area, minlength=count))
    return StructuralComponents(
        areas=np.array(areas),
        of_positives=np.array(of_positives),
        of_negatives=np.array(of_negatives),
        positives=int(flags.sum()),
        negatives=int((~flags).sum()),
        positive_groups=len(np.unique(codes[flags])),
        negative_groups=len(np.unique(codes[~flags])),
    )


def compute_area_covariance(parts: StructuralComponents) -> NDArray[np.float64]:
    """Compute the covariance of the areas, of shape (scores, scores).

    It is NaN if fewer than two groups have positives, or fewer than two have negatives.

    Example:
        >>> flags, score = np.array([True, True, False, False]), np.array([0.9, 0.4, 0.5, 0.1])
        >>> compute_area_covariance(compute_structural_components(flags, [score], None)).round(4).tolist()
        [[0.125]]
    """
    if min(parts.positive_groups, parts.negative_groups) < 2:
        return np.full((len(parts.areas), len(parts.areas)), np.nan)
    up, down = parts.of_positives / parts.positives, parts.of_negatives / parts.negatives
    total = up.shape[1]
    cross = up @ down.T
    matrix: NDArray[np.float64] = (
        _compute_unbiased_factor(parts.positive_groups) * (up @ up.T)
        + _compute_unbiased_factor(parts.negative_groups) * (down @ down.T)
        + _compute_unbiased_factor(total) * (cross + cross.T)
    )
    return matrix


def _compute_ranks(values: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute, for each value, the proportion of the reference values below it, ties counting half."""
    ordered = np.sort(reference)
    left, right = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return (left + right) / (2 * len(reference))


def _compute_unbiased_factor(groups: int) -> float:
    return groups / (groups - 1)


def _compute_effective_size(placements: NDArray[np.float64], codes: NDArray[np.int64], copies: float) -> float:
    """Compute how many independent images would give the observed variance of the mean placement."""
    variance = estimate_mean_variance(placements, codes).variance
    if not variance > 0:
        return float(len(placements))
    return max(copies, min(float(len(placements)), float(placements.var(ddof=1)) / variance))


def compute_binormal_variance(area: float, sizes: Sequence[float]) -> float:
    """Compute the variance of an area between two normal distributions of equal variance.

    Args:
        area: The area, in (0, 1).
        sizes: Effective numbers of independent positives and negatives.
    """
    # Probability that two positives both score above one negative; the same for one positive above two negatives.
    both = area - 2 * float(special.owens_t(special.ndtri(area), 1 / math.sqrt(3)))
    excess = both - area**2
    positives, negatives = sizes
    return (area * (1 - area) + (positives - 1 + negatives - 1) * excess) / (positives * negatives)


def compute_score_interval(area: float, sizes: Sequence[float], factor: float, errors: float) -> tuple[float, float]:
    """Compute the areas whose standard error, by the binormal variance times a factor, reaches the one observed.

    Args:
        area: The observed area, in [0, 1].
        sizes: Effective numbers of independent positives and negatives.
        factor: Multiplies the binormal variance, > 0.
        errors: How many standard errors an area in the interval may be from the observed one.
    """

    def compute_gap(true: float) -> float:
        return abs(area - true) - errors * math.sqrt(max(factor * compute_binormal_variance(true, sizes), 0.0))

    # The gap is positive at 0 and at 1, and negative next to the area, where the error exceeds the distance.
    edge = 1e-9
    inside = min(max(area, 10 * edge), 1 - 10 * edge)
    low = 0.0 if area == 0 or compute_gap(edge) <= 0 else float(optimize.brentq(compute_gap, edge, inside))
    high = 1.0 if area == 1 or compute_gap(1 - edge) <= 0 else float(optimize.brentq(compute_gap, inside, 1 - edge))
    return low, high


@dataclass(frozen=True)
class RankingEstimates:
    """Ranking of each class above the rest, in the order of the classes; NaN for a class without images.

    Attributes:
        auroc: One-vs-rest area under the ROC curve, in [0, 1].
        average_precision: Mean precision over the positives, in [0, 1]; a random ranking gives the class's
            prevalence.
        macro_auroc: Mean of the areas; NaN if one is undefined.
        macro_average_precision: Mean of the average precisions; NaN if one is undefined.
    """

    auroc: tuple[AreaEstimate, ...]
    average_precision: tuple[Estimate, ...]
    macro_auroc: Estimate
    macro_average_precision: Estimate


def ranking_of_predictions(
    true: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    groups: NDArray[np.generic] | None,
    *,
    confidence: float = 0.95,
    seed: int | None = None,
    resamples: int | None = None,
) -> RankingEstimates:
    """Compute one-vs-rest AUROC and average precision of each class, with intervals that allow for groups.

    Args:
        true: True classes of shape (n,), whole numbers in [0, classes).
        probabilities: Shape (n, classes); rows sum to one.
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        confidence: Coverage of the intervals, in (0, 1).
        seed: Deprecated, without effect: the intervals no longer need random numbers.
        resamples: Deprecated like `seed`.

    Raises:
        ValueError: If the shapes differ, the arrays are empty, a value is NaN, or a row does not sum to one.

    Example:
        >>> true = np.array([0, 0, 0, 1, 1, 1])
        >>> first = np.array([0.9, 0.8, 0.3, 0.6, 0.2, 0.1])
        >>> ranking = ranking_of_predictions(true, np.column_stack([first, 1 - first]), None)
        >>> round(ranking.auroc[0].value, 3), round(ranking.average_precision[0].value, 3)
        (0.889, 0.917)
    """
    check_confidence(confidence)
    handle_deprecated_arguments(seed=seed, resamples=resamples)
    table = check_probabilities(probabilities)
    classes = table.shape[1]
    truth = check_labels(true, classes, name="true")
    if len(truth) != len(table):
        raise ValueError(f"found {len(truth)} true labels and probabilities of {len(table)} images; expected as many")
    codes = encode_groups(groups, length=len(truth))
    present = [truth == each for each in range(classes)]
    scores = [table[:, each] for each in range(classes)]
    areas = tuple(
        auroc(positive, score, codes, confidence=confidence) for positive, score in zip(present, scores, strict=True)
    )
    precisions, contributions = zip(
        *(_estimate_precision(p, s, codes, confidence) for p, s in zip(present, scores, strict=True)), strict=True
    )
    # A pair of images in the wrong order may affect two classes.
    unknown, copies = 1 / (classes - 1), compute_copies(codes)
    return RankingEstimates(
        auroc=areas,
        average_precision=precisions,
        macro_auroc=compute_mean_estimate(
            areas,
            compute_correlation(
                _compute_area_covariance(present, scores, codes, areas), copies=copies, unknown=unknown
            ),
        ),
        macro_average_precision=compute_mean_estimate(
            precisions,
            compute_correlation(_compute_sum_covariance(contributions, codes), copies=copies, unknown=unknown),
        ),
    )


def average_precision(
    positive: NDArray[np.bool_],
    scores: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Compute average precision: the mean, over positives, of the precision at the score of each, with its interval.

    It is the sum over thresholds of precision times the gain in sensitivity, without interpolation (scikit-learn's
    definition); images of equal score are counted together. The interval is the Wilson interval at the number of
    independent images with the linearised variance of whole groups, with Student's t. If all positives score above all
    others, or one group has all positives, it is that of the positives, with those of a group as copies of one another.

    Args:
        positive: Shape (n,): whether each image is of the class.
        scores: Shape (n,): higher for more probable positives; any finite numbers.
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        Average precision, in [0, 1]; undefined without positives.

    Raises:
        ValueError: If the shapes differ, the arrays are empty, or a score is not finite.

    Example:
        >>> round(average_precision(np.array([True, False, True]), np.array([0.9, 0.5, 0.1])).value, 4)
        0.8333
    """
    check_confidence(confidence)
    flags = check_flags(positive, name="positive")
    codes = encode_groups(groups, length=len(flags))
    return _estimate_precision(flags, check_scores(scores, length=len(flags)), codes, confidence)[0]


def _estimate_precision(
    positive: NDArray[np.bool_], scores: NDArray[np.float64], codes: NDArray[np.int64], confidence: float
) -> tuple[Estimate, NDArray[np.float64]]:
    """Estimate average precision, and the contribution of each image to its deviation."""
    if not positive.any():
        return create_undefined_estimate(NO_IMAGES), np.zeros(len(positive))
    mean = compute_mean_share_above(positive, positive, scores)
    groups = len(np.unique(codes[positive]))
    spread = estimate_mean_variance(mean.contributions * len(positive), codes)
    # The variance of few positive groups is biased downwards; that of a single group can't be estimated.
    variance = spread.variance * groups / (groups - 1) if groups > 1 and mean.value < 1 - 1e-12 else math.nan
    estimate = estimate_from_variance(
        min(mean.value, 1.0), MeanVariance(variance, spread.freedom), codes[positive], confidence=confidence
    )
    return estimate, mean.contributions


def _compute_area_covariance(
    present: Sequence[NDArray[np.bool_]],
    scores: Sequence[NDArray[np.float64]],
    codes: NDArray[np.int64],
    areas: Sequence[AreaEstimate],
) -> NDArray[np.float64]:
    """Sum the products of the groups' contributions to two areas, of shape (classes, classes)."""
    contributions = [
        compute_structural_components(positive, [score], codes).contributions[0]
        if area.defined
        else np.zeros(int(codes.max()) + 1)
        for positive, score, area in zip(present, scores, areas, strict=True)
    ]
    return _compute_products(contributions)


def _compute_sum_covariance(
    contributions: Sequence[NDArray[np.float64]], codes: NDArray[np.int64]
) -> NDArray[np.float64]:
    return _compute_products([np.bincount(codes, weights=each).astype(np.float64) for each in contributions])


def _compute_products(contributions: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    table = np.array(contributions)
    product: NDArray[np.float64] = table @ table.T
    return product
