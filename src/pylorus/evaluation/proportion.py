"""Proportions of images with Wilson intervals: accuracy, sensitivity, specificity, precision and NPV.

Images of one patient resemble each other, so n images of few patients carry less information than n images of n
patients. If groups have several images, the Wilson interval is computed for the number of independent images with the
same variance (the effective size); with one image per group this is the plain Wilson interval.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.confusion import confusion_matrix
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.influence import estimate_design_effect
from pylorus.evaluation.inputs import check_flags, check_labels, encode_groups
from pylorus.evaluation.interval import (
    check_confidence,
    compute_quantile,
    compute_satterthwaite_freedom,
    compute_wilson_ends,
)

NO_IMAGES = "no image is of the class"
ALL_IMAGES = "all images are of the class"
NEVER_PREDICTED = "the class is never predicted"
ALWAYS_PREDICTED = "the class is always predicted"
ONE_GROUP = "all images are of one group"


@dataclass(frozen=True)
class Proportion(Estimate):
    """A proportion with its confidence interval, each in [0, 1]; all three are NaN if `total` is 0.

    Attributes:
        successes: Number of images that have the property.
        total: Number of all images.
    """

    successes: int
    total: int


@dataclass(frozen=True)
class ClassProportions:
    """The indices that are proportions of images, with intervals, in the order of the classes."""

    accuracy: Proportion
    precision: tuple[Proportion, ...]
    sensitivity: tuple[Proportion, ...]
    specificity: tuple[Proportion, ...]
    npv: tuple[Proportion, ...]


def wilson(successes: int, total: int, *, confidence: float = 0.95, reason: str = "no images") -> Proportion:
    """Estimate a proportion of independent images with its Wilson score interval (Wilson 1927).

    Args:
        successes: Number of images with the property, in [0, total].
        total: Number of all images, >= 0; with 0 the proportion is undefined and NaN.
        confidence: Coverage of the interval, in (0, 1).
        reason: Why there are no images, for a total of 0.

    Raises:
        ValueError: If successes are not in [0, total], or confidence is not in (0, 1).

    Example:
        >>> accuracy = wilson(409, 450)
        >>> round(accuracy.value, 3), round(accuracy.low, 3), round(accuracy.high, 3)
        (0.909, 0.879, 0.932)
    """
    check_confidence(confidence)
    if not 0 <= successes <= total:
        raise ValueError(f"found {successes} successes out of {total}; expected 0 <= successes <= total")
    if total == 0:
        return Proportion(math.nan, math.nan, math.nan, 0, 0, reason=reason)
    low, high = compute_wilson_ends(successes / total, float(total), compute_quantile(confidence))
    return Proportion(successes / total, low, high, int(successes), int(total))


def clustered_wilson(
    success: NDArray[np.bool_], groups: NDArray[np.generic] | None, *, confidence: float = 0.95
) -> Proportion:
    """Estimate a proportion of images in groups, with its Wilson interval at the effective number of images.

    `ClusterDesign` computes the interval, which allows for groups of unequal size; with one image per group it is the
    plain Wilson interval, and with a single group that of one image.

    Args:
        success: Shape (n,), n >= 1: whether each image has the property.
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        confidence: Coverage of the interval, in (0, 1).

    Raises:
        ValueError: If the shapes differ, there are no images, or confidence is not in (0, 1).

    Example:
        >>> correct = np.array([True, True, True, False, False, False])
        >>> independent = clustered_wilson(correct, None)
        >>> pairs = clustered_wilson(correct, np.array(["a", "a", "b", "b", "c", "c"]))
        >>> pairs.value == independent.value, pairs.low < independent.low
        (True, True)
    """
    check_confidence(confidence)
    flags = check_flags(success, name="success")
    codes = encode_groups(groups, length=len(flags))
    sizes = np.bincount(codes).astype(np.float64)
    if sizes.max() == 1:
        return wilson(int(flags.sum()), len(flags), confidence=confidence)
    successes = np.bincount(codes[flags], minlength=len(sizes)).astype(np.float64)
    value = float(successes.sum() / sizes.sum())
    low, high = compute_cluster_design(successes, sizes).compute_interval(value, confidence=confidence)
    return Proportion(value, low, high, int(flags.sum()), len(flags))


@dataclass(frozen=True)
class ClusterDesign:
    """How much information images in groups carry about a proportion.

    Attributes:
        size: Number of independent images with the same variance; at most the number of images.
        freedom: Degrees of freedom of that variance; infinite if it is not estimated.
        copies: Number of independent images if all images of a group were copies of one another, n² / Σm².
    """

    size: float
    freedom: float
    copies: float

    def compute_interval(self, value: float, *, confidence: float) -> tuple[float, float]:
        """Compute the Wilson interval around a proportion at the effective size, with Student's t.

        If the variance is based on few failures, t makes the interval wider than correlation within groups can. Each
        end is therefore limited to that of the interval with the images of a group as copies of one another.

        Args:
            value: The proportion, in [0, 1].
            confidence: Coverage of the interval, in (0, 1).

        Example:
            >>> low, high = ClusterDesign(size=60, freedom=20, copies=40).compute_interval(0.9, confidence=0.95)
            >>> round(low, 3), round(high, 3)
            (0.79, 0.956)
        """
        low, high = compute_wilson_ends(value, self.size, compute_quantile(confidence, freedom=self.freedom))
        if math.isinf(self.freedom):
            return low, high
        widest = compute_quantile(confidence, freedom=max(1.0, self.copies - 1))
        lowest, highest = compute_wilson_ends(value, min(self.size, self.copies), widest)
        return max(low, lowest), min(high, highest)

    def scale_size(self, factor: float) -> "ClusterDesign":
        """Return the design of an index that varies like a proportion of `factor` times as many images."""
        return ClusterDesign(self.size * factor, self.freedom, self.copies * factor)


def compute_cluster_design(successes: NDArray[np.float64], sizes: NDArray[np.float64]) -> ClusterDesign:
    """Estimate the effective size of a proportion whose images come in groups of any size.

    The variance is the larger of two estimates: that of the linearised ratio estimator (whole groups vary), and
    p (1 - p) / n · (1 + (Σm² / n - 1) ICC) with the intraclass correlation of an analysis of variance (Fleiss 2003,
    15.2). The first misses correlation if only small groups happen to have failures; the second if it differs between
    groups. Degrees of freedom are Satterthwaite's for the groups' contributions. If all or no images have the property
    neither can be estimated, and the images of a group count as copies of one another.

    Args:
        successes: Number of images with the property in each group, of shape (groups,).
        sizes: Number of images of each group, of shape (groups,), each >= 1.

    Example:
        >>> design = compute_cluster_design(np.array([5.0, 5.0, 0.0]), np.array([5.0, 5.0, 5.0]))
        >>> round(design.size, 2), design.freedom
        (2.0, 2.0)
    """
    total, groups = float(sizes.sum()), len(sizes)
    value = float(successes.sum()) / total
    squares = float((sizes**2).sum())
    copies = total**2 / squares
    if groups == 1 or value in (0.0, 1.0):
        return ClusterDesign(copies, math.inf, copies)
    independent = value * (1 - value) / total
    deviations = successes - value * sizes
    linearised = groups / (groups - 1) * float((deviations**2).sum()) / total**2
    effect = estimate_design_effect(deviations, sizes, total * value * (1 - value))
    variance = max(independent, linearised, independent * effect)
    freedom = max(1.0, compute_satterthwaite_freedom(deviations))
    return ClusterDesign(value * (1 - value) / variance, freedom, copies)


def proportions_of_confusion(confusion: NDArray[np.int64], *, confidence: float = 0.95) -> ClassProportions:
    """Compute proportions with plain Wilson intervals from counts of independent images, as in a published matrix.

    Args:
        confusion: Counts of shape (classes, classes); rows are true, columns predicted.
        confidence: Coverage of the intervals, in (0, 1).

    Raises:
        ValueError: If confusion is not a square matrix of counts, or confidence is not in (0, 1).

    Example:
        >>> vgg19 = np.array([[133, 15, 2], [11, 125, 14], [0, 7, 143]])
        >>> proportions = proportions_of_confusion(vgg19)
        >>> proportions.accuracy.successes, proportions.sensitivity[0].total
        (401, 150)
    """
    counts = np.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not np.issubdtype(counts.dtype, np.integer):
        raise ValueError(f"confusion is {counts.dtype} of shape {counts.shape}; expected a square matrix of integers")
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
    """Compute proportions with Wilson intervals that allow for groups of several images.

    Args:
        true: True classes of shape (n,), whole numbers in [0, classes).
        predicted: Predicted classes of shape (n,).
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        classes: Number of classes.
        confidence: Coverage of the intervals, in (0, 1).

    Returns:
        Proportions in the order of the classes; NaN if no image is in the denominator (precision of a class that is
        never predicted, sensitivity of a class without images).

    Raises:
        ValueError: If the shapes differ, the arrays are empty, or a label is out of range.

    Example:
        >>> proportions = proportions_of_predictions(np.array([0, 0, 1]), np.array([0, 1, 1]), None, classes=3)
        >>> [sensitivity.value for sensitivity in proportions.sensitivity]
        [0.5, 1.0, nan]
    """
    confusion_matrix(true, predicted, classes)  # checks the labels
    truth, guess = check_labels(true, classes), check_labels(predicted, classes)
    codes = encode_groups(groups, length=len(truth))

    def estimate_share(success: NDArray[np.bool_], among: NDArray[np.bool_], reason: str) -> Proportion:
        if not among.any():
            return wilson(0, 0, confidence=confidence, reason=reason)
        return clustered_wilson(success[among], codes[among], confidence=confidence)

    present = [truth == each for each in range(classes)]
    called = [guess == each for each in range(classes)]
    pairs = list(zip(present, called, strict=True))
    return ClassProportions(
        accuracy=estimate_share(truth == guess, np.ones(len(truth), dtype=np.bool_), ""),
        precision=tuple(estimate_share(p, c, NEVER_PREDICTED) for p, c in pairs),
        sensitivity=tuple(estimate_share(c, p, NO_IMAGES) for p, c in pairs),
        specificity=tuple(estimate_share(~c, ~p, ALL_IMAGES) for p, c in pairs),
        npv=tuple(estimate_share(~p, ~c, ALWAYS_PREDICTED) for p, c in pairs),
    )
