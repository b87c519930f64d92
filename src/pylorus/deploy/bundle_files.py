"""Read model.json and reject invalid content: unknown entries, wrong types, values out of range.

Also the files that say how the training images look, and limits on networks that are built as a description says.
"""

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from pylorus.core.errors import MAX_CLASSES, MAX_NAME_LENGTH, PylorusError, format_path, is_valid_name
from pylorus.core.io import validate
from pylorus.data.decode import POLICIES, RESAMPLING
from pylorus.data.field_of_view import FINDER
from pylorus.deploy.description import (
    ENSEMBLE_VERSION,
    FORMAT_VERSION,
    MAX_MEMBERS,
    Description,
    InputSpecification,
)
from pylorus.deploy.verified_files import (
    LOOKS,
    MAX_DESCRIPTION_BYTES,
    UNLIKE,
    TensorEntry,
    TensorFile,
    VerifiedFolder,
    parse_json,
)
from pylorus.model.backbone import check_model_arguments
from pylorus.model.inference import APPEARANCE_LENGTH, AppearanceModel
from pylorus.runs.folder import CHOICES, LAST


def read_description(content: bytes, *, where: str = "model.json") -> Description:
    """Parse and check the content of a model.json.

    Args:
        content: All bytes of the file.
        where: Name of the file in error messages.

    Raises:
        PylorusError: If the content is not a valid description; names the entry, the value found and the value
            expected.
    """
    if len(content) > MAX_DESCRIPTION_BYTES:
        raise PylorusError(f"{where}: has {len(content):,} bytes, expected {MAX_DESCRIPTION_BYTES:,} at most.")
    try:
        return build_description(parse_json(content, where=where), where=where)
    except PylorusError as error:  # its message may quote any character
        raise PylorusError(format_path(error)) from None


def build_description(values: Any, *, where: str = "model.json") -> Description:
    """Build a description from the plain values of a model.json, and check it; see `read_description`."""
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or not 1 <= version <= ENSEMBLE_VERSION:
        raise PylorusError(
            f"{where}: found format_version {str(version)[:20]}, expected 1 to {ENSEMBLE_VERSION}. "
            "A newer bundle needs a newer Pylorus; a bundle without a version has to be trained again."
        )
    current = _convert_format_1(values) if version == 1 else values
    description = validate(Description, json.dumps(current), where=f"{where}: ")
    _check_description(description, where)
    _check_characters(current, where)
    return description


DIRECTION_MARKS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that make a text look like another one, as they change the direction in which it is displayed."""


def _check_characters(values: object, where: str, path: str = "") -> None:
    """Reject texts and names that change what a terminal or a page displays around them."""
    if isinstance(values, dict):
        for name, value in values.items():
            _check_characters(name, where, path)
            _check_characters(value, where, f"{path}.{name}" if path else name)
    elif isinstance(values, list):
        for value in values:
            _check_characters(value, where, path)
    elif isinstance(values, str) and not values.isprintable():
        for letter in values:
            if unicodedata.category(letter) == "Cc" or letter in DIRECTION_MARKS:
                raise PylorusError(f"{where}: {path}: found the control character {letter!r} in {values[:80]!r}.")


def _convert_format_1(values: dict[str, Any]) -> dict[str, Any]:
    """Convert a description of format 1 to the current format: the last stage is shipped, nothing is guaranteed."""
    upgraded = {name: value for name, value in values.items() if name != "largest_difference"}
    decision, names, training = (values.get(name) for name in ("decision", "short_names", "training"))
    if isinstance(decision, dict) and isinstance(names, list):
        guarantees = {str(name): None for name in names}
        upgraded["decision"] = decision | {"confidence": None, "patients_needed": None, "guarantees": guarantees}
    stages = training.get("stages") if isinstance(training, dict) else None
    if isinstance(stages, list) and stages and isinstance(stages[-1], dict):
        upgraded["shipped"] = {"name": stages[-1].get("name"), "chosen_by": LAST, "accuracy": {}}
    return upgraded | {"format_version": FORMAT_VERSION, "prediction_sets": None}


def _check_description(description: Description, where: str) -> None:
    """Reject what types and ranges alone allow: a network without a name, duplicate names, entries of other classes."""
    _check_network(description, where)
    names, short_names = description.classes, description.short_names
    for key, listed in (("classes", names), ("short_names", short_names)):
        if (
            not all(map(is_valid_name, listed))
            or len(set(listed)) != len(listed)
            or not 2 <= len(listed) <= MAX_CLASSES
        ):
            raise PylorusError(
                f"{where}: {key}: found {_format_few(listed)}, expected 2 to {MAX_CLASSES} different names."
            )
    if len(names) != len(short_names):
        raise PylorusError(f"{where}: found {len(names)} classes but {len(short_names)} short_names.")
    _check_choices(description, where)
    _check_reference(description, where)
    _check_ensemble(description, where)


def _check_network(description: Description, where: str) -> None:
    """Reject a description whose network, input or calibration can't be meant."""
    if description.network is not None and not (
        0 < len(description.network) <= MAX_NAME_LENGTH and description.network.isprintable()
    ):
        raise PylorusError(f"{where}: network: found {description.network[:80]!r}, expected a dotted path.")
    check_model_arguments(description.arguments, where=f"{where}: arguments")
    _check_input(description.input, where)
    if len(description.calibration.bias) not in (0, len(description.classes)):
        raise PylorusError(
            f"{where}: calibration.bias: found {len(description.calibration.bias)} numbers, expected one for each "
            "class."
        )


