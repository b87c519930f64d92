"""Evaluate predictions of images whose class is known: the indices of a run's report, on images from elsewhere.

Each evaluation of a bundle by `pylorus validate` leaves a line beside it: see `record_look`.
"""

import errno
import hashlib
import json
import os
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus import __version__
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_count, format_number, format_percent, format_threshold
from pylorus.core.io import convert_to_plain
from pylorus.data.catalog import extract_groups
from pylorus.deploy.card import format_area, format_set_size, format_threshold_guarantee
from pylorus.deploy.description import Description, IntervalEstimate
from pylorus.deploy.thresholds import (
    assess_unlike_images,
    compute_classification_metrics,
    compute_set_metrics,
    convert_estimate,
    estimate_proportion,
    estimate_site_prevalence,
    find_calibrated_prevalence,
)
from pylorus.evaluation.calibration import calibration_line, estimate_calibration
from pylorus.evaluation.confusion import confusion_matrix
from pylorus.evaluation.decisions import operating_point, prediction_sets
from pylorus.evaluation.discrimination import ranking_of_predictions
from pylorus.evaluation.index_intervals import OVERALL, indices_of_predictions, proportions_of_predictions
from pylorus.evaluation.populations import (
    adjust_threshold,
    adjust_to_prevalence,
    calibration_in_the_large,
    predictive_values,
)
from pylorus.evaluation.predictions import Predictions
from pylorus.runs.reading import HASH_DIGITS, compute_image_set_hash


def evaluate_predictions(
    tables: Iterator[pd.DataFrame],
    description: Description,
    *,
    class_name: str | None = None,
    group: str | None = None,
    prevalence: float | None = None,
) -> dict[str, object]:
    """Evaluate predictions on the images whose class is known; unreadable images are left out and counted.

    The probabilities of these images are held in memory: eight bytes per class and image.

    Args:
        tables: Rows as `pylorus predict` writes them.
        description: The content of the bundle's model.json.
        class_name: Short name of the class that decides; None for the bundle's own.
        group: Regular expression that finds the patient in a path; None: each image is its own patient.
        prevalence: Proportion of the deciding class, in (0, 1), for which PPV and NPV are computed too.

    Returns:
        The metrics as plain values, under the names that the record of a prediction has.

    Raises:
        PylorusError: If no image of a known class can be read, or if no patient is found in a path.
    """
    predictions, why, left_out = _collect_known_images(tables, description, group)
    return evaluate_known_images(
        predictions, why, description, left_out=left_out, class_name=class_name, prevalence=prevalence
    )


def evaluate_known_images(
    predictions: Predictions,
    why: NDArray[np.str_],
    description: Description,
    *,
    left_out: int,
    class_name: str | None = None,
    prevalence: float | None = None,
) -> dict[str, object]:
    """Evaluate the predictions of images of known classes; see `evaluate_predictions`.

    Args:
        predictions: The predictions, with the calibrated probabilities of the bundle.
        why: Why the model abstains on each image, of shape (images,): "", "unsure" or "unlike".
        description: The content of the bundle's model.json.
        left_out: Number of images of known classes that can't be read.
        class_name: Short name of the class that decides; None for the bundle's own.
        prevalence: Proportion of the deciding class, in (0, 1), for which PPV and NPV are computed too.
    """
    groups = predictions.clusters
    deciding = class_name or description.decision.class_name
    threshold = description.decision.thresholds[deciding]
    metrics: dict[str, object] = {
        **convert_to_plain(compute_classification_metrics(predictions)),
        "left_out": left_out,
        "classes": list(description.short_names),
        "confusion": confusion_matrix(predictions.true, predictions.predicted, predictions.classes).tolist(),
        **_compute_further_metrics(predictions),
        "calibration": _evaluate_calibration(predictions),
        "unlike": convert_to_plain(estimate_proportion(why == "unlike", groups)),
        "unlike_images": assess_unlike_images(why == "unlike", groups, description.abstention),
        "unsure": convert_to_plain(estimate_proportion(why == "unsure", groups)),
        "answered": convert_to_plain(estimate_proportion(why == "", groups)),
        "accuracy_answered": convert_to_plain(estimate_proportion(predictions.correct, groups, among=why == "")),
    }
    if threshold is not None:
        guarantee = description.decision.guarantees[deciding]
        metrics["decision"] = {
            **_evaluate_threshold(predictions, deciding, threshold, prevalence=prevalence),
            "guarantee": convert_to_plain(guarantee),
        }
    if description.prediction_sets is not None:
        members = prediction_sets(
            predictions.probabilities, description.prediction_sets.get_limits(description.short_names)
        )
        coverage = {"coverage_asked": description.prediction_sets.coverage}
        metrics["prediction_sets"] = coverage | convert_to_plain(compute_set_metrics(predictions, members))
    return metrics


