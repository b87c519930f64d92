"""A network with a new head: built by timm or by a factory of the user's own, tried before training, and its input."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.inception_v3 import InceptionV3
from torch import Tensor, nn
from torch.func import functional_call

from pylorus.config.checks import check_model_name
from pylorus.config.instantiation import get_object, get_target
from pylorus.config.schema import ModelConfig
from pylorus.core.arguments import describe_value
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import join_names
from pylorus.model.hub import HubUnreachableError, format_timm_name, resolve_hub_file, resolve_weights_file
from pylorus.model.weights import compute_sha256, init_head, load_weights

log = logging.getLogger(__name__)

MAX_ARGUMENTS, MAX_ARGUMENT_SIZE = 64, 10_000
RESERVED_ARGUMENTS = (
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
        weights: Source of the weights: "hub" (timm's), "none", or a file's name.
        weights_sha256: SHA-256 of the weights file; None for random weights.
        licence: Licence of the weights as `model.licence` states it, or else timm: of those from the hub, and of a file
            with their name. None if not stated, and for random weights.
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
        PylorusError: If timm has no such model, the weights are unavailable or do not match, or the network does not
            turn images of that size into logits.
    """
    node = get_target(config)
    if node is not None:
        register_network(config.name, get_object(node, key="model"))
    else:
        check_model_name(config.name, where="model.name")
    check_model_arguments(config.args, where="model.args")
    check_normalization(config)
    try:
        network = create_network(config.name, config.args, classes=classes, image_size=image_size)
    except PylorusError as error:
        raise PylorusError(_explain_rejection(config, str(error), classes=classes, image_size=image_size)) from error
    pretrained_cfg = network.pretrained_cfg
    data_config = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    size = image_size or data_config["input_size"][-1]
    check_logits(network, config, classes=classes, image_size=size)
    file, weights = None, config.weights
    if node is not None and weights == "hub":
        weights = FACTORY_WEIGHTS
    try:
        file = None if weights == FACTORY_WEIGHTS else resolve_weights_file(config, pretrained_cfg)
    except HubUnreachableError as error:
        if not random_if_unreachable:
            raise
        weights = "none"
        log.warning(
            "RANDOM WEIGHTS: %s\nThe run continues without pretrained weights only because its images are synthetic.",
            error,
        )
    with ThreadPoolExecutor(max_workers=1) as hashing:
        digest = hashing.submit(compute_sha256, file) if file is not None else None
        if file is not None:
            load_weights(network, file)
        elif isinstance(network, InceptionV3):
            init_inception(network)
        init_head(network)
    is_timms = config.source is None and (weights == "hub" or Path(weights).stem == format_timm_name(pretrained_cfg))
    stated = pretrained_cfg.get("license") if is_timms else None
    return Backbone(
        network=network,
        name=config.name if node is not None else format_timm_name(pretrained_cfg),
        image_size=size,
        interpolation=data_config["interpolation"],
        mean=tuple(config.mean or data_config["mean"]),
        std=tuple(config.std or data_config["std"]),
        weights=_name_weights(weights, config, pretrained_cfg),
        weights_sha256=digest.result() if digest is not None else None,
        licence=None if weights == "none" else config.licence or stated,
    )


def _name_weights(weights: str, config: ModelConfig, pretrained_cfg: Mapping[str, Any]) -> str:
    """Return what card and report call the weights: hub (timm's), none, factory, or the name of a file."""
    if weights == "hub" and config.source is not None:
        return resolve_hub_file(config, pretrained_cfg).local_name
    return weights if weights in ("hub", "none", FACTORY_WEIGHTS) else Path(weights).name


def check_normalization(config: ModelConfig) -> None:
    """Check the mean and standard deviation that replace those of the network.

    Raises:
        PylorusError: If they are not three values each, for pixels in [0, 1].
    """
    for name, values, example in (
        ("mean", config.mean, IMAGENET_DEFAULT_MEAN),
        ("std", config.std, IMAGENET_DEFAULT_STD),
    ):
        low = 0.0 if name == "mean" else 1e-3
        if values is None or (len(values) == 3 and all(low <= value <= 1 for value in values)):
            continue
        hint = " Divide values for pixels in [0, 255] by 255." if max(values, default=0) > 1 else ""
        raise PylorusError(
            f"model.{name}: found {list(values)}, expected three numbers from {low:g} to 1, one for each of red, green "
            f"and blue, for pixels in [0, 1], such as {list(example)}.{hint}"
        )


