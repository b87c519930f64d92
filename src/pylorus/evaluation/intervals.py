"""An estimate with its confidence interval, what intervals are computed from, and decisions about a margin.

Non-inferiority and equivalence are decided by intervals (Piaggio et al., JAMA 2012;308:2594): any difference with an
interval can be tested, if larger values are better.

The nonparametric bounds for the mean of values in [0, 1], such as the proportion of each patient's images, are Gaffke's
(2005; Learned-Miller and Thomas 2019): the n observed values and the worst possible one, 1, are weighted by a random
point of the simplex (a Dirichlet distribution with all parameters 1); the bound is a quantile of that weighted mean.
For values that are only 0 or 1 it is the exact bound of Clopper and Pearson (1934). If all values are 0, the bound is
exact for any distribution: with a mean above q, the probability of a value of 0 is at most 1 - q. Between these cases
no distribution is known for which the coverage is too low; `benchmarks/thresholds.py` simulates it. With one value per
patient the images of a patient stay together: their similarity shows in how much the patients' proportions differ, so
that no intraclass correlation has to be estimated.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(256)
_ANGLES = (_NODES + 1) * np.pi / 4

ONE_GROUP = "all images are of one group"

LEAST_P = 1e-12
"""Smallest p-value that is told apart from 0 where it is found by inverting intervals."""


ROUNDING = 1e-9
"""An end of an interval that is this close to 0 is 0: differences of sums of shares are inexact by less."""


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval.

    Attributes:
        value: The estimate; NaN if the index is undefined.
        low: Lower end of the interval; NaN if there is no value or no interval.
        high: Upper end of the interval.
        reason: Why there is no value or no interval, as text that can follow a colon; empty if both exist.

    Example:
        >>> Estimate(value=0.9, low=0.85, high=0.94).has_interval
        True
    """

    value: float
    low: float
    high: float
    reason: str = field(default="", kw_only=True)

    @classmethod
    def from_saved(cls, values: Mapping[str, float | None]) -> "Estimate":
        """Return an estimate that was saved as `value`, `low` and `high`, with null for NaN.

        Example:
            >>> Estimate.from_saved({"value": 0.9, "low": None, "high": None}).has_interval
            False
        """
        value, low, high = (math.nan if (end := values[key]) is None else end for key in ("value", "low", "high"))
        return cls(value, low, high)

    @property
    def defined(self) -> bool:
        """Whether there is a value."""
        return not math.isnan(self.value)

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are known."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is above 0, by more than sums of floating-point numbers are inexact.

        Example:
            >>> Estimate(0.02, 0.01, 0.04).is_above_zero, Estimate(0.02, 2e-18, 0.04).is_above_zero
            (True, False)
        """
        return self.low > ROUNDING

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval is below 0, by more than sums of floating-point numbers are inexact."""
        return self.high < -ROUNDING


def create_undefined_estimate(reason: str) -> Estimate:
    """Create an estimate without a value, with the reason for it.

    Example:
        >>> create_undefined_estimate("no image is of class GC").defined
        False
    """
    return Estimate(math.nan, math.nan, math.nan, reason=reason)


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
    """Compute the Wilson interval around a proportion (Wilson 1927).

    statsmodels gives the same, but takes longer to import than pandas.

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
    square = errors**2 / size
    middle = (value + square / 2) / (1 + square)
    half_width = math.sqrt(square * (value * (1 - value) + square / 4)) / (1 + square)
    # Rounding may move the ends of 0/n and n/n slightly past the value.
    return min(value, max(0.0, middle - half_width)), max(value, min(1.0, middle + half_width))


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
        >>> low, high = np.array([0.0, 0.0, 0.5]), np.array([0.0, 0.0, 1.0])
        >>> compute_confidence_below(low, 0.5) > compute_confidence_below(high, 0.5)
        True
    """
    proportions = check_proportions(values)
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
    proportions = check_proportions(values)
    if (proportions == 1).all():
        return 1.0
    mean = float(proportions.mean())
    return float(
        optimize.brentq(lambda bound: compute_confidence_below(proportions, bound) - confidence, mean * 1e-3, 1.0)
    )


