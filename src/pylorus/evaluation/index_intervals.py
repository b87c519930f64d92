"""Balanced accuracy, macro averages, kappa, MCC and F1 of each class, with clustered bootstrap intervals.

Shares of images (accuracy, sensitivity, …) have their intervals in `proportion`; these indices are no shares.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.bootstrap import (
    RESAMPLES,
    BootstrapEstimate,
    Patterns,
    bootstrap_estimate,
    group_patterns,
    resampled_indices,
)
from pylorus.evaluation.confusion import class_indices, confusion_matrix, overall_indices
from pylorus.evaluation.inputs import group_codes, labels_in_range

OVERALL = ("balanced_accuracy", "macro_precision", "macro_f1", "cohen_kappa", "mcc")
"""The indices of all classes together that need a bootstrap."""

LOWEST = {"cohen_kappa": -1.0, "mcc": -1.0}
"""The least value of the indices whose range is not [0, 1]."""


@dataclass(frozen=True)
class IndexEstimates:
    """Indices of a confusion matrix that are no shares of images, with intervals; nan where undefined.

    Attributes:
        balanced_accuracy: Mean sensitivity, in [0, 1].
        macro_precision: Mean precision, in [0, 1].
        macro_f1: Mean F1, in [0, 1].
        cohen_kappa: Agreement beyond chance, in [-1, 1].
        mcc: Matthews correlation, in [-1, 1].
        f1: F1 of each class, in [0, 1], in the order of the classes.
    """

    balanced_accuracy: BootstrapEstimate
    macro_precision: BootstrapEstimate
    macro_f1: BootstrapEstimate
    cohen_kappa: BootstrapEstimate
    mcc: BootstrapEstimate
    f1: tuple[BootstrapEstimate, ...]


def indices_of_predictions(
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    groups: NDArray[np.generic] | None,
    *,
    classes: int,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> IndexEstimates:
    """Indices with intervals that draw whole groups; the order of the images makes no difference.

    Args:
        true: True classes of shape (n,), whole numbers in [0, classes).
        predicted: Predicted classes of shape (n,).
        groups: Names of shape (n,) of what the images belong to (patients), or None if each stands for
            itself.
        classes: How many classes there are.
        seed: The same seed gives the same intervals.
        resamples: How many resamples to draw.
        confidence: Coverage of the intervals, in (0, 1).

    Raises:
        ValueError: If the arrays don't fit each other, are empty, or hold labels out of range.

    Example:
        >>> true = np.repeat([0, 1], 20)
        >>> predicted = np.where(np.arange(40) % 5 == 0, 1 - true, true)
        >>> found = indices_of_predictions(true, predicted, None, classes=2, seed=0)
        >>> round(found.macro_f1.value, 3), found.macro_f1.low < 0.8 < found.macro_f1.high
        (0.8, True)
    """
    confusion_matrix(true, predicted, classes)  # refuses what does not fit
    truth, guess = labels_in_range(true, classes), labels_in_range(predicted, classes)
    codes = group_codes(groups, length=len(truth))
    patterns = group_patterns(codes, truth * classes + guess)
    return _estimates(patterns, classes=classes, seed=seed, resamples=resamples, confidence=confidence)


def indices_of_confusion(
    confusion: NDArray[np.int64], *, seed: int, resamples: int = RESAMPLES, confidence: float = 0.95
) -> IndexEstimates:
    """Indices with intervals from counts of independent images, as in a published matrix.

    Args:
        confusion: Counts of shape (classes, classes), not all zero; rows are true, columns predicted.
        seed: The same seed gives the same intervals.
        resamples: How many resamples to draw.
        confidence: Coverage of the intervals, in (0, 1).

    Raises:
        ValueError: If confusion is no square matrix of counts, or holds no image.

    Example:
        >>> resnet50 = np.array([[143, 7, 0], [11, 120, 19], [0, 4, 146]])
        >>> round(indices_of_confusion(resnet50, seed=0).macro_f1.value, 4)
        0.9073
    """
    counts = np.asarray(confusion)
    overall_indices(counts)  # refuses what is no matrix of counts
    if counts.ndim != 2 or not np.issubdtype(counts.dtype, np.integer) or not counts.any():
        raise ValueError(f"confusion is {counts.dtype} of shape {counts.shape}; expected one matrix of images")
    cells = counts.ravel()
    seen = np.flatnonzero(cells)
    patterns = Patterns(seen=seen, images=np.eye(len(seen)), groups=cells[seen].astype(np.int64))
    return _estimates(patterns, classes=len(counts), seed=seed, resamples=resamples, confidence=confidence)


def _estimates(patterns: Patterns, *, classes: int, seed: int, resamples: int, confidence: float) -> IndexEstimates:
    def indices(tables: NDArray[np.float64]) -> NDArray[np.float64]:
        stack = tables.reshape(-1, classes, classes)
        overall = overall_indices(stack)
        return np.column_stack([getattr(overall, name) for name in OVERALL] + [class_indices(stack).f1])

    values = resampled_indices(patterns, indices, width=classes**2, resamples=resamples, seed=seed)

    def estimate(column: int, *, lowest: float = 0.0) -> BootstrapEstimate:
        return bootstrap_estimate(
            float(values[0, column]),
            values[1:, column],
            groups=int(patterns.groups.sum()),
            lowest=lowest,
            confidence=confidence,
        )

    overall = {name: estimate(at, lowest=LOWEST.get(name, 0.0)) for at, name in enumerate(OVERALL)}
    return IndexEstimates(**overall, f1=tuple(estimate(len(OVERALL) + each) for each in range(classes)))
