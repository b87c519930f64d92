"""How well probabilities rank: one-vs-rest AUROC and average precision of each class, and their averages.

An area has its interval by DeLong (`delong`), which is exact arithmetic and covers as well as any. Average
precision and the averages over classes have theirs by the clustered bootstrap: scores are sorted once, and a
resample only changes the weights of the sorted images.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.bootstrap import (
    RESAMPLES,
    BootstrapEstimate,
    bootstrap_estimate,
    resampled_weights,
)
from pylorus.evaluation.confusion import macro_average
from pylorus.evaluation.delong import AreaEstimate, auroc, freedom, structural_components
from pylorus.evaluation.inputs import (
    checked_flags,
    checked_probabilities,
    checked_scores,
    group_codes,
    labels_in_range,
)


@dataclass(frozen=True)
class RankingEstimates:
    """How well each class is ranked above the rest, in their order; nan for a class without images.

    Attributes:
        auroc: One-vs-rest area under the ROC curve, in [0, 1].
        average_precision: Mean precision over the positives, in [0, 1]; a random ranking gives the class's
            share.
        macro_auroc: Mean of the areas; nan if one is undefined.
        macro_average_precision: Mean of the average precisions; nan if one is undefined.
    """

    auroc: tuple[AreaEstimate, ...]
    average_precision: tuple[BootstrapEstimate, ...]
    macro_auroc: BootstrapEstimate
    macro_average_precision: BootstrapEstimate


@dataclass(frozen=True, eq=False)
class Ranking:
    """Images sorted by falling score, ready to be weighed.

    Attributes:
        order: Positions of the images, likeliest first, shape (n,).
        positives: Places in that order that positives hold, shape (positives,).
        tie_start: For each positive, how many images score strictly higher.
        tie_end: For each positive, how many images score as high or higher.
        tied_start: For each positive, how many positives score strictly higher.
        tied_end: For each positive, how many positives score as high or higher.
    """

    order: NDArray[np.int64]
    positives: NDArray[np.int64]
    tie_start: NDArray[np.int64]
    tie_end: NDArray[np.int64]
    tied_start: NDArray[np.int64]
    tied_end: NDArray[np.int64]


def ranking_of(positive: NDArray[np.bool_], scores: NDArray[np.float64]) -> Ranking:
    """Sort images by score once.

    Args:
        positive: Shape (n,): whether each image is of the class.
        scores: Shape (n,): larger for likelier.

    Raises:
        ValueError: If the arrays don't fit each other, are empty, or scores are not finite.

    Example:
        >>> ranking_of(np.array([False, True]), np.array([0.2, 0.7])).order.tolist()
        [1, 0]
    """
    flags = checked_flags(positive, name="positive")
    falling = -checked_scores(scores, length=len(flags))
    order = np.argsort(falling, kind="stable")
    ordered, hits = falling[order], flags[order]
    places = np.flatnonzero(hits)
    own = ordered[places]
    return Ranking(
        order=order,
        positives=places,
        tie_start=np.searchsorted(ordered, own, "left"),
        tie_end=np.searchsorted(ordered, own, "right"),
        tied_start=np.searchsorted(own, own, "left"),
        tied_end=np.searchsorted(own, own, "right"),
    )


def weighted_ranking(ranking: Ranking, weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUROC and average precision with each image counted `weights` times.

    Average precision is the sum over thresholds of precision times the gain in sensitivity, without
    interpolation (scikit-learn's definition); images of equal score are taken together.

    Args:
        ranking: From `ranking_of`, for n images.
        weights: Shape (resamples, n), each >= 0, in the order of the images.

    Returns:
        AUROC and average precision, each of shape (resamples,), nan where no positive (or, for AUROC, no
        negative) has a weight.

    Example:
        >>> ranking = ranking_of(np.array([True, False, True]), np.array([0.9, 0.5, 0.1]))
        >>> area, precision = weighted_ranking(ranking, np.ones((1, 3)))
        >>> area.tolist(), precision.round(4).tolist()
        ([0.5], [0.8333])
    """
    sorted_weights = weights[:, ranking.order]
    weight = sorted_weights[:, ranking.positives]
    above = _running_sum(sorted_weights)
    hits = _running_sum(weight)
    positives, total = hits[:, -1], above[:, -1]
    negatives = total - positives
    hits_start, hits_end = hits[:, ranking.tied_start], hits[:, ranking.tied_end]
    seen_start, seen_end = above[:, ranking.tie_start], above[:, ranking.tie_end]
    # Negatives above a positive are lost to it; those of its own score count half.
    lost = ((seen_start - hits_start) + (seen_end - hits_end)) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        area = 1 - (weight * lost).sum(axis=1) / (positives * negatives)
        # Where seen_end is 0 the positive itself has no weight and adds nothing.
        gain = np.where(seen_end > 0, weight * hits_end / seen_end, 0.0)
        precision = gain.sum(axis=1) / positives
    area[(positives == 0) | (negatives == 0)] = np.nan
    precision[positives == 0] = np.nan
    return area, precision


