"""Intervals and p-values from standard errors: normal distribution, Student's t, logit scale, Wilson.

`scipy.special` gives the same numbers as `scipy.stats` and is much faster for a single one.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special
from statsmodels.stats.proportion import proportion_confint


def check_confidence(confidence: float) -> None:
    """Check that a coverage is in (0, 1).

    Raises:
        ValueError: If confidence is not strictly between 0 and 1.

    Example:
        >>> check_confidence(95)
        Traceback (most recent call last):
        ValueError: confidence is 95; expected a proportion in (0, 1), such as 0.95
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a proportion in (0, 1), such as 0.95")


def compute_quantile(confidence: float, *, freedom: float = math.inf) -> float:
    """Compute the half-width of an interval in standard errors.

    Args:
        confidence: Coverage of the interval, in (0, 1).
        freedom: Degrees of freedom of Student's t, > 0; infinite for the normal distribution.

    Raises:
        ValueError: If confidence is not in (0, 1).

    Example:
        >>> round(compute_quantile(0.95), 3), round(compute_quantile(0.95, freedom=10), 3)
        (1.96, 2.228)
    """
    check_confidence(confidence)
    tail = (1 - confidence) / 2
    return -float(special.ndtri(tail) if math.isinf(freedom) else special.stdtrit(freedom, tail))


def compute_two_sided_p(statistic: float, *, freedom: float = math.inf) -> float:
    """Compute the two-sided p of a statistic, in [0, 1].

    Args:
        statistic: A value divided by its standard error.
        freedom: Degrees of freedom of Student's t, > 0; infinite for the normal distribution.

    Example:
        >>> round(compute_two_sided_p(1.96), 3), round(compute_two_sided_p(-2.228, freedom=10), 3)
        (0.05, 0.05)
    """
    below = -abs(statistic)
    return 2 * float(special.ndtr(below) if math.isinf(freedom) else special.stdtr(freedom, below))


def compute_logit_interval(
    value: float, error: float, *, lowest: float = 0.0, confidence: float, freedom: float
) -> tuple[float, float]:
    """Compute an interval that is symmetric on the scale log((x - lowest) / (1 - x)), so that it stays in (lowest, 1).

    The standard error is transformed to that scale by the delta method.

    Args:
        value: The estimate, in (lowest, 1).
        error: Standard error of the value, > 0.
        lowest: Least possible value; the greatest is 1.
        confidence: Coverage of the interval, in (0, 1).
        freedom: Degrees of freedom of Student's t, > 0.

    Raises:
        ValueError: If confidence is not in (0, 1).

    Example:
        >>> low, high = compute_logit_interval(0.9, 0.05, confidence=0.95, freedom=100)
        >>> round(low, 3), round(high, 3)
        (0.749, 0.964)
    """
    width = 1 - lowest
    position = (value - lowest) / width
    reach = compute_quantile(confidence, freedom=freedom) * error / (width * position * (1 - position))
    low, high = special.expit(special.logit(position) + np.array([-reach, reach]))
    return lowest + width * float(low), lowest + width * float(high)


def compute_satterthwaite_freedom(contributions: NDArray[np.float64]) -> float:
    """Compute the degrees of freedom, 2 V² / Var(V), of a variance V that is a sum of squares (Satterthwaite 1946).

    If nearly all images are classified correctly, a few images make up most of the variance, and only they carry
    information about it.

    Args:
        contributions: Contribution of each group to the deviation of an index, or of a difference, of shape
            (groups,), at least two groups.

    Returns:
        Degrees of freedom, above 0 and at most groups - 1; groups - 1 if all contributions are 0.

    Example:
        >>> round(compute_satterthwaite_freedom(np.array([0.02, -0.01, 0.01] + 100 * [0.0])), 2)
        4.08
    """
    squares = contributions**2
    total, most = float(squares.sum()), len(squares) - 1.0
    spread = float((squares**2).sum()) - total**2 / len(squares)
    return min(most, 2 * total**2 / spread) if spread > 0 else most


def compute_wilson_ends(value: float, size: float, errors: float) -> tuple[float, float]:
    """Compute the Wilson interval around a proportion.

    Args:
        value: The proportion, in [0, 1].
        size: Effective number of independent images, > 0, not necessarily whole.
        errors: Half-width in standard errors, from `compute_quantile`.

    Raises:
        ValueError: If the value or the size is out of range.

    Example:
        >>> low, high = compute_wilson_ends(0.9, 50.0, 1.96)
        >>> round(low, 3), round(high, 3)
        (0.786, 0.957)
    """
    if not (size > 0 and 0 <= value <= 1):
        raise ValueError(
            f"the proportion is {value} of {size} images; expected a proportion in [0, 1] of a number above 0"
        )
    if not size < 1e15:
        return value, value
    low, high = proportion_confint(value * size, size, alpha=compute_two_sided_p(errors), method="wilson")
    # Rounding may move the ends of 0/n and n/n slightly past the value.
    return min(value, max(0.0, float(low))), max(value, min(1.0, float(high)))
