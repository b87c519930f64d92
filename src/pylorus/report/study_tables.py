"""Build the study's tables from our runs: 1-3, precision, sensitivity and F1; 4, the confusion matrices."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.confusion import class_indices
from pylorus.report.basis import format_test_basis
from pylorus.report.level import IMAGES, PATIENTS, Level
from pylorus.report.published import STUDY, PublishedModel
from pylorus.report.result import Result
from pylorus.report.table import Column, Number, Row, Table, create_text_columns

INDICES = (("precision", "precision"), ("sensitivity", "sensitivity"), ("f1", "F1"))
"""Metrics of the study's tables: their name in the code and their title in the report."""


def build_study_metric_table(results: Sequence[Result]) -> Table:
    """Build table 1, 2 or 3: three metrics of each class and their average, in %, for all stages of one run.

    Args:
        results: At least one, all of one run and of the same classes.
    """
    run = results[0].run
    return Table(
        key=f"study-{run.stem}",
        title=f"{run.label}: precision, sensitivity and F1 of each class, in %",
        basis=format_test_basis(results),
        columns=_build_study_columns([result.stage.name for result in results]),
        rows=_build_study_rows(
            results[0].images.predictions.class_names,
            [_compute_study_metrics(result.images.confusion) for result in results],
        ),
        notes=("Average: unweighted mean over the classes. The extended tables give confidence intervals.",),
    )


def build_confusion_table(results: Sequence[Result], *, level: str = IMAGES, number: int = 1) -> Table:
    """Build table 4: all confusion matrices; rows are true classes, columns predicted ones.

    Args:
        results: At least one, all of the same classes in the same order.
        level: `image-level` or `patient-level`; results without that level are omitted.
        number: Number of the table if the report has several; each set of classes needs its own.
    """
    levels = [
        (result, level_result) for result in results if (level_result := _get_level_or_none(result, level)) is not None
    ]
    names = levels[0][1].predictions.class_names
    suffix, unit = ("-patients", "patients") if level == PATIENTS else ("", "test images")
    return Table(
        key=f"confusion-matrices{suffix}" + (f"-{number}" if number > 1 else ""),
        title=f"Confusion matrices: number of {unit} by true class (rows) and predicted class (columns)",
        basis=format_test_basis([result for result, _ in levels], level=level),
        columns=(*create_text_columns("model", "stage", "true"), *(Column(name, over="predicted") for name in names)),
        rows=tuple(
            Row((result.run.label, result.stage.name, name, *(int(count) for count in counts)))
            for result, level_result in levels
            for name, counts in zip(names, level_result.confusion, strict=True)
        ),
    )


def build_published_metric_table(model: str) -> Table:
    """Build table 1, 2 or 3 as the study printed it."""
    results = [result for result in STUDY.results if result.model == model]
    return Table(
        key=f"published-{model.lower()}",
        title=f"As published: {model}: precision, sensitivity and F1 of each class, in %",
        basis=format_published_basis(),
        columns=_build_study_columns([result.stage for result in results]),
        rows=_build_study_rows(STUDY.short_names, [_get_printed_metrics(result) for result in results], digits=0),
    )


def build_published_confusion_table() -> Table:
    """Build table 4 as the study printed it."""
    return Table(
        key="published-confusion-matrices",
        title="As published: confusion matrices, test images by true class (rows) and predicted class (columns)",
        basis=format_published_basis(),
        columns=(
            *create_text_columns("model", "stage", "true"),
            *(Column(name, over="predicted") for name in STUDY.short_names),
        ),
        rows=tuple(
            Row((result.model, result.stage, name, *counts))
            for result in STUDY.results
            for name, counts in zip(STUDY.short_names, result.counts, strict=True)
        ),
    )


def format_published_basis() -> str:
    """Describe the data behind the study's numbers."""
    return (
        f"Image-level; {sum(STUDY.test_images)} test images, one per patient; OPTIMISTIC: every epoch was validated on "
        f"them. {STUDY.source}, DOI {STUDY.doi}."
    )


def _get_level_or_none(result: Result, level: str) -> Level | None:
    return result.images if level == IMAGES else result.patients


def _compute_study_metrics(confusion: NDArray[np.int64]) -> list[list[float]]:
    """Compute the three metrics, each as one value per class followed by their average, in %."""
    indices = class_indices(confusion)
    return [[*(100 * (index := getattr(indices, name))), 100 * float(np.mean(index))] for name, _ in INDICES]


def _get_printed_metrics(result: PublishedModel) -> list[list[float]]:
    return [[float(value) for value in getattr(result, name)] for name, _ in INDICES]


def _build_study_columns(stages: Sequence[str]) -> tuple[Column, ...]:
    return (*create_text_columns("class"), *(Column(title, over=stage) for stage in stages for _, title in INDICES))


def _build_study_rows(
    names: Sequence[str], stages: Sequence[Sequence[Sequence[float]]], *, digits: int = 1
) -> tuple[Row, ...]:
    """Build one row per class, then the average; `stages` holds, per stage and metric, one value per row."""
    return tuple(
        Row(
            (name, *(Number(float(index[position]), digits) for stage in stages for index in stage)),
            strong=position == len(names),
        )
        for position, name in enumerate([*names, "average"])
    )
