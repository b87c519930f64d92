"""Checks of what the user brings: images, weights, a bundle, and fonts for the class names.

torch and timm are imported only where they are needed, so that fonts and images are checked where torch does not load.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylorus.config.schema import CONF
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_bytes, format_count
from pylorus.data.decode import UnreadableImageError, read_image
from pylorus.data.walk import list_class_images
from pylorus.doctor.packages import Check, State
from pylorus.report.figure_style import DEFAULT_FONT, find_cjk_font_file, is_in_default_font

if TYPE_CHECKING:
    from pylorus.model.hub import HubFile

IMAGES = "Images"
SAMPLE_SIZE = 24
"""Number of images that are read."""

_scanned = cache(list_class_images)


def check_images(root: Path) -> Iterator[Check]:
    """Count the images of each class folder and read a sample of them."""
    if not root.is_dir():
        fix = "Pass a folder with one subfolder per class: --data DIR"
        yield Check(IMAGES, "folder", State.WRONG, f"{root} is not a folder", fix)
        return
    shards = len(list(root.glob("*.tar")))
    if shards:
        summary = f"{format_count(shards, 'shard')} in {root}"
        yield Check(IMAGES, "folder", State.GOOD, summary, f"train with data=shards data.root={root}")
        return
    try:
        rows, _ = _scanned(root)
    except PylorusError as error:
        fix = f"Put the images into {root}/CLASS/…, or list them in a manifest (docs/data.md)."
        yield Check(IMAGES, "folder", State.WRONG, " ".join(str(error).split()), fix)
        return
    counts = Counter(row[1] for row in rows)
    classes = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    yield Check(IMAGES, "folder", State.GOOD, f"{len(rows)} images in {root}: {classes}")
    yield check_sample([root / row[0] for row in rows[:: max(1, len(rows) // SAMPLE_SIZE)]][:SAMPLE_SIZE])


def check_sample(paths: list[Path]) -> Check:
    """Read the images as a run does and time it."""
    unreadable: list[str] = []
    start = time.perf_counter()
    for path in paths:
        try:
            read_image(path)
        except UnreadableImageError as error:
            unreadable.append(str(error))
    seconds = time.perf_counter() - start
    if unreadable:
        summary = f"{len(unreadable)} of {len(paths)} sampled images can't be read, e.g. {unreadable[0]}"
        return Check(
            IMAGES,
            "reading",
            State.WARNING,
            summary,
            "List all of them: pylorus audit DIR. Train without them: data.on_error=quarantine",
        )
    speed = f"{seconds / max(1, len(paths)) * 1000:.0f} ms each"
    return Check(IMAGES, "reading", State.GOOD, f"all {len(paths)} sampled images can be read, {speed}")


def list_class_names(root: Path) -> list[str]:
    """Return the class names of a folder; an empty list if it does not exist or holds no class folders."""
    if not root.is_dir() or list(root.glob("*.tar")):
        return []
    try:
        rows, _ = _scanned(root)
    except PylorusError:
        return []
    return sorted({row[1] for row in rows})


WEIGHTS = "Weights"


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


STUDY_MODELS = ("vgg19", "resnet50", "inception_v3")
"""Models of the published study: only for these is it a warning if their weights are missing."""


def check_weights(folder: Path) -> Iterator[Check]:
    """Yield a check for each model of conf/model whose weights are here, or that is of the study, and one for a sweep.

    Args:
        folder: Folder with weight files that were copied here, searched besides the hub's cache.
    """
    carried = 0
    for model in list_hub_models():
        hub = locate_weights(model)
        found = find_weights(hub, folder)
        carried += found is not None and found.file.parent == folder
        if found is not None or model in STUDY_MODELS:
            yield check_model(model, hub, found, folder)
    if carried > 1:
        key = f"'model.weights={folder}/${{model.name}}.safetensors'"
        yield Check(WEIGHTS, "sweep", State.GOOD, f"use all weight files of {folder} in a sweep with {key}")


def list_hub_models() -> dict[str, str]:
    """Return the models of conf/model that start from the hub's weights: their names there, mapped to timm's names."""
    from omegaconf import OmegaConf

    models: dict[str, str] = {}
    for file in sorted((CONF / "model").glob("*.yaml")):
        content: Any = OmegaConf.to_container(OmegaConf.load(file))
        if "name" in content and content.get("weights", "hub") == "hub":
            models[file.stem] = content["name"]
    return models


def locate_weights(model: str) -> "HubFile":
    """Return where the hub has the weights of a model, by its name in conf/model or timm's.

    Raises:
        PylorusError: If there is no such model, or the hub has no weights of it.
    """
    import timm

    from pylorus.config.checks import check_model_name
    from pylorus.model.hub import resolve_hub_file

    name = list_hub_models().get(model, model)
    check_model_name(name, where="MODEL")
    cfg: Any = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    return resolve_hub_file(cfg.to_dict())


def print_weights(models: Sequence[str], folder: Path) -> None:
    """Print a table of weights: input size, licence as timm states it, and where they are on this machine.

    Args:
        models: Names in conf/model or of timm; none: all of conf/model that start from the hub's weights.
        folder: Folder with weight files, searched besides the hub's cache.
    """
    import timm

    names = list_hub_models()
    rows = [("model", "weights", "input", "licence", "here")]
    for model in models or names:
        hub = locate_weights(model)
        cfg: Any = timm.models.get_pretrained_cfg(hub.name)
        found = find_weights(hub, folder)
        place = "no" if found is None else found.where
        rows.append((model, hub.name, f"{cfg.input_size[-1]} px", cfg.license or "not stated", place))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nSay which are missing and how to fetch them, and verify the others: pylorus weights check MODEL …")


def print_weight_checks(models: Sequence[str], folder: Path) -> bool:
    """Verify weights: SHA-256, and whether every key matches; print how to fetch those that are missing.

    Args:
        models: Names in conf/model or of timm; none: all of conf/model whose weights are on this machine.
        folder: Folder with weight files, searched besides the hub's cache.

    Returns:
        Whether all are here and intact.
    """
    is_good, missing, count = True, list[str](), 0
    for model in models or list_hub_models():
        hub = locate_weights(model)
        found = find_weights(hub, folder)
        if found is None and models:
            missing.append(f"  {hub.format_fetch_command(str(folder))}")
        if found is None:
            continue
        check = check_model(model, hub, found, folder)
        is_good, count = is_good and check.state is State.GOOD, count + 1
        print(f"{model}: {check.found}" + (f"\n  {check.remedy}" if check.remedy else ""))
    if missing:
        print(f"not on this machine: {len(missing)}. On a machine with a network:\n" + "\n".join(missing))
        print(f"Then copy {folder}/ to this machine.")
    elif not count:
        print(f"no weights of conf/model are on this machine, neither in the hub's cache nor in {folder}/")
    return is_good and not missing


def find_weights(hub: "HubFile", folder: Path) -> LocalWeights | None:
    """Return the weights from the hub's cache or the folder; None if neither has them."""
    cached = hub.find_cached_file()
    if cached is not None:
        return LocalWeights(cached, "in the hub's cache", "model.weights=hub")
    from pylorus.model.hub import find_file

    file = find_file(folder, hub.name)
    return None if file is None else LocalWeights(file, f"in {file}", f"model.weights={file}")


