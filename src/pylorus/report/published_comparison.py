"""Our results beside the published ones: other images, so unpaired, with intervals and a sentence."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pylorus.evaluation.comparison import difference_of_independent
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.index_intervals import indices_of_confusion
from pylorus.evaluation.proportion import proportions_of_confusion
from pylorus.evaluation.sentence import unpaired_sentence
from pylorus.report.basis import tested_on
from pylorus.report.options import CONFIDENCE
from pylorus.report.published import STUDY, PublishedModel
from pylorus.report.result import Result
from pylorus.report.study_tables import published_basis
from pylorus.report.table import Column, Row, Table, in_percent, text_columns

WINNER = ("ResNet50", "finetune")
"""The study's winner, with which models are compared that it did not have."""


@dataclass(frozen=True, eq=False)
class PublishedComparison:
    """One of our results beside a published one.

    Attributes:
        ours: The result.
        theirs: The published one of the same model and stage, or the study's winner.
        indices: Name, ours, theirs; the same index, with intervals.
    """

    ours: Result
    theirs: PublishedModel
    indices: tuple[tuple[str, Estimate, Estimate], ...]

    @property
    def sentence(self) -> str:
        """What is and what is not shown of accuracy."""
        name, ours, theirs = self.indices[0]
        return unpaired_sentence(
            self.ours.label,
            f"the published {self.theirs.model} {self.theirs.stage}",
            difference_of_independent(ours, theirs),
            index=name,
            images=(self.ours.test.images, int(self.theirs.confusion.sum())),
            confidence=CONFIDENCE,
        )


def compare_with_published(results: Sequence[Result]) -> tuple[PublishedComparison, ...]:
    """Compares every result that has the study's three classes; none where classes differ."""
    found = []
    for result in results:
        places = _places(result)
        if places is not None:
            theirs = _matching(result)
            found.append(PublishedComparison(result, theirs, _indices(result, theirs, places)))
    return tuple(found)


def published_comparison_table(comparisons: Sequence[PublishedComparison]) -> Table:
    """Accuracy, macro F1 and the sensitivity of each class, ours and published.

    Args:
        comparisons: At least one.
    """
    rows = []
    for each in comparisons:
        for name, ours, theirs in each.indices:
            rows.append(
                Row(
                    (
                        each.ours.label,
                        f"{each.theirs.model} {each.theirs.stage}",
                        name,
                        in_percent(ours),
                        in_percent(theirs),
                        in_percent(difference_of_independent(ours, theirs)),
                    )
                )
            )
    return Table(
        key="published-comparison",
        title="Ours and the published results, on different images",
        basis=f"Ours: {tested_on([each.ours for each in comparisons])} Published: {published_basis()}",
        columns=(
            *text_columns("ours", "published", "index"),
            Column("ours", unit="%"),
            Column("published", unit="%"),
            Column("difference", unit="points"),
        ),
        rows=tuple(rows),
        notes=(
            "Ours less the published. The images are others, and so may be the patients, the endoscopes and the "
            "cancers: a difference says nothing of the models alone. Intervals of the difference: Newcombe's method "
            "(MOVER).",
        ),
    )


def _indices(
    result: Result, theirs: PublishedModel, places: Sequence[int]
) -> tuple[tuple[str, Estimate, Estimate], ...]:
    shares = proportions_of_confusion(theirs.confusion, confidence=CONFIDENCE)
    f1 = indices_of_confusion(theirs.confusion, confidence=CONFIDENCE).macro_f1
    return (
        ("accuracy", result.images.shares.accuracy, shares.accuracy),
        ("macro F1", result.images.indices.macro_f1, f1),
        *(
            (f"sensitivity of {name}", result.images.shares.sensitivity[place], shares.sensitivity[number])
            for number, (name, place) in enumerate(zip(STUDY.short_names, places, strict=True))
        ),
    )


def _places(result: Result) -> list[int] | None:
    """Where the study's classes stand among a result's; None where they are not its classes."""
    names = result.images.predictions.class_names
    full = dict(zip(result.run.short_names, result.run.class_names, strict=True))
    if len(names) != len(STUDY.short_names):
        return None
    for known, own in (
        (STUDY.short_names, list(names)),
        (STUDY.class_names, [_plain(full[name]) for name in names]),
    ):
        wanted = [name if known is STUDY.short_names else _plain(name) for name in known]
        if set(wanted) == set(own):
            return [own.index(name) for name in wanted]
    return None


def _matching(result: Result) -> PublishedModel:
    architecture = _plain(result.run.model.partition(".")[0])
    for published in STUDY.results:
        if _plain(published.model) == architecture and published.stage == result.stage.name:
            return published
    return STUDY.result(*WINNER)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
