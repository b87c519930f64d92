"""Proportions of images with Wilson intervals: accuracy, sensitivity, specificity, precision and NPV.

Images of one patient resemble each other, so n images of few patients carry less information than n images of n
patients. If groups have several images, the Wilson interval is computed for the number of independent images with the
same variance (the effective size); with one image per group this is the plain Wilson interval.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.confusion import (
    CLASS_METRICS,
    ClassMetric,
    class_indices,
    confusion_matrix,
    overall_indices,
)
from pylorus.evaluation.influence import (
    NOISE,
    GroupCounts,
    Linearisation,
    compute_copies,
    compute_correlation,
    compute_linearised_indices,
    compute_mean_estimate,
    count_by_group,
    estimate_design_effect,
)
from pylorus.evaluation.intervals import (
    Estimate,
    check_confidence,
    compute_quantile,
    compute_satterthwaite_freedom,
    compute_wilson_ends,
    create_undefined_estimate,
)
from pylorus.evaluation.predictions import (
    Predictions,
    check_flags,
    check_labels,
    encode_groups,
    handle_deprecated_arguments,
)

INFORMATION_RANGE = (0.05, 1.0)
"""Least and greatest factor by which the effective number of images of kappa and MCC may differ from that of accuracy.

A factor above 1 would be too optimistic: if a model nearly always predicts the same class, a few images make the
variance small."""

OVERALL = ("balanced_accuracy", "macro_precision", "macro_f1", "cohen_kappa", "mcc")
"""The overall indices that are not proportions of images."""

ONE_CLASS = "all images are of one class and predicted as it"
CHANCE_CORRECTED = {"cohen_kappa": ONE_CLASS, "mcc": "all images are of one class, or all are predicted as one class"}
"""The chance-corrected indices, and why each may be undefined."""


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

    return ClassProportions(
        accuracy=clustered_wilson(truth == guess, codes, confidence=confidence),
        **{
            name: tuple(
                _estimate_share(CLASS_METRICS[name], truth == each, guess == each, codes, confidence)
                for each in range(classes)
            )
            for name in ("precision", "sensitivity", "specificity", "npv")
        },
    )


def estimate_class_metric(
    metric: ClassMetric,
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    groups: NDArray[np.generic] | None,
    *,
    classes: int,
    confidence: float = 0.95,
) -> tuple[Estimate, ...]:
    """Estimate an index of each class, with an interval that allows for groups.

    Args:
        metric: The index, such as `CLASS_METRICS["specificity"]`.
        true: True classes of shape (n,), whole numbers in [0, classes).
        predicted: Predicted classes of shape (n,).
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        classes: Number of classes.
        confidence: Coverage of the intervals, in (0, 1).

    Raises:
        ValueError: If the index has no interval, the shapes differ, the arrays are empty, or a label is out of range.

    Example:
        >>> f1 = estimate_class_metric(CLASS_METRICS["f1"], np.array([0, 0, 1]), np.array([0, 1, 1]), None, classes=2)
        >>> [round(each.value, 3) for each in f1]
        [0.667, 0.667]
    """
    confusion_matrix(true, predicted, classes)  # checks the labels
    truth, guess = check_labels(true, classes), check_labels(predicted, classes)
    codes = encode_groups(groups, length=len(truth))
    return tuple(_estimate_index(metric, truth == each, guess == each, codes, confidence) for each in range(classes))


def _estimate_share(
    metric: ClassMetric,
    present: NDArray[np.bool_],
    predicted: NDArray[np.bool_],
    codes: NDArray[np.int64],
    confidence: float,
) -> Proportion:
    """Estimate the share of successes of an index, before its transformation."""
    if metric.share is None:
        raise ValueError(f"the index {metric.name} has no interval: it does not say which images it counts")
    success, among = metric.share(present, predicted)
    if not among.any():
        return wilson(0, 0, confidence=confidence, reason=metric.undefined)
    return clustered_wilson(success[among], codes[among], confidence=confidence)


def _estimate_index(
    metric: ClassMetric,
    present: NDArray[np.bool_],
    predicted: NDArray[np.bool_],
    codes: NDArray[np.int64],
    confidence: float,
) -> Estimate:
    share = _estimate_share(metric, present, predicted, codes, confidence)
    if metric.transform is None:
        return share
    if share.total == 0:
        return create_undefined_estimate(metric.undefined)
    return Estimate(*(metric.transform(end) for end in (share.value, share.low, share.high)))


@dataclass(frozen=True)
class IndexEstimates:
    """Indices of a confusion matrix that are not proportions of images, with intervals; NaN where undefined.

    Attributes:
        balanced_accuracy: Mean sensitivity, in [0, 1].
        macro_precision: Mean precision, in [0, 1].
        macro_f1: Mean F1, in [0, 1].
        cohen_kappa: Agreement beyond chance, in [-1, 1].
        mcc: Matthews correlation coefficient, in [-1, 1].
        f1: F1 of each class, in [0, 1], in the order of the classes.
    """

    balanced_accuracy: Estimate
    macro_precision: Estimate
    macro_f1: Estimate
    cohen_kappa: Estimate
    mcc: Estimate
    f1: tuple[Estimate, ...]


def indices_of_predictions(
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    groups: NDArray[np.generic] | None,
    *,
    classes: int,
    confidence: float = 0.95,
    seed: int | None = None,
    resamples: int | None = None,
) -> IndexEstimates:
    """Compute indices with intervals that allow for groups; the order of the images does not matter.

    Args:
        true: True classes of shape (n,), whole numbers in [0, classes).
        predicted: Predicted classes of shape (n,).
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        classes: Number of classes.
        confidence: Coverage of the intervals, in (0, 1).
        seed: Deprecated, without effect: the intervals no longer need random numbers.
        resamples: Deprecated like `seed`.

    Raises:
        ValueError: If the shapes differ, the arrays are empty, or a label is out of range.

    Example:
        >>> true = np.repeat([0, 1], 20)
        >>> predicted = np.where(np.arange(40) % 5 == 0, 1 - true, true)
        >>> indices = indices_of_predictions(true, predicted, None, classes=2)
        >>> round(indices.macro_f1.value, 3), indices.macro_f1.low < 0.8 < indices.macro_f1.high
        (0.8, True)
    """
    check_confidence(confidence)
    handle_deprecated_arguments(seed=seed, resamples=resamples)
    confusion_matrix(true, predicted, classes)  # checks the labels
    truth, guess = check_labels(true, classes), check_labels(predicted, classes)
    codes = encode_groups(groups, length=len(truth))
    counts, copies = count_by_group(codes, truth * classes + guess), compute_copies(codes)
    f1 = estimate_class_metric(CLASS_METRICS["f1"], truth, guess, codes, classes=classes, confidence=confidence)
    shares = proportions_of_predictions(truth, guess, codes, classes=classes, confidence=confidence)

    def estimate_macro_average(name: str, parts: tuple[Estimate, ...], unknown: float) -> Estimate:
        def compute(tables: NDArray[np.float64]) -> NDArray[np.float64]:
            values: NDArray[np.float64] = getattr(class_indices(tables.reshape(-1, classes, classes)), name)
            return values

        covariance = compute_linearised_indices(counts, compute, width=classes**2).covariance
        return compute_mean_estimate(parts, compute_correlation(covariance, copies=copies, unknown=unknown))

    overall = compute_linearised_indices(
        counts, lambda tables: _compute_chance_indices(tables, classes), width=classes**2
    )
    accuracy = _compute_accuracy_design(counts, classes)
    true_shares, predicted_shares = (np.bincount(labels, minlength=classes) / len(truth) for labels in (truth, guess))
    by_chance = 1 - float(true_shares @ predicted_shares)
    kappa, mcc = (
        _estimate_beyond_chance(overall, index, name, accuracy, by_chance, confidence)
        for index, name in enumerate(CHANCE_CORRECTED)
    )
    return IndexEstimates(
        balanced_accuracy=estimate_macro_average("sensitivity", shares.sensitivity, 0.0),
        macro_precision=estimate_macro_average("precision", shares.precision, 0.0),
        # An error affects two classes, so two classes share a fraction of 1 / (classes - 1) of their possible errors.
        macro_f1=estimate_macro_average("f1", f1, 1 / (classes - 1)),
        cohen_kappa=kappa,
        mcc=mcc,
        f1=f1,
    )


def estimate_overall(predictions: Predictions, *, confidence: float = 0.95) -> dict[str, Estimate]:
    """Estimate accuracy and the indices in `OVERALL` of a model, by their names.

    Args:
        predictions: Predictions of the model; the intervals allow for their groups.
        confidence: Coverage of the intervals, in (0, 1).

    Example:
        >>> names, truth = np.array(["a", "b", "c", "d"]), np.array([0, 0, 1, 1])
        >>> indices = estimate_overall(Predictions(names, names, truth, np.eye(2)[[0, 1, 1, 1]], ("x", "y")))
        >>> indices["accuracy"].value, round(indices["balanced_accuracy"].value, 2)
        (0.75, 0.75)
    """
    true, predicted, groups = predictions.true, predictions.predicted, predictions.group
    indices = indices_of_predictions(true, predicted, groups, classes=predictions.classes, confidence=confidence)
    accuracy: Estimate = clustered_wilson(predictions.correct, groups, confidence=confidence)
    return {"accuracy": accuracy} | {name: getattr(indices, name) for name in OVERALL}


def indices_of_confusion(
    confusion: NDArray[np.int64],
    *,
    confidence: float = 0.95,
    seed: int | None = None,
    resamples: int | None = None,
) -> IndexEstimates:
    """Compute indices with intervals from counts of independent images, as in a published matrix.

    Args:
        confusion: Counts of shape (classes, classes), not all zero; rows are true, columns predicted.
        confidence: Coverage of the intervals, in (0, 1).
        seed: Deprecated, without effect: the intervals no longer need random numbers.
        resamples: Deprecated like `seed`.

    Raises:
        ValueError: If confusion is not a square matrix of counts, or contains no image.

    Example:
        >>> resnet50 = np.array([[143, 7, 0], [11, 120, 19], [0, 4, 146]])
        >>> round(indices_of_confusion(resnet50).macro_f1.value, 4)
        0.9073
    """
    handle_deprecated_arguments(seed=seed, resamples=resamples)
    counts = np.asarray(confusion)
    overall_indices(counts)  # checks that it is a matrix of counts
    if counts.ndim != 2 or not np.issubdtype(counts.dtype, np.integer) or not counts.any():
        raise ValueError(
            f"confusion is {counts.dtype} of shape {counts.shape}; expected a matrix of image counts, not all zero"
        )
    true, predicted = np.divmod(np.repeat(np.arange(counts.size), counts.ravel()), len(counts))
    return indices_of_predictions(true, predicted, None, classes=len(counts), confidence=confidence)


def _compute_chance_indices(tables: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
    """Compute the indices in `CHANCE_CORRECTED`, in its order, and accuracy as the last column."""
    indices = overall_indices(tables.reshape(-1, classes, classes))
    return np.column_stack([*(getattr(indices, name) for name in CHANCE_CORRECTED), indices.accuracy])


def _compute_accuracy_design(counts: GroupCounts, classes: int) -> ClusterDesign:
    correct = counts.count_where(counts.seen // classes == counts.seen % classes)
    return compute_cluster_design(correct, counts.count_where(np.ones(len(counts.seen), dtype=np.bool_)))


def _estimate_beyond_chance(
    overall: Linearisation, index: int, name: str, accuracy: ClusterDesign, by_chance: float, confidence: float
) -> Estimate:
    """Estimate kappa or MCC as 1 - e / q from the Wilson interval of the error rate e."""
    value, errors = float(overall.values[index]), 1 - float(overall.values[-1])
    if math.isnan(value):
        return create_undefined_estimate(CHANCE_CORRECTED[name])
    # Without errors kappa and MCC are 1, and q is the same for both: the error rate expected by chance.
    scale, factor = (by_chance if errors <= 0 else errors / (1 - value)), 1.0
    index_variance, error_variance = overall.covariance[index, index] * scale**2, overall.covariance[-1, -1]
    if 0 < errors < 1 and index_variance + error_variance > NOISE:
        factor = float(np.clip(error_variance / max(index_variance, NOISE), *INFORMATION_RANGE))
    low, high = accuracy.scale_size(factor).compute_interval(errors, confidence=confidence)
    return Estimate(value, max(-1.0, 1 - high / scale), 1 - low / scale)
