"""Results of a stage in one table: each class's metrics on validation and test images."""

import logging

import pandas as pd
from rich.console import Console
from rich.table import Table

from pylorus.evaluation.confusion import class_indices
from pylorus.evaluation.proportion import proportions_of_predictions
from pylorus.model.classifier import StagePlan
from pylorus.percent import format_percent
from pylorus.predictions import count_confusion, extract_labels, get_class_names
from pylorus.stages.stage import StageResult

log = logging.getLogger(__name__)


def log_stage_table(plan: StagePlan, result: StageResult, *, validated_on: str = "val") -> None:
    """Log a table of each class's metrics on validation and test images, at the stage's best epoch.

    Args:
        plan: The stage.
        result: Its result.
        validated_on: val, or test: then the test images selected the best epoch.
    """
    images = "the test images" if validated_on == "test" else "validation images"
    selection = f"best by {plan.config.monitor} on {images}" if result.epochs > 1 else "the only one"
    table = Table(title=f"{plan.name}: epoch {result.best_epoch} of {result.epochs}, {selection}")
    table.add_column("%", justify="left")
    for split in result.predictions:
        for metric in ("precision", "sensitivity", "F1"):
            table.add_column(f"{split}\n{metric}", justify="right")
    metrics_by_split = [class_indices(count_confusion(predictions)) for predictions in result.predictions.values()]
    names = get_class_names(result.predictions["test"])
    for row, name in enumerate(names):
        table.add_row(
            name,
            *(
                format_percent(v[row])
                for metrics in metrics_by_split
                for v in (metrics.precision, metrics.sensitivity, metrics.f1)
            ),
        )
    means = [v.mean() for metrics in metrics_by_split for v in (metrics.precision, metrics.sensitivity, metrics.f1)]
    table.add_row("average", *(format_percent(mean) for mean in means), style="bold")
    log.info(
        "\n%s%s", _render_text(table), "\n".join(_format_accuracy(split, t) for split, t in result.predictions.items())
    )


def _render_text(table: Table) -> str:
    """Render a table as text, the same on a terminal and in a file."""
    console = Console(width=140, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def _format_accuracy(split: str, table: pd.DataFrame) -> str:
    """Return accuracy with its confidence interval, and the numbers of images and groups."""
    true, predicted = extract_labels(table)
    groups = table["group"].to_numpy(dtype=str)
    is_grouped = len(set(groups)) < len(groups)
    proportions = proportions_of_predictions(
        true, predicted, groups if is_grouped else None, classes=len(get_class_names(table))
    )
    accuracy = proportions.accuracy
    grouping = f"{len(set(groups))} groups" if is_grouped else "each image its own group"
    return (
        f"{split}: accuracy {format_percent(accuracy.value)} % (95 % CI {format_percent(accuracy.low)} to {format_percent(accuracy.high)}), "
        f"{len(table)} images, {grouping}"
    )
