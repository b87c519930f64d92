"""From a standard error to an interval and a p-value: the normal distribution, Student's t and the logit scale.

From `scipy.special`, not `scipy.stats`: the same numbers, much faster for a single one.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import special
from statsmodels.stats.proportion import proportion_confint


def check_confidence(confidence: float) -> None:
    """Refuse a coverage that is none.

    Raises:
        ValueError: If confidence is not strictly between 0 and 1.

    Example:
        >>> check_confidence(95)
        Traceback (most recent call last):
        ValueError: confidence is 95; expected a share in (0, 1), such as 0.95
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a share in (0, 1), such as 0.95")


def quantile(confidence: float, *, freedom: float = math.inf) -> float:
    """Standard errors on either side of a value that an interval of this confidence takes in.

    Args:
        confidence: Coverage of the interval, in (0, 1).
        freedom: Degrees of freedom of Student's t, > 0; infinite for the normal distribution.

    Raises:
        ValueError: If confidence is not in (0, 1).

    Example:
        >>> round(quantile(0.95), 3), round(quantile(0.95, freedom=10), 3)
        (1.96, 2.228)
    """
    check_confidence(confidence)
    tail = (1 - confidence) / 2
    return -float(special.ndtri(tail) if math.isinf(freedom) else special.stdtrit(freedom, tail))


def two_sided_p(statistic: float, *, freedom: float = math.inf) -> float:
    """Chance of a value as many standard errors away from 0, in either direction, in [0, 1].

    Args:
        statistic: A value over its standard error.
        freedom: Degrees of freedom of Student's t, > 0; infinite for the normal distribution.

    Example:
        >>> round(two_sided_p(1.96), 3), round(two_sided_p(-2.228, freedom=10), 3)
        (0.05, 0.05)
    """
    below = -abs(statistic)
    return 2 * float(special.ndtr(below) if math.isinf(freedom) else special.stdtr(freedom, below))


def logit_interval(
    value: float, error: float, *, lowest: float = 0.0, confidence: float, freedom: float
) -> tuple[float, float]:
    """Interval that is symmetric on the scale log((x - lowest) / (1 - x)) and so stays within (lowest, 1).

    The standard error is carried to that scale by the delta method.

    Args:
        value: In (lowest, 1).
        error: Standard error of the value, > 0.
        lowest: The least value that there can be; the greatest is 1.
        confidence: Coverage of the interval, in (0, 1).
        freedom: Degrees of freedom of Student's t, > 0.

    Raises:
        ValueError: If confidence is not in (0, 1).

    Example:
        >>> low, high = logit_interval(0.9, 0.05, confidence=0.95, freedom=100)
        >>> round(low, 3), round(high, 3)
        (0.749, 0.964)
    """
    width = 1 - lowest
    share = (value - lowest) / width
    reach = quantile(confidence, freedom=freedom) * error / (width * share * (1 - share))
    low, high = special.expit(special.logit(share) + np.array([-reach, reach]))
    return lowest + width * float(low), lowest + width * float(high)


def compute_satterthwaite_freedom(contributions: NDArray[np.float64]) -> float:
    """Compute the degrees of freedom, 2 V² / Var(V), of a variance V that is a sum of squares (Satterthwaite 1946).

    Near a perfect result a few images make up nearly all of the variance, and they are what there is to learn from,
    however many others are recognised.

    Args:
        contributions: What each group adds to the deviation of an index, or of a difference, of shape (groups,), at
            least two groups.

    Returns:
        Above 0 and never more than groups - 1; groups - 1 where all contributions are 0.

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
        size: Number of independent images that it is a proportion of, > 0; need not be whole.
        errors: Standard errors to either side, from `quantile`.

    Example:
        >>> low, high = compute_wilson_ends(0.9, 50.0, 1.96)
        >>> round(low, 3), round(high, 3)
        (0.786, 0.957)
    """
    if not (size > 0 and 0 <= value <= 1):
        raise ValueError(f"a proportion of {value} of {size} images; expected one in [0, 1] of a number above 0")
    if not size < 1e15:
        return value, value
    low, high = proportion_confint(value * size, size, alpha=two_sided_p(errors), method="wilson")
    # Rounding may put the ends of 0/n and n/n a hair outside.
    return min(value, max(0.0, float(low))), max(value, min(1.0, float(high)))
