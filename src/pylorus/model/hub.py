"""Where pretrained weights are: on the hub, in its cache on this machine, on a page, or in a folder of files."""

import re
import shutil
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
from pylorus.core.io import write_atomically

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Possible suffixes of a weight file."""
HUB_TIMEOUT = 12.0
"""Seconds to wait for the hub's first answer."""


class HubUnreachableError(PylorusError):
    """Raised if the weights are not on this machine, and the hub is unreachable or does not have them."""


@dataclass(frozen=True)
class HubFile:
    """Location of a model's weights: in a repository on the hub, or on a page from which a person downloads them.

    Attributes:
        name: Name of a copy on this machine, without suffix: timm's name of the weights, with its tag; of weights with
            a source of their own, the name that they have there.
        repository: Repository on the hub; "" for weights that are not there.
        file: File in the repository, or on the page.
        page: Address of the page; None for weights on the hub.
        architecture: timm's name of the network; None: the same as `name`.
        licence: Licence of the weights, as timm or the model's file states it; None if not stated.
    """

    name: str
    repository: str
    file: str
    page: str | None = None
    architecture: str | None = None
    licence: str | None = None

    @property
    def local_name(self) -> str:
        """Name of a copy on this machine."""
        return self.name + Path(self.file).suffix

    @property
    def origin(self) -> str:
        """The repository or the page, as text."""
        return self.page or f"hf://{self.repository}"

    def find_cached_file(self) -> Path | None:
        """Return the file in the hub's cache on this machine, or None; uses no network."""
        from huggingface_hub import try_to_load_from_cache

        if self.page is not None:
            return None
        cached = try_to_load_from_cache(self.repository, self.file)
        return Path(cached) if isinstance(cached, str) else None

    def format_fetch_command(self, folder: str) -> str:
        """Return the command that downloads the file into a folder, on any machine with a network.

        For weights on a page it is the sentence that says what to do there.
        """
        from huggingface_hub import hf_hub_url

        target = f"{folder}/{self.local_name}"
        if self.page is not None:
            return f"in a browser, open {self.page}, download {self.file}, and save it as {target}"
        return (
            format_command(["curl", "--fail", "--location", "--create-dirs", "--output", target])
            + " "
            + hf_hub_url(self.repository, self.file)
        )

    def format_download_hint(self, folder: str = "PATH") -> str:
        """Say which file to download, from where, and how to use it on a machine without network access."""
        place = f"the page {self.page}" if self.page else f"the Hugging Face repository {self.repository}"
        return (
            f"download {self.file} from {place}, save it as {self.local_name}, copy it to this machine and add "
            f"model.weights={folder}/{self.local_name}."
        )


def format_timm_name(cfg: Mapping[str, Any]) -> str:
    """Return timm's name of the weights that its `cfg` describes: the architecture, and the tag if there is one."""
    return ".".join(part for part in (cfg.get("architecture"), cfg.get("tag")) if part)


def resolve_hub_file(config: ModelConfig, cfg: Mapping[str, Any]) -> HubFile:
    """Return where the weights of a model are: as `model.source` says, or as timm's `cfg` describes.

    Raises:
        PylorusError: If timm knows none, or `model.source` is not an address.
    """
    name = format_timm_name(cfg)
    if config.source is None:
        repository = cfg.get("hf_hub_id")
        if not repository:
            raise PylorusError(
                f"model.weights: timm knows no weights on the hub for {cfg.get('architecture')}. Use a file or none."
            )
        file = cfg.get("hf_hub_filename") or "model.safetensors"
        return HubFile(name, repository, file, licence=config.licence or cfg.get("license"))
    on_hub = re.fullmatch(r"hf://([\w.-]+/([\w.-]+))/([\w./+-]+)", config.source)
    if on_hub is not None:
        return HubFile(on_hub[2], on_hub[1], on_hub[3], architecture=name, licence=config.licence)
    page, _, file = config.source.partition("#")
    if re.match(r"https?://", page) is None or Path(file).suffix not in SUFFIXES or "/" in file:
        raise PylorusError(
            f"model.source: found {config.source}, expected hf://OWNER/REPOSITORY/FILE, or https://PAGE#FILE with a "
            f"file that ends in {', '.join(SUFFIXES)}."
        )
    return HubFile(Path(file).stem, "", file, page=page, architecture=name, licence=config.licence)


def resolve_weights_file(config: ModelConfig, cfg: Mapping[str, Any]) -> Path | None:
    """Return the file that `model.weights` refers to; None for random weights.

    Args:
        config: The model: weights (hub, none, or a file's path) and their source.
        cfg: timm's pretrained configuration of the architecture.

    Raises:
        HubUnreachableError: If the file is not cached, and the hub does not answer within 15 seconds or has no such
            file.
        PylorusError: If there is no such file, or no weights on the hub.
    """
    if config.weights == "none":
        return None
    if config.weights == "hub":
        return download_weights(resolve_hub_file(config, cfg))
    file = Path(config.weights)
    if not file.is_file():
        raise PylorusError(f"model.weights: found {config.weights}, expected hub, none, or an existing file.")
    return file


