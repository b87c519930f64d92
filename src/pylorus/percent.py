"""Shares as readers see them."""

from typing import SupportsFloat


def percent(share: SupportsFloat) -> str:
    """A share in %, with one digit; a dash where it is undefined."""
    value = float(share)
    return "–" if value != value else f"{100 * value:.1f}"