def _check_ensemble(description: Description, where: str) -> None:
    """Reject an ensemble of no or too many networks, and members that can't be used together."""
    is_ensemble = description.ensemble is not None
    if is_ensemble != (description.format_version == ENSEMBLE_VERSION):
        raise PylorusError(
            f"{where}: found format_version {description.format_version} {'with' if is_ensemble else 'without'} an "
            f"ensemble, but {ENSEMBLE_VERSION} is that of ensembles and {FORMAT_VERSION} that of single networks."
        )
    if not is_ensemble:
        return
    networks = description.list_networks()
    if not 2 <= len(networks) <= MAX_MEMBERS:
        raise PylorusError(f"{where}: ensemble.members: found {len(networks)}, expected 2 to {MAX_MEMBERS}.")
    for number, network in enumerate(networks):
        _check_network(network, f"{where}: ensemble.members[{number}]")
    if len({network.input.policy for network in networks}) > 1:
        raise PylorusError(f"{where}: ensemble.members: decode images by different rules (input.policy).")
    if description.input.form != description.form.forms[0]:
        raise PylorusError(f"{where}: input: expected that of a member with the largest images.")
    for gain in description.ensemble.gains if description.ensemble is not None else ():
        if gain.best is not None and gain.best >= len(networks):
            raise PylorusError(f"{where}: ensemble.gains: found member {gain.best}, expected 0 to {len(networks) - 1}.")


def _check_input(settings: InputSpecification, where: str) -> None:
    for key, value, known in (
        ("crop", settings.crop, ("none", "auto")),
        ("mask", settings.mask, ("none", "overlays")),
        ("fit", settings.fit, ("pad", "stretch", "crop")),
        ("interpolation", settings.interpolation, tuple(RESAMPLING)),
    ):
        if value not in known:
            raise PylorusError(f'{where}: input.{key}: found "{value[:50]}", expected one of {", ".join(known)}.')
    if not 1 <= settings.finder <= FINDER:
        raise PylorusError(
            f"{where}: input.finder: found {settings.finder}, but this Pylorus finds fields of view by versions 1 to "
            f"{FINDER}: images would be cropped otherwise than in training. Use the version of Pylorus that `versions` "
            "names."
        )
    for key, numbers, low in (("mean", settings.mean, -math.inf), ("std", settings.std, 0.0)):
        if len(numbers) != 3 or not all(low < number < 1e6 for number in numbers):
            raise PylorusError(
                f"{where}: input.{key}: found {_format_few(numbers)}, expected three numbers above {low:g}."
            )
    if settings.policy not in POLICIES:
        raise PylorusError(
            f"{where}: input.policy: found {settings.policy}, but this Pylorus reads images by policy "
            f"{' or '.join(map(str, POLICIES))}: probabilities would differ from those in training. Use the version of "
            "Pylorus that `versions` names."
        )


