"""Nonparametric confidence bounds for the mean of values in [0, 1], such as the proportion of each patient's images.

The method is Gaffke's (2005; Learned-Miller and Thomas 2019): the n observed values and the worst possible one, 1,
are weighted by a random point of the simplex (a Dirichlet distribution with all parameters 1); the bound is a quantile
of that weighted mean. For values that are only 0 or 1 it is the exact bound of Clopper and Pearson (1934). If all
values are 0, the bound is exact for any distribution: with a mean above q, the probability of a value of 0 is at most
1 - q. Between these cases no distribution is known for which the coverage is too low; `benchmarks/thresholds.py`
simulates it. With one value per patient the images of a patient stay together: their similarity shows in how much the
patients' proportions differ, so that no intraclass correlation has to be estimated.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.inputs import encode_groups
from pylorus.evaluation.interval import check_confidence

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(256)
_ANGLES = (_NODES + 1) * np.pi / 4


def compute_confidence_below(values: NDArray[np.float64], bound: float) -> float:
    """Compute the confidence, in [0, 1], with which the mean of the population is at most `bound`.

    Args:
        values: Independent values in [0, 1], of shape (n,), n >= 1.
        bound: Value that the mean is compared with.

    Raises:
        ValueError: If there are no values, or one is outside [0, 1].

    Example:
        >>> round(compute_confidence_below(np.zeros(45), 0.05), 3), round(1 - 0.95**45, 3)
        (0.901, 0.901)
        >>> compute_confidence_below(np.array([0.0, 0.0, 0.5]), 0.5) > compute_confidence_below(np.array([0.0, 0.0, 1.0]), 0.5)
        True
    """
    proportions = _check_values(values)
    if bound >= 1:
        return 1.0
    if bound <= 0:
        return 0.0
    ones = int((proportions == 1).sum())
    if ones + int((proportions == 0).sum()) == len(proportions):
        return float(special.betainc(ones + 1, len(proportions) - ones, bound)) if ones < len(proportions) else 0.0
    # With exponential variables E, the weighted mean is at most `bound` if sum((value - bound) E) <= 0; the
    # distribution function of that sum follows from its characteristic function (Gil-Pelaez 1951).
    levels, counts = np.unique(np.append(proportions, 1.0), return_counts=True)
    coefficients = levels - bound
    scale = np.sqrt((counts * coefficients**2).sum())
    logarithm = -(counts * np.log(1 - 1j * (np.tan(_ANGLES) / scale)[:, None] * coefficients)).sum(axis=1)
    integrand = np.exp(logarithm).imag / (np.sin(_ANGLES) * np.cos(_ANGLES))
    integral = float((_WEIGHTS * integrand).sum()) * np.pi / 4
    return float(np.clip(0.5 - integral / np.pi, 0.0, 1.0))


def compute_upper_bound(values: NDArray[np.float64], *, confidence: float) -> float:
    """Compute the one-sided upper confidence bound of the mean of the population, in [0, 1].

    Args:
        values: Independent values in [0, 1], of shape (n,), n >= 1.
        confidence: Coverage of the bound, in (0, 1).

    Raises:
        ValueError: If there are no values, one is outside [0, 1], or confidence is not in (0, 1).

    Example:
        >>> round(compute_upper_bound(np.zeros(30), confidence=0.95), 4), round(1 - 0.05 ** (1 / 30), 4)
        (0.095, 0.095)
    """
    check_confidence(confidence)
    proportions = _check_values(values)
    if (proportions == 1).all():
        return 1.0
    mean = float(proportions.mean())
    return float(
        optimize.brentq(lambda bound: compute_confidence_below(proportions, bound) - confidence, mean * 1e-3, 1.0)
    )


def estimate_mean_over_groups(
    values: NDArray[np.float64], groups: NDArray[np.generic] | None, *, confidence: float = 0.95
) -> Estimate:
    """Estimate the mean of values in [0, 1], with equal weight for each group, and its interval.

    Args:
        values: Shape (n,), n >= 1, each in [0, 1].
        groups: Group (patient) of each value, of shape (n,), or None if each value is its own group.
        confidence: Coverage of the two-sided interval, in (0, 1).

    Returns:
        The mean of the groups' means. The interval is nonparametric, and wider than a normal one.

    Raises:
        ValueError: If there are no values, one is outside [0, 1], the shapes differ, or confidence is not in (0, 1).

    Example:
        >>> estimate_mean_over_groups(np.array([1.0, 1.0, 1.0, 0.0]), np.array(["a", "a", "a", "b"])).value
        0.5
    """
    check_confidence(confidence)
    means = compute_group_means(_check_values(values), groups)
    one_sided = (1 + confidence) / 2
    return Estimate(
        value=float(means.mean()),
        low=1 - compute_upper_bound(1 - means, confidence=one_sided),
        high=compute_upper_bound(means, confidence=one_sided),
    )


def compute_group_means(values: NDArray[np.float64], groups: NDArray[np.generic] | None) -> NDArray[np.float64]:
    """Compute the mean of each group's values, in the order of the groups' sorted names.

    Args:
        values: Shape (n,), n >= 1.
        groups: Group of each value, of shape (n,), or None if each value is its own group.

    Example:
        >>> compute_group_means(np.array([1.0, 0.0, 1.0]), np.array(["b", "b", "a"])).tolist()
        [1.0, 0.5]
    """
    codes = encode_groups(groups, length=len(values))
    means: NDArray[np.float64] = np.bincount(codes, weights=values) / np.bincount(codes)
    return means


def _check_values(values: NDArray[np.float64]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"values have shape {array.shape}; expected (n,), with n >= 1")
    if not ((array >= 0) & (array <= 1)).all():  # negated, so that NaN is refused as well
        raise ValueError(f"values are in [{array.min()}, {array.max()}]; expected [0, 1]")
    return array