def check_model(model: str, hub: "HubFile", found: LocalWeights | None, folder: Path) -> Check:
    """Check that a model's weights are present, undamaged and match the network.

    Args:
        model: Name in conf/model.
        hub: Where the hub has the weights.
        found: The weights on this machine; None if there are none.
        folder: Where to put weights that are brought.
    """
    import timm
    import torch

    from pylorus.model.weights import compute_sha256, match_tensors

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


BUNDLE = "Bundle"


def check_bundle(folder: Path, trust: Sequence[Path] = ()) -> Iterator[Check]:
    """Load a bundle as `pylorus predict` does: file hashes, description, classes, weights, signature if `trust`."""
    from pylorus.deploy.model import UnknownNetworkError, load_bundle

    try:
        bundle = load_bundle(folder, trust=trust)
    except UnknownNetworkError as error:
        fix = "Check it with the command that uses it: `pylorus predict` with --network."
        yield Check(BUNDLE, "bundle", State.WARNING, " ".join(str(error).split()), fix)
        return
    except (PylorusError, OSError) as error:
        fix = "Copy the run's whole model/ folder again; `sha256sum -c SHA256SUMS` in it lists the files that changed."
        yield Check(BUNDLE, "bundle", State.WRONG, " ".join(str(error).split()), fix)
        return
    description = bundle.description
    summary = f"{folder}: {description.architecture}, classes {', '.join(description.classes)}; complete and loadable"
    yield Check(BUNDLE, "bundle", State.GOOD, summary)


FIGURES = "Figures"


def check_fonts(words: Iterable[str] = ()) -> Iterator[Check]:
    """Check that an installed font can draw the class names.

    Args:
        words: The class names, if known.
    """
    cjk_font = find_cjk_font_file()
    unsupported = [word for word in words if not is_in_default_font(word)]
    if cjk_font is not None:
        yield Check(
            FIGURES, "fonts", State.GOOD, f"{DEFAULT_FONT}, and {cjk_font.name} for Chinese, Japanese and Korean"
        )
        return
    summary = f"{DEFAULT_FONT}: Latin, Greek, Cyrillic; no font for Chinese, Japanese or Korean class names"
    fix = "install Noto Sans CJK (on Debian and Ubuntu: apt install fonts-noto-cjk)"
    if unsupported:
        yield Check(FIGURES, "fonts", State.WARNING, f"{summary}: figures show {', '.join(unsupported)} as boxes", fix)
    else:
        yield Check(FIGURES, "fonts", State.GOOD, summary, fix)
