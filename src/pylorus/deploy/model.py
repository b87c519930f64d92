"""Load a bundle: every file is verified by its hash, every tensor by its shape; nothing in it is ever executed."""

import contextlib
import copy
import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pylorus.config.checks import check_model_name
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_bytes
from pylorus.core.system import get_free_memory
from pylorus.data.input_format import InputFormat
from pylorus.deploy.bundle_files import (
    MAX_PARAMETERS,
    NetworkLimits,
    NetworkTooLargeError,
    check_reference_headers,
    list_prefixes,
    read_appearances,
    read_description,
    read_directions,
)
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
        return self.description.form

    @abstractmethod
    def run_network(self, images: NDArray[np.uint8]) -> NetworkOutput:
        """Run the network on images.

        Args:
            images: uint8 RGB of shape (n, *input.shape), as `input` reads them.

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
        """Predict images: uint8 RGB of shape (n, *input.shape), as `input` reads them."""
        return self.apply_thresholds(self.run_network(images), class_name=class_name)


class EnsembleClassifier(nn.Module):
    """Several networks that compute as one: the mean of their calibrated probabilities, and of their unlikeness.

    Network m has logits z_m, a temperature T_m and, after a recalibration, a bias b_m for each class. The logits of the
    ensemble are log((1 / M) Σ_m softmax(z_m / T_m + b_m)), so that their softmax is the mean of the networks'
    calibrated probabilities (a linear opinion pool; Lakshminarayanan et al. 2017). What follows the logits is that of a
    single network: a temperature, thresholds and abstention.

    Args:
        members: The networks with their normalisation and training images.
        windows: For each member the first row, and the side, of its square in a prepared image, in pixels; see
            `pylorus.data.input_format.StackedFormat`.
        temperatures: Temperature of each member.
        biases: What is added to each member's divided logits, of shape (members, classes).
    """

    temperatures: Tensor
    biases: Tensor

    def __init__(
        self,
        members: Sequence[BundleClassifier],
        *,
        windows: Sequence[tuple[int, int]],
        temperatures: Sequence[float],
        biases: Sequence[Sequence[float]],
    ):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.windows = tuple(windows)
        self.register_buffer("temperatures", torch.tensor([*temperatures], dtype=torch.float32))
        self.register_buffer("biases", torch.tensor([[*bias] for bias in biases], dtype=torch.float32))
        self.eval()

    def forward(self, image: Tensor) -> NetworkOutput:
        """Compute the output for uint8 RGB images of shape (n, 3, height, width), in which all squares are stacked."""
        outputs = [
            member(image[:, :, top : top + side, :side])
            for member, (top, side) in zip(self.members, self.windows, strict=True)
        ]
        calibrated = [
            torch.log_softmax(output.logits / self.temperatures[number] + self.biases[number], dim=1)
            for number, output in enumerate(outputs)
        ]
        logits = torch.logsumexp(torch.stack(calibrated), dim=0) - math.log(len(outputs))
        return NetworkOutput(logits, torch.stack([output.unlikeness for output in outputs]).mean(dim=0))


@dataclass(frozen=True, eq=False)
class Bundle(InferenceModel):
    """A trained network in PyTorch, or several whose probabilities are averaged, ready for inference.

    Attributes:
        classifier: Module whose input is uint8 RGB of shape (n, 3, height, width) on its device.
        device: The device that computes.
        factory: The user's own class, function or module that the network is from; None for a model of timm.
        fingerprints: Of its training and validation images; None if it carries none.
        members: Each network of an ensemble as a model of its own; empty for a single network.
    """

    classifier: BundleClassifier | EnsembleClassifier
    device: torch.device
    factory: Callable[..., Any] | None = None
    fingerprints: Fingerprints | None = None
    members: tuple["Bundle", ...] = ()

    @property
    def networks(self) -> tuple["Bundle", ...]:
        """Each of its networks as a model of its own: its members, or itself."""
        return self.members or (self,)

    @property
    def network(self) -> Any:
        """Its network; of an ensemble, a module list of its networks."""
        if isinstance(self.classifier, BundleClassifier):
            return self.classifier.network
        return nn.ModuleList([member.network for member in self.members])

    def select_input(self, images: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
        """Return the part of prepared images that the network of this number takes, of shape (n, size, size, 3)."""
        return self.input.get_square(images, self.input.forms.index(self.networks[number].input))

    def run_network(self, images: NDArray[np.uint8]) -> NetworkOutput:
        """Run the network on uint8 RGB images (n, *input.shape), as `input` reads them; tensors are on the CPU."""
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
        prefixes = list_prefixes(description)
        check_reference_headers(files, description)
        weights = files.tensor_files[WEIGHTS]
        module = _build_checked_network(description, network, weights, where=str(folder / DESCRIPTION))
        _read_weights(module, weights)
        directions = read_directions(files.tensor_files[UNLIKE], prefixes)
        appearances = read_appearances(files.tensor_files.get(LOOKS), prefixes)
        fingerprints = read_fingerprints(files, description.fingerprints)
    target, is_single = torch.device(device), description.ensemble is None
    networks: list[Any] = [module] if is_single else list(module)
    bundles = []
    for number, part in enumerate(description.list_networks()):
        classifier = BundleClassifier(
            move_to_device(networks[number], target),
            mean=part.input.mean,
            std=part.input.std,
            directions=directions[number],
            appearance=appearances[number],
        ).to(target)
        factory = network if is_single or part.network is not None else None
        bundles.append(Bundle(folder, part, files.hashes, files.contents, classifier, target, factory))
    bundle = replace(bundles[0] if is_single else join_networks(description, bundles), fingerprints=fingerprints)
    verify_inference(bundle, folder / WEIGHTS)
    return bundle


def join_networks(description: Description, members: Sequence[Bundle]) -> Bundle:
    """Return the ensemble of loaded networks, which `description` describes in this order."""
    forms = description.form.forms
    tops = [sum(form.size for form in forms[:number]) for number in range(len(forms))]
    classifier = EnsembleClassifier(
        [member.classifier for member in members if isinstance(member.classifier, BundleClassifier)],
        windows=[(tops[forms.index(member.input)], member.input.size) for member in members],
        temperatures=[member.description.calibration.temperature for member in members],
        biases=[member.description.calibration.bias or [0.0] * len(description.classes) for member in members],
    )
    first = members[0]
    return replace(
        first, description=description, classifier=classifier.to(first.device), factory=None, members=tuple(members)
    )


MAX_FLOPS = 10**14
"""The most floating-point operations for one image: thirty times those of timm's largest network."""


