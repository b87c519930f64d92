"""The study's weights: whether they are here, whole and fitting, and else which files to carry in. Needs torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from pylorus.cache.budget import readable_size
from pylorus.config import CONF
from pylorus.doctor.check import Check, State
from pylorus.errors import PylorusError
from pylorus.model.weights import HubFile, fitting_tensors, hub_file, sha256

AREA = "Weights"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""What a file of weights may end with."""


@dataclass(frozen=True)
class Found:
    """A model's weights on this machine.

    Attributes:
        file: Where they lie.
        where: The same in words.
        key: What the command line takes them by.
    """

    file: Path
    where: str
    key: str


def check_weights(folder: Path) -> Iterator[Check]:
    """One line for each model of the study, and one that says how a sweep takes them all.

    Args:
        folder: Where files that were carried in lie, beside the hub's cache.
    """
    carried = 0
    for model, name in study_models().items():
        hub = hub_file(dict(timm.models.get_pretrained_cfg(name).to_dict()))  # type: ignore[union-attr]
        found = look_for(hub, folder)
        carried += found is not None and found.file.parent == folder
        yield check_model(model, hub, found, folder)
    if carried > 1:
        key = f"'model.weights={folder}/${{model.name}}.safetensors'"
        yield Check(AREA, "a sweep", State.GOOD, f"takes the files of {folder} with {key}")


def study_models() -> dict[str, str]:
    """What `model=` offers with weights of the hub: names in conf/model, and timm's names."""
    from omegaconf import OmegaConf

    models: dict[str, str] = {}
    for file in sorted((CONF / "model").glob("*.yaml")):
        content: Any = OmegaConf.to_container(OmegaConf.load(file))
        if "name" in content and content.get("weights", "hub") == "hub":
            models[file.stem] = content["name"]
    return models


def look_for(hub: HubFile, folder: Path) -> Found | None:
    """The weights in the hub's cache, or in the folder; None where they are in neither."""
    cached = hub.kept()
    if cached is not None:
        return Found(cached, "in the hub's cache", "model.weights=hub")
    for suffix in SUFFIXES:
        file = folder / f"{hub.name}{suffix}"
        if file.is_file():
            return Found(file, f"in {file}", f"model.weights={file}")
    return None


def check_model(model: str, hub: HubFile, found: Found | None, folder: Path) -> Check:
    """Whether a model's weights are here, whole and fitting."""
    with torch.device("meta"):  # names and shapes alone: no memory, no random numbers
        network: Any = timm.create_model(hub.name, pretrained=False)
    if found is None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
        told = f"{hub.name} not here (about {readable_size(size)}): neither in the hub's cache nor in {folder}/"
        mend = f"With a network a run fetches it once. Else, where there is one, {hub.how_to_bring(str(folder))}"
        return Check(AREA, model, State.WARNING, told, mend)
    content = sha256(found.file)
    about = f"{hub.name} {found.where}, {readable_size(found.file.stat().st_size)}, SHA-256 {content}"
    again = f"Remove {found.file}, then {hub.how_to_bring(str(folder))}"
    named = _named_by_hash(found.file)
    if named is not None and named != content:
        return Check(AREA, model, State.WRONG, f"{about}, but the hub's cache says {named}: it is damaged", again)
    try:
        fitting_tensors(network, found.file)
    except PylorusError as error:
        return Check(AREA, model, State.WRONG, f"{about}: {str(error).splitlines()[0]}", again)
    return Check(AREA, model, State.GOOD, f"{about}, every key fits; {found.key}")


def _named_by_hash(file: Path) -> str | None:
    """The SHA-256 that a file in the hub's cache is called by, where the cache keeps it so."""
    name = file.resolve().name
    return name if len(name) == 64 and set(name) <= set("0123456789abcdef") else None
