"""Which results were tested on the same images: only these may be compared pair by pair."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pylorus.evaluation.predictions import aligned
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
    found: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        said = result.test.predictions
        order = np.argsort(said.sample)
        classes = np.array(said.class_names)[said.true[order]]
        key = (*map(bytes, (said.sample[order], classes, np.asarray(said.group)[order])), *sorted(said.class_names))
        found.setdefault(key, []).append(result)
    return tuple(SameTest(tuple(group)) for group in found.values())


def why_apart(sets: Sequence[SameTest]) -> tuple[str, ...]:
    """Sentences that say which runs are not compared with which, and why; none if there is one test set."""
    if len(sets) < 2:
        return ()
    if all(result.run.setting("data.fold") is not None for each in sets for result in each.results):
        return (
            f"The runs are folds: they test {len(sets)} different parts of the images, so they are not compared pair "
            "by pair; the table of pooled folds says what they show together.",
        )
    first = sets[0]
    said = []
    for other in sets[1:]:
        try:
            aligned(first.results[0].test.predictions, other.results[0].test.predictions)
            reason = "the tables differ"
        except ValueError as error:
            reason = str(error)
        said.append(
            f"{_runs(other)} and {_runs(first)} are not compared pair by pair: {reason}. "
            f"Splits {other.results[0].split} and {first.results[0].split}."
        )
    return tuple(said)


def _runs(tests: SameTest) -> str:
    names = tests.runs
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
