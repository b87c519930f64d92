"""Test-time augmentation: the mean calibrated probability of an image and its mirrored and turned copies.

Only the probabilities are averaged. Whether an image is unlike the training images is decided by the image as it is,
for which the bundle's threshold was measured. Thresholds of decisions, of the abstention "unsure" and of prediction
sets were measured without augmentation, so what they guarantee does not hold for averaged probabilities.
`measure_gain` compares both on labelled images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pylorus.core.formatting import format_count, format_number, format_percent, join_names
from pylorus.core.io import convert_to_plain
from pylorus.data.input_format import InputFormat
from pylorus.deploy.description import Description
from pylorus.deploy.model import InferenceModel
from pylorus.deploy.thresholds import convert_estimate
from pylorus.evaluation.comparison import paired_differences, paired_loss_difference
from pylorus.evaluation.decisions import operating_point
from pylorus.evaluation.intervals import Estimate
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.replicates import score_images
from pylorus.model.inference import NetworkOutput

COPIES: Mapping[str, tuple[tuple[int, bool], ...]] = {
    "mirror": ((0, False), (0, True)),
    "flips": ((0, False), (0, True), (2, False), (2, True)),
    "turns": tuple((turns, mirrored) for turns in range(4) for mirrored in (False, True)),
}
"""Copies of an image that each kind of augmentation averages: quarter turns, then whether it is mirrored."""
WORDS = {
    "mirror": "the image and its mirror image",
    "flips": "the image, mirrored, upside down, and both",
    "turns": "the image and its mirror image, each in four positions",
}
LEAST_PROBABILITY = 1e-300
"""Probabilities are at least this before their logarithm is taken."""


@dataclass(frozen=True, eq=False)
class AugmentedModel(InferenceModel):
    """A model that answers with the mean calibrated probabilities of several copies of an image.

    Attributes:
        model: The model that processes each copy.
        kind: A key of `COPIES`.
    """

    model: InferenceModel
    kind: str

    def run_network(self, images: NDArray[np.uint8]) -> NetworkOutput:
        """Return the logarithms of the mean probabilities as logits, and the unlikeness of the images as they are.

        Args:
            images: uint8 RGB of shape (n, *input.shape), as `input` reads them.
        """
        outputs = [self.model.run_network(turn_images(images, self.input, *copy)) for copy in COPIES[self.kind]]
        mean = np.mean([self.model.calibrate_logits(output.logits) for output in outputs], axis=0)
        return NetworkOutput(torch.from_numpy(np.log(np.maximum(mean, LEAST_PROBABILITY))), outputs[0].unlikeness)

    def calibrate_logits(self, logits: Tensor | NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return the mean probabilities of which `run_network` returned the logarithms, of shape (n, classes)."""
        mean = np.exp(np.asarray(logits, dtype=np.float64))
        return np.asarray(mean / mean.sum(axis=1, keepdims=True), dtype=np.float64)


def augment_model(model: InferenceModel, kind: str | None) -> InferenceModel:
    """Return a model that averages the copies of a kind of augmentation; the model itself for None."""
    if kind is None:
        return model
    return AugmentedModel(model.folder, model.description, model.sha256, model.contents, model, kind)


def turn_images(images: NDArray[np.uint8], form: InputFormat, turns: int, mirrored: bool) -> NDArray[np.uint8]:
    """Turn prepared images by quarters of a circle, after mirroring them left to right; each square of one for itself.

    Args:
        images: uint8 RGB of shape (n, *form.shape).
        form: How they were prepared; that of an ensemble may have several squares.
        turns: Number of quarter turns.
        mirrored: Whether they are mirrored first.

    Example:
        >>> image = np.array([[[[1], [2]], [[3], [4]]]], dtype=np.uint8).repeat(3, axis=3)
        >>> turn_images(image, InputFormat(2, "pad", "bicubic"), 2, True)[0, :, :, 0].tolist()
        [[3, 4], [1, 2]]
    """
    turned = images.copy()
    for number in range(len(form.forms)):
        square = form.get_square(images, number)
        form.get_square(turned, number)[:] = np.rot90(square[:, :, ::-1] if mirrored else square, turns, axes=(1, 2))
    return turned


def describe_augmentation(kind: str) -> dict[str, object]:
    """Return what a record says of the augmentation of its predictions, as plain values."""
    return {"kind": kind, "averaged": WORDS[kind], "passes": len(COPIES[kind])}


def format_augmentation(kind: str) -> list[str]:
    """Say what was averaged, what it costs, and what no longer holds, line by line."""
    return [
        _format_averaging(kind, WORDS[kind], len(COPIES[kind])),
        "  Decisions, prediction sets and the abstention unsure apply thresholds that were measured without it: what",
        "  the bundle guarantees for them does not hold here. Unlikeness is that of the image as it is.",
    ]


def _format_averaging(kind: str, averaged: str, passes: int) -> str:
    return (
        f"test-time augmentation ({kind}): mean probability of {averaged}; {passes} passes of the network for each "
        "image instead of 1"
    )


