"""What a run shows on every dashboard: the scalars of its epochs, its result in numbers, its figures and predictions.

All dashboards use the same names. The first part of a name is the group in which a dashboard shows it: `run` (one curve
through all stages), each stage (as in metrics.csv), and `result` (the shipped stage, in the units of the report).
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pylorus.core.formatting import format_estimate
from pylorus.core.io import read_json
from pylorus.data.dataset import ImageBatches
from pylorus.evaluation.predictions import Predictions
from pylorus.report.results import calibrate_predictions, evaluate_images
from pylorus.runs.folder import PARTS, RunFolder
from pylorus.runs.predictions import SavedPredictions, read_predictions

if TYPE_CHECKING:  # Matplotlib is imported where something is drawn: most runs have no dashboard
    from matplotlib.figure import Figure

RUN_GROUP, RESULT_GROUP = "run", "result"
"""First parts of the names of what belongs to no stage."""
OVERALL_METRICS = ("loss", "accuracy")
"""Metrics that are shown as one curve through all stages, too."""
EPOCH = "epoch"
"""The axis of all curves: epochs of the whole run, as `step` in metrics.csv."""
PERCENTAGES = ("accuracy", "sensitivity", "specificity")
"""Indices that the report writes in percent; it writes an area under the ROC curve from 0 to 1."""
MAX_MISTAKES = 16
"""The most misclassified images of a stage that are shown, if images may be sent."""
MAX_TABLE_ROWS = 5000
"""Images of a split whose predictions are shown in a table."""


def collect_scalars(metrics: Mapping[str, float], stages: Sequence[str]) -> dict[str, float]:
    """Return the scalars that a dashboard shows for one epoch.

    Args:
        metrics: What Lightning logs; names without a slash are its own.
        stages: Names of the stages in their order.

    Returns:
        The metrics of the stage; loss and accuracy also as part of one curve through all stages, with the number of
        the stage from 1.

    Example:
        >>> collect_scalars({"finetune/val/loss": 0.5, "epoch": 3}, ["pretrain", "finetune"])
        {'finetune/val/loss': 0.5, 'run/val/loss': 0.5, 'run/stage': 2.0}
    """
    scalars = {name: value for name, value in metrics.items() if "/" in name}
    for name in list(scalars):
        stage, _, remainder = name.partition("/")
        if stage in stages and remainder.partition("/")[2] in OVERALL_METRICS:
            scalars[f"{RUN_GROUP}/{remainder}"] = scalars[name]
            scalars[f"{RUN_GROUP}/stage"] = float(list(stages).index(stage) + 1)
    return scalars


def build_chart_layout(stages: Sequence[str], metrics: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the layout of TensorBoard's custom scalars: a category for the whole run and one for each stage.

    Args:
        stages: Names of the stages.
        metrics: Names of the indices of a class that are computed in each epoch.

    Example:
        >>> layout = build_chart_layout(["pretrain"], ["sensitivity"])
        >>> layout["pretrain"]["sensitivity"]
        ['Multiline', ['^pretrain/val/sensitivity/.*$']]
    """
    layout: dict[str, dict[str, list[Any]]] = {}
    for group in (RUN_GROUP, *stages):
        prefix = f"^{re.escape(group)}"
        charts = {name: ["Multiline", [f"{prefix}/(train|val)/{name}$"]] for name in OVERALL_METRICS}
        if group == RUN_GROUP:
            charts["stage"] = ["Multiline", [f"{prefix}/stage$"]]
        else:
            charts |= {name: ["Multiline", [f"{prefix}/val/{re.escape(name)}/.*$"]] for name in metrics}
        layout[group] = charts
    return layout


