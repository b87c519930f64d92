"""A network's weights: from the hub, its cache or a file, read as tensors only, with every key accounted for."""

import hashlib
import inspect
import logging
import pickle
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from pylorus.config.checks import check_model_name
from pylorus.config.instantiation import get_object, get_target
from pylorus.config.schema import ModelConfig
from pylorus.core.errors import PylorusError, format_name_list


def list_classifier_names(network: Any) -> tuple[str, ...]:
    """Return the names of the modules that produce the logits: one classifier, or two in distilled transformers."""
    classifier = network.get_classifier()
    heads = classifier if isinstance(classifier, tuple | list) else (classifier,)
    return tuple(name for name, module in network.named_modules() if any(module is head for head in heads))


def init_head(network: Any) -> None:
    """Initialize the head with small random weights, so that a stage starts from nearly uniform probabilities.

    timm's own initialization differs between models; with few classes some are so large that ten epochs only undo it.
    """
    for name in list_classifier_names(network):
        head = network.get_submodule(name)
        if isinstance(head, nn.Linear | nn.Conv2d):
            nn.init.normal_(head.weight, std=0.01)
            if head.bias is not None:
                nn.init.zeros_(head.bias)


HUB_TIMEOUT = 12.0
"""Seconds to wait for the hub's first answer."""

IGNORED_KEYS = ("AuxLogits.",)
"""Keys that a file may hold and our network does not: Inception's auxiliary classifier."""


class HubUnreachableError(PylorusError):
    """Raised if the weights are not on this machine and the hub is unreachable."""


@dataclass(frozen=True)
class HubFile:
    """Location of an architecture's weights on the hub.

    Attributes:
        name: timm's name of the weights, with its tag; also the name for a file that the user downloads.
        repository: Repository on the hub.
        file: File in the repository.
    """

    name: str
    repository: str
    file: str

    def find_cached_file(self) -> Path | None:
        """Return the file in the hub's cache on this machine, or None; uses no network."""
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repository, self.file)
        return Path(cached) if isinstance(cached, str) else None

    def format_download_hint(self, folder: str = "PATH") -> str:
        """Say which file to download, from where, and how to use it on a machine without network access."""
        local_file = f"{folder}/{self.name}.safetensors"
        return (
            f"download {self.file} from the Hugging Face repository {self.repository}, save it as "
            f"{self.name}.safetensors, copy it to this machine and add model.weights={local_file}."
        )


def resolve_hub_file(cfg: Mapping[str, Any]) -> HubFile:
    """Return the hub location of the weights that timm's `cfg` describes.

    Raises:
        PylorusError: If timm knows none.
    """
    repository = cfg.get("hf_hub_id")
    if not repository:
        raise PylorusError(
            f"model.weights: timm knows no weights on the hub for {cfg.get('architecture')}. Use a file or none."
        )
    name = ".".join(part for part in (cfg.get("architecture"), cfg.get("tag")) if part)
    return HubFile(name, repository, cfg.get("hf_hub_filename") or "model.safetensors")


def resolve_weights_file(weights: str, cfg: Mapping[str, Any]) -> Path | None:
    """Return the file that `model.weights` refers to; None for random weights.

    Args:
        weights: hub, none, or a file's path.
        cfg: timm's pretrained configuration of the architecture.

    Raises:
        HubUnreachableError: If the file is not cached and the hub does not answer within 15 seconds.
        PylorusError: If there is no such file, or no weights on the hub.
    """
    if weights == "none":
        return None
    if weights == "hub":
        return _fetch_from_hub(cfg)
    file = Path(weights)
    if not file.is_file():
        raise PylorusError(f"model.weights: found {weights}, expected hub, none, or an existing file.")
    return file


def _fetch_from_hub(cfg: Mapping[str, Any]) -> Path:
    """Return the weights file in the hub's cache, downloading it if necessary.

    Raises:
        HubUnreachableError: Within 15 seconds; the message says which file to download.
    """
    from huggingface_hub import hf_hub_download

    hub_location = resolve_hub_file(cfg)
    cached = hub_location.find_cached_file()
    if cached is not None:
        return cached
    reason = _explain_unreachable(hub_location.repository, hub_location.file)
    if reason is None:
        try:
            return Path(hf_hub_download(hub_location.repository, hub_location.file))
        except Exception as error:
            reason = str(error)
    raise HubUnreachableError(
        f"the weights of {hub_location.name} are not on this machine, and the hub is unreachable "
        f"({reason.strip().splitlines()[0]}).\nOn a machine with network access, {hub_location.format_download_hint()} "
        "For random weights: model.weights=none."
    )


