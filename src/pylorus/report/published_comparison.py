"""Compare our results with the published ones: unpaired, since the images differ, with confidence intervals."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pylorus.evaluation.comparison import difference_of_independent
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.index_intervals import indices_of_confusion
from pylorus.evaluation.proportion import proportions_of_confusion
from pylorus.evaluation.sentence import format_unpaired_sentence
from pylorus.report.basis import format_test_basis
from pylorus.report.options import CONFIDENCE
from pylorus.report.published import STUDY, PublishedModel
from pylorus.report.result import Result
from pylorus.report.study_tables import format_published_basis
from pylorus.report.table import Column, Row, Table, convert_to_percent_cell, create_text_columns

WINNER = ("ResNet50", "finetune")
"""The study's best model, used as the reference for models that the study did not include."""


@dataclass(frozen=True, eq=False)
class PublishedComparison:
    """Comparison of one of our results with a published one.

    Attributes:
        ours: Our result.
        theirs: The published result of the same model and stage, or of the study's best model.
        indices: Name of each metric with our estimate and the published one, both with intervals.
    """

    ours: Result
    theirs: PublishedModel
    indices: tuple[tuple[str, Estimate, Estimate], ...]

    @property
    def sentence(self) -> str:
        """The conclusion about the difference in accuracy."""
        name, ours, theirs = self.indices[0]
        return format_unpaired_sentence(
            self.ours.label,
            f"the published {self.theirs.model} {self.theirs.stage}",
            difference_of_independent(ours, theirs),
            index=name,
            images=(self.ours.test.images, int(self.theirs.confusion.sum())),
            confidence=CONFIDENCE,
        )


def compare_with_published(results: Sequence[Result]) -> tuple[PublishedComparison, ...]:
    """Compare every result that has the study's three classes; results with other classes are skipped."""
    comparisons = []
    for result in results:
        class_indices = _match_study_classes(result)
        if class_indices is not None:
            theirs = _match_published_model(result)
            comparisons.append(
                PublishedComparison(result, theirs, _collect_metric_pairs(result, theirs, class_indices))
            )
    return tuple(comparisons)


def build_published_comparison_table(comparisons: Sequence[PublishedComparison]) -> Table:
    """Build the table of accuracy, macro F1 and per-class sensitivity, ours and published.

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
                        convert_to_percent_cell(ours),
                        convert_to_percent_cell(theirs),
                        convert_to_percent_cell(difference_of_independent(ours, theirs)),
                    )
                )
            )
    return Table(
        key="published-comparison",
        title="Our results and the published results, on different images",
        basis=f"Ours: {format_test_basis([each.ours for each in comparisons])} Published: {format_published_basis()}",
        columns=(
            *create_text_columns("ours", "published", "index"),
            Column("ours", unit="%"),
            Column("published", unit="%"),
            Column("difference", unit="points"),
        ),
        rows=tuple(rows),
        notes=(
            "Difference: ours minus published. The images differ, and so may the patients, the endoscopes and the "
            "cancers; a difference therefore cannot be attributed to the models alone. Confidence intervals of the "
            "difference: Newcombe's method (MOVER).",
        ),
    )


def _collect_metric_pairs(
    result: Result, theirs: PublishedModel, class_indices: Sequence[int]
) -> tuple[tuple[str, Estimate, Estimate], ...]:
    proportions = proportions_of_confusion(theirs.confusion, confidence=CONFIDENCE)
    f1 = indices_of_confusion(theirs.confusion, confidence=CONFIDENCE).macro_f1
    return (
        ("accuracy", result.images.shares.accuracy, proportions.accuracy),
        ("macro F1", result.images.indices.macro_f1, f1),
        *(
            (f"sensitivity of {name}", result.images.shares.sensitivity[own_index], proportions.sensitivity[index])
            for index, (name, own_index) in enumerate(zip(STUDY.short_names, class_indices, strict=True))
        ),
    )


def _match_study_classes(result: Result) -> list[int] | None:
    """Return the indices of the study's classes among a result's classes; None if the classes differ."""
    names = result.images.predictions.class_names
    full_names = dict(zip(result.run.short_names, result.run.class_names, strict=True))
    if len(names) != len(STUDY.short_names):
        return None
    for study_names, own_names in (
        (STUDY.short_names, list(names)),
        (STUDY.class_names, [_normalize_name(full_names[name]) for name in names]),
    ):
        wanted = [name if study_names is STUDY.short_names else _normalize_name(name) for name in study_names]
        if set(wanted) == set(own_names):
            return [own_names.index(name) for name in wanted]
    return None


def _match_published_model(result: Result) -> PublishedModel:
    architecture = _normalize_name(result.run.model.partition(".")[0])
    for published in STUDY.results:
        if _normalize_name(published.model) == architecture and published.stage == result.stage.name:
            return published
    return STUDY.get_result(*WINNER)


def _normalize_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