def _build_checked_network(
    description: Description, factory: Callable[..., Any] | None, weights: TensorFile, *, where: str
) -> Any:
    """Build a network whose tensors have the types and shapes of a file, which takes no memory before that is known.

    Returns:
        The network; of an ensemble, a module list of its networks.

    Raises:
        PylorusError: See `build_network`; or if the network does not fit the file, or exceeds a limit.
        UnknownNetworkError: See `build_network`.
    """
    _check_memory(weights)
    parts = description.list_networks()
    # Only some networks of an ensemble may be the user's own; without any, the factory is refused.
    has_own = any(part.network is not None for part in parts)
    factories = [factory if part.network is not None or not has_own else None for part in parts]
    purpose = f"{description.architecture[:100]} with {len(description.classes)} classes, as {DESCRIPTION} says"
    pairs = list(zip(parts, factories, strict=True))
    trials = [None if own is not None else _build_trial_network(part, where=where) for part, own in pairs]
    if all(trial is not None for trial in trials):
        weights.check_entries(_list_entries(_join_modules(description, trials)), purpose=purpose)
    # Of a network that can't be built without memory, the file says how large it may be.
    limits = NetworkLimits(weights.elements + MAX_SPARE_ELEMENTS)
    networks = []
    for (part, own), trial in zip(pairs, trials, strict=True):
        try:
            with limits if trial is None and own is None else contextlib.nullcontext():
                networks.append(build_network(part, own, where=where))
        except PylorusError as error:
            _explain_size(error, part.architecture[:100], where=where)
            if own is None and where not in str(error):
                raise PylorusError(f"{where}: {error}") from None
            raise
    network = _join_modules(description, networks)
    weights.check_entries(_list_entries(network), purpose=purpose)
    return network


def _join_modules(description: Description, networks: Sequence[Any]) -> Any:
    return networks[0] if description.ensemble is None else nn.ModuleList(networks)


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
        with torch.device("meta"), NetworkLimits():
            network = _create_described_network(description)
    except PylorusError as error:
        _explain_size(error, architecture, where=where)
        _check_single_arguments(description, where=where)
        return None
    operations, faults = 0, []
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter, NetworkLimits(), torch.device("meta"):
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
            with torch.device("meta"), NetworkLimits():
                _create_described_network(description, without=name)
        except PylorusError:
            continue
        try:
            with torch.random.fork_rng(devices=[]), NetworkLimits(MAX_SPARE_ELEMENTS):
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


def verify_inference(model: InferenceModel, weights: Path) -> None:
    """Run a model on one black image, so that files that do not fit together are reported when it is loaded.

    Args:
        model: The model that was just loaded.
        weights: The file to name if the output is NaN or infinite.

    Raises:
        PylorusError: If the model can't compute, or if its output is NaN or infinite.
    """
    try:
        output = model.run_network(np.zeros((1, *model.input.shape), dtype=np.uint8))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__
        raise PylorusError(f"{model.folder}: its files do not fit together: {reason}.") from error
    if not (output.logits.isfinite().all() and output.unlikeness.isfinite().all()):
        raise PylorusError(f"{weights}: for a black image the network's output is NaN or infinite.")
