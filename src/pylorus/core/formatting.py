"""Formatting of proportions as percentages."""

from typing import SupportsFloat


def format_bytes(count: float) -> str:
    """Format a number of bytes for people.

    Example:
        >>> format_bytes(1536), format_bytes(3 * 2**30)
        ('1.5 KiB', '3.0 GiB')
    """
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def format_percent(proportion: SupportsFloat) -> str:
    """Format a proportion in percent with one decimal, without the sign; NaN becomes a dash."""
    value = float(proportion)
    return "–" if value != value else f"{100 * value:.1f}"


ABOUT = "about/"
"""Prefix of the columns that come from the user's manifest, in the catalog and in prediction tables."""
