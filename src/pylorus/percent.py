"""Formatting of proportions as percentages."""

from typing import SupportsFloat


def percent(share: SupportsFloat) -> str:
    """Format a proportion in percent with one decimal, without the sign; NaN becomes a dash."""
    value = float(share)
    return "–" if value != value else f"{100 * value:.1f}"
