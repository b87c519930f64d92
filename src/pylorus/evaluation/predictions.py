"""Input checks of the evaluation: labels, probabilities, logits, scores and groups.

NumPy only, because the training loop imports this module through the confusion matrix.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SUM_TOLERANCE = 1e-3
"""Largest deviation of a sum of probabilities from 1; half precision and values with four decimals stay within it."""


def check_labels(labels: NDArray[np.int64], classes: int, *, name: str = "the") -> NDArray[np.int64]:
    """Check labels and return them as int64.

    Args:
        labels: Shape (n,), n >= 1, of an integer type.
        classes: Number of classes, at least 2; labels must be in [0, classes).
        name: Name of the labels in error messages.

    Raises:
        ValueError: If there are no labels, or they are not one-dimensional, not of an integer type, or out of range.

    Example:
        >>> check_labels(np.array([0.0, 1.0]), 2, name="true")
        Traceback (most recent call last):
        ValueError: true labels are float64; expected integers (class indices)
    """
    if classes < 2:
        raise ValueError(f"classes is {classes}; a classifier has at least 2 classes")
    array = np.asarray(labels)
    if array.ndim != 1:
        raise ValueError(f"{name} labels have shape {array.shape}; expected one dimension, (n,)")
    if array.size == 0:
        raise ValueError(f"there are no {name} labels; expected at least one image")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} labels are {array.dtype}; expected integers (class indices)")
    outside = (array < 0) | (array >= classes)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise ValueError(f"{name} label {int(array[first])} at position {first} is not in [0, {classes})")
    return array.astype(np.int64)


def check_logits(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Check logits of shape (n, classes) and return them as float64.

    Raises:
        ValueError: If the shape is not (n >= 1, classes >= 2), or a value is NaN or infinite.

    Example:
        >>> check_logits(np.array([[1.0, np.nan]]))
        Traceback (most recent call last):
        ValueError: logits of image 0 are NaN or infinite: [1.0, nan]
    """
    return _check_finite_table(logits, name="logits")


def check_probabilities(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Check probabilities of shape (n, classes) and return them as float64.

    Raises:
        ValueError: If the shape is not (n >= 1, classes >= 2), a value is NaN or outside [0, 1], or a row
            does not sum to one within `SUM_TOLERANCE`.

    Example:
        >>> check_probabilities(np.array([[0.5, 0.5], [0.5, 0.4]]))
        Traceback (most recent call last):
        ValueError: probabilities of image 1 sum to 0.9 instead of 1: [0.5, 0.4]
    """
    table = _check_finite_table(probabilities, name="probabilities")
    outside = ((table < 0) | (table > 1)).any(axis=1)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise ValueError(f"probabilities of image {first} are not in [0, 1]: {table[first].tolist()}")
    sums = table.sum(axis=1)
    wrong = np.abs(sums - 1) > SUM_TOLERANCE
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"probabilities of image {first} sum to {sums[first]:.4g} instead of 1: {table[first].tolist()}"
        )
    return table


def check_scores(scores: NDArray[np.float64], *, length: int) -> NDArray[np.float64]:
    """Check scores of shape (length,) and return them as float64.

    Raises:
        ValueError: If the shape is different, or a score is NaN or infinite.

    Example:
        >>> check_scores(np.array([0.1, 0.2]), length=3)
        Traceback (most recent call last):
        ValueError: scores have shape (2,); expected (3,), one per image
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.shape != (length,):
        raise ValueError(f"scores have shape {array.shape}; expected ({length},), one per image")
    if not np.isfinite(array).all():
        first = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"score of image {first} is {array[first]}; expected a finite number")
    return array


def check_flags(flags: NDArray[np.bool_], *, name: str) -> NDArray[np.bool_]:
    """Check that flags are booleans of shape (n,), and return them.

    Raises:
        ValueError: If there are none, or they are not one-dimensional or not of a boolean type.

    Example:
        >>> check_flags(np.array([0.2, 1.0]), name="positive")
        Traceback (most recent call last):
        ValueError: positive is float64; expected booleans, one per image
    """
    array = np.asarray(flags)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; expected (n,), at least one image")
    if array.dtype != np.bool_:
        raise ValueError(f"{name} is {array.dtype}; expected booleans, one per image")
    return array


def check_names(names: NDArray[np.str_]) -> NDArray[np.str_]:
    """Check names (of images) of shape (n,) and return them as text.

    Raises:
        ValueError: If they are not text or not one-dimensional.

    Example:
        >>> check_names(np.array([1.5]))
        Traceback (most recent call last):
        ValueError: names are float64 of shape (1,); expected text of shape (n,)
    """
    array = np.asarray(names)
    if array.dtype.kind == "O" and all(isinstance(name, str) for name in array.ravel()):
        array = array.astype(np.str_)
    if array.ndim != 1 or array.dtype.kind != "U":
        raise ValueError(f"names are {array.dtype} of shape {array.shape}; expected text of shape (n,)")
    return array


