"""Any timm model with a new head: its weights from the hub or a file, and the input that it was made for.

Weights from the hub and from a file take one way: a file, read as tensors only, every key of it accounted for.
"""

import hashlib
import inspect
import logging
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from pylorus.config import ModelConfig
from pylorus.errors import PylorusError, did_you_mean, listing

log = logging.getLogger(__name__)

PATIENCE = 12.0
"""Seconds to wait for the hub's first answer."""

SPARE = ("AuxLogits.",)
"""Parts that a file may hold and our network does not: Inception's training aid."""


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


class HubUnreachableError(PylorusError):
    """The weights are not on this machine and the hub does not answer."""


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
        file = _weights_file(config, cfg)
    except HubUnreachableError as error:
        if not random_if_unreachable:
            raise
        weights = "none"
        log.warning("RANDOM WEIGHTS: %s\nOnly because the images are drawn does the run go on without them.", error)
    if file is not None:
        load_weights(network, file)
    _draw_head(network)
    data = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    return Backbone(
        network=network,
        name=".".join(part for part in (cfg.get("architecture"), cfg.get("tag")) if part),
        image_size=image_size or data["input_size"][-1],
        interpolation=data["interpolation"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        weights=weights if weights in ("hub", "none") else Path(weights).name,
        weights_sha256=_sha256(file) if file is not None else None,
        licence=cfg.get("license") if weights == "hub" else None,
    )


def classifier_names(network: Any) -> tuple[str, ...]:
    """The names of the modules that give the logits: timm's classifier, two of them in distilled transformers."""
    found = network.get_classifier()
    heads = found if isinstance(found, tuple | list) else (found,)
    return tuple(name for name, module in network.named_modules() if any(module is head for head in heads))


def _draw_head(network: Any) -> None:
    """Draws small weights for the head, so that a stage starts from even odds.

    timm's own draws differ from model to model; for few classes some are so large that ten epochs only undo them.
    """
    for name in classifier_names(network):
        head = network.get_submodule(name)
        if isinstance(head, nn.Linear | nn.Conv2d):
            nn.init.normal_(head.weight, std=0.01)
            if head.bias is not None:
                nn.init.zeros_(head.bias)


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


def _weights_file(config: ModelConfig, cfg: Mapping[str, Any]) -> Path | None:
    if config.weights == "none":
        return None
    if config.weights == "hub":
        return _from_hub(cfg)
    file = Path(config.weights)
    if not file.is_file():
        raise PylorusError(f"model.weights: found {config.weights}, expected hub, none, or a file that exists.")
    return file


def _from_hub(cfg: Mapping[str, Any]) -> Path:
    """The weights' file in the hub's cache, fetched if it is not there yet.

    Raises:
        HubUnreachableError: Within 15 seconds; the message says which file to bring.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repository, file = cfg.get("hf_hub_id"), cfg.get("hf_hub_filename") or "model.safetensors"
    if not repository:
        raise PylorusError(
            f"model.weights: timm knows no weights on the hub for {cfg.get('architecture')}. Give a file or none."
        )
    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    why = _why_unreachable(repository, file)
    if why is None:
        try:
            return Path(hf_hub_download(repository, file))
        except Exception as error:
            why = str(error)
    name = ".".join(part for part in (cfg.get("architecture"), cfg.get("tag")) if part)
    raise HubUnreachableError(
        f"the weights of {name} are not on this machine, and the hub does not answer ({why.strip().splitlines()[0]}).\n"
        f"Where there is a network, fetch {file} of the Hugging Face repository {repository}, save it as "
        f"{name}.safetensors, bring it here and add model.weights=PATH/{name}.safetensors. "
        "For random weights: model.weights=none."
    )


def _why_unreachable(repository: str, file: str) -> str | None:
    """None if the hub answers for this file, else why not; a name server may hang longer than any time limit."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    answer: list[str | None] = [f"no answer within {PATIENCE:.0f} s"]

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(repository, file), timeout=PATIENCE - 2)
            answer[0] = None
        except Exception as error:
            answer[0] = str(error) or type(error).__name__

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return answer[0]


def load_weights(network: Any, file: Path) -> None:
    """Fills the network from a file; every key must find its place, those of the classifier excepted.

    Raises:
        PylorusError: If the file can't be read as tensors, or a key is missing, unknown or of another shape.
    """
    given = _adapted(network, _tensors(file))
    wanted = network.state_dict()
    heads = tuple(f"{name}." for name in classifier_names(network))
    # Files from before torch 0.4.1 lack this counter, which is used by no network with a set momentum.
    missing = [
        name
        for name in wanted
        if name not in given and not name.startswith(heads) and not name.endswith(".num_batches_tracked")
    ]
    unknown = [name for name in given if name not in wanted and not name.startswith((*heads, *SPARE))]
    reshaped = [
        f"{name}: {tuple(given[name].shape)} in the file, {tuple(wanted[name].shape)} in the network"
        for name in given
        if name in wanted and given[name].shape != wanted[name].shape and not name.startswith(heads)
    ]
    if missing or unknown or reshaped:
        parts = [
            ("missing in the file", missing),
            ("unknown to the network", unknown),
            ("of another shape", reshaped),
        ]
        details = "\n".join(f"{len(names)} keys {what}:\n{listing(names, most=4)}" for what, names in parts if names)
        raise PylorusError(
            f"model.weights: {file} does not fit {type(network).__name__} "
            f"({getattr(network, 'pretrained_cfg', {}).get('architecture')}).\n{details}\n"
            "Is it the file of this very architecture? See model.name."
        )
    network.load_state_dict(
        {name: tensor for name, tensor in given.items() if _fits(name, wanted, heads)}, strict=False
    )


def _fits(name: str, wanted: Mapping[str, torch.Tensor], heads: tuple[str, ...]) -> bool:
    return name in wanted and not name.startswith(heads)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, or of a pickle in which nothing but tensors is looked at."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PylorusError(
            f"model.weights: {file} can't be read as tensors: {str(error).splitlines()[0]}\n"
            "Expected a safetensors file, or a pickle that holds tensors only: nothing else is loaded, since it could "
            "run code."
        ) from error
    for wrapped in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapped), dict):
            content = content[wrapped]
    tensors = {str(name).removeprefix("module."): tensor for name, tensor in dict(content).items()}
    if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise PylorusError(f"model.weights: {file} holds no table of tensors by name.")
    return tensors


def _adapted(network: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys of other sources (torchvision, the authors) under timm's names, by timm's filter for the architecture."""
    module = sys.modules[type(network).__module__]
    adapt = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if adapt is None:
        return tensors
    takes_network = len(inspect.signature(adapt).parameters) > 1
    return dict(adapt(tensors, network) if takes_network else adapt(tensors))


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
