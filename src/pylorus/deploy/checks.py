"""Reads model.json and refuses what can't be: unknown entries, wrong types, sizes and shares out of any range."""

import math
from collections.abc import Sequence
from typing import Any

from pylorus.data.image import POLICY_VERSION, RESAMPLING
from pylorus.deploy.description import FORMAT_VERSION, Description, Input
from pylorus.deploy.strict import built, parsed
from pylorus.errors import PylorusError
from pylorus.evaluation.calibration import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from pylorus.model.backbone import check_arguments, check_name
from pylorus.runs.shipped import CHOICES, LAST

MOST_BYTES = 1_000_000
"""Of a description: a hundred times what one takes."""
MOST_CLASSES, LARGEST_SIZE, LONGEST_NAME = 1000, 2048, 200


def read_description(content: bytes, *, where: str = "model.json") -> Description:
    """The description in a model.json, checked.

    Args:
        content: All bytes of the file.
        where: What errors call it.

    Raises:
        PylorusError: If it is no such description; names the entry, what was found and what is expected.
    """
    if len(content) > MOST_BYTES:
        raise PylorusError(f"{where}: has {len(content):,} bytes, expected {MOST_BYTES:,} at most.")
    values: Any = parsed(content, where=where)
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise PylorusError(
            f"{where}: found format_version {str(version)[:20]}, expected 1 to {FORMAT_VERSION}. "
            "A newer bundle needs a newer Pylorus; one of before there were versions has to be trained again."
        )
    found = built(Description, _upgraded(values) if version == 1 else values, where=where)
    check_description(found, where=where)
    return found


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """What a description of format 1 says, in the present format: its network is that of the last stage."""
    upgraded = {name: value for name, value in values.items() if name != "largest_difference"}
    training = values.get("training")
    stages = training.get("stages") if isinstance(training, dict) else None
    if isinstance(stages, list) and stages and isinstance(stages[-1], dict):
        upgraded["shipped"] = {"name": stages[-1].get("name"), "chosen_by": LAST, "accuracy": {}}
    return upgraded | {"format_version": FORMAT_VERSION}


def check_description(found: Description, *, where: str = "model.json") -> None:
    """Refuses values that can't be: unknown architectures, sizes out of any range, thresholds that are no shares.

    Raises:
        PylorusError: Names the entry, what was found and what is expected.
    """
    check_name(found.architecture, where=f"{where}: architecture")
    check_arguments(found.arguments, where=f"{where}: arguments")
    names, short = found.classes, found.short_names
    for key, each in (("classes", names), ("short_names", short)):
        odd = [name for name in each if not 0 < len(name) <= LONGEST_NAME or not name.isprintable()]
        if odd or len(set(each)) != len(each) or not 2 <= len(each) <= MOST_CLASSES:
            raise PylorusError(f"{where}: {key}: found {_few(each)}, expected 2 to {MOST_CLASSES} different names.")
    if len(names) != len(short):
        raise PylorusError(f"{where}: found {len(names)} classes but {len(short)} short_names.")
    _check_input(found.input, where)
    _check_choices(found, where)
    for key, value, low, high in (
        ("calibration.temperature", found.calibration.temperature, LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE),
        ("decision.sensitivity", found.decision.sensitivity, 0, 1),
        ("abstention.unlike_above", found.abstention.unlike_above, 0, 2),
        ("abstention.unsure_below", found.abstention.unsure_below, 0, 1),
        *((f"decision.thresholds.{name}", value, 0, 1) for name, value in found.decision.thresholds.items()),
    ):
        if value is not None and not low <= value <= high:
            raise PylorusError(f"{where}: {key}: found {value}, expected {low} to {high}.")


def _check_input(found: Input, where: str) -> None:
    if not 1 <= found.size <= LARGEST_SIZE:
        raise PylorusError(f"{where}: input.size: found {found.size}, expected 1 to {LARGEST_SIZE} pixels.")
    for key, value, known in (
        ("crop", found.crop, ("none", "auto")),
        ("fit", found.fit, ("pad", "stretch", "crop")),
        ("interpolation", found.interpolation, tuple(RESAMPLING)),
    ):
        if value not in known:
            raise PylorusError(f'{where}: input.{key}: found "{value[:50]}", expected one of {", ".join(known)}.')
    for key, numbers, low in (("mean", found.mean, -math.inf), ("std", found.std, 0.0)):
        if len(numbers) != 3 or not all(low < number < 1e6 for number in numbers):
            raise PylorusError(f"{where}: input.{key}: found {_few(numbers)}, expected three numbers above {low:g}.")
    if found.policy != POLICY_VERSION:
        raise PylorusError(
            f"{where}: input.policy: found {found.policy}, but this Pylorus reads images by policy {POLICY_VERSION}: "
            "its probabilities would not be those of the training. Take the Pylorus that `versions` names."
        )


def _check_choices(found: Description, where: str) -> None:
    if found.shipped.chosen_by not in CHOICES or (
        found.shipped.chosen_by != LAST and found.shipped.name not in found.shipped.accuracy
    ):
        raise PylorusError(
            f'{where}: shipped: found "{found.shipped.chosen_by[:50]}" with accuracies of '
            f"{_few(list(found.shipped.accuracy))}, expected one of {', '.join(CHOICES)}, with "
            "the accuracy of the stage itself."
        )
    short = set(found.short_names)
    if found.decision.class_name not in short:
        raise PylorusError(f'{where}: decision.class: found "{found.decision.class_name[:50]}", expected a short name.')
    by_class = {
        "decision.thresholds": found.decision.thresholds,
        "decision.test": found.decision.test,
        **{f"test.{key}": getattr(found.test, key) for key in ("sensitivity", "specificity", "precision", "auroc")},
    }
    for key, given in by_class.items():
        if set(given) != short:
            raise PylorusError(f"{where}: {key}: found {_few(sorted(given))}, expected {_few(found.short_names)}.")
    for part, counts in found.training.images.items():
        if len(counts) != len(found.classes) or min(counts) < 0:
            raise PylorusError(f"{where}: training.images.{part[:50]}: found {_few(counts)}, expected a count a class.")


def _few(values: Sequence[object]) -> str:
    shown = ", ".join(str(value)[:50] for value in values[:5])
    return shown + (f" and {len(values) - 5} more" if len(values) > 5 else "") if values else "nothing"
