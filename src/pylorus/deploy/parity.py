"""Parity check of an export: on real images it must agree with PyTorch, one image at a time and in batches."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pylorus.deploy.exported import OUTPUTS, run_session
from pylorus.deploy.load import Bundle
from pylorus.deploy.trial_images import TrialImages, select_evenly
from pylorus.errors import PylorusError

IMAGES = 66
"""Maximum number of images for the parity check."""
BATCH = 7
"""Batch size besides 1: not a power of two, so the last batch has yet another size."""
ABSOLUTE = 1e-4
"""Tolerance of calibrated probabilities and unlikeness; docs/export.md has measurements."""
ROUGHEST = 1e-4
"""Largest rounding error of fp32 that excuses a difference, as a fraction of the largest logit."""

Outputs = tuple[NDArray[np.float64], ...]
"""Logits (n, classes), calibrated probabilities (n, classes) and unlikeness (n,)."""


@dataclass(frozen=True)
class Parity:
    """Differences between an export and PyTorch.

    Attributes:
        images: Number of compared images.
        source: Where the images come from, as text.
        batches: Batch sizes.
        largest_logit: Largest absolute logit of PyTorch, to judge differences of logits by.
        logits: Largest difference of a logit, by batch size.
        probabilities: Largest difference of a calibrated probability, by batch size.
        unlikeness: Largest difference of unlikeness, by batch size.
        pytorch_alone: Largest difference of PyTorch's own logits between batch sizes, caused by rounding alone.
        other_class: Images with another predicted class.
        rounding: Largest difference of PyTorch's logits in fp32 from those in fp64; null if not computed.
        tolerance: Largest accepted difference of a logit.
    """

    images: int
    source: str
    batches: tuple[int, ...]
    largest_logit: float
    logits: tuple[float, ...]
    probabilities: tuple[float, ...]
    unlikeness: tuple[float, ...]
    pytorch_alone: float
    other_class: int
    rounding: float | None
    tolerance: float

    @property
    def has_passed(self) -> bool:
        """Whether the export agrees with PyTorch."""
        is_close = max(self.logits) <= self.tolerance and max(*self.probabilities, *self.unlikeness) <= ABSOLUTE
        return is_close and self.other_class == 0


def check_parity(bundle: Bundle, session: Any, images: TrialImages) -> Parity:
    """Compare an export with its bundle.

    Args:
        bundle: The bundle, on the CPU.
        session: onnxruntime's session of the export.
        images: Images to choose from evenly; at most `IMAGES` are used.

    Raises:
        PylorusError: If fewer than `BATCH` images can be read, or the export fails on a batch.
    """
    blocks = [block for _, block in select_evenly(images, IMAGES).read_blocks(bundle.input)]
    count = sum(map(len, blocks))
    if count < BATCH:
        raise PylorusError(
            f"{images.source}: {count} images can be read, expected at least {BATCH} to verify the export on."
        )
    batch = np.concatenate(blocks)
    pytorch_outputs, onnx_outputs = [], []
    for size in (1, BATCH):
        pytorch_outputs.append(run_in_batches(lambda part: _run_pytorch(bundle, part), batch, size))
        try:
            onnx_outputs.append(run_in_batches(lambda part: _run_onnx(session, part), batch, size))
        except RuntimeError as error:
            raise PylorusError(f"the export fails at batch size {size}: {error}.") from error
    largest = float(np.abs(pytorch_outputs[0][0]).max())
    differences = [
        tuple(map(_compute_difference, one, two)) for one, two in zip(pytorch_outputs, onnx_outputs, strict=True)
    ]
    accepted, rounding = compute_tolerance(largest), None
    if np.isfinite(differences).all() and max(difference[0] for difference in differences) > accepted:
        rounding = _compute_difference(pytorch_outputs[1][0], compute_fp64_logits(bundle, batch))
        accepted = max(accepted, 2 * min(rounding, ROUGHEST * largest))
    classes = [one[0].argmax(axis=1) for one in (*pytorch_outputs, *onnx_outputs)]
    return Parity(
        images=count,
        source=images.source,
        batches=(1, BATCH),
        largest_logit=largest,
        logits=tuple(difference[0] for difference in differences),
        probabilities=tuple(difference[1] for difference in differences),
        unlikeness=tuple(difference[2] for difference in differences),
        pytorch_alone=_compute_difference(pytorch_outputs[0][0], pytorch_outputs[1][0]),
        other_class=int(np.any([predicted != classes[0] for predicted in classes], axis=0).sum()),
        rounding=rounding,
        tolerance=accepted,
    )


def compute_tolerance(largest: float) -> float:
    """Return the largest accepted difference of a logit, given the largest absolute logit of PyTorch.

    It is 1e-4; less if all logits are below 1, since a wrong weight could hide below 1e-4 there; more if they are above
    10, since fp32 is not more exact. For networks with larger rounding errors, `check_parity` accepts twice the difference
    between PyTorch in fp32 and in fp64: if both err by that much, they differ by up to twice as much.

    Example:
        >>> [f"{compute_tolerance(largest):.0e}" for largest in (0.001, 0.1, 1.0, 10.0, 50.0)]
        ['1e-06', '1e-05', '1e-04', '1e-04', '5e-04']
    """
    return max(min(ABSOLUTE, 1e-4 * largest), 1e-5 * largest, 1e-6)


def run_in_batches(compute: Callable[[NDArray[np.uint8]], Outputs], images: NDArray[np.uint8], size: int) -> Outputs:
    """Apply `compute` to images in batches of `size`, and concatenate the outputs."""
    parts = [compute(images[start : start + size]) for start in range(0, len(images), size)]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def compute_fp64_logits(bundle: Bundle, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Compute logits (n, classes) of uint8 images (n, size, size, 3) with PyTorch in fp64."""
    classifier = copy.deepcopy(bundle.classifier).double()

    def compute(batch: NDArray[np.uint8]) -> Outputs:
        pixels = torch.from_numpy(batch.transpose(0, 3, 1, 2).copy()).double()
        with torch.inference_mode():
            logits: NDArray[np.float64] = classifier.network((pixels - classifier.mean) / classifier.std).numpy()
        return (logits,)

    return run_in_batches(compute, images, BATCH)[0]


def _run_pytorch(bundle: Bundle, images: NDArray[np.uint8]) -> Outputs:
    output = bundle.run_network(images)
    logits = output.logits.double().numpy()
    return logits, bundle.calibrate_logits(logits), output.unlikeness.double().numpy()


def _run_onnx(session: Any, images: NDArray[np.uint8]) -> Outputs:
    return tuple(array.astype(np.float64) for array in run_session(session, images, *OUTPUTS))


def _compute_difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Return the largest absolute difference; infinite if a value is NaN or infinite, or the shapes differ."""
    if first.shape != second.shape or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("inf")
    return float(np.abs(first - second).max())
