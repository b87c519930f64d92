"""Two models on the same images: differences of AUROC (DeLong), macro F1 and its like (paired bootstrap).

Each takes two `Predictions`, puts the second in the order of the first and refuses different sets of images.
Differences are first minus second.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.bootstrap import RESAMPLES, group_patterns, resampled_indices, standard_error
from pylorus.evaluation.confusion import overall_indices
from pylorus.evaluation.delong import covariance, structural_components
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.inputs import group_codes
from pylorus.evaluation.interval import check_confidence, quantile, two_sided_p
from pylorus.evaluation.mcnemar import mcnemar
from pylorus.evaluation.predictions import Predictions, aligned

INDICES = ("accuracy", "balanced_accuracy", "macro_precision", "macro_f1", "cohen_kappa", "mcc")
"""What two models are compared by, besides AUROC."""


@dataclass(frozen=True)
class Difference(Estimate):
    """A difference between two models on the same images, first minus second, with its interval.

    Attributes:
        standard_error: Of the difference, > 0; nan where it can't be told.
        p_value: Two-sided, of no difference, in [0, 1]; nan where it can't be told.
    """

    standard_error: float
    p_value: float


@dataclass(frozen=True)
class PairedDifferences:
    """Differences of the indices of all classes together; see `OverallIndices` for what they are."""

    accuracy: Difference
    balanced_accuracy: Difference
    macro_precision: Difference
    macro_f1: Difference
    cohen_kappa: Difference
    mcc: Difference


def delong_test(first: Predictions, second: Predictions, *, class_name: str, confidence: float = 0.95) -> Difference:
    """Difference of two one-vs-rest AUROCs on the same images (DeLong 1988; in groups Obuchowski 1997).

    Args:
        first: One model's predictions.
        second: The other's, about the same images.
        class_name: The class to rank above the rest.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The difference with its interval and p; all nan if the class, or the rest, has no images. If
        the areas do not vary (both rank perfectly) the interval is nan, and p is 1 for equal areas and nan
        otherwise.

    Raises:
        ValueError: If the two are not about the same images, or do not know the class.

    Example:
        >>> names, truth = np.array(list("abcdef")), np.array([0, 0, 0, 1, 1, 1])
        >>> def said(chance):
        ...     return Predictions(names, names, truth, np.column_stack([chance, 1 - chance]), ("x", "y"))
        >>> one = said(np.array([0.9, 0.8, 0.3, 0.5, 0.2, 0.1]))
        >>> two = said(np.array([0.9, 0.2, 0.6, 0.5, 0.7, 0.1]))
        >>> round(delong_test(one, two, class_name="x").value, 3)
        0.222
    """
    check_confidence(confidence)
    other = aligned(first, second)
    if class_name not in first.class_names:
        raise ValueError(f'no class "{class_name}"; there are {list(first.class_names)}')
    column = first.class_names.index(class_name)
    positive = first.true == column
    if positive.all() or not positive.any():
        return Difference(math.nan, math.nan, math.nan, math.nan, math.nan)
    scores = [first.probabilities[:, column], other.probabilities[:, column]]
    parts = structural_components(positive, scores, first.group)
    spread = covariance(parts)
    value = float(parts.areas[0] - parts.areas[1])
    variance = float(spread[0, 0] + spread[1, 1] - 2 * spread[0, 1])
    if math.isnan(variance) or variance < 1e-18:
        p_value = 1.0 if value == 0 else math.nan
        return Difference(value, math.nan, math.nan, math.nan, p_value)
    error = math.sqrt(variance)
    reach = quantile(confidence) * error
    p_value = two_sided_p(value / error)
    return Difference(value, max(-1.0, value - reach), min(1.0, value + reach), error, p_value)


def paired_differences(
    first: Predictions,
    second: Predictions,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> PairedDifferences:
    """Differences of accuracy, macro F1 and their like, by drawing the same groups for both models.

    Interval and p come from the standard error of the resampled differences and Student's t, with as many
    degrees of freedom as there are groups that the two models answer differently, less one: agreement,
    however long, tells nothing of the difference. If fewer than two groups tell them apart there is no
    interval, and p is 1. The p of accuracy is the exact one of `mcnemar`.

    Args:
        first: One model's predictions.
        second: The other's, about the same images.
        seed: The same seed gives the same intervals.
        resamples: How many resamples to draw.
        confidence: Coverage of the intervals, in (0, 1).

    Returns:
        Differences, first minus second; nan for an index that is 0/0 for one of them.

    Raises:
        ValueError: If the two are not about the same images.

    Example:
        >>> names, truth = np.array([f"image {i}" for i in range(40)]), np.arange(40) % 2
        >>> half_right = np.eye(2)[np.where(np.arange(40) < 20, truth, 1 - truth)]
        >>> perfect = Predictions(names, names, truth, np.eye(2)[truth], ("x", "y"))
        >>> other = Predictions(names, names, truth, half_right, ("x", "y"))
        >>> found = paired_differences(perfect, other, seed=0).macro_f1
        >>> found.value, found.low > 0, found.p_value < 0.001
        (0.5, True, True)
    """
    check_confidence(confidence)
    other, classes = aligned(first, second), first.classes
    codes = group_codes(first.group, length=len(first.true))
    cells = (first.true * classes + first.predicted) * classes + other.predicted
    told_apart = len(np.unique(codes[first.predicted != other.predicted]))

    def differences(tables: NDArray[np.float64]) -> NDArray[np.float64]:
        cube = tables.reshape(-1, classes, classes, classes)  # truth, the first's answer, the second's
        ours, theirs = overall_indices(cube.sum(axis=3)), overall_indices(cube.sum(axis=2))
        return np.column_stack([getattr(ours, name) - getattr(theirs, name) for name in INDICES])

    values = resampled_indices(
        group_patterns(codes, cells), differences, width=classes**3, resamples=resamples, seed=seed
    )
    found = {
        name: _difference(values[:, column], freedom=told_apart - 1, confidence=confidence)
        for column, name in enumerate(INDICES)
    }
    # There is one exact answer to the question of accuracy; an approximate one beside it would only confuse.
    found["accuracy"] = replace(found["accuracy"], p_value=mcnemar(first, other).p_value)
    return PairedDifferences(**found)


def _difference(values: NDArray[np.float64], *, freedom: int, confidence: float) -> Difference:
    """The first of `values` is the difference itself, the others those of the resamples."""
    value, spread = float(values[0]), values[1:]
    if math.isnan(value):
        return Difference(math.nan, math.nan, math.nan, math.nan, math.nan)
    if freedom < 1:
        return Difference(value, math.nan, math.nan, math.nan, 1.0)
    error = standard_error(spread)
    if math.isnan(error):
        return Difference(value, math.nan, math.nan, math.nan, math.nan)
    reach = quantile(confidence, freedom=freedom) * error
    p_value = two_sided_p(value / error, freedom=freedom)
    return Difference(value, value - reach, value + reach, error, p_value)
