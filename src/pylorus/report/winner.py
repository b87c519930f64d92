"""The winner by the study's rule, our own choice, and what the test images show of either."""

from collections.abc import Sequence
from dataclasses import dataclass

from pylorus.evaluation.sentence import percent
from pylorus.report.candidate import FOLDS, SET, Candidate, Pool
from pylorus.report.comparison import Comparison, compare_pair, correct_family, other_pairs, stage_pairs
from pylorus.report.options import ReportOptions
from pylorus.report.result import Result
from pylorus.report.same_test import SameTest
from pylorus.runs.shipped import KEY, LAST, describe_choice

BRIEF = {KEY: "named by deploy.stage", LAST: "the last stage: written by a version that did not compare stages"}
"""How the shipped stage of several runs was chosen, where validation did not choose it."""

MANY = 5
"""Names beyond this number are counted, not listed."""


@dataclass(frozen=True, eq=False)
class Winner:
    """Who is best on the test images of one pool.

    Attributes:
        pool: The candidates.
        leaders: Those with the highest test accuracy: the study's rule. More than one where they tie.
        preferred: The candidate with the highest validation accuracy, of equals the first; None without validation.
        reference: The candidate that the others are compared with: `preferred`, or without one the first of `leaders`.
        comparisons: `reference` against every other candidate, corrected.
        stages: The stages of each configuration against each other, corrected within it.
        others: All other pairs, unadjusted.
    """

    pool: Pool
    leaders: tuple[Candidate, ...]
    preferred: Candidate | None
    reference: Candidate
    comparisons: tuple[Comparison, ...]
    stages: tuple[Comparison, ...]
    others: tuple[Comparison, ...]

    @property
    def best(self) -> tuple[Result, ...]:
        """A run of each leader, that of median validation accuracy."""
        return tuple(each.representative for each in self.leaders)

    @property
    def chosen(self) -> Result | None:
        """The run of our own choice; of several replicates that of median validation accuracy."""
        return None if self.preferred is None else self.preferred.representative

    @property
    def tests(self) -> SameTest:
        """The results on the test images of that run."""
        return self.pool.same_test(self.chosen or self.best[0])

    @property
    def rule(self) -> str:
        """Who wins by the study's rule."""
        first = self.leaders[0]
        names = list_names([each.label for each in self.leaders])
        share, spread = percent(float(first.share)), _spread(first)
        if len(self.pool.candidates) == 1:
            return (
                f"{names} stands alone, with {share} of the test images recognised{spread}: there is nothing to "
                "compare it with."
            )
        verb = "wins" if len(self.leaders) == 1 else "tie"
        how = {SET: "best test accuracy", FOLDS: "best accuracy on the pooled test images of the folds"}.get(
            self.pool.kind, "best mean test accuracy"
        )
        if self.pool.kind == SET and any(each.replicates > 1 for each in self.pool.candidates):
            how += ", of several runs their mean"
        return f"By the study's rule ({how}) {names} {verb}, with {share}{spread}."

    @property
    def verdict(self) -> str:
        """Whether the candidate that is compared is shown to differ from the others; empty where there are none."""
        if not self.comparisons:
            return ""
        name, where = self.reference.label, self.pool.place
        better: list[str] = []
        worse: list[str] = []
        undecided: list[str] = []
        for each in self.comparisons:
            other = each.second if each.first is self.reference else each.first
            outcome = undecided if not each.is_shown else better if self.reference.share > other.share else worse
            outcome.append(other.label)
        sentences = []
        if better:
            sentences.append(f"That {name} is more accurate than {list_names(better)} is shown {where}.")
        if worse:
            verb = "is" if len(worse) == 1 else "are"
            sentences.append(f"That {list_names(worse)} {verb} more accurate than {name} is shown {where}.")
        if undecided:
            sentences.append(
                f"A difference in accuracy between {name} and {list_names(undecided, last='or')} is not shown {where}."
            )
        return " ".join([*sentences, self._allowance])

    @property
    def _allowance(self) -> str:
        """What the verdict allows for, where a reader could take it for more or for less."""
        if self.pool.kind != SET:
            return "These tests allow for patients and for training sets that overlap."
        numbers = [candidate.replicates for each in self.comparisons for candidate in (each.first, each.second)]
        if min(numbers) > 1:
            return "These tests allow for patients and for seeds."
        if max(numbers) > 1:
            return "They allow for patients, and for the seeds of what has several; a single run may be a lucky seed."
        return "These tests are of the models as trained, one run each; they do not tell what another seed would give."

    @property
    def choice(self) -> str:
        """Our own choice, which leaves the test set out."""
        if self.preferred is None or self.preferred.validation is None or self.chosen is None:
            return "Our own choice goes by validation accuracy; there are no validation predictions to choose by."
        label = self.preferred.label
        validation = percent(self.preferred.validation.mean)
        test = percent(float(self.preferred.share))
        mean = "a mean of " if self.preferred.replicates > 1 else ""
        shipped = self.chosen.run.shipped
        if len(self.pool.configurations) == 1 and shipped is not None and shipped.chosen_by in (KEY, LAST):
            why = describe_choice(shipped) if self.preferred.replicates == 1 else BRIEF[shipped.chosen_by]
            sentence = f"Shown first is what is shipped, {label} ({why}), with {mean}{test} on test images."
            return f"{sentence} {self._shipping}".strip()
        if self.chosen.run.setting("data.validation") == "test":
            return (
                f"By validation accuracy {label} would be our own choice; but here the validation images "
                "are the test images, so this choice, too, was made on the test set."
            )
        if len(self.pool.candidates) == 1:
            sentence = f"{label} is the only candidate: {mean}{validation} on validation and {test} on test images."
            return f"{sentence} {self._shipping}".strip()
        sentence = (
            "Our own choice goes by validation accuracy, because choosing by the test set would make its figures "
            f"optimistic: {label}, with {mean}{validation} on validation and {test} on test images."
        )
        return f"{sentence} {self._shipping}".strip()

    @property
    def _shipping(self) -> str:
        """Which model is shipped where the choice was trained several times."""
        preferred = self.preferred
        if preferred is None or preferred.replicates == 1:
            return ""
        if self.pool.kind == SET:
            return (
                f"Each of its {preferred.replicates} runs ships a model of its own; that of median validation accuracy "
                f"is {preferred.representative.run.label}."
            )
        several = len(self.pool.candidates) > 1
        blind = (
            "The validation images of one fold are test images of others, so this choice did not leave the pooled test "
            "images out wholly. "
            if self.pool.kind == FOLDS and several
            else ""
        )
        return (
            f"{blind}Each of its runs ships a model of its own, trained on a part of the images; the figures are of "
            "the configuration, not of one of these models."
        )