def _compute_further_metrics(predictions: Predictions) -> dict[str, object]:
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
            metric: {name: convert_to_plain(convert_estimate(value)) for name, value in zip(names, values, strict=True)}
            for metric, values in by_class.items()
        },
        **{name: convert_to_plain(convert_estimate(value)) for name, value in overall.items()},
    }


def _evaluate_calibration(predictions: Predictions) -> dict[str, object]:
    """Compare the frequency of each class with its probability: on average, and by the line of recalibration."""
    metrics: dict[str, object] = {}
    for column, name in enumerate(predictions.class_names):
        positive, probability = predictions.true == column, np.clip(predictions.probabilities[:, column], 0, 1)
        line = calibration_line(positive, probability, predictions.clusters)
        difference = calibration_in_the_large(positive, probability, predictions.clusters)
        estimates = {"difference": difference, "slope": line.slope, "intercept": line.intercept}
        metrics[name] = {
            "observed": float(positive.mean()),
            "expected": float(probability.mean()),
            "nearly_constant": line.is_flat,
            **{key: convert_to_plain(convert_estimate(estimate)) for key, estimate in estimates.items()},
        }
    return metrics


def _evaluate_threshold(
    predictions: Predictions, deciding: str, threshold: float, *, prevalence: float | None
) -> dict[str, object]:
    column = predictions.class_names.index(deciding)
    positive, scores = predictions.true == column, predictions.probabilities[:, column]
    point = operating_point(positive, scores, predictions.clusters, threshold=threshold)
    proportions = {
        name: convert_to_plain(convert_estimate(getattr(point, name)))
        for name in ("sensitivity", "specificity", "precision", "npv")
    }
    metrics = {"class": deciding, "threshold": threshold, **proportions, "prevalence": float(positive.mean())}
    if prevalence is None:
        return metrics
    values = predictive_values(point.sensitivity, point.specificity, prevalence=prevalence)
    stated = {name: convert_to_plain(convert_estimate(getattr(values, name))) for name in ("ppv", "npv")}
    return metrics | {"at_prevalence": {"prevalence": prevalence, **stated}}


