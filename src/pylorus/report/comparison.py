"""Pairs of results on the same test images: what differs, after Holm's correction over all pairs of the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from pylorus.evaluation.mcnemar import McNemar, mcnemar
from pylorus.evaluation.multiplicity import holm
from pylorus.evaluation.paired import Difference, PairedDifferences, delong_test, paired_differences
from pylorus.evaluation.sentence import better_sentence
from pylorus.report.options import CONFIDENCE, LEVEL, ReportOptions
from pylorus.report.result import Result
from pylorus.report.same_test import SameTest


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two results on the same test images; differences are first minus second.

    Attributes:
        first: The one.
        second: The other.
        images: McNemar's exact test of how many images each recognises.
        auroc: DeLong's test of the class's AUROC; None where the report has no class.
        differences: Macro F1 and its like, by the paired bootstrap.
        corrected: Each index's p after Holm's correction over all pairs of the report: accuracy, auroc, macro_f1.
        family: How many pairs that is.
    """

    first: Result
    second: Result
    images: McNemar
    auroc: Difference | None
    differences: PairedDifferences
    corrected: dict[str, float]
    family: int

    @property
    def is_shown(self) -> bool:
        """Whether one is shown to recognise more images than the other."""
        return self.corrected["accuracy"] < LEVEL

    @property
    def sentence(self) -> str:
        """What is and what is not shown of accuracy."""
        return better_sentence(
            self.first.label,
            self.second.label,
            self.images,
            corrected_p=self.corrected["accuracy"] if self.family > 1 else None,
            family=self.family,
            level=LEVEL,
            group_word="groups",
        )

    def of(self, result: Result, other: Result) -> bool:
        """Whether it compares these two, in either order."""
        return {result, other} == {self.first, self.second}


def compare_all(sets: Sequence[SameTest], *, class_name: str | None, options: ReportOptions) -> tuple[Comparison, ...]:
    """Compares all pairs that a reader would compare: see `pairs_of`.

    Each index is a family of its own: its p-values are corrected over all pairs of the report, also over those on
    another test set. A p that can't be told counts as 1 in its family, so that the family does not shrink.
    """
    tested = [(first, second) for tests in sets for first, second in pairs_of(tests)]
    found = [_compared(first, second, class_name, options) for first, second in tested]
    if not found:
        return ()
    families = {
        "accuracy": [images.p_value for images, _, _ in found],
        "auroc": [np.nan if auroc is None else auroc.p_value for _, auroc, _ in found],
        "macro_f1": [differences.macro_f1.p_value for _, _, differences in found],
    }
    corrected = {name: _corrected(p_values) for name, p_values in families.items()}
    return tuple(
        Comparison(
            *pair,
            images,
            auroc,
            differences,
            corrected={name: float(p_values[place]) for name, p_values in corrected.items()},
            family=len(found),
        )
        for place, (pair, (images, auroc, differences)) in enumerate(zip(tested, found, strict=True))
    )


def pairs_of(tests: SameTest) -> list[tuple[Result, Result]]:
    """Pairs on one test set: runs after the same stage, each run's shipped stage, and the stages of a run in turn."""
    results = tests.results
    pairs = [
        (first, second)
        for first, second in combinations(results, 2)
        if first.run is not second.run
        and (first.stage.name == second.stage.name or (first.is_shipped and second.is_shipped))
    ]
    runs = list(dict.fromkeys(result.run for result in results))
    for run in runs:
        pairs += [(later, earlier) for earlier, later in pairwise([each for each in results if each.run is run])]
    return pairs


def _compared(
    first: Result, second: Result, class_name: str | None, options: ReportOptions
) -> tuple[McNemar, Difference | None, PairedDifferences]:
    one, other = first.test.predictions, second.test.predictions
    knows = class_name in one.class_names
    return (
        mcnemar(one, other),
        delong_test(one, other, class_name=str(class_name), confidence=CONFIDENCE) if knows else None,
        paired_differences(one, other, seed=options.seed, resamples=options.resamples, confidence=CONFIDENCE),
    )


def _corrected(p_values: Sequence[float]) -> list[float]:
    family = np.array(p_values, dtype=np.float64)
    undefined = np.isnan(family)
    corrected = holm(np.where(undefined, 1.0, family))
    return [float(p) for p in np.where(undefined, np.nan, corrected)]
