"""Pretrained weights: list them, verify those on this machine, and fetch others: `pylorus weights`, and the doctor.

torch, timm and the hub are imported only where they are needed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylorus.core.errors import TRAIN_COMMAND, PylorusError
from pylorus.core.formatting import format_bytes, format_command
from pylorus.core.io import check_writable_folder
from pylorus.doctor.packages import Check, State

if TYPE_CHECKING:
    from pylorus.model.hub import HubFile, LocalWeights

WEIGHTS = "Weights"
STUDY_MODELS = ("vgg19", "resnet50", "inception_v3")
"""Models of the published study: only for these is it a warning if their weights are missing."""


def check_weights(folder: Path) -> Iterator[Check]:
    """Yield a check for each model of conf/model whose weights are here, or that is of the study, and one for a sweep.

    Args:
        folder: Folder with weight files that were copied here, searched besides the hub's cache.
    """
    from pylorus.model.hub import find_weights, list_hub_models, locate_weights

    carried = 0
    for model in list_hub_models():
        hub = locate_weights(model)
        found = find_weights(hub, folder)
        carried += found is not None and found.file.parent == folder and hub.architecture is None
        if found is not None or model in STUDY_MODELS:
            yield check_model(model, hub, found, folder)
    if carried > 1:
        key = f"'model.weights={folder}/${{model.name}}.safetensors'"
        yield Check(WEIGHTS, "sweep", State.GOOD, f"use all weight files of {folder} in a sweep with {key}")


def print_weights(models: Sequence[str], folder: Path) -> None:
    """Print a table of weights: origin, input size, licence, and where they are on this machine.

    Args:
        models: Names in conf/model or of timm; none: all of conf/model that start from pretrained weights.
        folder: Folder with weight files, searched besides the hub's cache.
    """
    import timm

    from pylorus.deploy.licences import assess_licence, describe_limits
    from pylorus.model.hub import find_weights, list_hub_models, locate_weights

    names = list_hub_models()
    rows = [("model", "weights", "from", "input", "licence", "here")]
    limited: dict[str, str] = {}
    for model in models or names:
        hub = locate_weights(model)
        cfg: Any = timm.models.get_pretrained_cfg(hub.architecture or hub.name)
        found = find_weights(hub, folder)
        place = "no" if found is None else found.where
        licence = hub.licence or "not stated"
        origin = "hf://timm" if hub.repository == f"timm/{hub.name}" else hub.origin  # its name is in the row
        rows.append((model, hub.name, origin, f"{cfg.input_size[-1]} px", licence, place))
        terms = assess_licence(hub.licence)
        if terms.limits:
            limited[licence] = f"  {licence} {describe_limits(terms)}"
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if limited:
        how = "--accept-licence, or deploy.accept_licence in training"
        print(f"\nLicences that limit passing a model on; an export has to accept them ({how}):")
        print("\n".join(limited.values()))
    print(
        "\nSay which are missing and how to fetch them, and verify the others: pylorus weights check MODEL …\n"
        "Fetch them into a folder, on a machine with a network: pylorus weights fetch MODEL …"
    )


def print_weight_checks(models: Sequence[str], folder: Path) -> bool:
    """Verify weights: SHA-256, and whether every key matches; print how to fetch those that are missing.

    Args:
        models: Names in conf/model or of timm; none: all of conf/model whose weights are on this machine.
        folder: Folder with weight files, searched besides the hub's cache.

    Returns:
        Whether all are here and intact.
    """
    from pylorus.model.hub import find_weights, list_hub_models, locate_weights

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


def print_fetched_weights(models: Sequence[str], folder: Path) -> bool:
    """Fetch weights into a folder, verify them, and print how to use them on a machine without a network.

    Args:
        models: Names in conf/model or of timm.
        folder: Folder to write to; a file that it has is not fetched again.

    Returns:
        Whether all are in the folder and intact.
    """
    check_writable_folder(folder, hint="Choose another --weights.")
    from pylorus.model.hub import (
        HubUnreachableError,
        LocalWeights,
        fetch_weights,
        find_file,
        list_hub_models,
        locate_weights,
    )

    located = {model: locate_weights(model) for model in models}
    is_good, commands, reasons = True, list[str](), dict[str, None]()
    is_reachable = True
    for model, hub in located.items():
        file = find_file(folder, hub.name)
        try:
            if file is None and (is_reachable or hub.page is not None or hub.find_cached_file() is not None):
                file = fetch_weights(hub, folder)
        except HubUnreachableError as error:
            reasons[str(error).splitlines()[0].rstrip(".")] = None
            is_reachable = is_reachable and hub.page is not None
        if file is None:
            commands.append(f"  {hub.format_fetch_command(str(folder))}")
            continue
        check = check_model(model, hub, LocalWeights(file, f"in {file}", f"model.weights={file}"), folder)
        is_good = is_good and check.state is State.GOOD
        named = [f"model={model}"] if model in list_hub_models() else ["model=timm", f"model.name={hub.name}"]
        print(f"{model}: {check.found}" + (f"\n  {check.remedy}" if check.remedy else ""))
        print(f"  licence: {_format_licence(hub)}")
        if check.state is State.GOOD:
            print(f"  to use it elsewhere, copy {folder}/ there and type:")
            print(f"  {TRAIN_COMMAND} {format_command([*named, f'model.weights={file}'])} …")
    if commands:
        print("\n".join(f"not fetched: {reason}." for reason in reasons))
        print("On a machine with a network:\n" + "\n".join(commands))
        print(f"Then copy {folder}/ to this machine.")
    return is_good and not commands


def _format_licence(hub: "HubFile") -> str:
    from pylorus.deploy.licences import assess_licence, describe_limits

    terms = assess_licence(hub.licence)
    if hub.licence is None:
        return "not stated; read the terms where the weights come from"
    if not terms.is_known:
        return f"{hub.licence}; Pylorus does not know what it allows"
    return hub.licence + (f", which {describe_limits(terms)}" if terms.limits else "")


def check_model(model: str, hub: "HubFile", found: "LocalWeights | None", folder: Path) -> Check:
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
        network: Any = timm.create_model(hub.architecture or hub.name, pretrained=False)
    if found is None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
        summary = f"{hub.name} not found (about {format_bytes(size)}): neither in the hub's cache nor in {folder}/"
        how = hub.format_download_hint(str(folder))
        fix = f"With a network, a run downloads it once. Without one: on a machine that has a network, {how}"
        if hub.page is not None:
            fix = f"On a machine with a network, {how}"
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