def encode_groups(groups: NDArray[np.generic] | None, *, length: int) -> NDArray[np.int64]:
    """Number the groups 0, 1, … in the order of their sorted names.

    Args:
        groups: Names (text or integers) of shape (length,); None makes each image its own group.
        length: Number of images.

    Returns:
        Codes of shape (length,); the largest is the number of groups minus one.

    Raises:
        ValueError: If the shape is different, or a name is neither text nor an integer (NaN is not allowed).

    Example:
        >>> encode_groups(np.array(["p7", "p2", "p7"]), length=3).tolist()
        [1, 0, 1]
    """
    if groups is None:
        return np.arange(length, dtype=np.int64)
    array = np.asarray(groups)
    if array.shape != (length,):
        raise ValueError(f"groups have shape {array.shape}; expected ({length},), one per image")
    if array.dtype.kind == "O" and all(isinstance(name, str) for name in array):
        array = array.astype(np.str_)
    elif array.dtype.kind == "O" and all(isinstance(name, int | np.integer) for name in array):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iuU":
        raise ValueError(f"groups are {array.dtype}; expected text or integers, none missing")
    codes = np.unique(array, return_inverse=True)[1]
    return codes.astype(np.int64)


def handle_deprecated_arguments(**arguments: object) -> None:
    """Warn about arguments of earlier versions that no longer have an effect.

    Args:
        arguments: Values by name; None if the caller left the argument out.
    """
    used = [name for name, value in arguments.items() if value is not None]
    if used:
        warnings.warn(
            f"no longer has an effect: {', '.join(used)}; the intervals are computed without resampling",
            DeprecationWarning,
            stacklevel=3,
        )


