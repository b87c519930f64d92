"""Correction for many tests: a sweep that compares often enough finds a difference where there is none."""

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats.multitest import multipletests


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correct a family of p-values so that the chance of any false claim stays below the level (Holm 1979).

    Args:
        p_values: Every test of the family, of shape (tests,), in [0, 1]; none may be left out because it is
            nan.

    Returns:
        Corrected p-values, of shape (tests,), in the same order.

    Raises:
        ValueError: If there are none, or one is nan or out of range.

    Example:
        >>> holm(np.array([0.01, 0.04, 0.03])).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    family = np.asarray(p_values, dtype=np.float64)
    if family.ndim != 1 or not len(family) or not ((family >= 0) & (family <= 1)).all():
        raise ValueError(f"p-values are {family.tolist()}; expected at least one, each in [0, 1], none nan")
    corrected: NDArray[np.float64] = multipletests(family, method="holm")[1]
    return corrected