def _check_choices(description: Description, where: str) -> None:
    if description.shipped.chosen_by not in CHOICES or (
        description.shipped.chosen_by != LAST and description.shipped.name not in description.shipped.accuracy
    ):
        raise PylorusError(
            f'{where}: shipped: found "{description.shipped.chosen_by[:50]}" with accuracies of '
            f"{_format_few(list(description.shipped.accuracy))}, expected one of {', '.join(CHOICES)}, with "
            "the accuracy of the shipped stage."
        )
    short_names = set(description.short_names)
    if description.decision.class_name not in short_names:
        raise PylorusError(
            f'{where}: decision.class: found "{description.decision.class_name[:50]}", expected a short name.'
        )
    by_class: dict[str, Mapping[str, object]] = {
        "decision.thresholds": description.decision.thresholds,
        "decision.guarantees": description.decision.guarantees,
        "decision.test": description.decision.test,
        **{
            f"test.{key}": getattr(description.test, key)
            for key in ("sensitivity", "specificity", "precision", "auroc")
        },
    }
    if description.prediction_sets is not None:
        sets = description.prediction_sets
        by_class["prediction_sets.lowest"] = sets.lowest
        by_class["prediction_sets.patients"] = sets.patients
        by_class["prediction_sets.test.coverage"] = sets.test.coverage
    for key, values in by_class.items():
        if set(values) != short_names:
            raise PylorusError(
                f"{where}: {key}: found {_format_few(sorted(values))}, expected {_format_few(description.short_names)}."
            )
    for part, counts in description.training.images.items():
        if len(counts) != len(description.classes) or min(counts) < 0:
            raise PylorusError(
                f"{where}: training.images.{part[:50]}: found {_format_few(counts)}, expected one count for each class."
            )


def _check_reference(description: Description, where: str) -> None:
    """Reject a reference of other classes, or whose numbers no images can have."""
    reference = description.reference
    if reference is None:
        return
    for name, rate in reference.rates.items():
        kind, _, class_name = name.partition("/")
        is_known = class_name in description.short_names if class_name else kind in ("abstained", "unlike", "unsure")
        if not (is_known and 0 <= rate.count <= rate.images and 1 <= rate.effective <= rate.images):
            raise PylorusError(f"{where}: reference.rates: found invalid numbers for {name[:50]!r}.")
        _check_correlation(rate.correlation, f"{where}: reference.rates.{name[:50]}")
    for name, score in reference.scores.items():
        if (
            len(score.counts) != len(score.cuts) + 1
            or list(score.cuts) != sorted(set(score.cuts))
            or min(score.counts) < 0
            or not 1 <= score.effective <= score.images
        ):
            raise PylorusError(f"{where}: reference.scores: found invalid numbers for {name[:50]!r}.")
        _check_correlation(score.correlation, f"{where}: reference.scores.{name[:50]}")


def _check_correlation(value: float, where: str) -> None:
    if not 0 <= value <= 1:
        raise PylorusError(f"{where}.correlation: found {value:g}, expected a number from 0 to 1.")


def _format_few(values: Sequence[object]) -> str:
    text = ", ".join(str(value)[:50] for value in values[:5])
    return text + (f" and {len(values) - 5} more" if len(values) > 5 else "") if values else "nothing"


# --- how the training images look ---

DIRECTIONS = "directions"
MAX_FEATURES = 32_768
"""The most features of an image: four times those of timm's widest network."""


def list_prefixes(description: Description) -> list[str]:
    """Return what the names of each network's tensors begin with in a bundle: its number in an ensemble."""
    return (
        [""] if description.ensemble is None else [f"{number}." for number in range(len(description.ensemble.members))]
    )


def check_reference_headers(files: VerifiedFolder, description: Description) -> None:
    """Check the headers of the files with mean directions and, if there is one, the appearance of training images.

    Raises:
        PylorusError: If their tensors are not those of the description's networks and classes.
    """
    classes, prefixes, directions = len(description.classes), list_prefixes(description), files.tensor_files[UNLIKE]
    missing = TensorEntry(torch.float32, ())
    entries = [directions.entries.get(f"{prefix}{DIRECTIONS}", missing) for prefix in prefixes]
    are_matrices = len(directions.entries) == len(prefixes) and all(
        entry.dtype == torch.float32
        and len(entry.shape) == 2
        and entry.shape[0] == classes
        and entry.shape[1] <= MAX_FEATURES
        for entry in entries
    )
    if not are_matrices:
        found = {name[:50]: str(each) for name, each in list(directions.entries.items())[:4]}
        matrices = f'one float32 matrix "{DIRECTIONS}"'
        if description.ensemble is not None:
            matrices = f'a float32 matrix "N.{DIRECTIONS}" for each of {len(prefixes)} networks N'
        directions.refuse(f"found {found}, expected {matrices} with {classes} rows")
    if (looks := files.tensor_files.get(LOOKS)) is not None:
        looks.check_entries(build_appearance_entries(classes, prefixes), purpose=f"{classes} classes")


