"""Tables of all metrics with confidence intervals, per class and over all classes, at one level."""

from collections.abc import Sequence

from pylorus.report.basis import format_test_basis
from pylorus.report.level import IMAGES, PATIENTS, Level
from pylorus.report.result import Result
from pylorus.report.table import (
    Column,
    Row,
    Table,
    convert_to_number_cell,
    convert_to_percent_cell,
    create_text_columns,
)

METHODS = (
    "All confidence intervals account for clustering of images within groups. Precision, sensitivity, specificity, NPV "
    "and accuracy: Wilson interval at the effective number of images. F1: the same, for the overlap of predicted and "
    "true images. Averages over classes: combined from the intervals of the classes (MOVER). κ and MCC: Wilson "
    "interval of the errors that they count. AUROC: score interval with DeLong's variance or, with several images per "
    "group, Obuchowski's. Average precision: linearised variance."
)


def build_class_metric_table(results: Sequence[Result], *, level: str = IMAGES) -> Table:
    """Build the table of each class of one run, one block per stage.

    Args:
        results: At least one, all of one run.
        level: `image-level` or `patient-level`; every result must have it.
    """
    run = results[0].run
    unit = "patients" if level == PATIENTS else "images"
    shares = ("precision", "sensitivity", "specificity", "NPV", "F1")
    return Table(
        key=f"classes-{run.stem}{_get_level_suffix(level)}",
        title=f"{run.label}: all metrics of each class",
        basis=format_test_basis(results, level=level),
        columns=(
            *create_text_columns("stage", "class"),
            Column(unit),
            *(Column(name, unit="%") for name in shares),
            Column("AUROC"),
            Column("average precision"),
        ),
        rows=tuple(row for result in results for row in _build_class_metric_rows(result, get_level(result, level))),
        notes=(
            "Macro average: unweighted mean over the classes. AUROC and average precision: one class versus the rest.",
            METHODS,
        ),
    )


def build_overall_metric_table(results: Sequence[Result], *, level: str = IMAGES) -> Table:
    """Build the table of metrics over all classes, one row per run and stage.

    Args:
        results: At least one.
        level: `image-level` or `patient-level`; every result must have it.
    """
    return Table(
        key=f"overall{_get_level_suffix(level)}",
        title="Metrics over all classes",
        basis=format_test_basis(results, level=level),
        columns=(
            *create_text_columns("model", "stage"),
            Column("accuracy", unit="%"),
            Column("balanced accuracy", unit="%"),
            Column("macro F1", unit="%"),
            Column("macro AUROC"),
            Column("macro average precision"),
            Column("Cohen's κ"),
            Column("MCC"),
        ),
        rows=tuple(_build_overall_metric_row(result, get_level(result, level)) for result in results),
        notes=("Balanced accuracy: mean sensitivity over the classes. MCC: Matthews correlation coefficient.",),
    )


def get_level(result: Result, level: str) -> Level:
    """Return the metrics of a result at a level.

    Raises:
        ValueError: If it has no patient level.
    """
    metrics = result.images if level == IMAGES else result.patients
    if metrics is None:
        raise ValueError(f"{result.label} has no {level}")
    return metrics


def _build_class_metric_rows(result: Result, level: Level) -> list[Row]:
    stage, shares, ranking = result.stage.name, level.shares, level.ranking
    rows = [
        Row(
            (
                stage,
                name,
                int(level.confusion[index].sum()),
                convert_to_percent_cell(shares.precision[index]),
                convert_to_percent_cell(shares.sensitivity[index]),
                convert_to_percent_cell(shares.specificity[index]),
                convert_to_percent_cell(shares.npv[index]),
                convert_to_percent_cell(level.indices.f1[index]),
                convert_to_number_cell(ranking.auroc[index]),
                convert_to_number_cell(ranking.average_precision[index]),
            )
        )
        for index, name in enumerate(level.predictions.class_names)
    ]
    average = Row(
        (
            stage,
            "macro average",
            int(level.confusion.sum()),
            convert_to_percent_cell(level.indices.macro_precision),
            convert_to_percent_cell(level.indices.balanced_accuracy),
            "",
            "",
            convert_to_percent_cell(level.indices.macro_f1),
            convert_to_number_cell(ranking.macro_auroc),
            convert_to_number_cell(ranking.macro_average_precision),
        ),
        strong=True,
    )
    return [*rows, average]


def _build_overall_metric_row(result: Result, level: Level) -> Row:
    return Row(
        (
            result.run.label,
            result.stage.name,
            convert_to_percent_cell(level.shares.accuracy),
            convert_to_percent_cell(level.indices.balanced_accuracy),
            convert_to_percent_cell(level.indices.macro_f1),
            convert_to_number_cell(level.ranking.macro_auroc),
            convert_to_number_cell(level.ranking.macro_average_precision),
            convert_to_number_cell(level.indices.cohen_kappa),
            convert_to_number_cell(level.indices.mcc),
        )
    )


def _get_level_suffix(level: str) -> str:
    return "-patients" if level == PATIENTS else ""