def download_weights(location: HubFile) -> Path:
    """Return the weights file in the hub's cache, downloading it if necessary.

    Raises:
        HubUnreachableError: Within 15 seconds; the message says which file to download.
    """
    from huggingface_hub import hf_hub_download

    cached = location.find_cached_file()
    if cached is not None:
        return cached
    if location.page is not None:
        raise HubUnreachableError(
            f"the weights {location.name} are not on the hub: a program can't download them.\n"
            f"On a machine with network access, {location.format_download_hint()} For random weights: "
            "model.weights=none."
        )
    reason = _explain_unreachable(location.repository, location.file)
    if reason is None:
        try:
            return Path(hf_hub_download(location.repository, location.file))
        except Exception as error:
            reason = str(error)
    raise HubUnreachableError(
        f"the weights of {location.name} are not on this machine, and the hub is unreachable "
        f"({reason.strip().splitlines()[0]}).\nOn a machine with network access, {location.format_download_hint()} "
        "For random weights: model.weights=none."
    )


def fetch_weights(location: HubFile, folder: Path) -> Path:
    """Copy a weights file into a folder, downloading it if necessary; it appears there only when it is complete.

    Raises:
        HubUnreachableError: See `download_weights`.
    """
    target = folder / location.local_name
    source = download_weights(location)
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(target) as temporary:
        shutil.copyfile(source, temporary)
    return target


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
    is_reachable = True
    for name, config in models.items():
        if (weights or config.weights) != "hub":
            continue
        cfg: Any = get_pretrained_cfg(config.name, allow_unregistered=True)
        location = resolve_hub_file(config, cfg.to_dict())
        if location.find_cached_file() is not None:
            continue
        try:
            missing.append(f"  {name}: {location.local_name}, from {location.origin}")
            if is_reachable or location.page:  # the hub is asked until it does not answer
                download_weights(location)
                missing.pop()
        except HubUnreachableError as error:
            problem, is_reachable = problem or error, is_reachable and location.page is not None
    if problem is not None:
        raise PylorusError(
            f"--weights hub: {str(problem).splitlines()[0]}\nNot on this machine:\n"
            + "\n".join(missing)
            + "\nOn a machine with a network, type pylorus weights fetch MODEL … --weights FOLDER; or download each "
            "and save it under the name above in one folder. Copy the folder to this machine and type --weights "
            "FOLDER. For random weights, to try the command: --weights none."
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
        has_hub = cfg is not None and (config.source is not None or cfg.hf_hub_id)
        location = resolve_hub_file(config, cfg.to_dict()) if has_hub else HubFile(config.name, "", ".safetensors")
        # Weights of a source of their own are never those that are named after the architecture.
        own = (location.name, config.name, location.name.split(".")[0]) if config.source is None else (location.name,)
        file = find_file(folder, *dict.fromkeys((name, *own)))
        if file is not None:
            yield name, str(file)
            continue
        missing.append(
            f"  {folder / location.name}.safetensors" if not has_hub else f"  {folder / location.local_name}"
        )
        missing[-1] += f", from {location.origin}" if has_hub else ""
    if missing:
        raise PylorusError(
            f"--weights: the weights of {format_count(len(missing), 'network')} are missing:\n"
            + "\n".join(missing)
            + f"\nOn a machine with a network, type pylorus weights fetch MODEL … --weights {folder.name}; or download "
            "each and save it under the name above. Or leave the network out of --models, or for random weights type "
            "--weights none."
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


def list_hub_models() -> dict[str, ModelConfig]:
    """Return the models of conf/model that start from pretrained weights, by their names there."""
    models: dict[str, ModelConfig] = {}
    for file in sorted((CONF / "model").glob("*.yaml")):
        content: Any = OmegaConf.to_container(OmegaConf.load(file))
        if "name" in content and content.get("weights", "hub") == "hub":
            models[file.stem] = ModelConfig(**content)
    return models


def locate_weights(model: str) -> HubFile:
    """Return where the pretrained weights of a model are, by its name in conf/model or timm's.

    Raises:
        PylorusError: If there is no such model, or the hub has no weights of it.
    """
    config = list_hub_models().get(model) or ModelConfig(model)
    check_model_name(config.name, where="MODEL")
    cfg: Any = get_pretrained_cfg(config.name, allow_unregistered=True)
    return resolve_hub_file(config, cfg.to_dict())


def find_weights(hub: HubFile, folder: Path) -> LocalWeights | None:
    """Return the weights from the hub's cache or the folder; None if neither has them."""
    cached = hub.find_cached_file()
    if cached is not None:
        return LocalWeights(cached, "in the hub's cache", "model.weights=hub")
    file = find_file(folder, hub.name)
    return None if file is None else LocalWeights(file, f"in {file}", f"model.weights={file}")