def run_on_black_images(network: nn.Module, *, images: int, image_size: int) -> Any:
    """Return what the network gives for black images: tensors without values, where the network allows it.

    On torch's meta device only shapes are computed, within milliseconds, and neither random numbers nor the statistics
    of batch norm change. A network that can't be run there is run on its own device, if it is in evaluation mode.
    """
    tensors = dict((*network.named_parameters(), *network.named_buffers()))
    parameter = next(network.parameters())
    with torch.no_grad():
        try:
            with torch.device("meta"):
                image = torch.zeros(images, 3, image_size, image_size, dtype=parameter.dtype)
                weights = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
                return functional_call(network, weights, (image,))
        except Exception:
            if network.training or parameter.is_meta:
                raise
        return network(torch.zeros(images, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device))


def find_fault(network: Any, *, classes: int, image_size: int) -> str | None:
    """Return why the network does not turn images of a size into logits, in its own words; None if it does."""
    with restore_modes(network):
        network.eval()
        try:
            logits = run_on_black_images(network, images=2, image_size=image_size)
        except Exception as error:  # whatever a network raises
            return _format_reason(error)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    return None if shape == (2, classes) else f"for 2 images it returns {shape} in place of {(2, classes)}"


def _format_reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [f"it raises {type(error).__name__}"])[0].rstrip(".")[:300]


def check_logits(network: Any, config: ModelConfig, *, classes: int, image_size: int) -> None:
    """Check by a trial that a network turns images of a size into one logit per class.

    Args:
        network: The network.
        config: What it was built from.
        classes: Number of its outputs.
        image_size: Side of the images in pixels.

    Raises:
        PylorusError: If it does not; the message names the key to change, and the sizes that work.
    """
    fault = find_fault(network, classes=classes, image_size=image_size)
    if fault is not None:
        raise PylorusError(_explain_fault(config, fault, classes=classes, image_size=image_size))


def build_trial_network(config: ModelConfig, *, classes: int, image_size: int | None) -> Any:
    """Build a timm model of random weights and check that it computes logits, before any image is read.

    Its tensors take no memory, except for models that can't be built that way. torch's random numbers stay as they are.

    Raises:
        PylorusError: If timm rejects the arguments, or the network does not compute logits of such images.
    """
    check_model_arguments(config.args, where="model.args")
    pretrained_cfg = timm.models.get_pretrained_cfg(config.name, allow_unregistered=True)
    assert pretrained_cfg is not None
    size = image_size or pretrained_cfg.input_size[-1]
    with torch.random.fork_rng(devices=[]):
        with suppress(PylorusError), torch.device("meta"):
            network = create_network(config.name, config.args, classes=classes, image_size=image_size)
            if find_fault(network, classes=classes, image_size=size) is None:
                return network
        # A few models can be built and run on a real device only.
        try:
            network = create_network(config.name, config.args, classes=classes, image_size=image_size)
        except PylorusError as error:
            raise PylorusError(
                _explain_rejection(config, str(error), classes=classes, image_size=image_size)
            ) from error
        check_logits(network, config, classes=classes, image_size=size)
    return network


SIDES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
"""Sides of images in pixels that are tried to suggest one."""
MAX_SUGGESTIONS = 3
"""Sizes that a message suggests."""


def _explain_fault(config: ModelConfig, fault: str, *, classes: int, image_size: int) -> str:
    """Say which key makes a network fail for images of a size, found by trials without it."""
    arguments = dict(config.args)

    def works(size: int, without: Iterable[str] = ()) -> bool:
        kept = {name: value for name, value in arguments.items() if name not in without}
        return _computes_logits(replace(config, args=kept), classes=classes, image_size=size)

    side = arguments.get("img_size")
    side = side[0] if isinstance(side, list | tuple) and len(set(side)) == 1 else side
    if isinstance(side, int) and side != image_size and works(side):
        return (
            f"model.args.img_size: found {side}, but the images have {image_size} × {image_size} pixels. Use "
            f"data.image_size={side} in place of model.args.img_size."
        )
    for name, value in arguments.items():
        if works(image_size, without=[name]):
            found = repr(value) if isinstance(value, str) else value
            return (
                f"model.args.{name}: found {found}, with which {config.name} does not compute one logit per class from "
                f"images of {image_size} × {image_size} pixels ({fault}). Leave model.args.{name} out."
            )
    if arguments and works(image_size, without=arguments):
        return (
            f"model.args: found {arguments}, with which {config.name} does not compute one logit per class from images "
            f"of {image_size} × {image_size} pixels ({fault}). Leave them out, or change them."
        )
    return (
        _suggest_sizes(config, fault, classes=classes, image_size=image_size)
        or f"model.name: {config.name} does not compute one logit per class from images ({fault})."
    )


