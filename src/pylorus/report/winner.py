"""The winner by the study's rule, our own choice, and what the test set shows of either."""

from collections.abc import Sequence
from dataclasses import dataclass

from pylorus.evaluation.sentence import percent
from pylorus.report.comparison import Comparison
from pylorus.report.result import Result
from pylorus.report.same_test import SameTest
from pylorus.runs.shipped import KEY, LAST, describe_choice

MANY = 5
"""Names beyond this number are counted, not listed."""


@dataclass(frozen=True, eq=False)
class Winner:
    """Who is best on one test set.

    Attributes:
        tests: The results on it.
        best: The candidates with the highest test accuracy: the study's rule. More than one where they tie.
        chosen: Of the shipped stages the one with the highest validation accuracy, of equals the first; None without
            validation.
        comparisons: The first of `best` against every other candidate.
    """

    tests: SameTest
    best: tuple[Result, ...]
    chosen: Result | None
    comparisons: tuple[Comparison, ...]

    @property
    def rule(self) -> str:
        """Who wins by the study's rule."""
        names = _listed([result.label for result in self.best])
        share = percent(self.best[0].images.shares.accuracy.value)
        if len(self.tests.candidates) == 1:
            return f"{names} stands alone ({share} of the test images recognised): there is nothing to compare it with."
        verb = "wins" if len(self.best) == 1 else "tie"
        return f"By the study's rule (best test accuracy) {names} {verb}, with {share}."

    @property
    def verdict(self) -> str:
        """Whether that is shown; empty where there is nothing to compare with."""
        if not self.comparisons:
            return ""
        shown = [_other(each, self.best[0]).label for each in self.comparisons if each.is_shown]
        not_shown = [_other(each, self.best[0]).label for each in self.comparisons if not each.is_shown]
        name = self.best[0].label
        if not not_shown:
            return f"That {name} is better than {_listed(shown)} is shown on this test set."
        if not shown:
            return f"That {name} is better than {_listed(not_shown, last='or')} is not shown by this test set."
        return (
            f"That {name} is better than {_listed(shown)} is shown on this test set; that it is better than "
            f"{_listed(not_shown, last='or')} is not shown."
        )

    @property
    def choice(self) -> str:
        """Our own choice, which leaves the test set out."""
        if self.chosen is None or self.chosen.validation_accuracy is None:
            return "Our own choice goes by validation accuracy; there are no validation predictions to choose by."
        shipped = self.chosen.run.shipped
        if shipped is not None and shipped.chosen_by in (KEY, LAST) and len(self.tests.runs) == 1:
            return (
                f"Shown first is what the run ships, {self.chosen.label} ({describe_choice(shipped)}), with "
                f"{percent(self.chosen.images.shares.accuracy.value)} on test images."
            )
        if self.chosen.run.setting("data.validation") == "test":
            return (
                f"By validation accuracy {self.chosen.label} would be our own choice; but here the validation images "
                "are the test images, so this choice, too, was made on the test set."
            )
        validation = percent(self.chosen.validation_accuracy.value)
        test = percent(self.chosen.images.shares.accuracy.value)
        return (
            "Our own choice goes by validation accuracy, because choosing by the test set would make its figures "
            f"optimistic: {self.chosen.label}, with {validation} on validation and {test} on test images."
        )


def winner_of(tests: SameTest, comparisons: Sequence[Comparison]) -> Winner:
    """Picks the winner among the candidates of one test set."""
    candidates = tests.candidates
    most = max(result.images.shares.accuracy.successes for result in candidates)
    best = tuple(result for result in candidates if result.images.shares.accuracy.successes == most)
    validated = [each for each in candidates if each.is_shipped and each.validation_accuracy is not None]
    others = [result for result in candidates if result is not best[0]]
    return Winner(
        tests=tests,
        best=best,
        chosen=max(validated, key=_validation_accuracy, default=None),
        comparisons=tuple(each for other in others for each in comparisons if each.of(best[0], other)),
    )


def _validation_accuracy(result: Result) -> float:
    assert result.validation_accuracy is not None
    return result.validation_accuracy.value


def _other(comparison: Comparison, result: Result) -> Result:
    return comparison.second if comparison.first is result else comparison.first


def _listed(names: Sequence[str], *, last: str = "and") -> str:
    if len(names) > MANY:
        return f"{', '.join(names[:MANY])} {last} {len(names) - MANY} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"