def build_appearance_entries(classes: int, prefixes: Sequence[str] = ("",)) -> dict[str, TensorEntry]:
    """Return the tensors of appearance.safetensors for a number of classes and the prefixes of the networks."""
    length = APPEARANCE_LENGTH
    shapes = {"center": (length,), "whitening": (length, length), "means": (classes, length), "scales": (2, 2)}
    return {
        f"{prefix}{name}": TensorEntry(torch.float32, shape) for prefix in prefixes for name, shape in shapes.items()
    }


def read_directions(file: TensorFile, prefixes: Sequence[str]) -> list[Tensor]:
    """Read the mean directions of the training images' features, of shape (classes, features) for each network."""
    tensors = file.read_tensors()
    directions = [tensors[f"{prefix}{DIRECTIONS}"] for prefix in prefixes]
    for prefix, each in zip(prefixes, directions, strict=True):
        if not torch.allclose(each.norm(dim=1), torch.ones(len(each)), atol=1e-3):
            raise PylorusError(f'{file.path}: the rows of "{prefix}{DIRECTIONS}" are not unit vectors.')
    return directions


def read_appearances(file: TensorFile | None, prefixes: Sequence[str]) -> list[AppearanceModel | None]:
    """Read how the training images look, for each network; None where a bundle from before this file does not say."""
    if file is None:
        return [None] * len(prefixes)
    tensors = file.read_tensors()
    for prefix in prefixes:
        if not (tensors[f"{prefix}scales"][1] > 0).all():
            raise PylorusError(f'{file.path}: the second row of "{prefix}scales" is not positive.')
    names = build_appearance_entries(2)
    return [AppearanceModel(**{name: tensors[f"{prefix}{name}"] for name in names}) for prefix in prefixes]


# --- limits of what a description asks for ---

MAX_PARAMETERS = 8_000_000_000
"""The most parameters of a network that is loaded: more than timm's largest has, 6.7 billion."""
MAX_MODULES = 10_000
"""The most modules of a network: five times as many as timm's networks have."""
MAX_TENSOR_ELEMENTS = 2**30
"""The most numbers in a tensor that the network computes for one image or while it is built."""


class NetworkTooLargeError(PylorusError):
    """Raised if a network exceeds a limit on parameters, modules, tensors or operations."""


class NetworkLimits(TorchFunctionMode):
    """Limits what a network takes while it is built and computes, in the body of the `with` statement.

    Args:
        parameters: The most parameters and buffers, in numbers.
    """

    def __init__(self, parameters: int = MAX_PARAMETERS):
        super().__init__()
        self.parameters, self.elements = parameters, min(parameters, MAX_TENSOR_ELEMENTS)
        self.count = self.modules = 0
        self._hooks: list[Any] = []

    def __enter__(self) -> Any:
        self._hooks = [
            register_module_parameter_registration_hook(self._count_tensor),
            register_module_buffer_registration_hook(self._count_tensor),
            register_module_module_registration_hook(self._count_module),
        ]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if function in FACTORIES:  # without memory, to know its size
            self._check_size(function(*args, **{**options, "device": "meta"}))
        result = function(*args, **options)
        self._check_size(result)
        return result

    def _check_size(self, result: Any) -> None:
        if isinstance(result, Tensor) and result.numel() > self.elements:
            raise NetworkTooLargeError(
                f"the network needs a tensor of {result.numel():,} numbers, more than {self.elements:,}"
            )

    def _count_tensor(self, _: nn.Module, __: str, tensor: Tensor | None) -> None:
        self.count += 0 if tensor is None else tensor.numel()
        if self.count > self.parameters:
            raise NetworkTooLargeError(f"the network has more than {self.parameters:,} parameters")

    def _count_module(self, *_: Any) -> None:
        self.modules += 1
        if self.modules > MAX_MODULES:
            raise NetworkTooLargeError(f"the network has more than {MAX_MODULES:,} modules")


FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace}
"""Functions that make a tensor of the size that their arguments say."""
