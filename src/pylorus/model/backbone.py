"""Any timm model with a new head, and the input that its weights were made for."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from torch import nn

from pylorus.config import ModelConfig
from pylorus.errors import PylorusError, did_you_mean
from pylorus.model.head import draw_head
from pylorus.model.weights import HubUnreachableError, load_weights, sha256, weights_file

log = logging.getLogger(__name__)

MOST_ARGUMENTS, LARGEST_ARGUMENT = 64, 10_000
OURS = (
    *("model_name", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path"),
    *("cache_dir", "scriptable", "exportable", "no_jit", "features_only", "out_indices", "num_classes"),
)
"""Arguments of timm.create_model that are not the user's: they would load files or change what comes in and out."""


@dataclass(frozen=True)
class Backbone:
    """A network and what must be known to feed and to cite it.

    Attributes:
        network: The timm model; takes (batch, 3, size, size), normalised, and gives logits (batch, classes).
        name: timm's name, with its tag where it has one.
        image_size: Side of the square input in pixels.
        interpolation: Of the resize to that size.
        mean: Of the weights' training images, a value a channel in [0, 1].
        std: As `mean`.
        weights: Where they came from: "hub", "none" or a file's name.
        weights_sha256: Of the weights' file; None for random weights.
        licence: Of the weights as timm states it; None where it is not stated or the weights are random.
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
    """The network that the configuration names, with a new head of `classes` outputs.

    The head is drawn from torch's generator: seed it first.

    Args:
        config: Name, weights and further arguments.
        classes: Outputs of the head.
        image_size: Side of the input in pixels; None: what the backbone was made for.
        random_if_unreachable: Whether to go on with random weights where the hub does not answer: for drawn images.

    Raises:
        PylorusError: If timm has no such model, or the weights can't be had or do not fit; it says how to mend it.
    """
    check_name(config.name, where="model.name")
    check_arguments(config.args, where="model.args")
    network = create_network(config.name, config.args, classes=classes, image_size=image_size)
    cfg = network.pretrained_cfg
    file, weights = None, config.weights
    try:
        file = weights_file(config.weights, cfg)
    except HubUnreachableError as error:
        if not random_if_unreachable:
            raise
        weights = "none"
        log.warning("RANDOM WEIGHTS: %s\nOnly because the images are drawn does the run go on without them.", error)
    if file is not None:
        load_weights(network, file)
    draw_head(network)
    data = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    return Backbone(
        network=network,
        name=".".join(part for part in (cfg.get("architecture"), cfg.get("tag")) if part),
        image_size=image_size or data["input_size"][-1],
        interpolation=data["interpolation"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        weights=weights if weights in ("hub", "none") else Path(weights).name,
        weights_sha256=sha256(file) if file is not None else None,
        licence=cfg.get("license") if weights == "hub" else None,
    )


def check_name(name: str, *, where: str) -> None:
    """Refuses what is no name of timm's, with or without a tag.

    Raises:
        PylorusError: Names the nearest that is known.
    """
    known = timm.list_models()
    if name.split(".")[0] not in known:
        nearest = did_you_mean(name.split(".")[0][:100], known)
        raise PylorusError(f'{where}: timm {timm.__version__} has no "{name[:100]}".{nearest}')


def check_arguments(arguments: Mapping[str, Any], *, where: str) -> None:
    """Refuses arguments of timm.create_model that are not plain, are absurdly large, or name files to load.

    Raises:
        PylorusError: Names the argument.
    """
    if len(arguments) > MOST_ARGUMENTS:
        raise PylorusError(f"{where}: found {len(arguments)} arguments, expected {MOST_ARGUMENTS} at most.")
    for name, value in arguments.items():
        if (
            not str(name).isidentifier()
            or str(name).startswith("_")
            or name in OURS
            or (name == "in_chans" and value != 3)
        ):
            raise PylorusError(
                f'{where}: "{str(name)[:100]}" can\'t be given here. Weights, classes and channels are not arguments; '
                "see model.weights."
            )
        values = value if isinstance(value, list | tuple) else [value]
        if len(values) > MOST_ARGUMENTS or not all(_is_plain(one) for one in values):
            raise PylorusError(
                f"{where}.{name}: found {str(value)[:100]}, expected a number within ±{LARGEST_ARGUMENT:,}, a word, "
                "true, false, null, or a short list of these."
            )


def _is_plain(value: object) -> bool:
    if isinstance(value, int | float):
        return abs(value) <= LARGEST_ARGUMENT
    return value is None or (isinstance(value, str) and len(value) <= 100)


def create_network(name: str, arguments: Mapping[str, Any], *, classes: int, image_size: int | None) -> Any:
    """The timm model of this name with random weights and a head of `classes` outputs.

    Args:
        name: As in `check_name`.
        arguments: As in `check_arguments`.
        classes: Outputs.
        image_size: Side of the input in pixels, for networks that are built for one; None: timm's own.

    Raises:
        PylorusError: If timm refuses them, or the model has no classifier.
    """
    given = dict(arguments)
    cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    if image_size is not None and cfg is not None and cfg.fixed_input_size:
        given.setdefault("img_size", image_size)
    try:
        network: Any = timm.create_model(name, pretrained=False, num_classes=classes, **given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PylorusError(f"model.name {name}, model.args {dict(arguments)}: timm refuses them: {error}") from error
    if not isinstance(network.get_classifier(), nn.Module | tuple | list):
        raise PylorusError(f"model.name: {name} has no classifier to replace.")
    return network
