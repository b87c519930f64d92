"""Balanced accuracy, macro averages, kappa, MCC and F1 of each class, with intervals.

The intervals of proportions of images (accuracy, sensitivity, …) are in `proportion`. These indices build on them:

* F1 of a class is 2 J / (1 + J), where J is a proportion: among the images that are of the class or predicted as it,
  those that are both. Its interval is the transformed Wilson interval of J.
* Averages over classes combine the intervals of the classes (`compute_mean_estimate`).
* Cohen's kappa and MCC are 1 - e / q, where e is the error rate. Their interval is the Wilson interval of e, at the
  number of images with which e / q has the variance of the index.

An index therefore has an interval wherever it is defined, even if no image is misclassified.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.confusion import class_indices, confusion_matrix, overall_indices
from pylorus.evaluation.estimate import Estimate, create_undefined_estimate
from pylorus.evaluation.influence import (
    NOISE,
    GroupCounts,
    Linearisation,
    compute_copies,
    compute_correlation,
    compute_linearised_indices,
    compute_mean_estimate,
    count_by_group,
)
from pylorus.evaluation.inputs import check_labels, encode_groups, handle_deprecated_arguments
from pylorus.evaluation.interval import check_confidence
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.proportion import (
    ClusterDesign,
    clustered_wilson,
    compute_cluster_design,
    proportions_of_predictions,
)

INFORMATION = (0.05, 1.0)
"""Least and greatest factor by which the effective number of images of kappa and MCC may differ from that of accuracy.

A factor above 1 would be too optimistic: if a model nearly always predicts the same class, a few images make the
variance small."""

OVERALL = ("balanced_accuracy", "macro_precision", "macro_f1", "cohen_kappa", "mcc")
"""The overall indices that are not proportions of images."""

NEITHER = "no image is of the class or predicted as it"
ONE_CLASS = "all images are of one class and predicted as it"
CHANCE = {"cohen_kappa": ONE_CLASS, "mcc": "all images are of one class, or all are predicted as one class"}
"""The chance-corrected indices, and why each may be undefined."""


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
    f1 = tuple(_estimate_f1(truth == each, guess == each, codes, confidence) for each in range(classes))
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
        for index, name in enumerate(CHANCE)
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


def _estimate_f1(
    present: NDArray[np.bool_], predicted: NDArray[np.bool_], codes: NDArray[np.int64], confidence: float
) -> Estimate:
    either = present | predicted
    if not either.any():
        return create_undefined_estimate(NEITHER)
    overlap = clustered_wilson((present & predicted)[either], codes[either], confidence=confidence)
    value, low, high = (2 * share / (1 + share) for share in (overlap.value, overlap.low, overlap.high))
    return Estimate(value, low, high)


def _compute_chance_indices(tables: NDArray[np.float64], classes: int) -> NDArray[np.float64]:
    """Compute the indices in `CHANCE`, in its order, and accuracy as the last column."""
    indices = overall_indices(tables.reshape(-1, classes, classes))
    return np.column_stack([*(getattr(indices, name) for name in CHANCE), indices.accuracy])


def _compute_accuracy_design(counts: GroupCounts, classes: int) -> ClusterDesign:
    correct = counts.count_where(counts.seen // classes == counts.seen % classes)
    return compute_cluster_design(correct, counts.count_where(np.ones(len(counts.seen), dtype=np.bool_)))


def _estimate_beyond_chance(
    overall: Linearisation, index: int, name: str, accuracy: ClusterDesign, by_chance: float, confidence: float
) -> Estimate:
    """Estimate kappa or MCC as 1 - e / q from the Wilson interval of the error rate e."""
    value, errors = float(overall.values[index]), 1 - float(overall.values[-1])
    if math.isnan(value):
        return create_undefined_estimate(CHANCE[name])
    # Without errors kappa and MCC are 1, and q is the same for both: the error rate expected by chance.
    scale, factor = (by_chance if errors <= 0 else errors / (1 - value)), 1.0
    index_variance, error_variance = overall.covariance[index, index] * scale**2, overall.covariance[-1, -1]
    if 0 < errors < 1 and index_variance + error_variance > NOISE:
        factor = float(np.clip(error_variance / max(index_variance, NOISE), *INFORMATION))
    low, high = accuracy.scale_size(factor).compute_interval(errors, confidence=confidence)
    return Estimate(value, max(-1.0, 1 - high / scale), 1 - low / scale)
