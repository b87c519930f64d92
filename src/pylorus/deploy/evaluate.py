"""An evaluation of predictions on images whose class their folder says, with intervals."""

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


def evaluation_of(tables: Iterator[pd.DataFrame], said: Description, options: "PredictOptions") -> dict[str, object]:
    """What predictions are worth on the images whose class is known; those that can't be read are left out, counted.

    It holds the probabilities of these images: eight bytes a class and image.

    Args:
        tables: Rows as `pylorus predict` writes them.
        said: The bundle's description.
        options: Of the prediction: the class that decides, and what finds the patient in a path.

    Raises:
        PylorusError: If no image of a known class can be read, or no patient is found in a path.
    """
    predictions, why, left_out = _known(tables, said, options.group)
    groups = predictions.clusters
    deciding = options.class_name or said.decision.class_name
    threshold = said.decision.thresholds[deciding]
    found: dict[str, object] = {
        **plain(figures_of(predictions)),
        "left_out": left_out,
        "classes": list(said.short_names),
        "confusion": confusion_matrix(predictions.true, predictions.predicted, predictions.classes).tolist(),
        **_further_indices(predictions),
        "unlike": plain(share(why == "unlike", groups)),
        "unsure": plain(share(why == "unsure", groups)),
        "answered": plain(share(why == "", groups)),
        "accuracy_answered": plain(share(predictions.correct, groups, among=why == "")),
    }
    if threshold is not None:
        guarantee = said.decision.guarantees[deciding]
        found["decision"] = _decided(predictions, deciding, threshold) | {"guarantee": plain(guarantee)}
    if said.prediction_sets is not None:
        members = prediction_sets(predictions.probabilities, said.prediction_sets.limits(said.short_names))
        asked = {"coverage_asked": said.prediction_sets.coverage}
        found["prediction_sets"] = asked | plain(set_figures(predictions, members))
    return found


def _further_indices(predictions: Predictions) -> dict[str, object]:
    """Compute every other index of the run's report at image level."""
    groups, names, classes = predictions.clusters, predictions.class_names, predictions.classes
    shares = proportions_of_predictions(predictions.true, predictions.predicted, groups, classes=classes)
    indices = indices_of_predictions(predictions.true, predictions.predicted, groups, classes=classes)
    ranking = ranking_of_predictions(predictions.true, predictions.probabilities, groups)
    scores = estimate_calibration(predictions.probabilities, predictions.true, groups)
    by_class = {"npv": shares.npv, "f1": indices.f1, "average_precision": ranking.average_precision}
    overall = {name: getattr(indices, name) for name in OVERALL}
    overall |= {"macro_auroc": ranking.macro_auroc, "macro_average_precision": ranking.macro_average_precision}
    overall |= {"ece": scores.ece, "brier": scores.brier, "nll": scores.nll}
    return {
        **{
            name: {each: plain(figure(value)) for each, value in zip(names, found, strict=True)}
            for name, found in by_class.items()
        },
        **{name: plain(figure(value)) for name, value in overall.items()},
    }


def _decided(predictions: Predictions, deciding: str, threshold: float) -> dict[str, object]:
    """What a class's stored threshold gives on these images."""
    column = predictions.class_names.index(deciding)
    positive, scores = predictions.true == column, predictions.probabilities[:, column]
    point = operating_point(positive, scores, predictions.clusters, threshold=threshold)
    shares = {name: plain(figure(getattr(point, name))) for name in ("sensitivity", "specificity", "precision", "npv")}
    return {"class": deciding, "threshold": threshold, **shares}


def _known(
    tables: Iterator[pd.DataFrame], said: Description, group: str | None
) -> tuple[Predictions, NDArray[np.str_], int]:
    """Predictions of the images of known class, why each is not answered, and how many could not be read."""
    names = list(said.short_names)
    columns = [f"probability/{name}" for name in names]
    chosen, left_out = [], 0
    for table in tables:
        known = table[table["true"] != ""]
        left_out += int((known["error"] != "").sum())
        readable = known[known["error"] == ""]
        part = readable[["true", "why", *columns]].reset_index(drop=True)
        part["group"] = _groups(readable["path"], group) if group is not None else ""
        chosen.append(part)
    rows = pd.concat(chosen, ignore_index=True)
    if rows.empty:
        raise PylorusError(f"none of the {left_out} images of a known class can be read: there is nothing to evaluate.")
    sample = np.arange(len(rows)).astype(str)
    predictions = Predictions(
        sample=sample,
        group=sample if group is None else rows["group"].to_numpy(dtype=str),
        true=np.asarray(rows["true"].map({name: place for place, name in enumerate(names)}), dtype=np.int64),
        probabilities=rows[columns].to_numpy(dtype=np.float64),
        class_names=tuple(names),
    )
    return predictions, rows["why"].to_numpy(dtype=str), left_out


def _groups(paths: "pd.Series[str]", pattern: str) -> list[str]:
    finder = group_finder(pattern, key="--group")
    found = []
    for path in paths:
        match = finder.search(path)
        if match is None or not group_in(match):
            raise PylorusError(f"--group: {pattern!r} finds no patient in {path}.")
        found.append(group_in(match))
    return found


def _groups_text(record: Mapping[str, Any]) -> str:
    """Of how many patients the evaluated images are, as far as that was given."""
    if record.get("request", {}).get("group") is None:
        return ", each taken for a patient of its own since --group is not given"
    return f" of {record['evaluation']['groups']:,} groups"


def told(record: Mapping[str, Any], said: Description) -> str:
    """What a user is to see of a prediction: how many images, and the evaluation."""
    lines = [f"{record['images']:,} images, {record['unreadable']:,} could not be read (column error says why)"]
    found = record.get("evaluation")
    if found is None:
        return lines[0]

    def shown(given: Mapping[str, float | None]) -> str:
        value, low, high = (float("nan") if each is None else each for each in Figure(**given).__dict__.values())
        return f"{percent(value):>5} ({percent(low)} to {percent(high)})"

    lines += [
        "",
        f"evaluation on {found['images']:,} images{_groups_text(record)}, in % (95 % interval):",
        f"  accuracy {shown(found['accuracy'])}",
        f"  balanced accuracy {shown(found['balanced_accuracy'])}, macro F1 {shown(found['macro_f1'])}",
    ]
    width = max(map(len, said.short_names))
    lines += [
        f"  {name:<{width}}  sensitivity {shown(found['sensitivity'][name])}, specificity "
        f"{shown(found['specificity'][name])}, AUROC {shown(found['auroc'][name])}"
        for name in said.short_names
    ]
    decision = found.get("decision")
    if decision is not None:
        lines.append(
            f"  {decision['class']} at the stored threshold {threshold_text(decision['threshold'])}: sensitivity "
            f"{shown(decision['sensitivity'])}, specificity {shown(decision['specificity'])}"
        )
        lines += [f"    {line}" for line in textwrap.wrap(threshold_sentence(said, decision["class"]), width=110)]
    sets = found.get("prediction_sets")
    if sets is not None:
        lines.append(
            f"  prediction sets at {100 * sets['coverage_asked']:g} %, each patient counting the same: "
            f"{set_size_text(Figure(**sets['size']))} classes on average; they hold the true class in"
        )
        lines += [f"    {name:<{width}}  {shown(sets['coverage'][name])}" for name in said.short_names]
    lines.append(f"  answered {shown(found['answered'])}; of these right {shown(found['accuracy_answered'])}")
    return "\n".join(lines)