def _explain_unreachable(repository: str, file: str) -> str | None:
    """Return None if the hub answers for this file, else why not; DNS may hang longer than any timeout."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    reason: list[str | None] = [f"no answer within {HUB_TIMEOUT:.0f} s"]

    def query_hub() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(repository, file), timeout=HUB_TIMEOUT - 2)
            reason[0] = None
        except Exception as error:
            reason[0] = str(error) or type(error).__name__

    thread = threading.Thread(target=query_hub, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    return reason[0]


def load_weights(network: Any, file: Path) -> None:
    """Load a file into the network; every key must match, except those of the classification head.

    Raises:
        PylorusError: If the file can't be read as tensors, or a key is missing, unknown or has a different shape.
    """
    network.load_state_dict(match_tensors(network, file), strict=False)


def match_tensors(network: Any, file: Path) -> dict[str, torch.Tensor]:
    """Return a file's tensors for the network, under the network's names, without the classification head.

    Raises:
        PylorusError: If the file can't be read as tensors, or a key is missing, unknown or has a different shape.
    """
    tensors = _convert_keys(network, _read_tensors(file))
    expected = network.state_dict()
    head_prefixes = tuple(f"{name}." for name in list_classifier_names(network))
    # Files from before torch 0.4.1 lack this counter, which no network with a fixed momentum uses.
    missing = [
        name
        for name in expected
        if name not in tensors and not name.startswith(head_prefixes) and not name.endswith(".num_batches_tracked")
    ]
    unknown = [
        name for name in tensors if name not in expected and not name.startswith((*head_prefixes, *IGNORED_KEYS))
    ]
    mismatched = [
        f"{name}: {tuple(tensors[name].shape)} in the file, {tuple(expected[name].shape)} in the network"
        for name in tensors
        if name in expected and tensors[name].shape != expected[name].shape and not name.startswith(head_prefixes)
    ]
    if missing or unknown or mismatched:
        problems = [
            ("missing in the file", missing),
            ("unknown to the network", unknown),
            ("with a different shape", mismatched),
        ]
        details = "\n".join(
            f"{len(names)} {'key' if len(names) == 1 else 'keys'} {problem}:\n{format_name_list(names, most=4)}"
            for problem, names in problems
            if names
        )
        raise PylorusError(
            f"model.weights: {file} does not match {type(network).__name__} "
            f"({getattr(network, 'pretrained_cfg', {}).get('architecture')}).\n{details}\n"
            "Is it a file for exactly this architecture? See model.name."
        )
    return {name: tensor for name, tensor in tensors.items() if _is_backbone_tensor(name, expected, head_prefixes)}


def _is_backbone_tensor(name: str, expected: Mapping[str, torch.Tensor], head_prefixes: tuple[str, ...]) -> bool:
    return name in expected and not name.startswith(head_prefixes)


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, or of a pickle from which only tensors are loaded."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PylorusError(
            f"model.weights: {file} can't be read as tensors{_format_cause(error)}. "
            "Expected a safetensors file, or a pickle of tensors only: nothing else is loaded, since it could run "
            "code."
        ) from error
    for wrapper_key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper_key), dict):
            content = content[wrapper_key]
    tensors = {str(name).removeprefix("module."): tensor for name, tensor in dict(content).items()}
    if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise PylorusError(f"model.weights: {file} holds no dictionary of tensors by name.")
    return tensors


def _format_cause(error: Exception) -> str:
    """Return the cause of a failure to read a file, without torch's advice to load code from it."""
    cause = str(error).splitlines()[0] if str(error) else type(error).__name__
    return "" if isinstance(error, pickle.UnpicklingError) or "weights_only" in cause else f": {cause.rstrip('.')}"


def read_checkpoint(file: Path, device: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the weights and hyperparameters of a checkpoint of Lightning: tensors and plain values only.

    Args:
        file: The checkpoint.
        device: Device to load to, in any form that `torch.load` takes.

    Raises:
        PylorusError: If there is no such file, or it is no checkpoint of tensors and plain values.
    """
    if not file.is_file():
        raise PylorusError(f"{file}: there is no such file.")
    try:
        checkpoint: Any = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        raise PylorusError(
            f"{file}: can't be read as tensors and plain values{_format_cause(error)}. Nothing else is loaded, since "
            "it could run code. Expected a checkpoint that Trainer.save_checkpoint wrote of a pylorus.Classifier."
        ) from error
    state, hyperparameters = (
        checkpoint.get(name) if isinstance(checkpoint, dict) else None for name in ("state_dict", "hyper_parameters")
    )
    if not isinstance(state, dict) or not isinstance(hyperparameters, dict | None):
        raise PylorusError(f"{file}: this is not a checkpoint of a LightningModule.")
    return state, hyperparameters or {}


def _convert_keys(network: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename keys of other sources (torchvision, the authors) to timm's, with timm's filter for the architecture."""
    module = sys.modules[type(network).__module__]
    filter_keys = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if filter_keys is None:
        return tensors
    takes_network = len(inspect.signature(filter_keys).parameters) > 1
    return dict(filter_keys(tensors, network) if takes_network else filter_keys(tensors))


def compute_sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


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
    node = get_target(config)
    if node is not None:
        register_network(config.name, get_object(node, key="model"))
    else:
        check_model_name(config.name, where="model.name")
    check_model_arguments(config.args, where="model.args")
    network = create_network(config.name, config.args, classes=classes, image_size=image_size)
    pretrained_cfg = network.pretrained_cfg
    file, weights = None, config.weights
    if node is not None and weights == "hub":
        weights = FACTORY_WEIGHTS
    try:
        file = None if weights == FACTORY_WEIGHTS else resolve_weights_file(config.weights, pretrained_cfg)
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
        name=config.name if node is not None else _format_timm_name(pretrained_cfg),
        image_size=image_size or data_config["input_size"][-1],
        interpolation=data_config["interpolation"],
        mean=tuple(data_config["mean"]),
        std=tuple(data_config["std"]),
        weights=weights if weights in ("hub", "none", FACTORY_WEIGHTS) else Path(weights).name,
        weights_sha256=compute_sha256(file) if file is not None else None,
        licence=pretrained_cfg.get("license") if weights == "hub" else None,
    )


def _format_timm_name(pretrained_cfg: Mapping[str, Any]) -> str:
    return ".".join(part for part in (pretrained_cfg.get("architecture"), pretrained_cfg.get("tag")) if part)


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
    except (TypeError, ValueError, RuntimeError) as error:
        raise PylorusError(f"model.name {name}, model.args {dict(arguments)}: timm rejected them: {error}") from error
    if not isinstance(network.get_classifier(), nn.Module | tuple | list):
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
