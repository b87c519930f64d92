"""Area under the ROC curve with DeLong's variance, for independent images and for images in groups.

DeLong, DeLong and Clarke-Pearson (Biometrics 1988;44:837) write the area as a mean over positives and a mean
over negatives (structural components) and take its variance from theirs. Obuchowski (Biometrics 1997;53:567)
sums the components within each group first; with one image a group hers is DeLong's variance, so one function
serves both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.influence import compute_copies, estimate_mean_variance
from pylorus.evaluation.inputs import checked_flags, checked_scores, group_codes
from pylorus.evaluation.interval import check_confidence, quantile
from pylorus.evaluation.proportion import ALL_IMAGES, NO_IMAGES

PRIOR = 20.0
"""Degrees of freedom that the binormal variance of an area counts for beside DeLong's."""


@dataclass(frozen=True)
class AreaEstimate(Estimate):
    """An area under the ROC curve with its interval, in [0, 1]; NaN without positives or negatives.

    Attributes:
        standard_error: By DeLong, in groups by Obuchowski; NaN if fewer than two groups hold positives
            (negatives), 0 where no positive and negative are in the wrong order.
        positives: Images of the class.
        negatives: All other images.
    """

    standard_error: float
    positives: int
    negatives: int


@dataclass(frozen=True, eq=False)
class Components:
    """Structural components of one or more areas over the same images, summed within groups.

    Attributes:
        areas: Shape (scores,).
        of_positives: Deviations from the area, summed over each group's positives, shape (scores, groups).
        of_negatives: The same for negatives.
        positives: Images of the class.
        negatives: All other images.
        positive_groups: Groups that hold a positive.
        negative_groups: Groups that hold a negative.
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
        """What each group adds to the deviation of each area, of shape (scores, groups)."""
        return self.of_positives / self.positives + self.of_negatives / self.negatives


def auroc(
    positive: NDArray[np.bool_],
    scores: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    confidence: float = 0.95,
) -> AreaEstimate:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    The interval is a score interval: it holds the areas that, with a standard error of their own, could have given the
    one observed. How the standard error depends on the area is taken from the binormal model, its size from DeLong's
    variance, with Student's t. Degrees of freedom are Welch's for the variance among positives and that among
    negatives, each with Satterthwaite's of its groups: few positive patients are few, however many others there are.
    DeLong's variance of few positives is too small more often than not; it is therefore combined with the binormal one
    where that is larger, as if that were known from `PRIOR` degrees of freedom, which no longer counts with many.
    `benchmarks/coverage.py` compares this with what it is to cover.

    Where DeLong's variance says nothing (every positive scores above every negative, one group holds all positives,
    all scores are equal) the binormal one stands alone, and the images of a group count as copies of one another.

    Args:
        positive: Shape (n,): whether each image is of the class.
        scores: Shape (n,): larger for likelier; any finite numbers.
        groups: Names of shape (n,) of what the images belong to, or None if each stands for itself.
        confidence: Coverage of the interval, in (0, 1).

    Raises:
        ValueError: If the arrays don't fit each other, are empty, or scores are not finite.

    Example:
        >>> found = auroc(np.array([True, True, False, False]), np.array([0.9, 0.4, 0.5, 0.1]))
        >>> found.value, found.low < 0.75 < found.high
        (0.75, True)
    """
    check_confidence(confidence)
    flags = checked_flags(positive, name="positive")
    positives, negatives = int(flags.sum()), int((~flags).sum())
    if not positives or not negatives:
        reason = ALL_IMAGES if positives else NO_IMAGES
        return AreaEstimate(math.nan, math.nan, math.nan, math.nan, positives, negatives, reason=reason)
    codes = group_codes(groups, length=len(flags))
    placements = compute_placements(flags, checked_scores(scores, length=len(flags)))
    found = estimate_area_variance(flags, placements, codes)
    kinds = (flags, ~flags)
    copies = [compute_copies(codes[kind]) for kind in kinds]
    if found.mean in (0.0, 1.0) or not found.variance > 0:
        low, high = _score_interval(found.mean, copies, 1.0, quantile(confidence))
        return AreaEstimate(found.mean, low, high, math.sqrt(found.variance), positives, negatives)
    sizes = [_effective_size(placements[kind], codes[kind], least) for kind, least in zip(kinds, copies, strict=True)]
    expected = _binormal_variance(found.mean, sizes)
    moderated = (found.freedom * found.variance + PRIOR * max(found.variance, expected)) / (found.freedom + PRIOR)
    errors = quantile(confidence, freedom=found.freedom + 1)
    low, high = _score_interval(found.mean, sizes, moderated / expected, errors)
    return AreaEstimate(found.mean, low, high, math.sqrt(found.variance), positives, negatives)


@dataclass(frozen=True)
class AreaVariance:
    """An area, or a difference of two areas of the same images, and how far other patients would move it.

    Attributes:
        mean: The area, or the difference.
        variance: NaN if fewer than two groups hold positives (negatives).
        freedom: Degrees of freedom of the variance, at least 1.
    """

    mean: float
    variance: float
    freedom: float


