"""A value with its confidence interval: the common form of all results that are not curves."""

import math
from dataclasses import dataclass, field


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

    @property
    def defined(self) -> bool:
        """Whether there is a value."""
        return not math.isnan(self.value)

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are known."""
        return not (math.isnan(self.low) or math.isnan(self.high))


def create_undefined_estimate(reason: str) -> Estimate:
    """Create an estimate without a value, with the reason for it.

    Example:
        >>> create_undefined_estimate("no image is of class GC").defined
        False
    """
    return Estimate(math.nan, math.nan, math.nan, reason=reason)
