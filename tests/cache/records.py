"""Shared by the cache tests: records that can be computed from their name, and a computation that counts its calls."""

import hashlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pylorus.cache.store import RecordStore

SIZE = 1000
"""Bytes of a record."""

BUDGET = 1 << 20


def record(name: str, size: int = SIZE) -> NDArray[np.uint8]:
    """The one right record of a name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def right(names: Sequence[str], size: int = SIZE) -> NDArray[np.uint8]:
    return np.stack([record(name, size) for name in names])


class Computation:
    """Computes the records of `names` in small blocks, and counts how often each was asked for."""

    def __init__(self, names: Sequence[str], *, block: int = 3, before: Callable[[int], None] | None = None) -> None:
        self.names = names
        self.block = block
        self.before = before
        self.asked: list[str] = []

    def __call__(self, places: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        self.asked += [self.names[place] for place in places]
        for first in range(0, len(places), self.block):
            if self.before is not None:
                self.before(first)
            yield right([self.names[place] for place in places[first : first + self.block]])


def some(count: int, prefix: str = "image") -> list[str]:
    return [f"{prefix}-{number:03d}" for number in range(count)]


def store(root: Path, *, key: str = "a", budget: int = BUDGET, kind: str = "features") -> RecordStore:
    return RecordStore(root, kind=kind, key={"network": key}, record_bytes=SIZE, budget_bytes=budget)


def fill(root: Path, names: Sequence[str], **how: str | int) -> Path:
    """Keeps the records of `names` and gives the store's folder."""
    filled = store(root, **how)
    filled.load_or_compute(names, Computation(names), memory_bytes=0)
    return filled.folder


def process(script: str, *words: object) -> subprocess.Popen[str]:
    """A Python process that runs `script` with these arguments; its standard output can be read."""
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)
