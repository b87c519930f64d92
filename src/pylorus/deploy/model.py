"""Load a bundle: every file is verified by its hash, every tensor by its shape; nothing in it is ever executed."""

import contextlib
import copy
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from pylorus.config.checks import check_model_name
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_bytes
from pylorus.core.system import get_free_memory
from pylorus.data.input_format import InputFormat
from pylorus.deploy.bundle_files import read_description
from pylorus.deploy.description import Description
from pylorus.deploy.fingerprints import Fingerprints, read_fingerprints
from pylorus.deploy.signature import build_manifest_check
from pylorus.deploy.verified_files import (
    DESCRIPTION,
    LOOKS,
    SUMS,
    UNLIKE,
    WEIGHTS,
    TensorEntry,
    TensorFile,
    open_verified_folder,
)
from pylorus.evaluation.calibration import probabilities_of_logits
from pylorus.evaluation.decisions import prediction_sets
from pylorus.model.backbone import call_factory, create_network, is_timm_model
from pylorus.model.inference import (
    APPEARANCE_LENGTH,
    AppearanceModel,
    BundleClassifier,
    NetworkOutput,
    move_to_device,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ModelPredictions:
    """The predictions of a bundle for n images.

    Attributes:
        probabilities: Calibrated probabilities in [0, 1], of shape (n, classes).
        predicted: Index of the most probable class of each image, of shape (n,).
        positive: Whether the deciding class's probability reaches its threshold, of shape (n,).
        unlikeness: Distance from the training images in [0, 2], of shape (n,); see `UNLIKENESS`.
        why: Why the model abstains, of shape (n,): "" (it answers), "unsure" or "unlike" (out-of-distribution).
        sets: Which classes are in each image's prediction set, of shape (n, classes); None if the bundle has no
            prediction sets.
    """

    probabilities: NDArray[np.float64]
    predicted: NDArray[np.int64]
    positive: NDArray[np.bool_]
    unlikeness: NDArray[np.float64]
    why: NDArray[np.str_]
    sets: NDArray[np.bool_] | None


@dataclass(frozen=True, eq=False)
class InferenceModel(ABC):
    """A trained network that is loaded and ready for inference.

    Attributes:
        folder: The folder that it was loaded from.
        description: The content of model.json.
        sha256: SHA-256 of each of its files, by file name.
        contents: Content of its files of text, by file name, as they were verified.
    """

    folder: Path
    description: Description
    sha256: Mapping[str, str]
    contents: Mapping[str, bytes]

    @property
    def identity(self) -> str:
        """The SHA-256 of its list of file hashes, which identifies it."""
        return hashlib.sha256(self.contents[SUMS]).hexdigest()

    @property
    def input(self) -> InputFormat:
        """How an image file is turned into the network's input."""
        return self.description.input.form

    @abstractmethod
    def run_network(self, images: NDArray[np.uint8]) -> NetworkOutput:
        """Run the network on images.

        Args:
            images: uint8 RGB of shape (n, size, size, 3), as `input` reads them.

        Returns:
            Tensors on the CPU.
        """

    def calibrate_logits(self, logits: Tensor | NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Return the calibrated probabilities of logits, both of shape (n, classes)."""
        values = np.asarray(logits, dtype=np.float64)
        calibration = self.description.calibration
        if calibration.bias:
            values = values + calibration.temperature * np.asarray(calibration.bias)
        return probabilities_of_logits(values, temperature=calibration.temperature)

    def apply_thresholds(self, output: NetworkOutput, *, class_name: str | None = None) -> ModelPredictions:
        """Derive probabilities, classes, decisions at the stored threshold and abstentions from the network's output.

        Args:
            output: Output of the network for n images.
            class_name: Short name of the class that decides; None for the bundle's own.
        """
        names, abstention = self.description.short_names, self.description.abstention
        deciding = class_name or self.description.decision.class_name
        threshold = self.description.decision.thresholds[deciding]
        probabilities = self.calibrate_logits(output.logits)
        sets = self.description.prediction_sets
        unlikeness = np.asarray(output.unlikeness, dtype=np.float64)
        is_uncertain = probabilities.max(axis=1) < abstention.unsure_below
        return ModelPredictions(
            probabilities=probabilities,
            predicted=probabilities.argmax(axis=1).astype(np.int64),
            positive=probabilities[:, names.index(deciding)] >= (2.0 if threshold is None else threshold),
            unlikeness=unlikeness,
            why=np.where(unlikeness > abstention.unlike_above, "unlike", np.where(is_uncertain, "unsure", "")),
            sets=None if sets is None else prediction_sets(probabilities, sets.get_limits(names)),
        )

    def predict_images(self, images: NDArray[np.uint8], *, class_name: str | None = None) -> ModelPredictions:
        """Predict images: uint8 RGB of shape (n, size, size, 3), as `input` reads them."""
        return self.apply_thresholds(self.run_network(images), class_name=class_name)


DIRECTIONS = "directions"


@dataclass(frozen=True, eq=False)
class Bundle(InferenceModel):
    """A trained network in PyTorch, ready for inference.

    Attributes:
        classifier: Module whose input is uint8 RGB of shape (n, 3, size, size) on its device.
        device: The device that computes.
        factory: The user's own class, function or module that the network is from; None for a model of timm.
        fingerprints: Of its training and validation images; None if it carries none.
    """

    classifier: BundleClassifier
    device: torch.device
    factory: Callable[..., Any] | None = None
    fingerprints: Fingerprints | None = None

    def run_network(self, images: NDArray[np.uint8]) -> NetworkOutput:
        """Run the network on uint8 RGB images (n, size, size, 3), as `input` reads them; tensors are on the CPU."""
        batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(self.device)
        with torch.inference_mode():
            computed: NetworkOutput = self.classifier(batch)
        return NetworkOutput(computed.logits.cpu(), computed.unlikeness.cpu())


class UnknownNetworkError(PylorusError):
    """Raised if a bundle's network is of the user's own, and the user did not pass it."""


def load_bundle(
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    network: Callable[..., Any] | None = None,
    trust: Sequence[Path] = (),
) -> Bundle:
    """Load and check a bundle.

    What is cheap is checked first: texts, the headers of the tensors, and the architecture without memory for its
    tensors. Then the tensors are read, once.

    Args:
        folder: The folder `model` of a run.
        device: The device that shall compute.
        network: For a network of the user's own: its class or function (`num_classes`, …), which gets the arguments
            that the bundle holds, as plain values, or a module of its kind. None for a model of timm.
        trust: Files with public keys; the bundle must be signed with one of them. Empty to accept any bundle.

    Raises:
        PylorusError: If the folder is not a bundle, if one of its files is missing, changed or invalid, or if it is not
            signed as it should be; names the file and what is wrong.
        UnknownNetworkError: If the network is of the user's own and `network` is None.
    """
    with open_verified_folder(folder, check_manifest=build_manifest_check(trust)) as files:
        description = read_description(files.contents[DESCRIPTION], where=str(folder / DESCRIPTION))
        classes, weights = len(description.classes), files.tensor_files[WEIGHTS]
        _check_direction_header(files.tensor_files[UNLIKE], classes)
        looks = files.tensor_files.get(LOOKS)
        if looks is not None:
            looks.check_entries(build_appearance_entries(classes), purpose=f"{classes} classes")
        module = _build_checked_network(description, network, weights, where=str(folder / DESCRIPTION))
        _read_weights(module, weights)
        directions = _read_directions(files.tensor_files[UNLIKE])
        appearance = None if looks is None else _read_appearance(looks)
        fingerprints = read_fingerprints(files, description.fingerprints)
    target = torch.device(device)
    classifier = BundleClassifier(
        move_to_device(module, target),
        mean=description.input.mean,
        std=description.input.std,
        directions=directions,
        appearance=appearance,
    )
    bundle = Bundle(
        folder, description, files.hashes, files.contents, classifier.to(target), target, network, fingerprints
    )
    verify_inference(bundle, folder / WEIGHTS)
    return bundle


MAX_PARAMETERS = 8_000_000_000
"""The most parameters of a network that is loaded: more than timm's largest has, 6.7 billion."""
MAX_MODULES = 10_000
"""The most modules of a network: five times as many as timm's networks have."""
MAX_TENSOR_ELEMENTS = 2**30
"""The most numbers in a tensor that the network computes for one image or while it is built."""
MAX_FLOPS = 10**14
"""The most floating-point operations for one image: thirty times those of timm's largest network."""


class NetworkTooLargeError(PylorusError):
    """Raised if a network exceeds a limit on parameters, modules, tensors or operations."""


class _NetworkLimits(TorchFunctionMode):
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


def _build_checked_network(
    description: Description, factory: Callable[..., Any] | None, weights: TensorFile, *, where: str
) -> Any:
    """Build a network whose tensors have the types and shapes of a file, which takes no memory before that is known.

    Raises:
        PylorusError: See `build_network`; or if the network does not fit the file, or exceeds a limit.
        UnknownNetworkError: See `build_network`.
    """
    _check_memory(weights)
    architecture = description.architecture[:100]
    purpose = f"{architecture} with {len(description.classes)} classes, as {DESCRIPTION} says"
    trial = None if factory is not None else _build_trial_network(description, where=where)
    if trial is not None:
        weights.check_entries(_list_entries(trial), purpose=purpose)
    # Of a network that can't be built without memory, the file says how large it may be.
    limits = _NetworkLimits(weights.elements + MAX_SPARE_ELEMENTS)
    try:
        with limits if trial is None and factory is None else contextlib.nullcontext():
            network = build_network(description, factory, where=where)
    except PylorusError as error:
        _explain_size(error, architecture, where=where)
        if factory is None and where not in str(error):
            raise PylorusError(f"{where}: {error}") from None
        raise
    weights.check_entries(_list_entries(network), purpose=purpose)
    return network


MAX_SPARE_ELEMENTS = 2**26
"""Numbers that a network may have besides those in its file, such as relative positions."""


def _check_memory(weights: TensorFile) -> None:
    needed = sum(entry.size for entry in weights.entries.values())
    free = get_free_memory()
    if weights.elements > MAX_PARAMETERS:
        weights.refuse(f"holds {weights.elements:,} parameters, expected {MAX_PARAMETERS:,} at most")
    if needed > free:
        raise PylorusError(
            f"{weights.path}: needs {format_bytes(needed)} of memory, but only {format_bytes(free)} are free. Close "
            "other programs, or use a machine with more memory."
        )


def _build_trial_network(description: Description, *, where: str) -> Any | None:
    """Build the network without memory for its tensors, and let it compute one image; None if it can't be built so.

    Raises:
        PylorusError: If timm has no such model or rejects its arguments, or if it exceeds a limit.
    """
    _check_architecture(description, where)
    architecture, size = description.architecture[:100], description.input.size
    try:
        with torch.device("meta"), _NetworkLimits():
            network = _create_described_network(description)
    except PylorusError as error:
        _explain_size(error, architecture, where=where)
        _check_single_arguments(description, where=where)
        return None
    operations, faults = 0, []
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter, _NetworkLimits(), torch.device("meta"):
            network.eval()(torch.zeros(1, 3, size, size))
        operations = counter.get_total_flops()
    except NetworkTooLargeError as error:
        faults.append(str(error))
    except Exception:  # whatever a network raises: a few compute on a real device only, where the others fail in words
        log.debug("%s can't compute on torch's meta device", architecture, exc_info=True)
    if operations > MAX_FLOPS:
        faults.append(f"the network needs {operations:.1e} operations for an image, more than {MAX_FLOPS:.0e}")
    if faults:
        raise PylorusError(f"{where}: {architecture} for images of {size} × {size} pixels is refused: {faults[0]}.")
    return network


def _explain_size(error: PylorusError, architecture: str, *, where: str) -> None:
    """Raise an error that names the limit that a network exceeds, if that is why it can't be built."""
    if isinstance(error.__cause__, NetworkTooLargeError):
        raise PylorusError(f"{where}: {architecture}, as it describes it, is refused: {error.__cause__}.") from None


def _create_described_network(description: Description, *, without: str | None = None) -> Any:
    arguments = {name: value for name, value in description.arguments.items() if name != without}
    return create_network(
        description.architecture, arguments, classes=len(description.classes), image_size=description.input.size
    )


def _check_single_arguments(description: Description, *, where: str) -> None:
    """Raise an error that names the argument without which timm accepts the others, if there is one."""
    for name, value in description.arguments.items():
        try:
            with torch.device("meta"), _NetworkLimits():
                _create_described_network(description, without=name)
        except PylorusError:
            continue
        try:
            with torch.random.fork_rng(devices=[]), _NetworkLimits(MAX_SPARE_ELEMENTS):
                _create_described_network(description)
        except PylorusError as error:
            reason = str(error).rpartition("timm rejected them: ")[2]
            raise PylorusError(
                f"{where}: arguments.{name}: found {str(value)[:100]!r}, with which {description.architecture[:100]} "
                f"can't be built (timm rejected them: {reason}). {DESCRIPTION} was damaged, or changed by hand."
            ) from None
        return


def _read_weights(network: Any, weights: TensorFile) -> None:
    """Read the weights of a network into its memory."""
    state = network.state_dict()
    own = {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    if all(tensor.data_ptr() in own for tensor in state.values()):
        weights.read_into(state)
    else:  # a network of the user's own whose state is a copy
        network.load_state_dict(weights.read_tensors())


def _list_entries(network: nn.Module) -> dict[str, TensorEntry]:
    return {name: TensorEntry(tensor.dtype, tuple(tensor.shape)) for name, tensor in network.state_dict().items()}


def build_network(description: Description, factory: Callable[..., Any] | None, *, where: str) -> Any:
    """Build the network that a description names, with random weights.

    Args:
        description: The content of model.json.
        factory: See `network` of `load_bundle`; a module is copied.
        where: The file that holds the description, for error messages.

    Raises:
        PylorusError: If timm has no such model, or a model of timm is described and there is a factory.
        UnknownNetworkError: If the network is of the user's own and there is no factory.
    """
    if factory is None:
        _check_architecture(description, where)
    elif is_timm_model(description.architecture):
        raise PylorusError(
            f"{where}: the network is {description.architecture} of timm. Leave out --network (in Python: network)."
        )
    if isinstance(factory, nn.Module):
        return copy.deepcopy(factory)
    if factory is None:
        return _create_described_network(description)
    classes, arguments = len(description.classes), description.arguments
    try:
        return call_factory(factory, {"num_classes": classes, **arguments})
    except Exception as error:  # whatever the user's code raises
        name = f"{factory.__module__}.{getattr(factory, '__qualname__', type(factory).__name__)}"
        raise PylorusError(
            f"network {name}, called with num_classes={classes} and {arguments}, failed: {type(error).__name__}: "
            f"{error}"
        ) from error


def _check_architecture(description: Description, where: str) -> None:
    """Check that timm has the network, or that it was registered in this process."""
    try:
        check_model_name(description.architecture, where=f"{where}: architecture")
    except PylorusError as error:
        if description.network is None:
            raise PylorusError(
                f"{error} If it is a network of your own, name its class or function: --network MODULE.NAME, or in "
                "Python: load_model(…, network=NAME)."
            ) from None
        name = description.network.rpartition(".")[2]
        raise UnknownNetworkError(
            f"{where}: the network {description.architecture[:100]} was built by {description.network}, which is not "
            f"part of Pylorus; a bundle never imports code. If you trust it, add --network {description.network}, or "
            f"in Python: load_model(…, network={name})."
        ) from None


def _check_direction_header(file: TensorFile, classes: int) -> None:
    entry = file.entries.get(DIRECTIONS, TensorEntry(torch.float32, ()))
    is_matrix = len(file.entries) == 1 and entry.dtype == torch.float32 and len(entry.shape) == 2
    if not is_matrix or entry.shape[0] != classes or entry.shape[1] > MAX_FEATURES:
        found = {name[:50]: str(each) for name, each in list(file.entries.items())[:4]}
        file.refuse(f'found {found}, expected one float32 matrix "{DIRECTIONS}" with {classes} rows')


MAX_FEATURES = 32_768
"""The most features of an image: four times those of timm's widest network."""


def _read_directions(file: TensorFile) -> Tensor:
    directions = file.read_tensors()[DIRECTIONS]
    if not torch.allclose(directions.norm(dim=1), torch.ones(len(directions)), atol=1e-3):
        raise PylorusError(f'{file.path}: the rows of "{DIRECTIONS}" are not unit vectors.')
    return directions


def build_appearance_entries(classes: int) -> dict[str, TensorEntry]:
    """Return the tensors of appearance.safetensors for a number of classes."""
    length = APPEARANCE_LENGTH
    shapes = {"center": (length,), "whitening": (length, length), "means": (classes, length), "scales": (2, 2)}
    return {name: TensorEntry(torch.float32, shape) for name, shape in shapes.items()}


def _read_appearance(file: TensorFile) -> AppearanceModel:
    tensors = file.read_tensors()
    if not (tensors["scales"][1] > 0).all():
        raise PylorusError(f'{file.path}: the second row of "scales" is not positive.')
    return AppearanceModel(**tensors)


def verify_inference(model: InferenceModel, weights: Path) -> None:
    """Run a model on one black image, so that files that do not fit together are reported when it is loaded.

    Args:
        model: The model that was just loaded.
        weights: The file to name if the output is NaN or infinite.

    Raises:
        PylorusError: If the model can't compute, or if its output is NaN or infinite.
    """
    size = model.input.size
    try:
        output = model.run_network(np.zeros((1, size, size, 3), dtype=np.uint8))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__
        raise PylorusError(f"{model.folder}: its files do not fit together: {reason}.") from error
    if not (output.logits.isfinite().all() and output.unlikeness.isfinite().all()):
        raise PylorusError(f"{weights}: for a black image the network's output is NaN or infinite.")
