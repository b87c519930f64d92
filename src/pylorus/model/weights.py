"""A network's weights: from the hub, its cache or a file, read as tensors only; and those of its new head.

Files have many layouts: the parts of a training (student, teacher, moving average, optimizer), the wrappers of other
libraries, classes of programs that are not here. The tensors of the backbone are found by name and shape, and every
one of them has to be there.
"""

import hashlib
import inspect
import logging
import pickle
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import safe_globals

from pylorus.core.errors import PylorusError, format_name_list, format_path

log = logging.getLogger(__name__)


AUXILIARY_HEADS = ("aux_head",)
"""Heads that timm's networks use in their own training only: VOLO's, for its token labels."""


def list_classifier_names(network: Any) -> tuple[str, ...]:
    """Return the names of the modules that produce the logits: one classifier, or two in distilled transformers."""
    classifier = network.get_classifier()
    heads = classifier if isinstance(classifier, tuple | list) else (classifier,)
    return tuple(name for name, module in network.named_modules() if any(module is head for head in heads))


def init_head(network: Any) -> None:
    """Initialize the head with small random weights, so that a stage starts from nearly uniform probabilities.

    timm's own initialization differs between models; with few classes some are so large that ten epochs only undo it.
    Of a head of several layers, such as LeViT's and CaFormer's, the layers that produce the logits are initialized.
    """
    for name in list_classifier_names(network):
        for layer in _list_logit_layers(network.get_submodule(name)):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _list_logit_layers(head: nn.Module) -> list[Any]:
    """List the layers of a head that have as many outputs as its last layer."""
    layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return [layer for layer in layers if len(layer.weight) == len(layers[-1].weight)]


def load_weights(network: Any, file: Path) -> None:
    """Load a file into the network; every key must match, except those of the classification head.

    Raises:
        PylorusError: If the file can't be read as tensors, or a key is missing, unknown or has a different shape.
    """
    network.load_state_dict(match_tensors(network, file), strict=False)


def match_tensors(network: Any, file: Path) -> dict[str, Tensor]:
    """Return a file's tensors for the network, under the network's names, without the classification head.

    Raises:
        PylorusError: If the file can't be read as tensors, or a key is missing, unknown or has a different shape.
    """
    tensors = _read_tensors(file)
    match = _find_best_match(network, tensors)
    if match.problems:
        details = "\n".join(
            f"{len(names)} {'key' if len(names) == 1 else 'keys'} {problem}:\n"
            f"{format_name_list(map(format_path, names), most=4)}"
            for problem, names in match.problems.items()
        )
        place = f" (its tensors {format_path(match.prefix)}*)" if match.prefix else ""
        raise PylorusError(
            f"model.weights: {file}{place} does not match {type(network).__name__} "
            f"({getattr(network, 'pretrained_cfg', {}).get('architecture')}).\n{details}\n"
            "Is it a file for exactly this architecture? See model.name."
        )
    if match.prefix and match.others:
        log.info(
            "weights  %s: loaded %s*; left out %s (%s)",
            file.name,
            format_path(match.prefix),
            f"{len(match.others)} other tensors" if len(match.others) > 1 else "another tensor",
            ", ".join(f"{format_path(name)}*" for name in _list_first_parts(match.others)),
        )
    _check_values(match.tensors, file)
    return match.tensors


