"""Formatting of proportions as percentages."""

from typing import SupportsFloat


def format_percent(proportion: SupportsFloat) -> str:
    """Format a proportion in percent with one decimal, without the sign; NaN becomes a dash."""
    value = float(proportion)
    return "–" if value != value else f"{100 * value:.1f}"
