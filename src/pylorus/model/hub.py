"""Where pretrained weights are: on the hub, in its cache on this machine, or in a folder of files."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from timm.models import get_pretrained_cfg

from pylorus.config.checks import check_model_name
from pylorus.config.schema import CONF, ModelConfig
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_command, format_count

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Possible suffixes of a weight file."""
HUB_TIMEOUT = 12.0
"""Seconds to wait for the hub's first answer."""


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

    def format_fetch_command(self, folder: str) -> str:
        """Return the command that downloads the file into a folder, on any machine with a network."""
        from huggingface_hub import hf_hub_url

        target = f"{folder}/{self.name}.safetensors"
        return (
            format_command(["curl", "--fail", "--location", "--create-dirs", "--output", target])
            + " "
            + hf_hub_url(self.repository, self.file)
        )

    def format_download_hint(self, folder: str = "PATH") -> str:
        """Say which file to download, from where, and how to use it on a machine without network access."""
        local_file = f"{folder}/{self.name}.safetensors"
        return (
            f"download {self.file} from the Hugging Face repository {self.repository}, save it as "
            f"{self.name}.safetensors, copy it to this machine and add model.weights={local_file}."
        )


def format_timm_name(cfg: Mapping[str, Any]) -> str:
    """Return timm's name of the weights that its `cfg` describes: the architecture, and the tag if there is one."""
    return ".".join(part for part in (cfg.get("architecture"), cfg.get("tag")) if part)


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
    return HubFile(format_timm_name(cfg), repository, cfg.get("hf_hub_filename") or "model.safetensors")


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


def find_all_weights(models: Mapping[str, ModelConfig], weights: str | None) -> dict[str, str | None]:
    """Find the weights of several networks, and download those that the hub has.

    Args:
        models: What a user calls each network, and its configuration.
        weights: hub, none, or a folder with a file for each network; None: as each configuration says.

    Returns:
        The value of `model.weights` for each network; None: as its configuration says.

    Raises:
        PylorusError: If weights are not on this machine and can't be downloaded; the message lists all of them.
    """
    if weights is not None and weights not in ("hub", "none"):
        return dict(_iter_files(Path(weights).expanduser().absolute(), models))
    missing: list[str] = []
    problem: HubUnreachableError | None = None
    for name, config in models.items():
        if (weights or config.weights) != "hub":
            continue
        cfg: Any = get_pretrained_cfg(config.name, allow_unregistered=True)
        location = resolve_hub_file(cfg.to_dict())
        if location.find_cached_file() is not None:
            continue
        try:
            missing.append(f"  {name}: {location.name}, from the Hugging Face repository {location.repository}")
            if problem is None:  # the hub is asked until it does not answer
                resolve_weights_file("hub", cfg.to_dict())
                missing.pop()
        except HubUnreachableError as error:
            problem = error
    if problem is not None:
        raise PylorusError(
            f"--weights hub: {str(problem).splitlines()[0]}\nNot on this machine:\n"
            + "\n".join(missing)
            + "\nOn a machine with a network, download model.safetensors of each, save it as NAME.safetensors, the "
            "name above, in one folder, copy it to this machine and type --weights FOLDER. For random weights, to try "
            "the command: --weights none."
        ) from problem
    return dict.fromkeys(models, weights)


def _iter_files(folder: Path, models: Mapping[str, ModelConfig]) -> Iterator[tuple[str, str]]:
    """Yield the weight file of each network in a folder.

    Raises:
        PylorusError: If there is no such folder, or a file is missing; the message lists all that are.
    """
    if not folder.is_dir():
        raise PylorusError(f"--weights: found {folder}, expected hub, none, or an existing folder with weight files.")
    missing: list[str] = []
    for name, config in models.items():
        cfg: Any = get_pretrained_cfg(config.name, allow_unregistered=True)
        full = config.name if cfg is None else format_timm_name(cfg.to_dict())
        stems = dict.fromkeys((name, full, config.name, full.split(".")[0]))
        file = find_file(folder, *stems)
        if file is not None:
            yield name, str(file)
            continue
        source = f", from the Hugging Face repository {cfg.hf_hub_id}" if cfg is not None and cfg.hf_hub_id else ""
        missing.append(f"  {folder / full}.safetensors{source}")
    if missing:
        raise PylorusError(
            f"--weights: the weights of {format_count(len(missing), 'network')} are missing:\n"
            + "\n".join(missing)
            + "\nOn a machine with a network, download model.safetensors of each repository, and save it under the "
            "name above. Or leave the network out of --models, or for random weights type --weights none."
        )


def find_file(folder: Path, *stems: str) -> Path | None:
    """Return the first weight file in a folder with one of these names, without suffix; None if there is none."""
    files = (folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES)
    return next((file for file in files if file.is_file()), None)


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


def list_hub_models() -> dict[str, str]:
    """Return the models of conf/model that start from the hub's weights: their names there, mapped to timm's names."""
    models: dict[str, str] = {}
    for file in sorted((CONF / "model").glob("*.yaml")):
        content: Any = OmegaConf.to_container(OmegaConf.load(file))
        if "name" in content and content.get("weights", "hub") == "hub":
            models[file.stem] = content["name"]
    return models


def locate_weights(model: str) -> HubFile:
    """Return where the hub has the weights of a model, by its name in conf/model or timm's.

    Raises:
        PylorusError: If there is no such model, or the hub has no weights of it.
    """
    name = list_hub_models().get(model, model)
    check_model_name(name, where="MODEL")
    cfg: Any = get_pretrained_cfg(name, allow_unregistered=True)
    return resolve_hub_file(cfg.to_dict())


def find_weights(hub: HubFile, folder: Path) -> LocalWeights | None:
    """Return the weights from the hub's cache or the folder; None if neither has them."""
    cached = hub.find_cached_file()
    if cached is not None:
        return LocalWeights(cached, "in the hub's cache", "model.weights=hub")
    file = find_file(folder, hub.name)
    return None if file is None else LocalWeights(file, f"in {file}", f"model.weights={file}")
