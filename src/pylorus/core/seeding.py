"""Random seeds: every random number of a run is derived from the run's seed and from the purpose of the number."""

import hashlib


def compute_seed(*purpose: str | int) -> int:
    """Return a seed in [0, 2^63) that depends on all of `purpose` and on nothing else.

    Unlike `hash`, it is the same on every machine, in every process and in every version of Python.

    Example:
        >>> compute_seed(0, "order", 1) == compute_seed(0, "order", 1)
        True
        >>> compute_seed(0, "order", 1) == compute_seed(0, "order", 2)
        False
    """
    # repr distinguishes 1 from "1", and ("a", "bc") from ("ab", "c").
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
