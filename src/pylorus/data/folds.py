"""Stratified group folds that scale to a million groups.

Method and result are those of scikit-learn's StratifiedGroupKFold, fold by fold, so existing splits stay valid. There,
each group tries one fold after another in a Python loop, which takes seven minutes for a million groups; here, a group
tries all folds at once.
"""

import numpy as np
from numpy.typing import NDArray


def stratified_folds(
    labels: NDArray[np.int64], groups: NDArray[np.str_], *, folds: int, seed: int
) -> NDArray[np.int64]:
    """Assign each row to a fold: groups stay whole, classes are spread evenly.

    Groups are shuffled, then assigned one by one, those with the most uneven class counts first: each to the fold that
    makes the class shares vary least between the folds; ties go to the fold with the fewest images.

    Args:
        labels: Class of each row, of shape (rows,).
        groups: Group of each row, of shape (rows,); the names only affect the order that is shuffled.
        folds: Number of folds, at most the number of groups.
        seed: Seed of the shuffle, in [0, 2^32).

    Returns:
        Fold of each row, from 0 to folds - 1, of shape (rows,).

    Raises:
        ValueError: If the arrays differ in length, or there are fewer groups than folds.
    """
    if len(labels) != len(groups):
        raise ValueError(f"{len(labels)} labels and {len(groups)} groups; expected equal numbers")
    _, label, totals = np.unique(labels, return_inverse=True, return_counts=True)
    names, group = np.unique(groups, return_inverse=True)
    if not 1 <= folds <= len(names):
        raise ValueError(f"folds is {folds} with {len(names)} groups; expected 1 to {len(names)}")
    table = np.bincount(group * len(totals) + label, minlength=len(names) * len(totals))
    shuffled = np.arange(len(names))
    np.random.RandomState(seed).shuffle(shuffled)  # as in existing splits
    counts = table.reshape(len(names), len(totals)).astype(np.float64)[shuffled]
    order = np.argsort(-np.std(counts, axis=1), kind="stable")
    fold = np.empty(len(names), dtype=np.int64)
    fold[shuffled[order]] = _put_groups_in_folds(counts[order], totals, folds)
    return fold[group]


def _put_groups_in_folds(counts: NDArray[np.float64], totals: NDArray[np.int64], folds: int) -> NDArray[np.int64]:
    """Assign groups to folds, in their order.

    Args:
        counts: Images of each group in each class, of shape (groups, classes).
        totals: Images of each class, of shape (classes,).
        folds: Number of folds.

    Returns:
        Fold of each group, of shape (groups,).
    """
    filled = np.zeros((folds, len(totals)))
    candidates = np.empty((folds, folds, len(totals)))  # candidates[i]: all folds with the group added to fold i
    diagonal = np.arange(folds)
    fold_of_group = np.empty(len(counts), dtype=np.int64)
    for index, group in enumerate(counts):
        candidates[:] = filled
        candidates[diagonal, diagonal] += group
        shares = candidates / totals
        shares -= shares.sum(axis=1, keepdims=True) / folds
        shares *= shares
        imbalance = np.sqrt(shares.sum(axis=1) / folds).mean(axis=1)
        best = _find_best_fold(imbalance.tolist(), filled.sum(axis=1).tolist())
        filled[best] += group
        fold_of_group[index] = best
    return fold_of_group


def _find_best_fold(imbalance: list[float], images: list[float]) -> int:
    best, least, fewest = 0, imbalance[0], images[0]
    for fold in range(1, len(imbalance)):
        value = imbalance[fold]
        # as np.isclose, which is too slow for a million calls
        is_tie = abs(value - least) <= 1e-8 + 1e-5 * abs(least)
        if value < least or (is_tie and images[fold] < fewest):
            best, least, fewest = fold, value, images[fold]
    return best
