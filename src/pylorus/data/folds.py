"""Folds that keep groups whole and spread classes evenly, for a million groups too.

The method is that of scikit-learn's StratifiedGroupKFold, and so is the result, fold by fold: splits that were cut
with it stay as they are. There each group tries each fold in turn in a Python loop, which takes seven minutes
a cut for a million groups; here a group tries all folds at once.
"""

import numpy as np
from numpy.typing import NDArray


def stratified_folds(
    labels: NDArray[np.int64], groups: NDArray[np.str_], *, folds: int, seed: int
) -> NDArray[np.int64]:
    """The fold of each row: groups whole, classes spread evenly.

    Groups are shuffled, then dealt out, those of the most uneven classes first: each to the fold where the shares of
    the classes then vary least between the folds; of equal ones to that with the fewest images.

    Args:
        labels: Of shape (rows,).
        groups: Of shape (rows,); their names decide nothing but the order that is shuffled.
        folds: How many, at most the number of groups.
        seed: In [0, 2^32).

    Returns:
        From 0 to folds - 1, of shape (rows,).

    Raises:
        ValueError: If the arrays differ in length, or there are fewer groups than folds.
    """
    if len(labels) != len(groups):
        raise ValueError(f"{len(labels)} labels and {len(groups)} groups; expected as many of each")
    _, label, totals = np.unique(labels, return_inverse=True, return_counts=True)
    names, group = np.unique(groups, return_inverse=True)
    if not 1 <= folds <= len(names):
        raise ValueError(f"folds is {folds} with {len(names)} groups; expected 1 to {len(names)}")
    table = np.bincount(group * len(totals) + label, minlength=len(names) * len(totals))
    shuffled = np.arange(len(names))
    np.random.RandomState(seed).shuffle(shuffled)  # as in the splits that are out there
    counts = table.reshape(len(names), len(totals)).astype(np.float64)[shuffled]
    order = np.argsort(-np.std(counts, axis=1), kind="stable")
    fold = np.empty(len(names), dtype=np.int64)
    fold[shuffled[order]] = _dealt(counts[order], totals, folds)
    return fold[group]


def _dealt(counts: NDArray[np.float64], totals: NDArray[np.int64], folds: int) -> NDArray[np.int64]:
    """The fold of each group, in their order; `counts` of shape (groups, classes), `totals` of shape (classes,)."""
    filled = np.zeros((folds, len(totals)))
    tried = np.empty((folds, folds, len(totals)))  # tried[i]: the folds once the group has joined fold i
    itself = np.arange(folds)
    chosen = np.empty(len(counts), dtype=np.int64)
    for number, group in enumerate(counts):
        tried[:] = filled
        tried[itself, itself] += group
        shares = tried / totals
        shares -= shares.sum(axis=1, keepdims=True) / folds
        shares *= shares
        uneven = np.sqrt(shares.sum(axis=1) / folds).mean(axis=1)
        best = _first_best(uneven.tolist(), filled.sum(axis=1).tolist())
        filled[best] += group
        chosen[number] = best
    return chosen


def _first_best(uneven: list[float], images: list[float]) -> int:
    best, least, fewest = 0, uneven[0], images[0]
    for fold in range(1, len(uneven)):
        value = uneven[fold]
        # np.isclose, which a million calls make too slow
        alike = abs(value - least) <= 1e-8 + 1e-5 * abs(least)
        if value < least or (alike and images[fold] < fewest):
            best, least, fewest = fold, value, images[fold]
    return best
