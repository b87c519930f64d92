"""Evaluate predictions on images whose true class is the name of their folder, with confidence intervals."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.data.catalog import group_finder, group_in
from pylorus.deploy.card import set_size_text, threshold_sentence
from pylorus.deploy.description import Description, Figure
from pylorus.deploy.fixing import figure, figures_of, set_figures, share
from pylorus.deploy.strict import plain
from pylorus.errors import PylorusError
from pylorus.evaluation.calibration import estimate_calibration
from pylorus.evaluation.conformal import prediction_sets
from pylorus.evaluation.confusion import confusion_matrix
from pylorus.evaluation.decisions import operating_point
from pylorus.evaluation.index_intervals import OVERALL, indices_of_predictions
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.proportion import proportions_of_predictions
from pylorus.evaluation.ranking import ranking_of_predictions
from pylorus.evaluation.sentence import threshold_text
from pylorus.percent import percent

if TYPE_CHECKING:
    from pylorus.deploy.predict import PredictOptions


def evaluation_of(
    tables: Iterator[pd.DataFrame], description: Description, options: "PredictOptions"
) -> dict[str, object]:
    """Evaluate predictions on the images whose class is known; unreadable images are left out and counted.

    The probabilities of these images are held in memory: eight bytes per class and image.

    Args:
        tables: Rows as `pylorus predict` writes them.
        description: The content of the bundle's model.json.
        options: Options of the prediction: the class that decides, and the pattern that finds the patient in a path.

    Returns:
        The metrics as plain values, under the names that the record of a prediction has.

    Raises:
        PylorusError: If no image of a known class can be read, or if no patient is found in a path.
    """
    predictions, why, left_out = _known(tables, description, options.group)
    groups = predictions.clusters
    deciding = options.class_name or description.decision.class_name
    threshold = description.decision.thresholds[deciding]
    metrics: dict[str, object] = {
        **plain(figures_of(predictions)),
        "left_out": left_out,
        "classes": list(description.short_names),
        "confusion": confusion_matrix(predictions.true, predictions.predicted, predictions.classes).tolist(),
        **_further_indices(predictions),
        "unlike": plain(share(why == "unlike", groups)),
        "unsure": plain(share(why == "unsure", groups)),
        "answered": plain(share(why == "", groups)),
        "accuracy_answered": plain(share(predictions.correct, groups, among=why == "")),
    }
    if threshold is not None:
        guarantee = description.decision.guarantees[deciding]
        metrics["decision"] = _decided(predictions, deciding, threshold) | {"guarantee": plain(guarantee)}
    if description.prediction_sets is not None:
        members = prediction_sets(
            predictions.probabilities, description.prediction_sets.limits(description.short_names)
        )
        coverage = {"coverage_asked": description.prediction_sets.coverage}
        metrics["prediction_sets"] = coverage | plain(set_figures(predictions, members))
    return metrics


def _further_indices(predictions: Predictions) -> dict[str, object]:
    """Compute the other image-level metrics of the run's report."""
    groups, names, classes = predictions.clusters, predictions.class_names, predictions.classes
    proportions = proportions_of_predictions(predictions.true, predictions.predicted, groups, classes=classes)
    indices = indices_of_predictions(predictions.true, predictions.predicted, groups, classes=classes)
    ranking = ranking_of_predictions(predictions.true, predictions.probabilities, groups)
    scores = estimate_calibration(predictions.probabilities, predictions.true, groups)
    by_class = {"npv": proportions.npv, "f1": indices.f1, "average_precision": ranking.average_precision}
    overall = {name: getattr(indices, name) for name in OVERALL}
    overall |= {"macro_auroc": ranking.macro_auroc, "macro_average_precision": ranking.macro_average_precision}
    overall |= {"ece": scores.ece, "brier": scores.brier, "nll": scores.nll}
    return {
        **{
            metric: {name: plain(figure(value)) for name, value in zip(names, values, strict=True)}
            for metric, values in by_class.items()
        },
        **{name: plain(figure(value)) for name, value in overall.items()},
    }


def _decided(predictions: Predictions, deciding: str, threshold: float) -> dict[str, object]:
    """Return the performance of a class's stored threshold on these images."""
    column = predictions.class_names.index(deciding)
    positive, scores = predictions.true == column, predictions.probabilities[:, column]
    point = operating_point(positive, scores, predictions.clusters, threshold=threshold)
    proportions = {
        name: plain(figure(getattr(point, name))) for name in ("sensitivity", "specificity", "precision", "npv")
    }
    return {"class": deciding, "threshold": threshold, **proportions}


