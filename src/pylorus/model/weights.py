"""A network's weights: from the hub's cache, the hub or a file, read as tensors only, every key accounted for."""

import hashlib
import inspect
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pylorus.errors import PylorusError, listing
from pylorus.model.head import classifier_names

PATIENCE = 12.0
"""Seconds to wait for the hub's first answer."""

SPARE = ("AuxLogits.",)
"""Parts that a file may hold and our network does not: Inception's training aid."""


class HubUnreachableError(PylorusError):
    """The weights are not on this machine and the hub does not answer."""


@dataclass(frozen=True)
class HubFile:
    """Where an architecture's weights lie on the hub, and what they are called here.

    Attributes:
        name: timm's name of the weights, with its tag: that of the file that is brought.
        repository: Of the hub.
        file: In the repository.
    """

    name: str
    repository: str
    file: str

    def kept(self) -> Path | None:
        """The file in the hub's cache on this machine; None where it is not. Asks no network."""
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repository, self.file)
        return Path(cached) if isinstance(cached, str) else None

    def how_to_bring(self, folder: str = "PATH") -> str:
        """Which file to fetch, from where, and what to do with it on a machine without a network."""
        brought = f"{folder}/{self.name}.safetensors"
        return (
            f"fetch {self.file} of the Hugging Face repository {self.repository}, save it as "
            f"{self.name}.safetensors, bring it here and add model.weights={brought}."
        )


def hub_file(cfg: Mapping[str, Any]) -> HubFile:
    """Where the hub keeps the weights that timm's `cfg` describes.

    Raises:
        PylorusError: If timm knows none there.
    """
    repository = cfg.get("hf_hub_id")
    if not repository:
        raise PylorusError(
            f"model.weights: timm knows no weights on the hub for {cfg.get('architecture')}. Give a file or none."
        )
    name = ".".join(part for part in (cfg.get("architecture"), cfg.get("tag")) if part)
    return HubFile(name, repository, cfg.get("hf_hub_filename") or "model.safetensors")


def weights_file(weights: str, cfg: Mapping[str, Any]) -> Path | None:
    """The file that `model.weights` means; None for random weights.

    Args:
        weights: hub, none, or a file's path.
        cfg: What timm knows of the architecture's weights.

    Raises:
        HubUnreachableError: If the file is not here and the hub does not answer, within 15 seconds.
        PylorusError: If there is no such file, or no weights on the hub.
    """
    if weights == "none":
        return None
    if weights == "hub":
        return _from_hub(cfg)
    file = Path(weights)
    if not file.is_file():
        raise PylorusError(f"model.weights: found {weights}, expected hub, none, or a file that exists.")
    return file


def _from_hub(cfg: Mapping[str, Any]) -> Path:
    """The weights' file in the hub's cache, fetched if it is not there yet.

    Raises:
        HubUnreachableError: Within 15 seconds; the message says which file to bring.
    """
    from huggingface_hub import hf_hub_download

    found = hub_file(cfg)
    cached = found.kept()
    if cached is not None:
        return cached
    why = _why_unreachable(found.repository, found.file)
    if why is None:
        try:
            return Path(hf_hub_download(found.repository, found.file))
        except Exception as error:
            why = str(error)
    raise HubUnreachableError(
        f"the weights of {found.name} are not on this machine, and the hub does not answer "
        f"({why.strip().splitlines()[0]}).\nWhere there is a network, {found.how_to_bring()} "
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
    network.load_state_dict(fitting_tensors(network, file), strict=False)


def fitting_tensors(network: Any, file: Path) -> dict[str, torch.Tensor]:
    """What a file holds for the network, by the network's names, without the classifier.

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
    return {name: tensor for name, tensor in given.items() if _fits(name, wanted, heads)}


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


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
