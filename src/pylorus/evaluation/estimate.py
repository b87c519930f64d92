"""A number and the interval that goes with it: the one shape of every result that is not a curve."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval.

    `value` is nan where the index is undefined (0/0). `low` and `high` are nan where the data cannot tell how
    far the value is to be trusted; then the value stands, without an interval.

    Example:
        >>> Estimate(value=0.9, low=0.85, high=0.94).has_interval
        True
    """

    value: float
    low: float
    high: float

    @property
    def defined(self) -> bool:
        """Whether there is a value at all."""
        return not math.isnan(self.value)

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are known."""
        return not (math.isnan(self.low) or math.isnan(self.high))
