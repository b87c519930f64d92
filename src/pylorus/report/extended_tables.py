"""All indices with their intervals: of each class, and of all classes together, at one level."""

from collections.abc import Sequence

from pylorus.report.basis import tested_on
from pylorus.report.level import IMAGES, PATIENTS, Level
from pylorus.report.result import Result
from pylorus.report.table import Column, Row, Table, as_number, in_percent, text_columns

METHODS = (
    "All intervals keep the images of a group together. Precision, sensitivity, specificity, NPV and accuracy: Wilson, "
    "at the effective number of images. F1: the same, of the overlap of called and true images. Averages of classes: "
    "combined from the intervals of the classes (MOVER). κ and MCC: Wilson interval of the errors that they count. "
    "AUROC: score interval with DeLong's variance, in groups Obuchowski's. Average precision: linearised variance."
)


def class_table(results: Sequence[Result], *, level: str = IMAGES) -> Table:
    """Each class of one run, a block a stage.

    Args:
        results: Of one run, at least one.
        level: `image-level` or `patient-level`; each result has it.
    """
    run = results[0].run
    unit = "patients" if level == PATIENTS else "images"
    shares = ("precision", "sensitivity", "specificity", "NPV", "F1")
    return Table(
        key=f"classes-{run.stem}{_suffix(level)}",
        title=f"{run.label}: all indices of each class",
        basis=tested_on(results, level=level),
        columns=(
            *text_columns("stage", "class"),
            Column(unit),
            *(Column(name, unit="%") for name in shares),
            Column("AUROC"),
            Column("average precision"),
        ),
        rows=tuple(row for result in results for row in _class_rows(result, at(result, level))),
        notes=(
            "Macro average: unweighted mean over the classes. AUROC and average precision: one class against the rest.",
            METHODS,
        ),
    )


def overall_table(results: Sequence[Result], *, level: str = IMAGES) -> Table:
    """All classes together, a row a stage of a run.

    Args:
        results: At least one.
        level: `image-level` or `patient-level`; each result has it.
    """
    return Table(
        key=f"overall{_suffix(level)}",
        title="All classes together",
        basis=tested_on(results, level=level),
        columns=(
            *text_columns("model", "stage"),
            Column("accuracy", unit="%"),
            Column("balanced accuracy", unit="%"),
            Column("macro F1", unit="%"),
            Column("macro AUROC"),
            Column("macro average precision"),
            Column("Cohen's κ"),
            Column("MCC"),
        ),
        rows=tuple(_overall_row(result, at(result, level)) for result in results),
        notes=("Balanced accuracy: mean sensitivity of the classes. MCC: Matthews correlation coefficient.",),
    )


def at(result: Result, level: str) -> Level:
    """A result's indices at a level.

    Raises:
        ValueError: If it has no patient level.
    """
    found = result.images if level == IMAGES else result.patients
    if found is None:
        raise ValueError(f"{result.label} has no {level}")
    return found


def _class_rows(result: Result, level: Level) -> list[Row]:
    stage, shares, ranking = result.stage.name, level.shares, level.ranking
    rows = [
        Row(
            (
                stage,
                name,
                int(level.confusion[place].sum()),
                in_percent(shares.precision[place]),
                in_percent(shares.sensitivity[place]),
                in_percent(shares.specificity[place]),
                in_percent(shares.npv[place]),
                in_percent(level.indices.f1[place]),
                as_number(ranking.auroc[place]),
                as_number(ranking.average_precision[place]),
            )
        )
        for place, name in enumerate(level.predictions.class_names)
    ]
    average = Row(
        (
            stage,
            "macro average",
            int(level.confusion.sum()),
            in_percent(level.indices.macro_precision),
            in_percent(level.indices.balanced_accuracy),
            "",
            "",
            in_percent(level.indices.macro_f1),
            as_number(ranking.macro_auroc),
            as_number(ranking.macro_average_precision),
        ),
        strong=True,
    )
    return [*rows, average]


def _overall_row(result: Result, level: Level) -> Row:
    return Row(
        (
            result.run.label,
            result.stage.name,
            in_percent(level.shares.accuracy),
            in_percent(level.indices.balanced_accuracy),
            in_percent(level.indices.macro_f1),
            as_number(level.ranking.macro_auroc),
            as_number(level.ranking.macro_average_precision),
            as_number(level.indices.cohen_kappa),
            as_number(level.indices.mcc),
        )
    )


def _suffix(level: str) -> str:
    return "-patients" if level == PATIENTS else ""
