"""A bundle, read: every file by its hash, every tensor by its shape; nothing in it is ever executed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pylorus.data.input import InputFormat
from pylorus.deploy.checks import MOST_BYTES, read_description
from pylorus.deploy.description import Description
from pylorus.deploy.files import DESCRIPTION, UNLIKE, WEIGHTS, checked_sums
from pylorus.deploy.network import BundledClassifier, Output, laid_out
from pylorus.errors import PylorusError, listing
from pylorus.evaluation.calibration import probabilities_of_logits
from pylorus.model.backbone import create_network

DIRECTIONS = "directions"


@dataclass(frozen=True, eq=False)
class Answers:
    """What a bundle says of some images.

    Attributes:
        probabilities: Calibrated, of shape (n, classes).
        predicted: The likeliest class of each, of shape (n,).
        positive: Whether the deciding class's probability reaches its threshold, of shape (n,).
        unlikeness: Of shape (n,), in [0, 2].
        why: Why it abstains, of shape (n,): "", "unsure" or "unlike".
    """

    probabilities: NDArray[np.float64]
    predicted: NDArray[np.int64]
    positive: NDArray[np.bool_]
    unlikeness: NDArray[np.float64]
    why: NDArray[np.str_]


@dataclass(frozen=True, eq=False)
class Bundle:
    """A trained network, ready to be asked.

    Attributes:
        folder: Where it lies.
        description: All of model.json.
        classifier: `classifier(images)` takes uint8 RGB of shape (n, 3, size, size) on its device.
        device: Where it computes.
        sha256: Of each of its files, by name.
    """

    folder: Path
    description: Description
    classifier: BundledClassifier
    device: torch.device
    sha256: Mapping[str, str]

    @property
    def input(self) -> InputFormat:
        """How a file becomes the network's input."""
        return self.description.input.form

    def output(self, images: NDArray[np.uint8]) -> Output:
        """What the network says of images (n, size, size, 3) as `input` reads them, on the CPU."""
        batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(self.device)
        with torch.inference_mode():
            found: Output = self.classifier(batch)
        return Output(found.logits.cpu(), found.unlikeness.cpu())

    def probabilities(self, logits: Tensor | NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """Calibrated probabilities (n, classes) of logits."""
        given = np.asarray(logits, dtype=np.float64)
        return probabilities_of_logits(given, temperature=self.description.calibration.temperature)

    def decide(self, output: Output, *, class_name: str | None = None) -> Answers:
        """Probabilities, classes, decisions at the stored threshold, and where the model abstains.

        Args:
            output: Of the classifier.
            class_name: Short name of the class that decides; None: the bundle's own.
        """
        names, abstention = self.description.short_names, self.description.abstention
        deciding = class_name or self.description.decision.class_name
        threshold = self.description.decision.thresholds[deciding]
        shares = self.probabilities(output.logits)
        unlike = np.asarray(output.unlikeness, dtype=np.float64)
        unsure = shares.max(axis=1) < abstention.unsure_below
        return Answers(
            probabilities=shares,
            predicted=shares.argmax(axis=1).astype(np.int64),
            positive=shares[:, names.index(deciding)] >= (2.0 if threshold is None else threshold),
            unlikeness=unlike,
            why=np.where(unlike > abstention.unlike_above, "unlike", np.where(unsure, "unsure", "")),
        )

    def answer(self, images: NDArray[np.uint8], *, class_name: str | None = None) -> Answers:
        """What it says of images (n, size, size, 3), uint8 RGB as `input` reads them."""
        return self.decide(self.output(images), class_name=class_name)


def load_bundle(folder: Path, *, device: str | torch.device = "cpu") -> Bundle:
    """Reads and checks a bundle.

    Args:
        folder: The folder `model` of a run.
        device: Where it is to compute.

    Raises:
        PylorusError: If it is no bundle, or a file of it is missing, changed or not what it should be; names the file
            and what is wrong.
    """
    sums = checked_sums(folder)
    with (folder / DESCRIPTION).open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    description = read_description(content, where=str(folder / DESCRIPTION))
    network = create_network(
        description.architecture,
        description.arguments,
        classes=len(description.classes),
        image_size=description.input.size,
    )
    weights = _tensors(folder / WEIGHTS)
    _check_shapes(weights, network.state_dict(), folder / WEIGHTS, description)
    network.load_state_dict(weights)
    place = torch.device(device)
    classifier = BundledClassifier(
        laid_out(network, place),
        mean=description.input.mean,
        std=description.input.std,
        directions=_directions(folder / UNLIKE, len(description.classes)),
    )
    bundle = Bundle(folder, description, classifier.to(place), place, sums)
    _try_out(bundle)
    return bundle


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        found = load_file(path)
    except (SafetensorError, ValueError, OSError, KeyError) as error:
        raise PylorusError(
            f"{path}: can't be read as safetensors, and nothing else is ever loaded: {error}."
        ) from error
    broken = [name for name, tensor in found.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise PylorusError(f"{path}: holds values that are no numbers in:\n{listing(broken, most=4)}")
    return found


def _check_shapes(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, said: Description) -> None:
    def shown(tensors: Mapping[str, Tensor], name: str) -> str:
        return f"{tensors[name].dtype} {tuple(tensors[name].shape)}" if name in tensors else "nothing"

    wrong = [
        f"{name}: found {shown(given, name)}, expected {shown(wanted, name)}"
        for name in sorted({*given, *wanted})
        if shown(given, name) != shown(wanted, name)
    ]
    if wrong:
        raise PylorusError(
            f"{path}: does not fit {said.architecture} of {len(said.classes)} classes, which {DESCRIPTION} names:\n"
            f"{listing(wrong, most=4)}"
        )


def _directions(path: Path, classes: int) -> Tensor:
    given = _tensors(path)
    found = given.get(DIRECTIONS)
    if found is None or len(given) != 1 or found.dtype != torch.float32 or found.ndim != 2 or len(found) != classes:
        shapes = {name[:50]: tuple(tensor.shape) for name, tensor in list(given.items())[:4]}
        raise PylorusError(f'{path}: found {shapes}, expected one float32 matrix "{DIRECTIONS}" of {classes} rows.')
    if not torch.allclose(found.norm(dim=1), torch.ones(len(found)), atol=1e-3):
        raise PylorusError(f'{path}: the rows of "{DIRECTIONS}" are no unit vectors.')
    return found


def _try_out(bundle: Bundle) -> None:
    """One black image, so that what does not fit together is told now and not at the first of a million."""
    size = bundle.input.size
    try:
        found = bundle.output(np.zeros((1, size, size, 3), dtype=np.uint8))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__
        raise PylorusError(f"{bundle.folder}: its files do not fit together: {reason}.") from error
    if not (found.logits.isfinite().all() and found.unlikeness.isfinite().all()):
        raise PylorusError(f"{bundle.folder / WEIGHTS}: a black image gives logits that are no numbers.")
