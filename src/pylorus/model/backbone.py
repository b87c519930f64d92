"""Build any timm model with a new classification head and the input format that its weights expect."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from torch import nn

from pylorus.config import ModelConfig
from pylorus.errors import PylorusError, format_suggestion
from pylorus.model.head import init_head
from pylorus.model.weights import HubUnreachableError, compute_sha256, load_weights, resolve_weights_file

log = logging.getLogger(__name__)

MOST_ARGUMENTS, LARGEST_ARGUMENT = 64, 10_000
OURS = (
    *("model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path"),
    *("cache_dir", "scriptable", "exportable", "no_jit", "features_only", "out_indices", "num_classes"),
)
"""Arguments of timm.create_model that users may not set: they would load files or change the input or output."""


@dataclass(frozen=True)
class Backbone:
    """A network together with what is needed to feed and cite it.

    Attributes:
        network: The timm model; maps normalized images (batch, 3, size, size) to logits (batch, classes).
        name: timm's name, with its tag if it has one.
        image_size: Side of the square input in pixels.
        interpolation: Interpolation used to resize images to that size.
        mean: Per-channel mean of the images on which the weights were trained, in [0, 1].
        std: Per-channel standard deviation of the same images.
        weights: Source of the weights: "hub", "none", or a file's name.
        weights_sha256: SHA-256 of the weights file; None for random weights.
        licence: Licence of the weights as timm states it; None if not stated or if the weights are random.
    """

    network: nn.Module
    name: str
    image_size: int
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights: str
    weights_sha256: str | None
    licence: str | None


def build_backbone(
    config: ModelConfig, *, classes: int, image_size: int | None = None, random_if_unreachable: bool = False
) -> Backbone:
    """Build the network that the configuration names, with a new head of `classes` outputs.

    The head is initialized from torch's global generator: seed it first.

    Args:
        config: Name, weights and further arguments.
        classes: Number of outputs.
        image_size: Side of the input in pixels; None for the size the backbone was designed for.
        random_if_unreachable: Whether to fall back to random weights if the hub is unreachable (for synthetic images).

    Raises:
        PylorusError: If timm has no such model, or the weights are unavailable or do not match.
    """
    check_model_name(config.name, where="model.name")
    check_model_arguments(config.args, where="model.args")
    network = create_network(config.name, config.args, classes=classes, image_size=image_size)
    pretrained_cfg = network.pretrained_cfg
    file, weights = None, config.weights
    try:
        file = resolve_weights_file(config.weights, pretrained_cfg)
    except HubUnreachableError as error:
        if not random_if_unreachable:
            raise
        weights = "none"
        log.warning(
            "RANDOM WEIGHTS: %s\nThe run continues without pretrained weights only because its images are synthetic.",
            error,
        )
    if file is not None:
        load_weights(network, file)
    init_head(network)
    data_config = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    return Backbone(
        network=network,
        name=".".join(part for part in (pretrained_cfg.get("architecture"), pretrained_cfg.get("tag")) if part),
        image_size=image_size or data_config["input_size"][-1],
        interpolation=data_config["interpolation"],
        mean=tuple(data_config["mean"]),
        std=tuple(data_config["std"]),
        weights=weights if weights in ("hub", "none") else Path(weights).name,
        weights_sha256=compute_sha256(file) if file is not None else None,
        licence=pretrained_cfg.get("license") if weights == "hub" else None,
    )


def check_model_name(name: str, *, where: str) -> None:
    """Check that `name` is a timm model, with or without a tag.

    Raises:
        PylorusError: If it is not; the message suggests the nearest known name.
    """
    known = timm.list_models()
    if name.split(".")[0] not in known:
        nearest = format_suggestion(name.split(".")[0][:100], known)
        raise PylorusError(f'{where}: timm {timm.__version__} has no "{name[:100]}".{nearest}')


def check_model_arguments(arguments: Mapping[str, Any], *, where: str) -> None:
    """Check that arguments of timm.create_model are plain values, not absurdly large, and load no files.

    Raises:
        PylorusError: Names the argument.
    """
    if len(arguments) > MOST_ARGUMENTS:
        raise PylorusError(f"{where}: found {len(arguments)} arguments, expected at most {MOST_ARGUMENTS}.")
    for name, value in arguments.items():
        if (
            not str(name).isidentifier()
            or str(name).startswith("_")
            or name in OURS
            or (name == "in_chans" and value != 3)
        ):
            raise PylorusError(
                f'{where}: "{str(name)[:100]}" can\'t be set here. Weights, classes and channels are not arguments; '
                "see model.weights."
            )
        values = value if isinstance(value, list | tuple) else [value]
        if len(values) > MOST_ARGUMENTS or not all(_is_plain(item) for item in values):
            raise PylorusError(
                f"{where}.{name}: found {str(value)[:100]}, expected a number within ±{LARGEST_ARGUMENT:,}, a short "
                "string, true, false, null, or a short list of these."
            )


def _is_plain(value: object) -> bool:
    if isinstance(value, int | float):
        return abs(value) <= LARGEST_ARGUMENT
    return value is None or (isinstance(value, str) and len(value) <= 100)


def create_network(name: str, arguments: Mapping[str, Any], *, classes: int, image_size: int | None) -> Any:
    """Create the timm model with random weights and a head of `classes` outputs.

    Args:
        name: A name that passes `check_model_name`.
        arguments: Arguments that pass `check_model_arguments`.
        classes: Number of outputs.
        image_size: Side of the input in pixels, for networks built for a fixed size; None for timm's default.

    Raises:
        PylorusError: If timm rejects the arguments, or the model has no classification head.
    """
    options = dict(arguments)
    pretrained_cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    if image_size is not None and pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        options.setdefault("img_size", image_size)
    try:
        network: Any = timm.create_model(name, pretrained=False, num_classes=classes, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PylorusError(f"model.name {name}, model.args {dict(arguments)}: timm rejected them: {error}") from error
    if not isinstance(network.get_classifier(), nn.Module | tuple | list):
        raise PylorusError(f"model.name: {name} has no classification head to replace.")
    return network