def _check_values(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse numbers with which no network computes anything, before it is trained on them."""
    numbers = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.is_meta}

    def is_finite(tensor: Tensor) -> bool:
        values = tensor.float() if tensor.itemsize == 1 else tensor  # PyTorch can't tell this of numbers of 8 bits
        # Their sum is faster: it is finite, unless it overflows or one of them is not.
        return bool(values.sum().isfinite()) or bool(values.isfinite().all())

    wrong = [name for name, tensor in numbers.items() if not is_finite(tensor)]
    if wrong:
        raise PylorusError(
            f"model.weights: {file} contains NaN or infinite values in:\n"
            f"{format_name_list(map(format_path, wrong), most=4)}\nUse a file of a training that did not diverge."
        )


@dataclass(frozen=True)
class _Match:
    """A part of a file as the weights of a network.

    Attributes:
        prefix: What the names in the file begin with; "" for the whole file.
        tensors: Those of the backbone, under the network's names.
        problems: Names that are missing, unknown or of another shape; empty if everything matches.
        count: Number of tensors of the backbone in the part, of the right shape.
        others: Names in the file outside the part.
    """

    prefix: str
    tensors: dict[str, Tensor]
    problems: dict[str, list[str]]
    count: int
    others: list[str]


PREFERRED_PARTS = (r"(^|[._])ema([._]|$)", r"teacher", r"encoder_q\.|base_encoder\.")
"""Of several matching parts of a file, the first of these is loaded: averaged weights, then a student's teacher."""

IGNORED_KEYS = (
    *("AuxLogits.", "mask_token", "queue", "decoder_", "decoder."),
    *("projector.", "projection_head.", "predictor.", "prototypes."),
)
"""Keys that a file may hold and our network does not: Inception's auxiliary classifier, and the parts that follow the
backbone in self-supervised pretraining."""


def _find_best_match(network: Any, tensors: Mapping[str, Tensor]) -> _Match:
    """Find the part of a file that holds the network's backbone; if none does, the part that is nearest to it."""
    whole = _match_part(network, tensors, "")
    if not whole.problems:
        return whole
    matches = [whole, *(_match_part(network, tensors, prefix) for prefix in _list_prefixes(tensors, whole))]

    def rank(match: _Match) -> tuple[bool, int, list[bool], bool, int]:
        preferences = [re.search(pattern, match.prefix) is not None for pattern in PREFERRED_PARTS]
        is_whole = not match.others  # of prefixes that all names have, the longest; else the shortest
        return not match.problems, match.count, preferences, is_whole, len(match.prefix) * (1 if is_whole else -1)

    return max(matches, key=rank)


def _list_prefixes(tensors: Mapping[str, Tensor], whole: _Match) -> list[str]:
    """List what the names of a large part of the tensors begin with, such as `state_dict.module.encoder_q.`."""
    counts: dict[str, int] = {}
    for name in tensors:
        parts = name.split(".")
        for length in range(1, len(parts)):
            prefix = ".".join(parts[:length]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    needed = len(whole.problems.get(MISSING, ())) + whole.count
    return [prefix for prefix, count in counts.items() if 2 * count >= needed]


MISSING, UNKNOWN, MISMATCHED, OTHER_TYPE = (
    *("missing in the file", "unknown to the network", "with a different shape"),
    "that can't be converted to the network's type",
)


def _is_of_type(tensor: Tensor, expected: Tensor) -> bool:
    """Return whether a tensor holds plain numbers of the same kind, in any precision."""
    is_plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.is_meta <= expected.is_meta
    return is_plain and tensor.is_floating_point() == expected.is_floating_point() and not tensor.is_complex()


def _describe_type(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f"{str(tensor.layout).removeprefix('torch.')} "
    return f"{layout}{str(tensor.dtype).removeprefix('torch.')}{' without values' if tensor.is_meta else ''}"


def _match_part(network: Any, tensors: Mapping[str, Tensor], prefix: str) -> _Match:
    """Compare the tensors whose names begin with `prefix` with the backbone's."""
    part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    part = _convert_keys(network, _name_children(network, part))
    expected = network.state_dict()
    head_prefixes = tuple(f"{name}." for name in (*list_classifier_names(network), *AUXILIARY_HEADS))
    # Files from before torch 0.4.1 lack this counter, which no network with a fixed momentum uses.
    missing = [
        name
        for name in expected
        if name not in part and not name.startswith(head_prefixes) and not name.endswith(".num_batches_tracked")
    ]
    unknown = [name for name in part if name not in expected and not name.startswith((*head_prefixes, *IGNORED_KEYS))]
    backbone = {
        name: tensor for name, tensor in part.items() if name in expected and not name.startswith(head_prefixes)
    }
    mismatched = [
        f"{name}: {tuple(tensor.shape)} in the file, {tuple(expected[name].shape)} in the network"
        for name, tensor in backbone.items()
        if tensor.shape != expected[name].shape
    ]
    of_other_type = [
        f"{name}: {_describe_type(tensor)} in the file, {_describe_type(expected[name])} in the network"
        for name, tensor in backbone.items()
        if not name.endswith(".num_batches_tracked") and not _is_of_type(tensor, expected[name])
    ]
    problems = {MISSING: missing, UNKNOWN: unknown, MISMATCHED: mismatched, OTHER_TYPE: of_other_type}
    return _Match(
        prefix,
        backbone,
        {problem: names for problem, names in problems.items() if names},
        len(backbone) - len(mismatched),
        [name for name in tensors if not name.startswith(prefix)],
    )


def _name_children(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename keys that begin with a number, as in fastai's files, to the child of the network at that position."""
    children = [name for name, _ in network.named_children()]
    positions = {name: name.split(".")[0] for name in tensors}
    if not all(position.isdecimal() and int(position) < len(children) for position in positions.values()):
        return tensors
    return {
        children[int(positions[name])] + name.removeprefix(positions[name]): tensor for name, tensor in tensors.items()
    }


def _convert_keys(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename keys of other sources (torchvision, the authors) to timm's, with timm's filter for the architecture."""
    module = sys.modules[type(network).__module__]
    filter_keys = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if filter_keys is None:
        return tensors
    takes_network = len(inspect.signature(filter_keys).parameters) > 1
    try:
        return dict(filter_keys(tensors, network) if takes_network else filter_keys(tensors))
    except Exception:  # whatever a filter does with the tensors of another network: they don't match
        return tensors


def _list_first_parts(names: list[str]) -> list[str]:
    """List the first parts of dotted names, each once, with the dot."""
    return list(dict.fromkeys(name.split(".")[0] + ("." if "." in name else "") for name in names))[:5]


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of a pickle from which only tensors are loaded, by dotted names."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(file)
        else:
            content = _load_pickle(file)
        named = list(_iter_tensors(content, "", count()))
    except Exception as error:
        raise PylorusError(
            f"model.weights: {file} can't be read as tensors{_format_cause(error)}. "
            "Expected a safetensors file, or a pickle of tensors only: nothing else is loaded, since it could run "
            "code."
        ) from error
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in named}
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if not tensors:
        raise PylorusError(f"model.weights: {file} holds no dictionary of tensors by name.")
    return tensors


MAX_PARTS, MAX_DEPTH, MAX_NAME_LENGTH = 200_000, 64, 500
"""Tensors and dictionaries of a file, how deep they are nested, and characters of a name: far more than any has."""


def _iter_tensors(content: Any, prefix: str, parts: Iterator[int], depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dictionaries and pickled modules by their dotted names.

    Raises:
        ValueError: If there are too many: a few bytes can hold one dictionary billions of times, or within itself.
    """
    state = getattr(content, "state", None)
    if isinstance(content, _Placeholder) and isinstance(state, dict) and "_modules" in state:
        for part in ("_parameters", "_buffers", "_modules"):
            yield from _iter_tensors(state.get(part), prefix, parts, depth + 1)
    elif isinstance(content, dict):
        if depth > MAX_DEPTH:
            raise ValueError(f"its dictionaries are nested more than {MAX_DEPTH} deep")
        for name, value in content.items():
            path = f"{prefix}{name}"
            if next(parts) >= MAX_PARTS:
                raise ValueError(f"it holds over {MAX_PARTS:,} tensors and other values")
            if not isinstance(value, Tensor):
                yield from _iter_tensors(value, f"{path}.", parts, depth + 1)
            elif len(path) > MAX_NAME_LENGTH or path.count(".") > MAX_DEPTH:
                raise ValueError(
                    f"it holds a tensor called {format_path(path[:60])}…, expected at most {MAX_NAME_LENGTH} "
                    f"characters and {MAX_DEPTH} dots"
                )
            else:
                yield path, value.detach()


class _Placeholder:
    """Stands for an object of a class or function that is not loaded; holds what it was pickled with."""

    def __init__(self, *_: object, **__: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _ListPlaceholder:
    """Stands for a class of lists that is not loaded; its objects become plain ones: torch 2.11 adds to no others."""

    def __new__(cls, *_: object) -> Any:
        return []


class _DictionaryPlaceholder:
    """Stands for a class of dictionaries that is not loaded; its objects become plain ones."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


MAX_PLACEHOLDERS = 200
"""Classes that a file may name besides tensors and plain values."""


def _load_pickle(file: Path) -> Any:
    """Load a pickle with torch's restricted unpickler; what else than tensors it names is neither imported nor called.

    A training's options, its optimizer, a whole module or a number of NumPy become placeholders.

    Raises:
        Exception: If the file is damaged or compressed, or names a module that torch refuses.
    """
    _check_archive(file)
    known: dict[str, type] = {}
    while True:
        try:
            with warnings.catch_warnings(), safe_globals([(kind, name) for name, kind in known.items()]):
                warnings.simplefilter("ignore")  # about protocols
                return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except pickle.UnpicklingError as error:
            unknown = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            container = re.search(r"Can only (set|append).* but got <class '.*#(\d+)'>", str(error), re.IGNORECASE)
            if unknown is not None and len(known) < MAX_PLACEHOLDERS:
                name = unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"
                known[name] = type(f"#{len(known)}", (_Placeholder,), {})
            elif container is not None:
                # A dictionary or a list of a class of its own: torch adds to plain dictionaries and known lists only.
                name, is_list = list(known)[int(container[2])], container[1].lower() == "append"
                known[name] = type(name, (_ListPlaceholder if is_list else _DictionaryPlaceholder,), {})
            else:
                raise


def _check_archive(file: Path) -> None:
    """Refuse a compressed archive, which torch.save does not write: a few bytes could become any number of them.

    Raises:
        ValueError: If a part is compressed.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for part in archive.infolist():
                if part.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(
                        f"its part {format_path(part.filename[:80])} is compressed, and could become any size"
                    )


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
        _check_archive(file)
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


def compute_sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
