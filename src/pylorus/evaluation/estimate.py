"""A number and the interval that goes with it: the one shape of every result that is not a curve."""

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval.

    Attributes:
        value: NaN where the index is undefined.
        low: Lower end of the interval; NaN where there is no value or no interval.
        high: Upper end.
        reason: Why there is no value, or no interval, in words that follow a colon; empty where there are both.

    Example:
        >>> Estimate(value=0.9, low=0.85, high=0.94).has_interval
        True
    """

    value: float
    low: float
    high: float
    reason: str = field(default="", kw_only=True)

    @property
    def defined(self) -> bool:
        """Whether there is a value at all."""
        return not math.isnan(self.value)

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are known."""
        return not (math.isnan(self.low) or math.isnan(self.high))


def undefined(reason: str) -> Estimate:
    """Return an estimate without a value, and why there is none.

    Example:
        >>> undefined("no image is of class GC").defined
        False
    """
    return Estimate(math.nan, math.nan, math.nan, reason=reason)
