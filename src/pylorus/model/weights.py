"""A network's weights: from the hub, its cache or a file, read as tensors only, with every key accounted for."""

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

from pylorus.errors import PylorusError, format_name_list
from pylorus.model.head import list_classifier_names

PATIENCE = 12.0
"""Seconds to wait for the hub's first answer."""

SPARE = ("AuxLogits.",)
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

    reason: list[str | None] = [f"no answer within {PATIENCE:.0f} s"]

    def query_hub() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(repository, file), timeout=PATIENCE - 2)
            reason[0] = None
        except Exception as error:
            reason[0] = str(error) or type(error).__name__

    thread = threading.Thread(target=query_hub, daemon=True)
    thread.start()
    thread.join(PATIENCE)
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
    unknown = [name for name in tensors if name not in expected and not name.startswith((*head_prefixes, *SPARE))]
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
            f"model.weights: {file} can't be read as tensors: {str(error).splitlines()[0]}\n"
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