def check_proportions(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values as an array of shape (n,); ValueError if there are none, or one is outside [0, 1]."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"values have shape {array.shape}; expected (n,), with n >= 1")
    if not ((array >= 0) & (array <= 1)).all():  # negated, so that NaN is refused as well
        raise ValueError(f"values are in [{array.min()}, {array.max()}]; expected [0, 1]")
    return array


@dataclass(frozen=True)
class MarginDecision:
    """What a difference with its interval shows about a margin.

    Attributes:
        difference: The difference, first minus second, with its interval.
        margin: The largest difference that counts as no worse.
        noninferior: Whether the first is shown to be worse by less than the margin.
        superior: Whether the first is shown to be better.
        equivalent: Whether the two are shown to differ by less than the margin.
    """

    difference: Estimate
    margin: float
    noninferior: bool
    superior: bool
    equivalent: bool


def decide_noninferiority(estimate: Estimate, *, margin: float, reference: float = 0.0) -> MarginDecision:
    """Test non-inferiority, superiority and equivalence with an interval (Piaggio 2012; Schuirmann 1987).

    An interval of confidence c gives one-sided tests at the level (1 - c) / 2 each: one of 95 % tests non-inferiority
    at 2.5 %, one of 90 % equivalence at the usual 5 %. Larger values must be better.

    Args:
        estimate: A difference, first minus second, from `paired_differences`, `delong_test` or
            `difference_of_independent`; or a figure of one model, to be compared with `reference`.
        margin: The largest difference that counts as no worse, > 0, chosen before the data are seen.
        reference: A published or given figure that is subtracted; 0 for a difference.

    Returns:
        The decision; nothing is shown if the estimate has no interval.

    Raises:
        ValueError: If the margin is not above 0, or the reference is not finite.

    Example:
        >>> decision = decide_noninferiority(Estimate(0.90, 0.87, 0.93), reference=0.91, margin=0.05)
        >>> decision.noninferior, decision.superior, decision.equivalent
        (True, False, True)
    """
    if not 0 < margin < math.inf:
        raise ValueError(f"the margin is {margin:g}; expected a number above 0, such as 0.05")
    if not math.isfinite(reference):
        raise ValueError(f"the reference is {reference:g}; expected a finite number, such as 0.9")
    value, low, high = (end - reference for end in (estimate.value, estimate.low, estimate.high))
    difference = Estimate(value, low, high, reason=estimate.reason)
    noninferior = low > -margin
    return MarginDecision(difference, margin, noninferior, difference.is_above_zero, noninferior and high < margin)


@dataclass(frozen=True)
class MarginTest(MarginDecision):
    """What a difference shows about a margin, with the p-values that belong to its intervals.

    Attributes:
        noninferior_p: One-sided, for the hypothesis that the first is worse by the margin or more; NaN without an
            interval.
        equivalent_p: The larger one of two one-sided tests, for the hypothesis that they differ by the margin or more.
        inferior: Whether the first is shown to be worse by more than the margin.
    """

    noninferior_p: float
    equivalent_p: float
    inferior: bool


def compute_margin_test(
    estimate: Callable[[float], Estimate], *, margin: float, reference: float = 0.0, confidence: float = 0.95
) -> MarginTest:
    """Test non-inferiority and equivalence with p-values, by the intervals of a difference at every confidence.

    p of non-inferiority is (1 - c) / 2 for the confidence c at which the lower end of the interval is at minus the
    margin, so that p < 0.025 if and only if a 95 % interval is above it. p of equivalence is the larger one of two such
    tests, at minus and at plus the margin (Schuirmann 1987).

    Args:
        estimate: Function of the confidence that returns the difference, or figure, with its interval.
        margin: The largest difference that counts as no worse, > 0, chosen before the data are seen.
        reference: A published or given figure that is subtracted; 0 for a difference.
        confidence: Coverage of the interval of the decision, in (0, 1).

    Raises:
        ValueError: If the margin is not above 0, or the reference is not finite.

    Example:
        >>> from pylorus.evaluation.index_intervals import wilson
        >>> test = compute_margin_test(lambda c: wilson(180, 200, confidence=c), reference=0.9, margin=0.05)
        >>> test.noninferior, round(test.noninferior_p, 3), round(test.equivalent_p, 3)
        (True, 0.024, 0.024)
    """
    decision = decide_noninferiority(estimate(confidence), margin=margin, reference=reference)
    lower = _compute_p_above(estimate, reference - margin)

    def mirror(level: float) -> Estimate:
        each = estimate(level)
        return Estimate(-each.value, -each.high, -each.low)

    upper = _compute_p_above(mirror, -(reference + margin))
    inferior = decision.difference.high < -margin
    return MarginTest(**vars(decision), noninferior_p=lower, equivalent_p=max(lower, upper), inferior=inferior)


def _compute_p_above(estimate: Callable[[float], Estimate], bound: float) -> float:
    """Compute one-sided p, for the hypothesis of at most a bound, from the interval that ends at it."""
    middle = estimate(0.5)
    if not middle.has_interval:
        return math.nan
    is_above = middle.value > bound

    def compute_gap(exponent: float) -> float:
        each = estimate(1 - 2 * math.exp(exponent))
        return (each.low if is_above else each.high) - bound

    least, most = math.log(LEAST_P), math.log(0.4999)
    gaps = compute_gap(least), compute_gap(most)
    if gaps[0] * gaps[1] < 0:
        tail = math.exp(float(optimize.brentq(compute_gap, least, most, xtol=1e-6)))
    else:  # the value is at the bound, or the bound is out of reach of every interval
        tail = 0.5 if (gaps[1] > 0) != is_above else LEAST_P
    return tail if is_above else 1 - tail
