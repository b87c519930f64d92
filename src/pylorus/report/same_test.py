"""Group results by test set: only results on the same test images may be compared in pairs."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pylorus.report.result import Result


@dataclass(frozen=True, eq=False)
class ComparableResults:
    """Results on one test set.

    Attributes:
        results: At least one, in the order of runs and stages.
    """

    results: tuple[Result, ...]

    @property
    def candidates(self) -> tuple[Result, ...]:
        """Results among which a winner is chosen: the shipped stage of each run, or the stages of a single run."""
        shipped = tuple(result for result in self.results if result.is_shipped)
        return shipped if len(shipped) > 1 else self.results

    @property
    def runs(self) -> list[str]:
        """Labels of the runs."""
        return list(dict.fromkeys(result.run.label for result in self.results))


def group_by_test_set(results: Sequence[Result]) -> tuple[ComparableResults, ...]:
    """Group results that have the same test images, true classes, groups and class names."""
    by_test: dict[str, list[Result]] = {}
    for result in results:
        by_test.setdefault(compute_test_hash(result), []).append(result)
    return tuple(ComparableResults(tuple(group)) for group in by_test.values())


@lru_cache(maxsize=512)
def compute_test_hash(result: Result) -> str:
    """Return a hash of the test images of a result, their true classes, groups and class names."""
    table = result.test.predictions
    order = np.argsort(table.sample)
    classes = np.array(table.class_names)[table.true[order]]
    columns = (table.sample[order], classes, np.asarray(table.group)[order], np.array(sorted(table.class_names)))
    return hashlib.sha256("\n".join("\t".join(map(str, column.tolist())) for column in columns).encode()).hexdigest()
