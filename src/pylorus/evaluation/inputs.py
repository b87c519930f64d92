"""What evaluation accepts: labels, probabilities, logits, scores, groups; anything else is refused by name.

NumPy only, because the training loop comes through here by way of the confusion matrix.
"""

import warnings

import numpy as np
from numpy.typing import NDArray

SUM_TOLERANCE = 1e-3
"""How far probabilities may sum from one: half precision and four printed decimals stay within it."""


def labels_in_range(labels: NDArray[np.int64], classes: int, *, name: str = "the") -> NDArray[np.int64]:
    """Give labels back as int64, or say what is wrong with them.

    Args:
        labels: Shape (n,), n >= 1, of an integer type.
        classes: Labels must lie in [0, classes); at least 2.
        name: What the error calls them.

    Raises:
        ValueError: If there are none, they are not one-dimensional, not integers by type, or out of range.

    Example:
        >>> labels_in_range(np.array([0.0, 1.0]), 2, name="true")
        Traceback (most recent call last):
        ValueError: true labels are float64; give whole numbers (class indices)
    """
    if classes < 2:
        raise ValueError(f"classes is {classes}; a classifier tells at least 2 classes apart")
    array = np.asarray(labels)
    if array.ndim != 1:
        raise ValueError(f"{name} labels have shape {array.shape}; give one dimension, (n,)")
    if array.size == 0:
        raise ValueError(f"no {name} labels given: nothing can be said of an empty set")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} labels are {array.dtype}; give whole numbers (class indices)")
    outside = (array < 0) | (array >= classes)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise ValueError(f"{name} label {int(array[first])} at position {first} is not in [0, {classes})")
    return array.astype(np.int64)


def checked_logits(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give logits of shape (n, classes) back as float64.

    Raises:
        ValueError: If the shape is not (n >= 1, classes >= 2) or a value is nan or infinite.

    Example:
        >>> checked_logits(np.array([[1.0, np.nan]]))
        Traceback (most recent call last):
        ValueError: logits of image 0 hold nan or infinity: [1.0, nan]
    """
    return _finite_table(logits, name="logits")


def checked_probabilities(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give probabilities of shape (n, classes) back as float64.

    Raises:
        ValueError: If the shape is not (n >= 1, classes >= 2), a value is nan or outside [0, 1], or a row
            does not sum to one within `SUM_TOLERANCE`.

    Example:
        >>> checked_probabilities(np.array([[0.5, 0.5], [0.5, 0.4]]))
        Traceback (most recent call last):
        ValueError: probabilities of image 1 sum to 0.9, not to 1: [0.5, 0.4]
    """
    table = _finite_table(probabilities, name="probabilities")
    outside = ((table < 0) | (table > 1)).any(axis=1)
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise ValueError(f"probabilities of image {first} are not in [0, 1]: {table[first].tolist()}")
    sums = table.sum(axis=1)
    off = np.abs(sums - 1) > SUM_TOLERANCE
    if off.any():
        first = int(np.flatnonzero(off)[0])
        raise ValueError(f"probabilities of image {first} sum to {sums[first]:.4g}, not to 1: {table[first].tolist()}")
    return table


def checked_scores(scores: NDArray[np.float64], *, length: int) -> NDArray[np.float64]:
    """Give scores of shape (length,) back as float64.

    Raises:
        ValueError: If the shape is another, or a score is nan or infinite.

    Example:
        >>> checked_scores(np.array([0.1, 0.2]), length=3)
        Traceback (most recent call last):
        ValueError: scores have shape (2,); expected (3,), one an image
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.shape != (length,):
        raise ValueError(f"scores have shape {array.shape}; expected ({length},), one an image")
    if not np.isfinite(array).all():
        first = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"score of image {first} is {array[first]}; expected a finite number")
    return array


def checked_flags(flags: NDArray[np.bool_], *, name: str) -> NDArray[np.bool_]:
    """Give yes/no values of shape (n,) back, or say what is wrong with them.

    Raises:
        ValueError: If there are none, they are not one-dimensional, or not boolean by type.

    Example:
        >>> checked_flags(np.array([0.2, 1.0]), name="positive")
        Traceback (most recent call last):
        ValueError: positive is float64; expected booleans, one an image
    """
    array = np.asarray(flags)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}; expected (n,), at least one image")
    if array.dtype != np.bool_:
        raise ValueError(f"{name} is {array.dtype}; expected booleans, one an image")
    return array


def checked_names(names: NDArray[np.str_]) -> NDArray[np.str_]:
    """Give names (of images) of shape (n,) back as text.

    Raises:
        ValueError: If they are not text or not one-dimensional.

    Example:
        >>> checked_names(np.array([1.5]))
        Traceback (most recent call last):
        ValueError: names are float64 of shape (1,); expected text of shape (n,)
    """
    array = np.asarray(names)
    if array.dtype.kind == "O" and all(isinstance(name, str) for name in array.ravel()):
        array = array.astype(np.str_)
    if array.ndim != 1 or array.dtype.kind != "U":
        raise ValueError(f"names are {array.dtype} of shape {array.shape}; expected text of shape (n,)")
    return array


def group_codes(groups: NDArray[np.generic] | None, *, length: int) -> NDArray[np.int64]:
    """Number the groups 0, 1, … in the order of their sorted names.

    Args:
        groups: Names (text or integers) of shape (length,); None makes each image its own group.
        length: How many images there are.

    Returns:
        Codes of shape (length,); the largest is the number of groups less one.

    Raises:
        ValueError: If the shape is another, or a group is not named by text or an integer (nan is no name).

    Example:
        >>> group_codes(np.array(["p7", "p2", "p7"]), length=3).tolist()
        [1, 0, 1]
    """
    if groups is None:
        return np.arange(length, dtype=np.int64)
    array = np.asarray(groups)
    if array.shape != (length,):
        raise ValueError(f"groups have shape {array.shape}; expected ({length},), one an image")
    if array.dtype.kind == "O" and all(isinstance(name, str) for name in array):
        array = array.astype(np.str_)
    elif array.dtype.kind == "O" and all(isinstance(name, int | np.integer) for name in array):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iuU":
        raise ValueError(f"groups are {array.dtype}; expected text or whole numbers, none missing")
    codes = np.unique(array, return_inverse=True)[1]
    return codes.astype(np.int64)


def warn_of_unused(**arguments: object) -> None:
    """Warn of arguments that earlier versions took and that have no effect any more.

    Args:
        arguments: Their values by name; None where the caller left them out.
    """
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        warnings.warn(
            f"no effect any more: {', '.join(given)}; the intervals are computed without resampling",
            DeprecationWarning,
            stacklevel=3,
        )


def _finite_table(table: NDArray[np.float64], *, name: str) -> NDArray[np.float64]:
    array = np.asarray(table, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
        raise ValueError(f"{name} have shape {array.shape}; expected (n, classes), n >= 1, classes >= 2")
    broken = ~np.isfinite(array).all(axis=1)
    if broken.any():
        first = int(np.flatnonzero(broken)[0])
        raise ValueError(f"{name} of image {first} hold nan or infinity: {array[first].tolist()}")
    return array