def _known(
    tables: Iterator[pd.DataFrame], description: Description, group: str | None
) -> tuple[Predictions, NDArray[np.str_], int]:
    """Return the predictions of images of known class, each one's reason to abstain, and the number of unreadable ones.

    The reason is "", "unsure" or "unlike".
    """
    names = list(description.short_names)
    columns = [f"probability/{name}" for name in names]
    tables_of_known_class, left_out = [], 0
    for table in tables:
        known = table[table["true"] != ""]
        left_out += int((known["error"] != "").sum())
        readable = known[known["error"] == ""]
        part = readable[["true", "why", *columns]].reset_index(drop=True)
        part["group"] = _groups(readable["path"], group) if group is not None else ""
        tables_of_known_class.append(part)
    rows = pd.concat(tables_of_known_class, ignore_index=True)
    if rows.empty:
        raise PylorusError(
            f"None of the {left_out} images of a known class can be read, so there is nothing to evaluate."
        )
    sample = np.arange(len(rows)).astype(str)
    predictions = Predictions(
        sample=sample,
        group=sample if group is None else rows["group"].to_numpy(dtype=str),
        true=np.asarray(rows["true"].map({name: index for index, name in enumerate(names)}), dtype=np.int64),
        probabilities=rows[columns].to_numpy(dtype=np.float64),
        class_names=tuple(names),
    )
    return predictions, rows["why"].to_numpy(dtype=str), left_out


def _groups(paths: "pd.Series[str]", pattern: str) -> list[str]:
    finder = group_finder(pattern, key="--group")
    groups = []
    for path in paths:
        match = finder.search(path)
        if match is None or not group_in(match):
            raise PylorusError(f"--group: the pattern {pattern!r} finds no patient in {path}.")
        groups.append(group_in(match))
    return groups


def _groups_text(record: Mapping[str, Any]) -> str:
    """Return how many patients the evaluated images come from, to follow the number of images."""
    if record.get("request", {}).get("group") is None:
        return ", each treated as a separate patient because --group was not given"
    return f" of {record['evaluation']['groups']:,} groups (patients)"


def told(record: Mapping[str, Any], description: Description) -> str:
    """Format the summary of a prediction: the number of images, and the evaluation if there is one.

    Args:
        record: The record of the prediction, as its .about.json holds it.
        description: The content of the bundle's model.json.
    """
    lines = [
        f"images: {record['images']:,}, unreadable: {record['unreadable']:,} (the column `error` gives the reasons)"
    ]
    evaluation = record.get("evaluation")
    if evaluation is None:
        return lines[0]

    def shown(estimate: Mapping[str, float | None]) -> str:
        numbers = Figure(**estimate).__dict__.values()
        value, low, high = (float("nan") if number is None else number for number in numbers)
        return f"{percent(value):>5} ({percent(low)} to {percent(high)})"

    lines += [
        "",
        f"evaluation on {evaluation['images']:,} images{_groups_text(record)}, in % (95 % confidence interval):",
        f"  accuracy {shown(evaluation['accuracy'])}",
        f"  balanced accuracy {shown(evaluation['balanced_accuracy'])}, macro F1 {shown(evaluation['macro_f1'])}",
    ]
    width = max(map(len, description.short_names))
    lines += [
        f"  {name:<{width}}  sensitivity {shown(evaluation['sensitivity'][name])}, specificity "
        f"{shown(evaluation['specificity'][name])}, AUROC {shown(evaluation['auroc'][name])}"
        for name in description.short_names
    ]
    decision = evaluation.get("decision")
    if decision is not None:
        lines.append(
            f"  {decision['class']} at the stored threshold {threshold_text(decision['threshold'])}: sensitivity "
            f"{shown(decision['sensitivity'])}, specificity {shown(decision['specificity'])}"
        )
        lines += [
            f"    {line}" for line in textwrap.wrap(threshold_sentence(description, decision["class"]), width=110)
        ]
    sets = evaluation.get("prediction_sets")
    if sets is not None:
        lines.append(
            f"  prediction sets at {100 * sets['coverage_asked']:g} %, each patient weighted equally: "
            f"{set_size_text(Figure(**sets['size']))} classes on average; they contain the true class in"
        )
        lines += [f"    {name:<{width}}  {shown(sets['coverage'][name])}" for name in description.short_names]
    lines.append(
        f"  answered {shown(evaluation['answered'])}; of these, correct {shown(evaluation['accuracy_answered'])}"
    )
    return "\n".join(lines)
