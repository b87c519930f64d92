"""Ranking by probability: one-vs-rest AUROC and average precision of each class, and their averages.

The interval of an AUROC is DeLong's (`delong`). Average precision is a mean over positives, and the area under the
risk-coverage curve one over images; one function computes the value and the contribution of each image to its
deviation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.auroc import (
    AreaEstimate,
    auroc,
    compute_mean_share_above,
    compute_structural_components,
)
from pylorus.evaluation.confusion import NO_IMAGES
from pylorus.evaluation.influence import (
    MeanVariance,
    compute_copies,
    compute_correlation,
    compute_mean_estimate,
    estimate_from_variance,
    estimate_mean_variance,
)
from pylorus.evaluation.intervals import Estimate, check_confidence, create_undefined_estimate
from pylorus.evaluation.predictions import (
    check_flags,
    check_labels,
    check_probabilities,
    check_scores,
    encode_groups,
    handle_deprecated_arguments,
)


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