def iter_settings(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the settings of a nested configuration, with dotted names.

    Example:
        >>> list(iter_settings({"model": {"name": "vgg19", "args": {}}, "seed": 0}))
        [('model.name', 'vgg19'), ('model.args', {}), ('seed', 0)]
    """
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from iter_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True, eq=False)
class RunResults:
    """The result of a run: its shipped stage, in the units of the report.

    Attributes:
        stage: Name of the shipped stage.
        class_name: Short name of the class of interest.
        values: Best epoch of the stage, and indices such as `result/test/sensitivity_percent`.
        limits: Limits of the 95 % confidence intervals, as `result/test/sensitivity_percent_low`.
        texts: The indices with their intervals, as the report writes them, as `result/test/sensitivity`.
        reliability: Reliability diagram of the test images before and after temperature scaling.
        bundle: Folder of the model, with its card.
    """

    stage: str
    class_name: str
    values: dict[str, float]
    limits: dict[str, float]
    texts: dict[str, str]
    reliability: "Figure"
    bundle: Path

    @property
    def sentence(self) -> str:
        """The result on test images in a sentence."""
        accuracy, sensitivity, specificity, auroc = (
            self.texts[f"{RESULT_GROUP}/test/{index}"] for index in (*PERCENTAGES, "auroc")
        )
        return (
            f"Stage {self.stage} on test images: accuracy {accuracy}; {self.class_name}: sensitivity {sensitivity}, "
            f"specificity {specificity}, AUROC {auroc}."
        )


def read_run_results(folder: RunFolder) -> RunResults:
    """Read the result of a run whose model is written.

    The figures of the test images are those of model.json; those of the validation images are computed in the same way.
    """
    bundle = folder.path / "model"
    description = read_json(bundle / "model.json") or {}
    stage, class_name, names = (
        description["shipped"]["name"],
        description["decision"]["class"],
        description["short_names"],
    )
    validation, test = (read_predictions(folder.get_predictions_path(stage, part), order=names) for part in PARTS)
    calibration = calibrate_predictions(validation, test)
    level, column = evaluate_images(calibration.validation), list(names).index(class_name)
    areas = level.ranking.auroc
    by_part: dict[str, dict[str, tuple[float, ...]]] = {
        "val": {
            "accuracy": _list_limits(level.shares.accuracy),
            "sensitivity": _list_limits(level.shares.sensitivity[column]),
            "specificity": _list_limits(level.shares.specificity[column]),
            "auroc": _list_limits(areas[column]),
        },
        "test": {
            index: tuple(math.nan if each[limit] is None else float(each[limit]) for limit in ("value", "low", "high"))
            for index, each in {
                "accuracy": description["test"]["accuracy"],
                **{name: description["test"][name][class_name] for name in ("sensitivity", "specificity", "auroc")},
            }.items()
        },
    }
    trained = folder.get_stage(stage).training_result
    assert trained is not None
    values = {f"{RESULT_GROUP}/best_epoch": float(trained.best_epoch), f"{RESULT_GROUP}/epochs": float(trained.epochs)}
    limits: dict[str, float] = {}
    texts: dict[str, str] = {}
    for part, indices in by_part.items():
        for index, estimate in indices.items():
            name, is_percentage = f"{RESULT_GROUP}/{part}/{index}", index in PERCENTAGES
            value, low, high = (100 * number if is_percentage else number for number in estimate)
            unit = "_percent" if is_percentage else ""
            values[f"{name}{unit}"] = value
            limits |= {f"{name}{unit}_low": low, f"{name}{unit}_high": high}
            texts[name] = format_estimate(*estimate, in_percent=is_percentage, label="95 % CI ")
    from pylorus.report.result_figures import plot_reliability_diagram

    return RunResults(
        stage=stage,
        class_name=class_name,
        values=_remove_undefined(values),
        limits=_remove_undefined(limits),
        texts=texts,
        reliability=plot_reliability_diagram(calibration, title=f"{stage}/test"),
        bundle=bundle,
    )


def _list_limits(estimate: Any) -> tuple[float, float, float]:
    return estimate.value, estimate.low, estimate.high


def _remove_undefined(values: Mapping[str, float]) -> dict[str, float]:
    """Remove NaN, which dashboards draw as 0 or refuse."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def iter_figures(predictions: Predictions, title: str) -> Iterator[tuple[str, "Figure"]]:
    """Iterate over the figures of a stage on a split, with the last part of their names."""
    from pylorus.report.result_figures import plot_precision_recall_curve, plot_roc_curve

    yield "roc", plot_roc_curve(predictions, title=title)
    yield "precision_recall", plot_precision_recall_curve(predictions, title=title)


def build_prediction_rows(saved: SavedPredictions) -> pd.DataFrame:
    """Build a table of predictions: sample ids, classes and probabilities, and no name of a file, group or column."""
    predictions = saved.predictions
    names = np.array(predictions.class_names)
    table = pd.DataFrame(
        {
            "sample_id": predictions.sample,
            "true": names[predictions.true],
            "predicted": names[predictions.predicted],
            "correct": np.where(predictions.correct, "yes", "no"),
        }
    )
    for column, name in enumerate(names):
        table[f"probability {name}"] = predictions.probabilities[:, column].round(4)
    return table.head(MAX_TABLE_ROWS)


def plot_confident_errors(predictions: Predictions, datamodule: ImageBatches) -> "Figure | None":
    """Plot the misclassified validation images with the highest confidence; None if there are none."""
    from pylorus.report.figure_style import create_figure, replace_undrawable, report_style, wrap_text

    wrong = np.flatnonzero(~predictions.correct)
    if not len(wrong):
        return None
    confidence = predictions.probabilities.max(axis=1)[wrong]
    rows = wrong[np.argsort(-confidence, kind="stable")][:MAX_MISTAKES].tolist()
    with report_style():
        figure = create_figure(2.5 * -(-len(rows) // 4), width=8)
    images = datamodule.get_dataset("val").load_rows(rows)
    panels = figure.subplots(-(-len(rows) // 4), 4, squeeze=False).flat
    true, predicted = (
        [predictions.class_names[label] for label in labels] for labels in (predictions.true, predictions.predicted)
    )
    for axes, row, image in zip(panels, rows, images, strict=False):
        axes.imshow(image)
        title = wrap_text(replace_undrawable(f"{true[row]}, predicted as {predicted[row]}"), 1.85, 8)
        axes.set_title(title, fontsize=8, fontweight="normal", loc="center")
    for axes in figure.axes:
        axes.set_axis_off()
    return figure