def _explain_rejection(config: ModelConfig, rejection: str, *, classes: int, image_size: int | None) -> str:
    """Say which sizes work if it is for the size of the images that timm does not build a network."""
    if image_size is None:
        return rejection
    return _suggest_sizes(config, rejection, classes=classes, image_size=image_size) or rejection


def _computes_logits(config: ModelConfig, *, classes: int, image_size: int) -> bool:
    try:
        with torch.device("meta"):
            network = create_network(config.name, config.args, classes=classes, image_size=image_size)
        return find_fault(network, classes=classes, image_size=image_size) is None
    except PylorusError:
        return False


def _suggest_sizes(config: ModelConfig, fault: str, *, classes: int, image_size: int) -> str | None:
    """Say that a network can't process images of a size, and which it can; None if there are none."""
    own_size = _get_own_size(config.name)
    nearest = sorted({*SIDES, own_size} - {image_size}, key=lambda size: (size != own_size, abs(size - image_size)))
    trials = (size for size in nearest if _computes_logits(config, classes=classes, image_size=size))
    sizes = sorted(islice(trials, MAX_SUGGESTIONS))
    if not sizes:
        return None
    closest = min(sizes, key=lambda size: abs(size - image_size))
    advice = "Leave data.image_size out" if closest == own_size else f"Use data.image_size={closest}"
    if len(sizes) == 1:
        return (
            f"data.image_size: found {image_size}, expected {closest}: {config.name} is made for one size ({fault}). "
            f"{advice}."
        )
    return (
        f"data.image_size: found {image_size}, which {config.name} can't process ({fault}); it works with "
        f"{join_names([str(size) for size in sizes])}, among others. {advice}, or use another of these."
    )


def _get_own_size(name: str) -> int:
    """Return the side of the images that a timm model was designed for, in pixels."""
    pretrained_cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    return 224 if pretrained_cfg is None else int(pretrained_cfg.input_size[-1])


def init_inception(network: nn.Module) -> None:
    """Draw the convolutions of an Inception-V3 with random weights anew, after He et al. (2015).

    timm draws all of them with the same standard deviation, 0.1: while batch norm is frozen, features grow from layer
    to layer, to 4e7 and a loss above 1e8.

    Args:
        network: The network.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def register_network(name: str, factory: Callable[..., Any]) -> None:
    """Make a network of your own known by a name, in this process, like a model of timm.

    Args:
        name: Its name, as in `model.name` and in the exported model.
        factory: Function or class that takes `num_classes` and `model.args`, and returns a module like timm's, with
            `forward_features`, `forward_head(features, pre_logits=False)` and `get_classifier`. Its input is described
            by the attributes `input_size` (3, side, side), `mean` and `std`; without them ImageNet's are assumed.

    Raises:
        PylorusError: If timm has a model of that name.
    """
    if name in timm.list_models() and name not in _own_networks:
        raise PylorusError(f"model.name: timm has a model {name}. Give your own network another name.")

    def create(pretrained: bool = False, pretrained_cfg: Any = None, **arguments: Any) -> Any:
        for ignored in ("pretrained_cfg_overlay", "cache_dir"):
            arguments.pop(ignored, None)
        network = call_factory(factory, arguments)
        if not hasattr(network, "pretrained_cfg"):
            network.pretrained_cfg = {
                "architecture": name,
                "input_size": tuple(getattr(network, "input_size", (3, 224, 224))),
                "mean": tuple(getattr(network, "mean", IMAGENET_DEFAULT_MEAN)),
                "std": tuple(getattr(network, "std", IMAGENET_DEFAULT_STD)),
                "interpolation": getattr(network, "interpolation", "bicubic"),
            }
        return network

    create.__name__ = name
    _own_networks.add(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the name is registered again
        timm.models.register_model(create)


def call_factory(factory: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Build a network of the user's own, and check that it has timm's interface."""
    network = factory(**arguments)
    missing = [method for method in TIMM_METHODS if not hasattr(network, method)]
    if missing:
        raise ValueError(f"{type(network).__name__} has no {', '.join(missing)}")
    return network