def ranking_of_predictions(
    true: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    groups: NDArray[np.generic] | None,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> RankingEstimates:
    """One-vs-rest AUROC and average precision of each class, with intervals that draw whole groups.

    Args:
        true: True classes of shape (n,), whole numbers in [0, classes).
        probabilities: Shape (n, classes); rows sum to one.
        groups: Names of shape (n,) of what the images belong to (patients), or None if each stands for
            itself.
        seed: The same seed gives the same intervals.
        resamples: How many resamples to draw.
        confidence: Coverage of the intervals, in (0, 1).

    Raises:
        ValueError: If the arrays don't fit each other, are empty, hold nan or rows that don't sum to one.

    Example:
        >>> true = np.array([0, 0, 0, 1, 1, 1])
        >>> first = np.array([0.9, 0.8, 0.3, 0.6, 0.2, 0.1])
        >>> found = ranking_of_predictions(true, np.column_stack([first, 1 - first]), None, seed=0)
        >>> round(found.auroc[0].value, 3), round(found.average_precision[0].value, 3)
        (0.889, 0.917)
    """
    table = checked_probabilities(probabilities)
    classes = table.shape[1]
    truth = labels_in_range(true, classes, name="true")
    if len(truth) != len(table):
        raise ValueError(f"{len(truth)} true labels but probabilities of {len(table)} images")
    codes = group_codes(groups, length=len(truth))
    drawn = np.ones(int(codes.max()) + 1, dtype=np.int64)
    rankings = [ranking_of(truth == each, table[:, each]) for each in range(classes)]
    observed = _every_class(rankings, np.ones((1, len(truth))))[0]
    spread = np.concatenate(
        [
            _every_class(rankings, weights[:, codes])
            for weights in resampled_weights(drawn, resamples=resamples, seed=seed, numbers_each=8 * len(truth))
        ]
    )

    def estimate(
        value: NDArray[np.float64], resampled: NDArray[np.float64], degrees: float | None = None
    ) -> BootstrapEstimate:
        return bootstrap_estimate(float(value), resampled, groups=len(drawn), freedom=degrees, confidence=confidence)

    return RankingEstimates(
        auroc=tuple(auroc(truth == each, table[:, each], codes, confidence=confidence) for each in range(classes)),
        average_precision=tuple(estimate(observed[1, c], spread[:, 1, c]) for c in range(classes)),
        macro_auroc=estimate(
            macro_average(observed[0]), macro_average(spread[:, 0]), _macro_freedom(truth, table, codes)
        ),
        macro_average_precision=estimate(macro_average(observed[1]), macro_average(spread[:, 1])),
    )


def _macro_freedom(truth: NDArray[np.int64], table: NDArray[np.float64], codes: NDArray[np.int64]) -> float | None:
    """Degrees of freedom of the mean area, from what each group adds to it; None if an area is undefined."""
    present = [truth == each for each in range(table.shape[1])]
    if any(positive.all() or not positive.any() for positive in present):
        return None
    added = [
        structural_components(positive, [table[:, each]], codes).contributions[0]
        for each, positive in enumerate(present)
    ]
    return freedom(np.mean(added, axis=0))


def _every_class(rankings: list[Ranking], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """AUROC and average precision of shape (resamples, 2, classes); nan for a class without images."""
    empty = np.full(len(weights), math.nan)
    each = [weighted_ranking(r, weights) if len(r.positives) else (empty, empty) for r in rankings]
    return np.array(each).transpose(2, 1, 0)


def _running_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of the first 0, 1, … columns, of shape (rows, columns + 1)."""
    sums = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=sums[:, 1:])
    return sums
