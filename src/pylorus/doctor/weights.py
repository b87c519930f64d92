"""Check the weights of the study's models: present, undamaged, matching; else name the files to bring. Needs torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from pylorus.cache.budget import format_bytes
from pylorus.config import CONF
from pylorus.doctor.check import Check, State
from pylorus.errors import PylorusError
from pylorus.model.weights import HubFile, compute_sha256, match_tensors, resolve_hub_file

WEIGHTS = "Weights"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Possible suffixes of a weight file."""


@dataclass(frozen=True)
class LocalWeights:
    """A model's weight file on this machine.

    Attributes:
        file: Path of the weights.
        where: Their location, as text.
        key: The configuration key and value that loads them.
    """

    file: Path
    where: str
    key: str


def check_weights(folder: Path) -> Iterator[Check]:
    """Yield a check for each model of the study, and one that says how a sweep loads them all.

    Args:
        folder: Folder with weight files that were copied here, searched besides the hub's cache.
    """
    carried = 0
    for model, name in list_study_models().items():
        hub = resolve_hub_file(dict(timm.models.get_pretrained_cfg(name).to_dict()))  # type: ignore[union-attr]
        found = find_weights(hub, folder)
        carried += found is not None and found.file.parent == folder
        yield check_model(model, hub, found, folder)
    if carried > 1:
        key = f"'model.weights={folder}/${{model.name}}.safetensors'"
        yield Check(WEIGHTS, "sweep", State.GOOD, f"use all weight files of {folder} in a sweep with {key}")


def list_study_models() -> dict[str, str]:
    """Return the models of conf/model that start from the hub's weights: their names there, mapped to timm's names."""
    from omegaconf import OmegaConf

    models: dict[str, str] = {}
    for file in sorted((CONF / "model").glob("*.yaml")):
        content: Any = OmegaConf.to_container(OmegaConf.load(file))
        if "name" in content and content.get("weights", "hub") == "hub":
            models[file.stem] = content["name"]
    return models


def find_weights(hub: HubFile, folder: Path) -> LocalWeights | None:
    """Return the weights from the hub's cache or the folder; None if neither has them."""
    cached = hub.find_cached_file()
    if cached is not None:
        return LocalWeights(cached, "in the hub's cache", "model.weights=hub")
    for suffix in SUFFIXES:
        file = folder / f"{hub.name}{suffix}"
        if file.is_file():
            return LocalWeights(file, f"in {file}", f"model.weights={file}")
    return None


def check_model(model: str, hub: HubFile, found: LocalWeights | None, folder: Path) -> Check:
    """Check that a model's weights are present, undamaged and match the network.

    Args:
        model: Name in conf/model.
        hub: Where the hub has the weights.
        found: The weights on this machine; None if there are none.
        folder: Where to put weights that are brought.
    """
    with torch.device("meta"):  # names and shapes only: no memory, no random numbers
        network: Any = timm.create_model(hub.name, pretrained=False)
    if found is None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
        summary = f"{hub.name} not found (about {format_bytes(size)}): neither in the hub's cache nor in {folder}/"
        how = hub.format_download_hint(str(folder))
        fix = f"With a network, a run downloads it once. Without one: on a machine that has a network, {how}"
        return Check(WEIGHTS, model, State.WARNING, summary, fix)
    actual_hash = compute_sha256(found.file)
    summary = f"{hub.name} {found.where}, {format_bytes(found.file.stat().st_size)}, SHA-256 {actual_hash}"
    replace_file = f"Remove {found.file}, then {hub.format_download_hint(str(folder))}"
    expected_hash = _get_expected_hash(found.file)
    if expected_hash is not None and expected_hash != actual_hash:
        return Check(
            WEIGHTS,
            model,
            State.WRONG,
            f"{summary}, but the hub's cache expects {expected_hash}: the file is damaged",
            replace_file,
        )
    try:
        match_tensors(network, found.file)
    except PylorusError as error:
        return Check(WEIGHTS, model, State.WRONG, f"{summary}: {str(error).splitlines()[0]}", replace_file)
    return Check(WEIGHTS, model, State.GOOD, f"{summary}, all keys match; use it with {found.key}")


def _get_expected_hash(file: Path) -> str | None:
    """Return the SHA-256 that a file of the hub's cache is named after, or None if its name is not a hash."""
    name = file.resolve().name
    return name if len(name) == 64 and set(name) <= set("0123456789abcdef") else None