def _check_finite_table(table: NDArray[np.float64], *, name: str) -> NDArray[np.float64]:
    array = np.asarray(table, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
        raise ValueError(f"{name} have shape {array.shape}; expected (n, classes), n >= 1, classes >= 2")
    non_finite = ~np.isfinite(array).all(axis=1)
    if non_finite.any():
        first = int(np.flatnonzero(non_finite)[0])
        raise ValueError(f"{name} of image {first} are NaN or infinite: {array[first].tolist()}")
    return array


MAX_NAMED_SAMPLES = 3
"""Number of samples that an error message names."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Probabilities of one model for a set of images, with their true classes.

    Attributes:
        sample: Names of the images, unique, of shape (n,), n >= 1.
        group: Groups (patients) of the images, of shape (n,).
        true: True classes, whole numbers in [0, classes), of shape (n,).
        probabilities: Class probabilities of shape (n, classes); rows sum to one.
        class_names: Names of the columns, unique, of length classes.

    Raises:
        ValueError: If a shape, a label, a name or a probability is not as described above.

    Example:
        >>> predictions = Predictions(
        ...     sample=np.array(["a.png", "b.png"]),
        ...     group=np.array(["p1", "p2"]),
        ...     true=np.array([0, 1]),
        ...     probabilities=np.array([[0.8, 0.2], [0.6, 0.4]]),
        ...     class_names=("cancer", "other"),
        ... )
        >>> predictions.predicted.tolist(), predictions.classes
        ([0, 0], 2)
    """

    sample: NDArray[np.str_]
    group: NDArray[np.generic]
    true: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        table = check_probabilities(self.probabilities)
        truth = check_labels(self.true, table.shape[1], name="true")
        if not len(truth) == len(table) == len(self.sample):
            raise ValueError(
                f"found {len(self.sample)} samples, {len(truth)} true labels and probabilities of {len(table)} images; "
                "expected equally many"
            )
        if len(set(self.class_names)) != table.shape[1] or len(self.class_names) != table.shape[1]:
            raise ValueError(
                f"class names are {list(self.class_names)}; expected a unique name for each of {table.shape[1]} columns"
            )
        names, count = np.unique(check_names(self.sample), return_counts=True)
        if (count > 1).any():
            raise ValueError(f"samples that occur more than once: {_format_some_names(names[count > 1])}")
        encode_groups(self.group, length=len(truth))  # checks the names of the groups

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each image, of shape (n,); for ties, the first."""
        labels: NDArray[np.int64] = np.argmax(self.probabilities, axis=1).astype(np.int64)
        return labels

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the predicted class of each image is the true one, of shape (n,)."""
        flags: NDArray[np.bool_] = self.predicted == self.true
        return flags

    @property
    def clusters(self) -> NDArray[np.generic] | None:
        """The group of each image if a group has several images, otherwise None."""
        return self.group if len(np.unique(self.group)) < len(self.true) else None


def concat_predictions(tables: Sequence[Predictions]) -> Predictions:
    """Concatenate the predictions for disjoint sets of images."""
    return Predictions(
        sample=np.concatenate([table.sample for table in tables]),
        group=np.concatenate([np.asarray(table.group) for table in tables]),
        true=np.concatenate([table.true for table in tables]),
        probabilities=np.concatenate([table.probabilities for table in tables]),
        class_names=tables[0].class_names,
    )


def align_predictions(first: Predictions, second: Predictions) -> Predictions:
    """Reorder the second model's predictions to the first's order of images and classes.

    Raises:
        ValueError: If the two differ in images, classes, true classes or groups, because a paired comparison of
            different test sets is wrong.

    Example:
        >>> one = Predictions(np.array(["a", "b"]), np.array([1, 2]), np.array([0, 1]), np.eye(2), ("x", "y"))
        >>> two = Predictions(np.array(["b", "a"]), np.array([2, 1]), np.array([0, 1]), np.eye(2), ("y", "x"))
        >>> align_predictions(one, two).sample.tolist(), align_predictions(one, two).probabilities.tolist()
        (['a', 'b'], [[1.0, 0.0], [0.0, 1.0]])
    """
    if set(first.class_names) != set(second.class_names):
        raise ValueError(f"the classes differ: {list(first.class_names)} and {list(second.class_names)}")
    first_names, second_names = check_names(first.sample), check_names(second.sample)
    unmatched = np.setxor1d(first_names, second_names)
    if len(unmatched):
        raise ValueError(
            f"the two predictions are not for the same images ({len(first_names)} and {len(second_names)} images; "
            f"{len(unmatched)} are in only one of them: {_format_some_names(unmatched)}); compare runs with the same "
            f"split"
        )
    rows = np.argsort(second_names)[np.searchsorted(second_names[np.argsort(second_names)], first_names)]
    columns = np.array([second.class_names.index(name) for name in first.class_names])
    # columns[i] is the second's column of the first's class i; its inverse converts the second's labels.
    truth = np.argsort(columns)[second.true[rows]]
    groups = np.asarray(second.group)[rows]
    for name, differs in (
        ("true classes", truth != first.true),
        ("groups", groups != np.asarray(first.group)),
    ):
        if np.any(differs):
            raise ValueError(
                f"the two predictions disagree on the {name} of "
                f"{_format_some_names(first_names[np.atleast_1d(differs)])}"
            )
    return Predictions(first_names, groups, truth, second.probabilities[rows][:, columns], first.class_names)


def _format_some_names(names: NDArray[np.str_]) -> str:
    """Format the first `MAX_NAMED_SAMPLES` names, and the number of the others."""
    text = ", ".join(str(name) for name in names[:MAX_NAMED_SAMPLES])
    return text if len(names) <= MAX_NAMED_SAMPLES else f"{text} and {len(names) - MAX_NAMED_SAMPLES} more"


@dataclass(frozen=True, eq=False)
class PatientLevel:
    """Predictions with one row per group.

    Attributes:
        predictions: `sample` and `group` are the group's name; probabilities are means over its images.
        images: Number of images of each row, of shape (groups,).
        left_out: Names of the groups left out because their images have several true classes.
    """

    predictions: Predictions
    images: NDArray[np.int64]
    left_out: tuple[str, ...]


def patient_level(predictions: Predictions, *, leave_out_mixed: bool = False) -> PatientLevel:
    """Average the probabilities of each group's images.

    A group whose images have several true classes has no single true class. It is an error, or, on request, left out
    and named in the result; it is never counted as one of its classes.

    Args:
        predictions: Image-level predictions.
        leave_out_mixed: Leave out groups with several true classes instead of raising an error.

    Returns:
        One row per group, sorted by name.

    Raises:
        ValueError: If a group has several true classes and is not to be left out, or if no group remains.

    Example:
        >>> predictions = Predictions(
        ...     sample=np.array(["a", "b", "c"]),
        ...     group=np.array(["p1", "p1", "p2"]),
        ...     true=np.array([0, 0, 1]),
        ...     probabilities=np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]]),
        ...     class_names=("cancer", "other"),
        ... )
        >>> patients = patient_level(predictions)
        >>> patients.images.tolist(), patients.predictions.probabilities.round(3).tolist()
        ([2, 1], [[0.6, 0.4], [0.2, 0.8]])
    """
    codes = encode_groups(predictions.group, length=len(predictions.true))
    first = np.unique(codes, return_index=True)[1]
    names = np.asarray(predictions.group)[first].astype(np.str_)
    images = np.bincount(codes).astype(np.int64)
    truth = predictions.true[first]
    mixed = np.bincount(codes, weights=predictions.true != truth[codes]) > 0
    if mixed.any() and not leave_out_mixed:
        raise ValueError(
            f"{int(mixed.sum())} of {len(names)} groups have several true classes "
            f"({', '.join(names[mixed][:MAX_NAMED_SAMPLES])}, …) and therefore no patient-level one; "
            "leave_out_mixed=True leaves them out and names them"
        )
    if mixed.all():
        raise ValueError(f"all {len(names)} groups have several true classes, so no patient-level prediction remains")
    means = np.zeros((len(names), predictions.classes))
    np.add.at(means, codes, predictions.probabilities)
    means /= images[:, None]
    single = ~mixed
    return PatientLevel(
        predictions=Predictions(
            sample=names[single],
            group=names[single],
            true=truth[single],
            probabilities=means[single],
            class_names=predictions.class_names,
        ),
        images=images[single],
        left_out=tuple(str(name) for name in names[mixed]),
    )