def _collect_known_images(
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
        part["group"] = extract_groups(list(readable["path"]), group, key="--group")
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


def _format_groups(record: Mapping[str, Any]) -> str:
    """Return how many patients the evaluated images come from, to follow the number of images."""
    if record.get("request", {}).get("group") is None:
        return ", each treated as a separate patient because --group was not given"
    return f" of {record['evaluation']['groups']:,} groups (patients)"


def _format_slope(calibration: Mapping[str, Any]) -> str:
    if calibration.get("nearly_constant"):  # an older Pylorus has not written it
        return "slope can't be interpreted: the probability is nearly the same for all images"
    value, low, high = (calibration["slope"][key] for key in ("value", "low", "high"))
    if value is None:
        return "slope undefined"
    interval = "no interval" if low is None or high is None else f"{format_number(low, 2)} to {format_number(high, 2)}"
    return f"slope {format_number(value, 2)} ({interval})"


def format_evaluation(record: Mapping[str, Any], description: Description) -> list[str]:
    """Format the evaluation of a prediction, line by line.

    Args:
        record: The record of the prediction, as its .about.json holds it, with an evaluation.
        description: The content of the bundle's model.json.
    """
    evaluation = record["evaluation"]

    def format_estimate(estimate: Mapping[str, float | None]) -> str:
        value, low, high = (estimate[key] for key in ("value", "low", "high"))
        if value is None:
            return "undefined"
        interval = "no interval" if low is None or high is None else f"{format_percent(low)} to {format_percent(high)}"
        return f"{format_percent(value):>5} ({interval})"

    lines = [
        f"evaluation on {format_count(evaluation['images'], 'image')}{_format_groups(record)}, in % but for AUROC "
        "(95 % confidence interval):",
        f"  accuracy {format_estimate(evaluation['accuracy'])}",
        f"  balanced accuracy {format_estimate(evaluation['balanced_accuracy'])}, "
        f"macro F1 {format_estimate(evaluation['macro_f1'])}",
    ]
    width = max(map(len, description.short_names))
    lines += [
        f"  {name:<{width}}  sensitivity {format_estimate(evaluation['sensitivity'][name])}, specificity "
        f"{format_estimate(evaluation['specificity'][name])}, AUROC "
        f"{format_area(IntervalEstimate(**evaluation['auroc'][name]))}"
        for name in description.short_names
    ]
    calibration = evaluation.get("calibration", {})  # a record of an older Pylorus has none
    lines += ["  calibration (slope below 1: overconfident, above 1: underconfident):"] if calibration else []
    lines += [
        f"    {name:<{width}}  {format_percent(each['observed'])} observed, "
        f"{format_percent(each['expected'])} expected by the mean probability, "
        f"difference {format_estimate(each['difference'])}; {_format_slope(each)}"
        for name, each in calibration.items()
    ]
    decision = evaluation.get("decision")
    if decision is not None:
        lines.append(
            f"  {decision['class']} at the stored threshold {format_threshold(decision['threshold'])}: sensitivity "
            f"{format_estimate(decision['sensitivity'])}, specificity {format_estimate(decision['specificity'])}"
        )
        of_images = {"ppv": decision["precision"], **decision}
        for values, note in ((of_images, ", as here"), (decision.get("at_prevalence", {}), "")):
            if "prevalence" not in values:  # a record of an older Pylorus
                continue
            text = f"PPV {format_estimate(values['ppv'])}, NPV {format_estimate(values['npv'])}"
            if not note and None in (values["ppv"]["value"], values["npv"]["value"]):  # as on the page of `validate`
                text = "PPV and NPV are unknown: they need both sensitivity and specificity on these images"
            prevalence = format_percent(values["prevalence"], digits=1 if note else None)
            lines.append(f"    where {prevalence} % of the images are {decision['class']}{note}: {text}")
        guarantee = format_threshold_guarantee(description, decision["class"])
        if "tta" in record:
            guarantee = (
                "What the threshold guarantees was measured without test-time augmentation, and does not hold here."
            )
        lines += [f"    {line}" for line in textwrap.wrap(guarantee, width=110)]
    sets = evaluation.get("prediction_sets")
    if sets is not None:
        lines.append(
            f"  prediction sets at {format_percent(sets['coverage_asked'], digits=None)} %, each patient "
            "weighted equally: "
            f"{format_set_size(IntervalEstimate(**sets['size']))} classes on average; they contain the true class in"
        )
        lines += [f"    {name:<{width}}  {format_estimate(sets['coverage'][name])}" for name in description.short_names]
    lines.append(
        f"  answered {format_estimate(evaluation['answered'])}; "
        f"of these, correct {format_estimate(evaluation['accuracy_answered'])}"
    )
    return lines


# --- prevalence ---

LEAST_IMAGES = 0.5
"""An estimated prevalence counts as that of so many images at least, so that no class becomes impossible."""


def evaluate_prevalence_shift(
    predictions: Predictions, description: Description, *, class_name: str, prevalence: float | None
) -> dict[str, Any]:
    """Evaluate probabilities and decisions as they are, and corrected to the estimated and to a stated prevalence.

    Args:
        predictions: The predictions, with the calibrated probabilities of the bundle.
        description: The content of the bundle's model.json.
        class_name: Short name of the class that decides.
        prevalence: Stated proportion of this class, in (0, 1); the others keep their proportions to each other. None
            if none is stated.

    Returns:
        As plain values: the proportions of the classes (where the probabilities are calibrated, estimated without
        labels, observed, and those corrected to), the figures of each set of probabilities, and the decisions at the
        stored and at the corrected threshold.
    """
    names, groups = description.short_names, predictions.clusters
    original, _ = find_calibrated_prevalence(description)
    estimated = estimate_site_prevalence(predictions.probabilities, groups, description)
    column, threshold = names.index(class_name), description.decision.thresholds[class_name]
    targets: dict[str, NDArray[np.float64] | None] = {"uncorrected": None}
    if estimated["classes"]:
        values = np.maximum(
            [estimated["classes"][name]["value"] for name in names], LEAST_IMAGES / len(predictions.true)
        )
        targets["estimated"] = values / values.sum()
    if prevalence is not None and original.all():
        others = original * (1 - prevalence) / (1 - original[column])
        targets["stated"] = np.where(np.arange(len(names)) == column, prevalence, others)
    record: dict[str, Any] = {"class": class_name, "stated": prevalence, "estimated": estimated}
    record["observed"] = {
        name: convert_to_plain(estimate_proportion(predictions.true == index, groups))
        for index, name in enumerate(names)
    }
    record["targets"] = {
        name: dict(zip(names, target.tolist(), strict=True)) for name, target in targets.items() if target is not None
    }
    record["probabilities"], record["decisions"] = {}, []
    stored = None if threshold is None else predictions.probabilities[:, column] >= threshold
    for key, target in targets.items():
        corrected = predictions
        if target is not None:
            table = adjust_to_prevalence(predictions.probabilities, original=original, target=target)
            corrected = replace(predictions, probabilities=table)
        record["probabilities"][key] = _evaluate_probabilities(corrected)
        if threshold is None or stored is None:
            continue
        thresholds = {"stored": threshold}
        if target is not None:
            moved = adjust_threshold(threshold, original=float(original[column]), target=float(target[column]))
            thresholds["corrected"] = moved
        for kind, value in thresholds.items():
            decision = _evaluate_threshold(corrected, class_name, value, prevalence=prevalence)
            differently = int(((corrected.probabilities[:, column] >= value) != stored).sum())
            record["decisions"].append({"probabilities": key, "kind": kind, **decision, "differently": differently})
    return record


def _evaluate_probabilities(predictions: Predictions) -> dict[str, Any]:
    groups = predictions.clusters
    scores = estimate_calibration(predictions.probabilities, predictions.true, groups)
    differences = {
        name: calibration_in_the_large(
            predictions.true == index, np.clip(predictions.probabilities[:, index], 0, 1), groups
        )
        for index, name in enumerate(predictions.class_names)
    }
    return {
        "accuracy": convert_to_plain(estimate_proportion(predictions.correct, groups)),
        "brier": convert_to_plain(convert_estimate(scores.brier)),
        "nll": convert_to_plain(convert_estimate(scores.nll)),
        "difference": {name: convert_to_plain(convert_estimate(each)) for name, each in differences.items()},
    }


# --- looks ---

LOOKS_SUFFIX = ".looks.jsonl"
"""Beside a bundle: a line for each validation of it."""
RECALIBRATION = "recalibration"
"""Purpose of a line that is no validation: the bundle was recalibrated on these images."""
IMAGES_OF_LOOK = "hashes of images"
"""Key of such a line: keyed hashes of the images, in the first line of each set."""


def record_look(
    folder: Path, digests: Sequence[str], *, bundle: str, patients: int | None, purpose: str = "validation"
) -> dict[str, object]:
    """Record beside a bundle that it was evaluated on a set, and count how often it was, and on how many of its images.

    The line holds neither names nor images: hashes, counts, the time and the version. The hash of an image is keyed by
    the bundle, so that it can't be looked up elsewhere; it is written once for each set.

    Args:
        folder: Folder of the bundle.
        digests: SHA-256 of each image.
        bundle: Identity of the bundle.
        patients: Number of patients; None if they are not known.
        purpose: validation, or recalibration: the bundle was fitted on these images, which is no evaluation.

    Returns:
        How often the bundle was evaluated on this set and on any set, this time included; on how many of these images
        it was evaluated before, in how many earlier looks, and when the first and the last was; the number of earlier
        looks that recorded no images; on how many of the images it was recalibrated; and where that is recorded, "" if
        it could not be written.
    """
    bundle_folder = folder.resolve()  # "." and a link are the bundle that they lead to
    path = bundle_folder.with_name(f"{bundle_folder.name}{LOOKS_SUFFIX}")
    set_hash = compute_image_set_hash(set(digests))
    hashes = [hashlib.sha256(f"{bundle} {each}".encode()).hexdigest()[:HASH_DIGITS] for each in digests]
    lines = [each for each in _read_looks(path) if each.get("bundle") == bundle]
    earlier = [each for each in lines if each.get("purpose") != RECALIBRATION]
    fitted = {
        str(digest)
        for each in lines
        if each.get("purpose") == RECALIBRATION and isinstance(each.get(IMAGES_OF_LOOK), list)
        for digest in each[IMAGES_OF_LOOK]
    }
    images_of_sets = {
        str(each.get("image set")): set(map(str, each[IMAGES_OF_LOOK]))
        for each in earlier
        if isinstance(each.get(IMAGES_OF_LOOK), list)
    }
    look = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "bundle": bundle,
        "image set": set_hash,
        "images": len(digests),
        "patients": patients,
        "pylorus": __version__,
        "purpose": purpose,
        **({} if set_hash in images_of_sets else {IMAGES_OF_LOOK: sorted(set(hashes))}),
    }
    try:
        _append_line(path, json.dumps(look))
        where = str(path)
    except OSError:
        where = ""
    images_of_sets[set_hash] = set(hashes)  # those of an earlier look by an older Pylorus, too
    known = [each for each in earlier if str(each.get("image set")) in images_of_sets]
    overlapping = [each for each in known if not images_of_sets[str(each.get("image set"))].isdisjoint(hashes)]
    seen: set[str] = set().union(*(images_of_sets[str(each.get("image set"))] for each in overlapping))
    return {
        "this set": 1 + sum(each.get("image set") == set_hash for each in earlier),
        "all sets": 1 + len(earlier),
        "images seen": sum(each in seen for each in hashes),
        "earlier looks": len(overlapping),
        "seen": [overlapping[0].get("time"), overlapping[-1].get("time")] if overlapping else [],
        "recalibrated on": sum(each in fitted for each in hashes),
        "looks without images": len(earlier) - len(known),
        "recorded in": where,
    }


def _append_line(path: Path, line: str) -> None:
    """Append a line to a file: all of it, or nothing. An earlier line that was cut off remains a line of its own."""
    content = line.encode() + b"\n"
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            content = content if file.read(1) == b"\n" else b"\n" + content
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise


def _read_looks(path: Path) -> list[dict[str, Any]]:
    """Read the earlier looks; a line that a full disk cut off is left out."""
    looks = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                content = json.loads(line)
                if isinstance(content, dict):
                    looks.append(content)
    return looks
