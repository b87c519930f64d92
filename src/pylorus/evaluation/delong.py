"""Area under the ROC curve with DeLong's variance, for independent images and for images in groups.

DeLong, DeLong and Clarke-Pearson (Biometrics 1988;44:837) write the area as a mean over positives and a mean
over negatives (structural components) and take its variance from theirs. Obuchowski (Biometrics 1997;53:567)
sums the components within each group first; with one image a group hers is DeLong's variance, so one function
serves both.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.inputs import checked_flags, checked_scores, group_codes
from pylorus.evaluation.interval import check_confidence, logit_interval, quantile


@dataclass(frozen=True)
class AreaEstimate(Estimate):
    """An area under the ROC curve with its interval, in [0, 1]; nan without positives or negatives.

    Attributes:
        standard_error: By DeLong, in groups by Obuchowski; nan if fewer than two groups hold positives
            (negatives).
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

    The interval is symmetric on the logit scale, which keeps it in [0, 1] and near its coverage for large
    areas (Pepe 2003, 5.2). Student's t of `freedom` takes the place of the normal quantile: simulated, 150
    images with an area of 0.98 are covered in 96 % with it and in 93 % without.

    Where every positive scores above every negative (or below) DeLong's variance is 0 and says nothing; there
    the interval is the score interval with Hanley and McNeil's variance (Radiology 1982;143:29), counting
    groups instead of images.

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
        return AreaEstimate(math.nan, math.nan, math.nan, math.nan, positives, negatives)
    parts = structural_components(flags, [scores], groups)
    area = float(parts.areas[0])
    if area in (0.0, 1.0):
        low, high = _separated(area, parts.positive_groups, parts.negative_groups, confidence=confidence)
        return AreaEstimate(area, low, high, 0.0, positives, negatives)
    variance = float(covariance(parts)[0, 0])
    if math.isnan(variance) or variance <= 0:
        # Nothing varied (one group of a kind, or the same score for all images): no interval can be told.
        return AreaEstimate(area, math.nan, math.nan, math.nan, positives, negatives)
    error = math.sqrt(variance)
    degrees = freedom(parts.contributions[0])
    low, high = logit_interval(area, error, confidence=confidence, freedom=degrees)
    return AreaEstimate(area, low, high, error, positives, negatives)


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
        score = checked_scores(each, length=len(flags))
        above, below = _ranks(score[flags], score[~flags]), _ranks(score[~flags], score[flags])
        area = float(above.mean())
        areas.append(area)
        of_positives.append(np.bincount(codes[flags], weights=above - area, minlength=count))
        # A negative's component is the share of positives above it: one less the share that it is above.
        of_negatives.append(np.bincount(codes[~flags], weights=1 - below - area, minlength=count))
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


def freedom(contributions: NDArray[np.float64]) -> float:
    """Degrees of freedom, 2 V² / Var(V), of a variance V that is a sum of squares (Satterthwaite 1946).

    Near an area of 1 a few misranked images make up nearly all of the variance, and they are what there is to
    learn from, however many others are ranked without fault.

    Args:
        contributions: What each group adds to the deviation of an area, or of a difference, of shape
            (groups,), not all 0; at least two groups.

    Returns:
        Above 0, and never more than groups - 1.

    Example:
        >>> round(freedom(np.array([0.02, -0.01, 0.01] + 100 * [0.0])), 2)
        4.08
    """
    squares = contributions**2
    total, most = float(squares.sum()), len(squares) - 1.0
    spread = float((squares**2).sum()) - total**2 / len(squares)
    return min(most, 2 * total**2 / spread) if spread > 0 else most


def _ranks(of: NDArray[np.float64], among: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each of `of`, the share of `among` below it, ties counting half."""
    ordered = np.sort(among)
    left, right = np.searchsorted(ordered, of, "left"), np.searchsorted(ordered, of, "right")
    return (left + right) / (2 * len(among))


def _unbiased(groups: int) -> float:
    return groups / (groups - 1)


def _separated(area: float, positives: int, negatives: int, *, confidence: float) -> tuple[float, float]:
    """Interval of an area of 0 or 1: the areas whose own standard error would still reach it."""
    errors = quantile(confidence)

    def gap(true: float) -> float:
        first, second = true / (2 - true), 2 * true**2 / (1 + true)
        variance = (true * (1 - true) + (positives - 1) * (first - true**2) + (negatives - 1) * (second - true**2)) / (
            positives * negatives
        )
        return (1 - true) - errors * math.sqrt(max(variance, 0.0))

    # gap is positive at 0 and falls below zero just under 1, where the error outlasts the distance.
    end = float(optimize.brentq(gap, 1e-9, 1 - 1e-9))
    return (end, 1.0) if area == 1.0 else (0.0, 1 - end)
