"""Whether two models recognise equally many of the same images: McNemar's exact test, by group."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.inputs import group_codes
from pylorus.evaluation.predictions import Predictions, aligned


@dataclass(frozen=True)
class McNemar:
    """Whether two models recognise equally many of the same images.

    Attributes:
        images: How many images both saw.
        groups: How many groups (patients) these belong to.
        right_first: Images that the first model recognises.
        right_second: Images that the second model recognises.
        only_first: Images that the first alone recognises.
        only_second: Images that the second alone recognises.
        p_value: Two-sided, exact, in (0, 1]; 1 if no image tells the two apart.
    """

    images: int
    groups: int
    right_first: int
    right_second: int
    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Predictions, second: Predictions) -> McNemar:
    """Exact test that two models recognise equally many images (McNemar 1947), each group kept together.

    If the models are equally good, exchanging their answers on all images of a group changes nothing. So each
    group's balance (images that the first alone recognises, less those that the second alone does) is as
    likely to be turned round, and p is the exact share of all such turns that are as lopsided as what was
    seen. With one image a group this is the binomial exact McNemar test.

    Raises:
        ValueError: If the two are not about the same images.

    Example:
        >>> truth, names = np.zeros(6, dtype=np.int64), np.array(list("abcdef"))
        >>> right, wrong = np.tile([1.0, 0.0], (6, 1)), np.tile([0.0, 1.0], (6, 1))
        >>> mcnemar(
        ...     Predictions(names, names, truth, right, ("x", "y")),
        ...     Predictions(names, names, truth, wrong, ("x", "y")),
        ... ).p_value
        0.03125
    """
    other = aligned(first, second)
    codes = group_codes(first.group, length=len(first.true))
    lead = first.correct.astype(np.int64) - other.correct.astype(np.int64)
    balance = np.bincount(codes, weights=lead).astype(np.int64)
    return McNemar(
        images=len(lead),
        groups=len(balance),
        right_first=int(first.correct.sum()),
        right_second=int(other.correct.sum()),
        only_first=int((lead > 0).sum()),
        only_second=int((lead < 0).sum()),
        p_value=_sign_flip(balance),
    )


def _sign_flip(balance: NDArray[np.int64]) -> float:
    """Share of all turns of sign whose sum is as far from 0 as the observed one, adding group by group."""
    sizes = np.abs(balance[balance != 0])
    reach = int(sizes.sum())
    chance = np.zeros(2 * reach + 1)
    chance[reach] = 1.0
    for size in sizes:
        # reach bounds every partial sum, so what rolls over the edge is always 0.
        chance = (np.roll(chance, size) + np.roll(chance, -size)) / 2
    sums = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, float(chance[sums >= abs(int(balance.sum()))].sum()))
