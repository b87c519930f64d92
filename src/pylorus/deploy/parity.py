"""The gate of an export: on real images it must say what PyTorch says, one at a time and several at once."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pylorus.deploy.exported import OUTPUTS, computed
from pylorus.deploy.load import Bundle
from pylorus.deploy.trial_images import TrialImages, spread
from pylorus.errors import PylorusError

IMAGES = 66
"""On how many images an export is tried, at most."""
BATCH = 7
"""How many at once beside one at a time: no power of two, and the last batch is another size still."""
ABSOLUTE = 1e-4
"""How far a calibrated probability or an unlikeness may be from PyTorch's; docs/export.md has what was measured."""
ROUGHEST = 1e-4
"""How far 32 bits alone may be from 64 and still excuse a difference, as a share of the largest logit."""

Outputs = tuple[NDArray[np.float64], ...]
"""Logits (n, classes), calibrated probabilities (n, classes) and unlikeness (n,)."""


@dataclass(frozen=True)
class Parity:
    """How near an export comes to PyTorch.

    Attributes:
        images: How many were compared.
        source: Where they come from, in words.
        batches: At how many at once.
        largest_logit: Of PyTorch, its absolute value: what differences of logits are to be seen beside.
        logits: Largest difference of any logit, by the batch.
        probabilities: The same of calibrated probabilities.
        unlikeness: The same of unlikeness.
        pytorch_alone: Largest difference of PyTorch's own logits between the batches: what rounding alone makes.
        other_class: Images whose likeliest class is another.
        rounding: How far PyTorch's own logits in 32 bits are from those in 64, at most; null where it was not asked.
        tolerance: Largest difference of a logit that is let pass.
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
    def passed(self) -> bool:
        """Whether the export may be used."""
        near = max(self.logits) <= self.tolerance and max(*self.probabilities, *self.unlikeness) <= ABSOLUTE
        return near and self.other_class == 0


def tried(bundle: Bundle, session: Any, images: TrialImages) -> Parity:
    """Compares an export with the bundle that it was made of.

    Args:
        bundle: On the CPU.
        session: Of onnxruntime.
        images: To choose from, evenly.

    Raises:
        PylorusError: If fewer than `BATCH` of them can be read, or the export can't compute a batch.
    """
    blocks = [block for _, block in spread(images, IMAGES).read(bundle.input)]
    count = sum(map(len, blocks))
    if count < BATCH:
        raise PylorusError(
            f"{images.source}: {count} images can be read, expected at least {BATCH} to try the export on."
        )
    batch = np.concatenate(blocks)
    theirs, ours = [], []
    for size in (1, BATCH):
        theirs.append(in_batches(lambda part: _of_pytorch(bundle, part), batch, size))
        try:
            ours.append(in_batches(lambda part: _of_onnx(session, part), batch, size))
        except RuntimeError as error:
            raise PylorusError(f"the export can't compute {size} images at once: {error}.") from error
    largest = float(np.abs(theirs[0][0]).max())
    apart = [tuple(map(_apart, one, two)) for one, two in zip(theirs, ours, strict=True)]
    allowed, rounding = tolerance(largest), None
    if np.isfinite(apart).all() and max(far[0] for far in apart) > allowed:
        rounding = _apart(theirs[1][0], logits_in_64_bits(bundle, batch))
        allowed = max(allowed, 2 * min(rounding, ROUGHEST * largest))
    classes = [one[0].argmax(axis=1) for one in (*theirs, *ours)]
    return Parity(
        images=count,
        source=images.source,
        batches=(1, BATCH),
        largest_logit=largest,
        logits=tuple(far[0] for far in apart),
        probabilities=tuple(far[1] for far in apart),
        unlikeness=tuple(far[2] for far in apart),
        pytorch_alone=_apart(theirs[0][0], theirs[1][0]),
        other_class=int(np.any([found != classes[0] for found in classes], axis=0).sum()),
        rounding=rounding,
        tolerance=allowed,
    )


def tolerance(largest: float) -> float:
    """How far a logit may be from PyTorch's, where the largest of them has this absolute value.

    1e-4; less where logits are all below 1, since there a wrong weight could hide below it; more where they are above
    10, since there 32 bits can't do better. A network in which 32 bits are rougher still may differ by twice what
    PyTorch in 32 bits differs from PyTorch in 64: if both err by so much, they are so far apart.

    Example:
        >>> [f"{tolerance(largest):.0e}" for largest in (0.001, 0.1, 1.0, 10.0, 50.0)]
        ['1e-06', '1e-05', '1e-04', '1e-04', '5e-04']
    """
    return max(min(ABSOLUTE, 1e-4 * largest), 1e-5 * largest, 1e-6)


def in_batches(compute: Callable[[NDArray[np.uint8]], Outputs], images: NDArray[np.uint8], size: int) -> Outputs:
    """What `compute` gives of images, `size` at a time."""
    parts = [compute(images[start : start + size]) for start in range(0, len(images), size)]
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))


def logits_in_64_bits(bundle: Bundle, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The logits (n, classes) of images (n, size, size, 3), computed by PyTorch in 64 bits."""
    precise = copy.deepcopy(bundle.classifier).double()

    def compute(part: NDArray[np.uint8]) -> Outputs:
        pixels = torch.from_numpy(part.transpose(0, 3, 1, 2).copy()).double()
        with torch.inference_mode():
            logits: NDArray[np.float64] = precise.network((pixels - precise.mean) / precise.std).numpy()
        return (logits,)

    return in_batches(compute, images, BATCH)[0]


def _of_pytorch(bundle: Bundle, images: NDArray[np.uint8]) -> Outputs:
    found = bundle.output(images)
    logits = found.logits.double().numpy()
    return logits, bundle.probabilities(logits), found.unlikeness.double().numpy()


def _of_onnx(session: Any, images: NDArray[np.uint8]) -> Outputs:
    return tuple(each.astype(np.float64) for each in computed(session, images, *OUTPUTS))


def _apart(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """The largest difference; infinite where either is no number, or the shapes differ."""
    if first.shape != second.shape or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("inf")
    return float(np.abs(first - second).max())
