"""The confusion matrix and all indices that are computed from it.

`class_indices` and `overall_indices` take one matrix or a stack of them, of shape (..., classes, classes), because a
permutation test needs the same arithmetic for thousands of matrices. Rows are true classes, columns predicted ones.

An index whose definition divides zero by zero is undefined and NaN, never 0 or 1, and it is never left out of an
average: a macro average over classes is NaN as soon as one class is undefined.

`CLASS_METRICS` is the registry of the indices of a class: training, curves, tables, the sweep table and the choices of
`monitor` read it. To add one, add an entry.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.predictions import check_labels

Counts: TypeAlias = NDArray[np.int64] | NDArray[np.float64]
"""Whole numbers >= 0; floats are allowed because resampling uses matrix products, which BLAS only has for floats."""


Flags: TypeAlias = NDArray[np.bool_]
"""One flag per image."""

NO_IMAGES = "no image is of the class"
ALL_IMAGES = "all images are of the class"
NEVER_PREDICTED = "the class is never predicted"
ALWAYS_PREDICTED = "the class is always predicted"
NEITHER = "no image is of the class or predicted as it"


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """Counts of each class against the rest; all but `confusion` have the shape (..., classes) or broadcast to it.

    Attributes:
        confusion: Counts of shape (..., classes, classes).
        true_positives: Images of the class that are predicted as it (TP).
        predicted: Images predicted as the class (TP + FP).
        present: Images of the class (TP + FN).
        total: All images, of shape (..., 1).
        true_negatives: Images of other classes that are predicted as another class (TN).
    """

    confusion: NDArray[np.float64]
    true_positives: NDArray[np.float64]
    predicted: NDArray[np.float64]
    present: NDArray[np.float64]
    total: NDArray[np.float64]
    true_negatives: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ClassMetric:
    """An index of each class against the rest.

    Attributes:
        name: Name in metrics.csv, in `monitor` and in `metrics`.
        label: Name in tables and figures.
        formula: Definition, with TP, FP, TN and FN.
        compute: Function of the counts that returns one value per class, NaN where undefined; larger is better.
        share: For the interval: function of two flags per image, whether it is of the class and whether it is predicted
            as it, that returns which images count as successes, and among which images. None: no interval.
        transform: Increasing function that turns the share of successes into the index; None: the share is the index.
        undefined: Why the index may be undefined.
        is_in_tables: Whether tables 1-3, curves and the sweep table show it without being asked.
    """

    name: str
    label: str
    formula: str
    compute: Callable[[ClassCounts], NDArray[np.float64]]
    share: Callable[[Flags, Flags], tuple[Flags, Flags]] | None = None
    transform: Callable[[float], float] | None = None
    undefined: str = ""
    is_in_tables: bool = False


CLASS_METRICS: dict[str, ClassMetric] = {
    metric.name: metric
    for metric in (
        ClassMetric(
            "precision",
            "precision",
            "TP / (TP + FP)",
            lambda counts: _compute_ratio(counts.true_positives, counts.predicted),
            lambda present, predicted: (present, predicted),
            undefined=NEVER_PREDICTED,
            is_in_tables=True,
        ),
        ClassMetric(
            "sensitivity",
            "sensitivity",
            "TP / (TP + FN)",
            lambda counts: _compute_ratio(counts.true_positives, counts.present),
            lambda present, predicted: (predicted, present),
            undefined=NO_IMAGES,
            is_in_tables=True,
        ),
        ClassMetric(
            "specificity",
            "specificity",
            "TN / (TN + FP)",
            lambda counts: _compute_ratio(counts.true_negatives, counts.total - counts.present),
            lambda present, predicted: (~predicted, ~present),
            undefined=ALL_IMAGES,
        ),
        ClassMetric(
            "npv",
            "NPV",
            "TN / (TN + FN)",
            lambda counts: _compute_ratio(counts.true_negatives, counts.total - counts.predicted),
            lambda present, predicted: (~present, ~predicted),
            undefined=ALWAYS_PREDICTED,
        ),
        ClassMetric(
            "f1",
            "F1",
            "2 TP / (2 TP + FP + FN)",
            lambda counts: _compute_ratio(2 * counts.true_positives, counts.predicted + counts.present),
            lambda present, predicted: (present & predicted, present | predicted),
            transform=lambda overlap: 2 * overlap / (1 + overlap),
            undefined=NEITHER,
            is_in_tables=True,
        ),
    )
}
"""The indices of a class by name, in the order of the tables."""

IMAGE_METRICS = ("loss", "accuracy")
"""What `monitor` may name beside an index of a class: means over images."""


def get_monitor_column(monitor: str) -> str:
    """Return the validation metric of a `monitor` as metrics.csv names it within a stage; of an index, the average."""
    return f"val/{monitor}" + ("" if monitor in IMAGE_METRICS else "/average")


def select_class_metrics(names: Iterable[str] = ()) -> list[ClassMetric]:
    """Return the registered indices that tables, curves and the sweep table of a run show, in their order.

    Args:
        names: Further ones, such as the keys of `metrics` of the run's configuration; unknown ones are left out.

    Example:
        >>> [metric.label for metric in select_class_metrics(["specificity"])]
        ['precision', 'sensitivity', 'specificity', 'F1']
    """
    chosen = set(names)
    return [metric for metric in CLASS_METRICS.values() if metric.is_in_tables or metric.name in chosen]


def compute_class_metric(metric: ClassMetric, confusion: Counts) -> NDArray[np.float64]:
    """Compute an index of each class.

    Args:
        metric: The index.
        confusion: Counts of shape (..., classes, classes).

    Returns:
        The index, of shape (..., classes), NaN where undefined.

    Raises:
        ValueError: If the last two axes are not square, or a count is negative, NaN or infinite.

    Example:
        >>> compute_class_metric(CLASS_METRICS["specificity"], np.array([[4, 1], [2, 3]])).tolist()
        [0.6, 0.8]
    """
    return metric.compute(_count_classes(_check_counts(confusion)))


@dataclass(frozen=True, eq=False)
class ClassIndices:
    """Indices of each class against the rest, each of shape (..., classes), in [0, 1], NaN where undefined.

    Attributes:
        precision: TP / (TP + FP); undefined for a class that is never predicted.
        sensitivity: TP / (TP + FN), also called recall; undefined for a class without images.
        specificity: TN / (TN + FP); undefined if all images are of the class.
        npv: TN / (TN + FN), the negative predictive value; undefined if the class is always predicted.
        f1: 2 TP / (2 TP + FP + FN); undefined for a class that is neither present nor predicted.
    """

    precision: NDArray[np.float64]
    sensitivity: NDArray[np.float64]
    specificity: NDArray[np.float64]
    npv: NDArray[np.float64]
    f1: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class OverallIndices:
    """Indices over all classes, each of shape (...) of the stack, NaN where undefined.

    Attributes:
        accuracy: Proportion of correctly classified images, in [0, 1]; undefined without images.
        balanced_accuracy: Mean sensitivity of the classes, in [0, 1].
        macro_precision: Mean precision of the classes, in [0, 1].
        macro_f1: Mean F1 of the classes, in [0, 1].
        cohen_kappa: (observed - expected agreement) / (1 - expected agreement), in [-1, 1] (Cohen 1960).
        mcc: Matthews correlation coefficient for several classes, in [-1, 1] (Gorodkin 2004, R_K).
    """

    accuracy: NDArray[np.float64]
    balanced_accuracy: NDArray[np.float64]
    macro_precision: NDArray[np.float64]
    macro_f1: NDArray[np.float64]
    cohen_kappa: NDArray[np.float64]
    mcc: NDArray[np.float64]


def confusion_matrix(true: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Count images by true and predicted class.

    Args:
        true: True classes of shape (n,), whole numbers in [0, classes).
        predicted: Predicted classes of shape (n,), in the same order of images.
        classes: Number of classes, at least 2; a class may be absent from both arrays.

    Returns:
        Counts of shape (classes, classes); rows are true, columns predicted.

    Raises:
        ValueError: If there are no labels, the lengths differ, a label is not an integer or is out of range.

    Example:
        >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), classes=3).tolist()
        [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    """
    true_labels = check_labels(true, classes, name="true")
    predicted_labels = check_labels(predicted, classes, name="predicted")
    if len(true_labels) != len(predicted_labels):
        raise ValueError(
            f"found {len(true_labels)} true and {len(predicted_labels)} predicted labels; expected equally many"
        )
    cells = np.bincount(true_labels * classes + predicted_labels, minlength=classes * classes)
    return cells.reshape(classes, classes).astype(np.int64)