def measure_gain(
    plain: Predictions, augmented: Predictions, description: Description, *, kind: str, class_name: str
) -> dict[str, Any]:
    """Compare the predictions of labelled images with and without test-time augmentation, keeping patients together.

    Args:
        plain: Predictions of the images as they are.
        augmented: Predictions of the same images with augmentation.
        description: The content of the bundle's model.json.
        kind: A key of `COPIES`.
        class_name: Short name of the class that decides.

    Returns:
        Plain values: accuracy, Brier score and log loss of both and their paired differences, with minus without
        augmentation; sensitivity and specificity of both at the stored threshold.
    """
    scores = [score_images(each.probabilities, each.true) for each in (plain, augmented)]
    figures: dict[str, Any] = {
        "accuracy": {
            "without": float(plain.correct.mean()),
            "with": float(augmented.correct.mean()),
            "difference": convert_to_plain(convert_estimate(paired_differences(augmented, plain, seed=0).accuracy)),
        }
    }
    for column, name in enumerate(("brier", "log_loss"), start=1):
        before, after = (each[:, column] for each in scores)
        difference = paired_loss_difference(after, before, plain.clusters)
        figures[name] = {
            "without": float(before.mean()),
            "with": float(after.mean()),
            "difference": convert_to_plain(convert_estimate(difference)),
        }
    threshold = description.decision.thresholds[class_name]
    decision: dict[str, Any] | None = None
    if threshold is not None:
        column = plain.class_names.index(class_name)
        points = {
            name: operating_point(
                each.true == column, each.probabilities[:, column], each.clusters, threshold=threshold
            )
            for name, each in (("without", plain), ("with", augmented))
        }
        decision = {"class": class_name, "threshold": threshold} | {
            name: {
                figure: convert_to_plain(convert_estimate(getattr(point, figure)))
                for figure in ("sensitivity", "specificity")
            }
            for name, point in points.items()
        }
    return {
        **describe_augmentation(kind),
        "images": len(plain.true),
        "groups": len(np.unique(plain.group)),
        "other_class": int((plain.predicted != augmented.predicted).sum()),
        "figures": figures,
        "decision": decision,
    }


FIGURES = {"accuracy": ("accuracy", 100.0, 1), "brier": ("Brier score", 1.0, 4), "log_loss": ("log loss", 1.0, 4)}
"""Name, factor and decimals of each compared figure."""


def format_gain(gain: Mapping[str, Any]) -> list[str]:
    """Say what test-time augmentation changed on labelled images, line by line; see `measure_gain`."""
    lines = [
        _format_averaging(gain["kind"], gain["averaged"], gain["passes"]),
        f"  on {format_count(gain['images'], 'image')} of {format_count(gain['groups'], 'group')}, "
        f"{format_count(gain['other_class'], 'image')} with another predicted class; without → with, difference "
        "(95 % interval, paired, groups kept together):",
    ]
    for key, (name, factor, digits) in FIGURES.items():
        figure = gain["figures"][key]
        unit = " %" if factor == 100 else ""
        before, after = (format_number(factor * figure[side], digits) for side in ("without", "with"))
        lines.append(
            f"    {name} {before}{unit} → {after}{unit}: {_format_difference(figure['difference'], factor, digits)}"
        )
    decision = gain["decision"]
    if decision is not None:
        pairs = [
            f"{figure} {_format_share(decision['without'][figure])} → {_format_share(decision['with'][figure])}"
            for figure in ("sensitivity", "specificity")
        ]
        lines.append(
            f"    {decision['class']} at the stored threshold: {', '.join(pairs)}; its guarantee was measured without "
            "augmentation"
        )
    return [*lines, f"  {explain_gain(gain)}"]


def _format_difference(difference: Mapping[str, float | None], factor: float, digits: int) -> str:
    value, low, high = (difference[key] for key in ("value", "low", "high"))
    if value is None:
        return "undefined"
    text = format_number(factor * value, digits, signed=True) + (" points" if factor == 100 else "")
    if low is None or high is None:
        return f"{text} (no interval)"
    ends = (format_number(factor * end, digits, signed=True) for end in (low, high))
    return f"{text} ({' to '.join(ends)})"


def _format_share(estimate: Mapping[str, float | None]) -> str:
    return "undefined" if estimate["value"] is None else f"{format_percent(estimate['value'])} %"


def explain_gain(gain: Mapping[str, Any]) -> str:
    """Say in one sentence which figures got better or worse, as far as their intervals show it.

    Example:
        >>> def figure(low, high): return {"difference": {"value": (low + high) / 2, "low": low, "high": high}}
        >>> figures = {"accuracy": figure(-0.1, 0.2), "brier": figure(-0.3, -0.1), "log_loss": figure(-0.2, 0.1)}
        >>> explain_gain({"figures": figures})
        'Better: Brier score. Not shown to differ: accuracy and log loss.'
    """
    better, worse, unclear = list[str](), list[str](), list[str]()
    for key, (name, _, _) in FIGURES.items():
        difference = Estimate.from_saved(gain["figures"][key]["difference"])
        higher, lower = (better, worse) if key == "accuracy" else (worse, better)
        (higher if difference.is_above_zero else lower if difference.is_below_zero else unclear).append(name)
    if not better and not worse:
        return "No gain is shown: the interval of each difference contains zero or is unknown."
    parts = (("Better", better), ("Worse", worse), ("Not shown to differ", unclear))
    return " ".join(f"{title}: {join_names(names)}." for title, names in parts if names)
