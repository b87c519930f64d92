"""Input checks of the evaluation: labels, probabilities, logits, scores and groups.

NumPy only, because the training loop imports this module through the confusion matrix.
"""

import warnings

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