def class_indices(confusion: Counts) -> ClassIndices:
    """Compute precision, sensitivity, specificity, NPV and F1 of each class against the rest.

    Args:
        confusion: Counts of shape (..., classes, classes).

    Returns:
        Indices of shape (..., classes), NaN where undefined.

    Raises:
        ValueError: If the last two axes are not square, or a count is negative, NaN or infinite.

    Example:
        >>> resnet50 = np.array([[143, 7, 0], [11, 120, 19], [0, 4, 146]])
        >>> class_indices(resnet50).sensitivity.round(3).tolist()
        [0.953, 0.8, 0.973]
    """
    counts = _count_classes(_check_counts(confusion))
    return ClassIndices(**{field.name: CLASS_METRICS[field.name].compute(counts) for field in fields(ClassIndices)})


def overall_indices(confusion: Counts) -> OverallIndices:
    """Compute accuracy, macro averages, Cohen's kappa and MCC.

    Args:
        confusion: Counts of shape (..., classes, classes).

    Returns:
        Indices of shape (...), NaN where undefined.

    Raises:
        ValueError: If the last two axes are not square, or a count is negative, NaN or infinite.

    Example:
        >>> stack = np.array([[[5, 0], [0, 5]], [[4, 1], [2, 3]]])
        >>> overall_indices(stack).accuracy.tolist()
        [1.0, 0.7]
    """
    counts = _check_counts(confusion)
    by_class = class_indices(counts)
    hits = np.trace(counts, axis1=-2, axis2=-1)
    predicted, present = counts.sum(axis=-2), counts.sum(axis=-1)
    total = counts.sum(axis=(-2, -1))
    expected = (predicted * present).sum(axis=-1)
    covariance = total * hits - expected
    variances = (total**2 - (predicted**2).sum(axis=-1)) * (total**2 - (present**2).sum(axis=-1))
    return OverallIndices(
        accuracy=_compute_ratio(hits, total),
        balanced_accuracy=compute_macro_average(by_class.sensitivity),
        macro_precision=compute_macro_average(by_class.precision),
        macro_f1=compute_macro_average(by_class.f1),
        cohen_kappa=_compute_ratio(covariance, total**2 - expected),
        mcc=_compute_ratio(covariance, np.sqrt(variances)),
    )