def is_timm_model(name: str) -> bool:
    """Return whether a name, with or without a tag, is that of a model of timm itself, not of the user's own."""
    architecture = name.split(".")[0]
    return architecture in timm.list_models() and architecture not in _own_networks


_own_networks: set[str] = set()
TIMM_METHODS = ("forward_features", "forward_head", "get_classifier")
FACTORY_WEIGHTS = "factory"
"""Source of the weights of a network of the user's own, as its factory returned it."""


def check_model_arguments(arguments: Mapping[str, Any], *, where: str) -> None:
    """Check that arguments of timm.create_model are plain values, not absurdly large, and load no files.

    Raises:
        PylorusError: Names the argument.
    """
    if len(arguments) > MAX_ARGUMENTS:
        raise PylorusError(f"{where}: found {len(arguments)} arguments, expected at most {MAX_ARGUMENTS}.")
    for name, value in arguments.items():
        if (
            not str(name).isidentifier()
            or str(name).startswith("_")
            or name in RESERVED_ARGUMENTS
            or (name == "in_chans" and value != 3)
        ):
            raise PylorusError(
                f'{where}: "{str(name)[:100]}" can\'t be set here. Weights, classes and channels are not arguments; '
                "see model.weights."
            )
        values = value if isinstance(value, list | tuple) else [value]
        if len(values) > MAX_ARGUMENTS or not all(_is_plain(item) for item in values):
            raise PylorusError(
                f"{where}.{name}: found {str(value)[:100]}, expected a number within ±{MAX_ARGUMENT_SIZE:,}, a short "
                "string, true, false, null, or a short list of these."
            )


def _is_plain(value: object) -> bool:
    if isinstance(value, int | float):
        return abs(value) <= MAX_ARGUMENT_SIZE
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
    except Exception as error:  # whatever a network's constructor raises
        reason = _format_reason(error)
        raise PylorusError(f"model.name {name}, model.args {dict(arguments)}: timm rejected them: {reason}") from error
    classifier = network.get_classifier() if hasattr(network, "get_classifier") else None
    if not isinstance(classifier, nn.Module | tuple | list):
        raise PylorusError(f"model.name: {name} has no classification head to replace.")
    return network


def convert_to_pixel_scale(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Convert mean and standard deviation of channels to those of pixels in [0, 255], each of shape (1, 3, 1, 1)."""
    pixel_mean, pixel_std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return pixel_mean, pixel_std


def normalize_images(image: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalize images to a network's input: the one normalization of training, prediction and export.

    Args:
        image: RGB images of shape (n, 3, size, size), with pixels in [0, 255], usually uint8.
        mean: Mean of each channel, from `convert_to_pixel_scale`.
        std: Standard deviation of each channel, from `convert_to_pixel_scale`.

    Returns:
        Images of the same shape, in the precision of `mean`.

    Raises:
        ValueError: If the images do not have three channels.
    """
    if image.shape[1] != 3:
        raise ValueError(f"found {image.shape[1]}-channel images, expected RGB: decode them with pylorus.data.decode")
    return (image.float() - mean) / std


@contextmanager
def restore_modes(network: nn.Module) -> Iterator[None]:
    """Restore each module's training or evaluation mode on exit."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class InvalidBatchError(PylorusError, ValueError):
    """A batch of images in another form than a classifier takes."""


def check_image_batch(image: Any) -> None:
    """Check that images are RGB (batch, 3, size, size) with pixels in [0, 255].

    Raises:
        InvalidBatchError: If not; the message says how images of another kind are converted.
    """
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != 3:
        is_batch = isinstance(image, Tensor) and image.ndim == 4
        channels = f"found {image.shape[1]}-channel images, expected RGB: " if is_batch else ""
        raise InvalidBatchError(
            f"image: {channels}found {describe_value(image)}, expected a uint8 tensor of shape (batch, 3, size, size). "
            "An RGB array (size, size, 3) is converted by torch.from_numpy(array).permute(2, 0, 1)[None]."
        )
    if image.is_floating_point() and not torch.compiler.is_compiling():
        low, high = float(image.min()), float(image.max())
        if low < 0 or 0 < high <= 1.5:
            raise InvalidBatchError(
                f"image: found pixels from {low:.3g} to {high:.3g}, expected 0 to 255, as uint8: the classifier "
                "normalizes images itself."
            )
