"""Two models on different images, such as ours and a published one: a difference with its interval."""

import math

from pylorus.evaluation.estimate import Estimate


def difference_of_independent(first: Estimate, second: Estimate) -> Estimate:
    """Difference of two estimates that share no image, first minus second.

    The interval is put together from the two intervals (MOVER, Zou and Donner, Stat Med 2008;27:1693); from
    two Wilson intervals it is Newcombe's (Stat Med 1998;17:873, method 10). It has the confidence that both
    have.

    Args:
        first: One estimate with its interval: a proportion, a macro F1, an area.
        second: The other's, of the same index and with the same confidence, from other images.

    Returns:
        The difference; nan if a value is undefined, with a nan interval if an interval is.

    Example:
        >>> from pylorus.evaluation.proportion import wilson
        >>> found = difference_of_independent(wilson(409, 450), wilson(401, 450))
        >>> round(found.value, 4), round(found.low, 4), round(found.high, 4)
        (0.0178, -0.0217, 0.0575)
    """
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, low, high)