def winner_of(pool: Pool, *, class_name: str | None, options: ReportOptions) -> Winner:
    """Picks the winner among the candidates of a pool and tests the questions asked."""
    candidates = pool.candidates
    most = max(each.share for each in candidates)
    leaders = tuple(each for each in candidates if each.share == most)
    preferred = _choose(pool)
    reference = preferred or leaders[0]

    def compare(pairs: Sequence[tuple[Candidate, Candidate]]) -> tuple[Comparison, ...]:
        return tuple(compare_pair(*pair, pool, class_name=class_name, options=options) for pair in pairs)

    stages = tuple(
        comparison
        for each, pairs in zip(pool.configurations, stage_pairs(pool), strict=True)
        for comparison in correct_family(compare(pairs), question=f"stage against stage within {each.label}")
    )
    if len(pool.configurations) == 1:
        against = tuple(each for each in stages if reference in (each.first, each.second))
        return Winner(pool, leaders, preferred, reference, against, stages, ())
    against_winner = compare([(reference, each) for each in candidates if each is not reference])
    others = compare(other_pairs(pool, [*against_winner, *stages]))
    blind = preferred is not None and pool.kind == SET and reference.results[0].run.setting("data.validation") != "test"
    # Where these test images had a say in who is compared, any pair could have become the question.
    rivals = [] if blind else [each for each in others if {each.first, each.second} <= set(candidates)]
    question = f"{reference.label} against each other configuration"
    if rivals:
        question += ", corrected for all pairs of configurations, since it was not chosen independently of these images"
    return Winner(
        pool,
        leaders,
        preferred,
        reference,
        correct_family(against_winner, question=question, others=rivals),
        stages,
        others,
    )


def list_names(names: Sequence[str], *, last: str = "and") -> str:
    """Names in a sentence; beyond `MANY` the rest is counted.

    Example:
        >>> list_names(["a", "b", "c"], last="or")
        'a, b or c'
    """
    if len(names) > MANY:
        return f"{', '.join(names[:MANY])} {last} {len(names) - MANY} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def _choose(pool: Pool) -> Candidate | None:
    if len(pool.configurations) == 1:
        only = pool.configurations[0].shipped
        return only if only.validation is not None else None
    validated = [each for each in pool.candidates if each.validation is not None]
    # Rounded, so that of equal means the first is taken, whatever the last digit of their sums.
    return max(validated, key=lambda each: round(each.validation.mean, 12) if each.validation else 0.0, default=None)


def _spread(candidate: Candidate) -> str:
    """How far the runs of a candidate lie apart, in brackets; nothing for a single run."""
    summary = candidate.accuracies
    if summary.replicates == 1:
        return ""
    return (
        f" ({candidate.replicate_words}: standard deviation {100 * summary.deviation:.1f} points, "
        f"{100 * summary.lowest:.1f} to {percent(summary.highest)})"
    )
