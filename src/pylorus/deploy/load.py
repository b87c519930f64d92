"""A bundle, read: every file by its hash, every tensor by its shape; nothing in it is ever executed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pylorus.deploy.answers import TrainedModel
from pylorus.deploy.checks import MOST_BYTES, read_description
from pylorus.deploy.description import Description
from pylorus.deploy.files import DESCRIPTION, UNLIKE, WEIGHTS, checked_sums
from pylorus.deploy.network import BundledClassifier, Output, laid_out
from pylorus.errors import PylorusError, listing
from pylorus.model.backbone import create_network

DIRECTIONS = "directions"


@dataclass(frozen=True, eq=False)
class Bundle(TrainedModel):
    """A trained network, ready to be asked, in PyTorch.

    Attributes:
        classifier: `classifier(images)` takes uint8 RGB of shape (n, 3, size, size) on its device.
        device: Where it computes.
    """

    classifier: BundledClassifier
    device: torch.device

    def output(self, images: NDArray[np.uint8]) -> Output:
        """What the network says of images (n, size, size, 3) as `input` reads them, on the CPU."""
        batch = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(self.device)
        with torch.inference_mode():
            found: Output = self.classifier(batch)
        return Output(found.logits.cpu(), found.unlikeness.cpu())


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
    description = described(folder)
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
    bundle = Bundle(folder, description, sums, classifier.to(place), place)
    try_out(bundle, folder / WEIGHTS)
    return bundle


def described(folder: Path) -> Description:
    """The description in a folder's model.json, checked.

    Raises:
        PylorusError: See `read_description`.
    """
    with (folder / DESCRIPTION).open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    return read_description(content, where=str(folder / DESCRIPTION))


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


def try_out(model: TrainedModel, weights: Path) -> None:
    """One black image, so that what does not fit together is told now and not at the first of a million.

    Args:
        model: Just loaded.
        weights: The file that is to blame where it gives no numbers.

    Raises:
        PylorusError: If it can't be computed.
    """
    size = model.input.size
    try:
        found = model.output(np.zeros((1, size, size, 3), dtype=np.uint8))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__
        raise PylorusError(f"{model.folder}: its files do not fit together: {reason}.") from error
    if not (found.logits.isfinite().all() and found.unlikeness.isfinite().all()):
        raise PylorusError(f"{weights}: a black image gives logits that are no numbers.")