def compute_macro_average(by_class: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the unweighted mean over classes; NaN if any class is undefined.

    Args:
        by_class: An index of shape (..., classes).

    Returns:
        Its mean, of shape (...). No class is left out: a mean over fewer classes would be a different index.

    Example:
        >>> compute_macro_average(np.array([[0.5, 1.0], [0.5, np.nan]])).tolist()
        [0.75, nan]
    """
    mean: NDArray[np.float64] = np.asarray(np.mean(by_class, axis=-1))
    return mean


def accuracy(confusion: Counts) -> float:
    """Compute the proportion of correctly classified images, in [0, 1]; NaN without images.

    Example:
        >>> accuracy(np.array([[4, 1], [2, 3]]))
        0.7
    """
    return float(overall_indices(_check_single_matrix(confusion)).accuracy)


def balanced_accuracy(confusion: Counts) -> float:
    """Compute the mean sensitivity of the classes, in [0, 1]; NaN if a class has no images.

    Example:
        >>> balanced_accuracy(np.array([[4, 0], [1, 1]]))
        0.75
    """
    return float(overall_indices(_check_single_matrix(confusion)).balanced_accuracy)


def macro_f1(confusion: Counts) -> float:
    """Compute the mean F1 of the classes, in [0, 1]; NaN if a class is neither present nor predicted.

    Example:
        >>> macro_f1(np.array([[3, 0], [0, 3]]))
        1.0
    """
    return float(overall_indices(_check_single_matrix(confusion)).macro_f1)


def cohen_kappa(confusion: Counts) -> float:
    """Compute the agreement beyond chance, in [-1, 1]; NaN if chance agreement is complete (only one class).

    Example:
        >>> cohen_kappa(np.array([[4, 1], [2, 3]]))
        0.4
    """
    return float(overall_indices(_check_single_matrix(confusion)).cohen_kappa)


def mcc(confusion: Counts) -> float:
    """Compute the Matthews correlation coefficient, in [-1, 1]; NaN if there is one true or one predicted class only.

    Example:
        >>> round(mcc(np.array([[4, 1], [2, 3]])), 4)
        0.4082
    """
    return float(overall_indices(_check_single_matrix(confusion)).mcc)


def _count_classes(counts: NDArray[np.float64]) -> ClassCounts:
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    predicted, present = counts.sum(axis=-2), counts.sum(axis=-1)
    total = counts.sum(axis=(-2, -1))[..., None]
    return ClassCounts(counts, hits, predicted, present, total, total - predicted - present + hits)


def _compute_ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide, with 0/0 as NaN and without a warning: NaN is the documented result there."""
    defined = denominator > 0
    return np.where(defined, numerator / np.where(defined, denominator, 1.0), np.nan)


def _check_counts(confusion: Counts) -> NDArray[np.float64]:
    counts = np.asarray(confusion, dtype=np.float64)
    if counts.ndim < 2 or counts.shape[-1] != counts.shape[-2] or counts.shape[-1] < 2:
        raise ValueError(f"confusion has shape {counts.shape}; expected (..., classes >= 2, classes >= 2)")
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("confusion has a negative, NaN or infinite count; expected counts of images")
    return counts


def _check_single_matrix(confusion: Counts) -> Counts:
    if np.ndim(confusion) != 2:
        raise ValueError(f"confusion has shape {np.shape(confusion)}; expected a single matrix with two axes")
    return confusion
