"""Non-inferiority and equivalence with a margin, decided by intervals (Piaggio et al., JAMA 2012;308:2594).

Any difference with an interval can be tested: of two models on the same images or on others, or of a model from a
published or given figure. Larger values must be better.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from scipy import optimize

from pylorus.evaluation.intervals import Estimate

LEAST_P = 1e-12
"""Smallest p-value that is told apart from 0 where it is found by inverting intervals."""


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
    return MarginDecision(difference, margin, noninferior, low > 0, noninferior and high < margin)


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
