"""Chance, once: every random number of a run comes from its seed and from what the number is for."""

import hashlib


def derived_seed(*purpose: str | int) -> int:
    """A seed in [0, 2^63) that depends on all of `purpose` and on nothing else.

    The same on every machine, process and Python, unlike `hash`.

    Example:
        >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 1)
        True
        >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 2)
        False
    """
    # repr keeps 1 and "1" apart, and ("a", "bc") from ("ab", "c").
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
