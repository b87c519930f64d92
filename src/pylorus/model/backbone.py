"""Any timm model with a new head, and the input that its weights were made for."""

import logging
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
    network, image_size = _created(config, classes, image_size)
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


def _created(config: ModelConfig, classes: int, image_size: int | None) -> tuple[Any, int | None]:
    known = timm.list_models()
    if config.name.split(".")[0] not in known:
        raise PylorusError(
            f'model.name: timm {timm.__version__} has no "{config.name}".'
            f"{did_you_mean(config.name.split('.')[0], known)}"
        )
    arguments = dict(config.args)
    cfg = timm.models.get_pretrained_cfg(config.name, allow_unregistered=True)
    if image_size is not None and cfg is not None and cfg.fixed_input_size:
        arguments.setdefault("img_size", image_size)
    try:
        network: Any = timm.create_model(config.name, pretrained=False, num_classes=classes, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PylorusError(f"model.name {config.name}, model.args {config.args}: timm refuses them: {error}") from error
    if not isinstance(network.get_classifier(), nn.Module | tuple | list):
        raise PylorusError(f"model.name: {config.name} has no classifier to replace.")
    return network, image_size