def compute_placements(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the share of images of the other kind with which each image is in the right order.

    Args:
        positive: Shape (n,), with at least one image of each kind.
        scores: Shape (n,), finite.

    Returns:
        Of shape (n,), in [0, 1], ties counting half; the mean over positives and that over negatives are the area.

    Example:
        >>> compute_placements(np.array([True, True, False]), np.array([0.9, 0.2, 0.5])).tolist()
        [1.0, 0.0, 0.5]
    """
    placements = np.empty(len(scores))
    placements[positive] = _ranks(scores[positive], scores[~positive])
    placements[~positive] = 1 - _ranks(scores[~positive], scores[positive])
    return placements


def estimate_area_variance(
    positive: NDArray[np.bool_], placements: NDArray[np.float64], codes: NDArray[np.int64]
) -> AreaVariance:
    """Estimate the variance of an area from its placements, or of a difference from the differences of placements.

    Args:
        positive: Shape (n,), with at least one image of each kind.
        placements: From `compute_placements`, or the difference of two such arrays, of shape (n,).
        codes: The group of each image, whole numbers >= 0, of shape (n,).

    Example:
        >>> positive = np.array([True, True, False, False])
        >>> placements = compute_placements(positive, np.array([0.9, 0.4, 0.5, 0.1]))
        >>> found = estimate_area_variance(positive, placements, np.arange(4))
        >>> found.mean, found.variance, found.freedom
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


def structural_components(
    positive: NDArray[np.bool_],
    scores: list[NDArray[np.float64]],
    groups: NDArray[np.generic] | None,
) -> Components:
    """Split the area of each score into what each group contributes.

    Args:
        positive: Shape (n,), with at least one image of each kind.
        scores: One array of shape (n,) a model.
        groups: Names of shape (n,), or None if each image stands for itself.

    Raises:
        ValueError: If the arrays don't fit each other, or there are no positives or no negatives.

    Example:
        >>> flags = np.array([True, True, False])
        >>> structural_components(flags, [np.array([0.9, 0.2, 0.5])], None).areas.tolist()
        [0.5]
    """
    flags = checked_flags(positive, name="positive")
    if flags.all() or not flags.any():
        raise ValueError(f"{int(flags.sum())} of {len(flags)} images are positive; an area needs both kinds")
    codes = group_codes(groups, length=len(flags))
    count = int(codes.max()) + 1
    areas, of_positives, of_negatives = [], [], []
    for each in scores:
        placements = compute_placements(flags, checked_scores(each, length=len(flags)))
        area = float(placements[flags].mean())
        areas.append(area)
        of_positives.append(np.bincount(codes[flags], weights=placements[flags] - area, minlength=count))
        of_negatives.append(np.bincount(codes[~flags], weights=placements[~flags] - area, minlength=count))
    return Components(
        areas=np.array(areas),
        of_positives=np.array(of_positives),
        of_negatives=np.array(of_negatives),
        positives=int(flags.sum()),
        negatives=int((~flags).sum()),
        positive_groups=len(np.unique(codes[flags])),
        negative_groups=len(np.unique(codes[~flags])),
    )


def covariance(parts: Components) -> NDArray[np.float64]:
    """Covariance of the areas, of shape (scores, scores); nan if fewer than two groups hold a kind of image.

    Example:
        >>> flags, score = np.array([True, True, False, False]), np.array([0.9, 0.4, 0.5, 0.1])
        >>> covariance(structural_components(flags, [score], None)).round(4).tolist()
        [[0.125]]
    """
    if min(parts.positive_groups, parts.negative_groups) < 2:
        return np.full((len(parts.areas), len(parts.areas)), np.nan)
    up, down = parts.of_positives / parts.positives, parts.of_negatives / parts.negatives
    total = up.shape[1]
    cross = up @ down.T
    spread: NDArray[np.float64] = (
        _unbiased(parts.positive_groups) * (up @ up.T)
        + _unbiased(parts.negative_groups) * (down @ down.T)
        + _unbiased(total) * (cross + cross.T)
    )
    return spread


def _ranks(of: NDArray[np.float64], among: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each of `of`, the share of `among` below it, ties counting half."""
    ordered = np.sort(among)
    left, right = np.searchsorted(ordered, of, "left"), np.searchsorted(ordered, of, "right")
    return (left + right) / (2 * len(among))


def _unbiased(groups: int) -> float:
    return groups / (groups - 1)


def _effective_size(placements: NDArray[np.float64], codes: NDArray[np.int64], copies: float) -> float:
    """Compute how many independent images of a kind would have a mean placement of the variance seen."""
    variance = estimate_mean_variance(placements, codes).variance
    if not variance > 0:
        return float(len(placements))
    return max(copies, min(float(len(placements)), float(placements.var(ddof=1)) / variance))


def _binormal_variance(area: float, sizes: Sequence[float]) -> float:
    """Compute the variance of an area between two normal distributions of equal variance.

    Args:
        area: In (0, 1).
        sizes: Independent positives and negatives.
    """
    # Two positives both score above one negative; the same holds for one positive above two negatives.
    both = area - 2 * float(special.owens_t(special.ndtri(area), 1 / math.sqrt(3)))
    spread = both - area**2
    positives, negatives = sizes
    return (area * (1 - area) + (positives - 1 + negatives - 1) * spread) / (positives * negatives)


def _score_interval(area: float, sizes: Sequence[float], factor: float, errors: float) -> tuple[float, float]:
    """Compute the areas whose standard error, by the binormal variance times a factor, reaches the one observed."""

    def compute_gap(true: float) -> float:
        return abs(area - true) - errors * math.sqrt(max(factor * _binormal_variance(true, sizes), 0.0))

    # The gap is positive at 0 and at 1 and below zero just beside the area, where the error outlasts the distance.
    edge = 1e-9
    inside = min(max(area, 10 * edge), 1 - 10 * edge)
    low = 0.0 if area == 0 or compute_gap(edge) <= 0 else float(optimize.brentq(compute_gap, edge, inside))
    high = 1.0 if area == 1 or compute_gap(1 - edge) <= 0 else float(optimize.brentq(compute_gap, inside, 1 - edge))
    return low, high
