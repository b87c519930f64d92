"""Load a bundle: every file is verified by its hash, every tensor by its shape; nothing in it is ever executed."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pylorus.config.checks import check_model_name
from pylorus.core.errors import PylorusError, format_name_list
from pylorus.data.input_format import InputFormat
from pylorus.deploy.bundle_files import (
    DESCRIPTION,
    LOOKS,
    MAX_DESCRIPTION_BYTES,
    UNLIKE,
    WEIGHTS,
    read_description,
    verify_checksums,
)
from pylorus.deploy.description import Description
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
    """

    folder: Path
    description: Description
    sha256: Mapping[str, str]

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
        return probabilities_of_logits(values, temperature=self.description.calibration.temperature)

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
    """

    classifier: BundleClassifier
    device: torch.device
    factory: Callable[..., Any] | None = None

    def run_network(self, images: NDArray[np.uint8]) -> NetworkOutput:
        """Run the network on uint8 RGB images (n, size, size, 3), as `input` reads them; tensors are on the CPU."""
        batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(self.device)
        with torch.inference_mode():
            computed: NetworkOutput = self.classifier(batch)
        return NetworkOutput(computed.logits.cpu(), computed.unlikeness.cpu())


class UnknownNetworkError(PylorusError):
    """Raised if a bundle's network is of the user's own, and the user did not pass it."""


def load_bundle(
    folder: Path, *, device: str | torch.device = "cpu", network: Callable[..., Any] | None = None
) -> Bundle:
    """Load and check a bundle.

    Args:
        folder: The folder `model` of a run.
        device: The device that shall compute.
        network: For a network of the user's own: its class or function (`num_classes`, …), which gets the arguments
            that the bundle holds, as plain values, or a module of its kind. None for a model of timm.

    Raises:
        PylorusError: If the folder is not a bundle, or if one of its files is missing, changed or invalid; names the
            file and what is wrong.
        UnknownNetworkError: If the network is of the user's own and `network` is None.
    """
    sums = verify_checksums(folder)
    description = load_description(folder)
    module = build_network(description, network, where=str(folder / DESCRIPTION))
    weights = _load_tensors(folder / WEIGHTS)
    _check_shapes(weights, module.state_dict(), folder / WEIGHTS, description)
    module.load_state_dict(weights)
    target = torch.device(device)
    classifier = BundleClassifier(
        move_to_device(module, target),
        mean=description.input.mean,
        std=description.input.std,
        directions=_load_directions(folder / UNLIKE, len(description.classes)),
        appearance=_load_appearance(folder / LOOKS, len(description.classes)) if LOOKS in sums else None,
    )
    bundle = Bundle(folder, description, sums, classifier.to(target), target, network)
    verify_inference(bundle, folder / WEIGHTS)
    return bundle


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
    classes, arguments = len(description.classes), description.arguments
    if factory is None:
        return create_network(description.architecture, arguments, classes=classes, image_size=description.input.size)
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


def load_description(folder: Path) -> Description:
    """Read and check the model.json of a folder.

    Raises:
        PylorusError: See `read_description`.
    """
    with (folder / DESCRIPTION).open("rb") as file:
        content = file.read(MAX_DESCRIPTION_BYTES + 1)
    return read_description(content, where=str(folder / DESCRIPTION))


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError, KeyError) as error:
        raise PylorusError(
            f"{path}: can't be read as safetensors, and no other format is ever loaded: {error}."
        ) from error
    non_finite = [
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if non_finite:
        raise PylorusError(f"{path}: contains NaN or infinite values in:\n{format_name_list(non_finite, most=4)}")
    return tensors


def _check_shapes(
    tensors_found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, description: Description
) -> None:
    def format_shape(tensors: Mapping[str, Tensor], name: str) -> str:
        return f"{tensors[name].dtype} {tuple(tensors[name].shape)}" if name in tensors else "nothing"

    mismatches = [
        f"{name}: found {format_shape(tensors_found, name)}, expected {format_shape(expected, name)}"
        for name in sorted({*tensors_found, *expected})
        if format_shape(tensors_found, name) != format_shape(expected, name)
    ]
    if mismatches:
        raise PylorusError(
            f"{path}: does not fit {description.architecture} with {len(description.classes)} classes, as "
            f"{DESCRIPTION} says:\n"
            f"{format_name_list(mismatches, most=4)}"
        )


def _load_directions(path: Path, classes: int) -> Tensor:
    tensors = _load_tensors(path)
    directions = tensors.get(DIRECTIONS)
    if (
        directions is None
        or len(tensors) != 1
        or directions.dtype != torch.float32
        or directions.ndim != 2
        or len(directions) != classes
    ):
        shapes = {name[:50]: tuple(tensor.shape) for name, tensor in list(tensors.items())[:4]}
        raise PylorusError(f'{path}: found {shapes}, expected one float32 matrix "{DIRECTIONS}" with {classes} rows.')
    if not torch.allclose(directions.norm(dim=1), torch.ones(len(directions)), atol=1e-3):
        raise PylorusError(f'{path}: the rows of "{DIRECTIONS}" are not unit vectors.')
    return directions


def _load_appearance(path: Path, classes: int) -> AppearanceModel:
    tensors, length = _load_tensors(path), APPEARANCE_LENGTH
    expected = {"center": (length,), "whitening": (length, length), "means": (classes, length), "scales": (2, 2)}
    shapes = {name[:50]: tuple(tensor.shape) for name, tensor in list(tensors.items())[:5]}
    if shapes != expected or any(tensor.dtype != torch.float32 for tensor in tensors.values()):
        raise PylorusError(f"{path}: found {shapes}, expected float32 of {expected}.")
    if not (tensors["scales"][1] > 0).all():
        raise PylorusError(f'{path}: the second row of "scales" is not positive.')
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
