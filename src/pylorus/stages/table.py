"""What a stage gave, in one table: each class's indices on validation and test images."""

import logging

import pandas as pd
from rich.console import Console
from rich.table import Table

from pylorus.evaluation.confusion import class_indices
from pylorus.evaluation.proportion import proportions_of_predictions
from pylorus.model.classifier import StagePlan
from pylorus.percent import percent
from pylorus.predictions import class_names, confusion_of, labels_of
from pylorus.stages.stage import StageResult

log = logging.getLogger(__name__)


def show_stage(plan: StagePlan, result: StageResult, *, validated_on: str = "val") -> None:
    """Logs a table of each class's indices, on validation and test images, at the stage's best epoch.

    Args:
        plan: Of the stage.
        result: What it gave.
        validated_on: val, or test: then the test images named the best epoch.
    """
    images = "the test images" if validated_on == "test" else "validation images"
    chosen = f"best by {plan.config.monitor} on {images}" if result.epochs > 1 else "its only one"
    table = Table(title=f"{plan.name}: epoch {result.best_epoch} of {result.epochs}, {chosen}")
    table.add_column("%", justify="left")
    for part in result.predictions:
        for index in ("precision", "sensitivity", "F1"):
            table.add_column(f"{part}\n{index}", justify="right")
    by_part = [class_indices(confusion_of(predictions)) for predictions in result.predictions.values()]
    names = class_names(result.predictions["test"])
    for place, name in enumerate(names):
        table.add_row(
            name,
            *(percent(v[place]) for part in by_part for v in (part.precision, part.sensitivity, part.f1)),
        )
    means = [v.mean() for part in by_part for v in (part.precision, part.sensitivity, part.f1)]
    table.add_row("average", *(percent(mean) for mean in means), style="bold")
    log.info("\n%s%s", _rendered(table), "\n".join(_accuracy(part, t) for part, t in result.predictions.items()))


def _rendered(table: Table) -> str:
    """A table as text, the same on a terminal and in a file."""
    console = Console(width=140, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def _accuracy(part: str, table: pd.DataFrame) -> str:
    """Accuracy with its interval, and what it stands on."""
    true, predicted = labels_of(table)
    groups = table["group"].to_numpy(dtype=str)
    grouped = len(set(groups)) < len(groups)
    found = proportions_of_predictions(true, predicted, groups if grouped else None, classes=len(class_names(table)))
    share = found.accuracy
    level = f"{len(set(groups))} groups" if grouped else "each image its own group"
    return (
        f"{part}: accuracy {percent(share.value)} (95 % interval {percent(share.low)} to {percent(share.high)}), "
        f"{len(table)} images, {level}"
    )
