"""Which results were tested on the same images: only these may be compared pair by pair."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pylorus.report.result import Result


@dataclass(frozen=True, eq=False)
class SameTest:
    """Results on one test set.

    Attributes:
        results: At least one, in the order of runs and stages.
    """

    results: tuple[Result, ...]

    @property
    def candidates(self) -> tuple[Result, ...]:
        """Among what a winner is chosen: the shipped stage of each run; the stages, where there is one run."""
        shipped = tuple(result for result in self.results if result.is_shipped)
        return shipped if len(shipped) > 1 else self.results

    @property
    def runs(self) -> list[str]:
        """Labels of the runs."""
        return list(dict.fromkeys(result.run.label for result in self.results))


def by_test_set(results: Sequence[Result]) -> tuple[SameTest, ...]:
    """Sorts results by what they were tested on: the same images, truth, groups and classes."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(name_test(result), []).append(result)
    return tuple(SameTest(tuple(group)) for group in found.values())


@lru_cache(maxsize=512)
def name_test(result: Result) -> str:
    """A name of what a result was tested on: the same for the same images, truth, groups and classes."""
    said = result.test.predictions
    order = np.argsort(said.sample)
    classes = np.array(said.class_names)[said.true[order]]
    parts = (said.sample[order], classes, np.asarray(said.group)[order], np.array(sorted(said.class_names)))
    return hashlib.sha256("\n".join("\t".join(map(str, part.tolist())) for part in parts).encode()).hexdigest()
