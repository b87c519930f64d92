"""Shares of images with Wilson intervals: accuracy, sensitivity, specificity, precision and NPV.

Images of one patient resemble each other, so n images of few patients tell less than n images of n patients.
Where groups hold several images, the Wilson interval is drawn for the smaller number of independent images
that would vary as much (its effective size); with one image a group this is the plain Wilson interval, to the
last digit.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats.proportion import proportion_confint

from pylorus.evaluation.confusion import confusion_matrix
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.inputs import checked_flags, group_codes, labels_in_range
from pylorus.evaluation.interval import check_confidence, quantile, two_sided_p


@dataclass(frozen=True)
class Proportion(Estimate):
    """A share with its confidence interval, each in [0, 1]; all three nan where `total` is 0.

    Attributes:
        successes: How many images have the property.
        total: Out of how many.
    """

    successes: int
    total: int


@dataclass(frozen=True)
class ClassProportions:
    """The indices that are shares of images, with intervals, in the order of the classes."""

    accuracy: Proportion
    precision: tuple[Proportion, ...]
    sensitivity: tuple[Proportion, ...]
    specificity: tuple[Proportion, ...]
    npv: tuple[Proportion, ...]


def wilson(successes: int, total: int, *, confidence: float = 0.95) -> Proportion:
    """A share of independent images with its Wilson score interval (Wilson 1927).

    Args:
        successes: Images with the property, in [0, total].
        total: All images, >= 0; with 0 the share is undefined and given as nan.
        confidence: Coverage of the interval, in (0, 1).

    Raises:
        ValueError: If successes are not in [0, total], or confidence is not in (0, 1).

    Example:
        >>> share = wilson(409, 450)
        >>> round(share.value, 3), round(share.low, 3), round(share.high, 3)
        (0.909, 0.879, 0.932)
    """
    check_confidence(confidence)
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes out of {total}; expected 0 <= successes <= total")
    if total == 0:
        return Proportion(math.nan, math.nan, math.nan, 0, 0)
    return _wilson_of_size(int(successes), int(total), size=float(total), errors=quantile(confidence))


def clustered_wilson(
    success: NDArray[np.bool_], groups: NDArray[np.generic] | None, *, confidence: float = 0.95
) -> Proportion:
    """A share of images that come in groups, with its Wilson interval for the effective number of images.

    The effective size is n / deff, where deff is the variance of the share with whole groups drawn
    (linearised ratio estimator) over that of n independent images; it never exceeds n. Student's t with
    groups - 1 degrees of freedom takes the place of the normal quantile, since deff is estimated (Korn and
    Graubard 1998). Where all or none succeed, deff can't be estimated and the images of a group are taken as
    copies of one another.

    Args:
        success: Shape (n,), n >= 1: whether each image has the property.
        groups: Names of shape (n,), or None if every image stands for itself.
        confidence: Coverage of the interval, in (0, 1).

    Raises:
        ValueError: If the shapes differ, nothing is given, or confidence is not in (0, 1).

    Example:
        >>> recognised = np.array([True, True, True, False, False, False])
        >>> alone = clustered_wilson(recognised, None)
        >>> in_pairs = clustered_wilson(recognised, np.array(["a", "a", "b", "b", "c", "c"]))
        >>> in_pairs.value == alone.value, in_pairs.low < alone.low
        (True, True)
    """
    check_confidence(confidence)
    flags = checked_flags(success, name="success")
    codes = group_codes(groups, length=len(flags))
    sizes = np.bincount(codes).astype(np.float64)
    if sizes.max() == 1:
        return wilson(int(flags.sum()), len(flags), confidence=confidence)
    successes = np.bincount(codes[flags], minlength=len(sizes)).astype(np.float64)
    size = _effective_size(successes, sizes)
    # One group alone gives no degrees of freedom; its effective size of 1 already says that it tells little.
    errors = quantile(confidence, freedom=len(sizes) - 1 if len(sizes) > 1 else math.inf)
    return _wilson_of_size(int(flags.sum()), len(flags), size=size, errors=errors)


def proportions_of_confusion(confusion: NDArray[np.int64], *, confidence: float = 0.95) -> ClassProportions:
    """Shares with plain Wilson intervals, from counts of independent images (as in a published matrix).

    Args:
        confusion: Counts of shape (classes, classes); rows are true, columns predicted.
        confidence: Coverage of the intervals, in (0, 1).

    Raises:
        ValueError: If confusion is not a square matrix of counts, or confidence is not in (0, 1).

    Example:
        >>> vgg19 = np.array([[133, 15, 2], [11, 125, 14], [0, 7, 143]])
        >>> shares = proportions_of_confusion(vgg19)
        >>> shares.accuracy.successes, shares.sensitivity[0].total
        (401, 150)
    """
    counts = np.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(f"confusion is {counts.dtype} of shape {counts.shape}; expected square, whole numbers")
    classes = len(counts)
    true, predicted = np.divmod(np.repeat(np.arange(classes**2), counts.ravel()), classes)
    return proportions_of_predictions(true, predicted, None, classes=classes, confidence=confidence)


def proportions_of_predictions(
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    groups: NDArray[np.generic] | None,
    *,
    classes: int,
    confidence: float = 0.95,
) -> ClassProportions:
    """Shares with Wilson intervals that allow for groups of several images.

    Args:
        true: True classes of shape (n,), whole numbers in [0, classes).
        predicted: Predicted classes of shape (n,).
        groups: Names of shape (n,) of what the images belong to (patients), or None if each stands for
            itself.
        classes: How many classes there are.
        confidence: Coverage of the intervals, in (0, 1).

    Returns:
        Shares in the order of the classes; nan where no image is in the denominator (precision of a class
        never predicted, sensitivity of a class without images).

    Raises:
        ValueError: If the arrays don't fit each other, are empty, or hold labels out of range.

    Example:
        >>> shares = proportions_of_predictions(np.array([0, 0, 1]), np.array([0, 1, 1]), None, classes=3)
        >>> [share.value for share in shares.sensitivity]
        [0.5, 1.0, nan]
    """
    confusion_matrix(true, predicted, classes)  # refuses what does not fit
    truth, guess = labels_in_range(true, classes), labels_in_range(predicted, classes)
    codes = group_codes(groups, length=len(truth))

    def share(success: NDArray[np.bool_], among: NDArray[np.bool_]) -> Proportion:
        if not among.any():
            return wilson(0, 0, confidence=confidence)
        return clustered_wilson(success[among], codes[among], confidence=confidence)

    present = [truth == each for each in range(classes)]
    chosen = [guess == each for each in range(classes)]
    return ClassProportions(
        accuracy=share(truth == guess, np.ones(len(truth), dtype=np.bool_)),
        precision=tuple(share(p, c) for p, c in zip(present, chosen, strict=True)),
        sensitivity=tuple(share(c, p) for p, c in zip(present, chosen, strict=True)),
        specificity=tuple(share(~c, ~p) for p, c in zip(present, chosen, strict=True)),
        npv=tuple(share(~p, ~c) for p, c in zip(present, chosen, strict=True)),
    )


def _effective_size(successes: NDArray[np.float64], sizes: NDArray[np.float64]) -> float:
    """How many independent images would vary as much as these groups do; both arrays of shape (groups,)."""
    total, groups = float(sizes.sum()), len(sizes)
    share = float(successes.sum()) / total
    copies = total**2 / float((sizes**2).sum())
    if groups == 1 or share in (0.0, 1.0):
        return copies
    variance = groups / (groups - 1) * float(((successes - share * sizes) ** 2).sum()) / total**2
    return min(total, share * (1 - share) / variance) if variance > 0 else total


def _wilson_of_size(successes: int, total: int, *, size: float, errors: float) -> Proportion:
    """The Wilson interval around successes / total, as wide as `size` independent images make it."""
    share = successes / total
    low, high = proportion_confint(share * size, size, alpha=two_sided_p(errors), method="wilson")
    # Rounding may put the ends of 0/n and n/n a hair outside.
    return Proportion(share, min(share, max(0.0, float(low))), max(share, min(1.0, float(high))), successes, total)
