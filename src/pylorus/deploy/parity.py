"""Parity check of an export: on real images it must agree with PyTorch, one image at a time and in batches."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf

from pylorus.core.errors import PylorusError, UnreadableImageError
from pylorus.core.formatting import format_count
from pylorus.data.catalog import extract_groups
from pylorus.data.input_format import InputFormat
from pylorus.deploy.description import Description
from pylorus.deploy.inputs import Sources
from pylorus.deploy.model import Bundle, InferenceModel
from pylorus.deploy.onnx import OUTPUTS, run_session
from pylorus.model.inference import NetworkOutput

READ_BATCH = 32
UNKNOWN_LABEL = -1
IMAGES_HINT = "Choose images with --images DIR."


@dataclass(frozen=True, eq=False)
class TrialImages:
    """Image files, not read yet.

    Attributes:
        files: In any order.
        labels: Class index of each file in the bundle's class order, or `UNKNOWN_LABEL`; int64 of shape (files,).
        groups: Group (patient) of each file; shape (files,).
        source: Where they come from, as text.
    """

    files: tuple[Path, ...]
    labels: NDArray[np.int64]
    groups: NDArray[np.str_]
    source: str

    def __len__(self) -> int:
        return len(self.files)

    def select_files(self, indices: NDArray[np.int64]) -> "TrialImages":
        """Return the files at the given indices."""
        return TrialImages(
            tuple(self.files[index] for index in indices), self.labels[indices], self.groups[indices], self.source
        )

    def read_blocks(self, input_format: InputFormat) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Yield indices and pixels (n, height, width, 3), block by block; files that can't be read are skipped."""
        for start in range(0, len(self.files), READ_BATCH):
            indices, images = [], []
            for index in range(start, min(start + READ_BATCH, len(self.files))):
                try:
                    images.append(input_format.load_image(self.files[index]))
                    indices.append(index)
                except UnreadableImageError:
                    continue
            if images:
                yield np.array(indices, dtype=np.int64), np.stack(images)


def select_evenly(images: TrialImages, count: int) -> TrialImages:
    """Return at most `count` of the images, evenly spaced."""
    indices = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(np.int64)
    return images.select_files(indices)


def find_user_images(folder: Path, description: Description, *, group: str | None) -> TrialImages:
    """Find the images below a folder; a folder named after a class labels its images.

    Args:
        folder: Folder from --images.
        description: The bundle's description.
        group: Regular expression that finds the patient in a path; None to make each image its own group.

    Raises:
        PylorusError: If it is not a folder, holds no image, or a path matches no patient.
    """
    if not folder.is_dir():
        raise PylorusError(f"--images: found {folder}, expected a folder of images.")
    class_names = tuple(zip(description.classes, description.short_names, strict=True))
    items = [item for item in Sources((str(folder),), class_names, None).iter_items() if isinstance(item.source, Path)]
    if not items:
        raise PylorusError(f"--images: {folder} holds no images.")
    groups = extract_groups([item.path for item in items], group, key="--group")
    return TrialImages(
        tuple(Path(str(item.source)) for item in items),
        np.array([UNKNOWN_LABEL if item.label is None else item.label for item in items], dtype=np.int64),
        np.array(groups, dtype=np.str_),
        "--images",
    )


def find_run_images(bundle: Path, description: Description, split: str | None = None) -> TrialImages:
    """Find the images of a bundle's run.

    Args:
        bundle: The folder `model` of a run.
        description: The bundle's description.
        split: Split (train, val or test); None for all.

    Raises:
        PylorusError: If it is not in a run, or the run's images are missing; the message asks for --images.
    """
    run = bundle.absolute().parent
    try:
        table = pd.read_csv(run / "split.csv", dtype=str)
        config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"), resolve=False)
        source, root = (config["data"][key] for key in ("kind", "root"))  # type: ignore[index, call-overload]
        rows = table if split is None else table[table["split"] == split]
        labels = [description.classes.index(name) for name in rows["class"]]
        paths, groups = list(rows["path"]), rows["group"].to_numpy(dtype=np.str_)
    except Exception:  # errors of pandas or YAML: the files are not those of a run
        raise PylorusError(
            f"{bundle}: an export is verified on real images, but this bundle is not in a run with images. "
            f"{IMAGES_HINT}"
        ) from None
    if source == "shards":
        raise PylorusError(f"{run}: its images are in shards, which export can't read. {IMAGES_HINT}")
    folder = run / "images" if source == "synthetic" else Path(str(root))
    files = tuple(folder / path for path in paths)
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise PylorusError(
            f"{missing}: this image of the run no longer exists, but the export is verified on it. {IMAGES_HINT}"
        )
    note = " (synthetic, not real)" if source == "synthetic" else ""
    return TrialImages(
        files, np.array(labels, dtype=np.int64), groups, f"the run's own {f'{split} ' if split else ''}images{note}"
    )


IMAGES = 66
"""Maximum number of images for the parity check."""
BATCH = 7
"""Batch size besides 1: not a power of two, so the last batch has yet another size."""
PROBABILITY_TOLERANCE = 1e-4
"""Tolerance of calibrated probabilities and unlikeness; docs/export.md has measurements."""
MAX_ROUNDING = 1e-4
"""Largest rounding error of fp32 that excuses a difference, as a fraction of the largest logit."""
MAX_UNLIKENESS_ROUNDING = 5e-4
"""Largest rounding error of unlikeness that excuses a difference: twice that is the last digit that the page shows."""

Outputs = tuple[NDArray[np.float64], ...]
"""Logits (n, classes), calibrated probabilities (n, classes) unless in fp64, and unlikeness (n,)."""


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
        other_abstention: Images on which only one of both abstains, or for another reason, although neither PyTorch's
            unlikeness nor its largest probability is within `PROBABILITY_TOLERANCE` of its threshold.
        rounding: Largest difference of PyTorch's logits in fp32 from those in fp64; null if not computed.
        unlikeness_rounding: The same of unlikeness.
        tolerance: Largest accepted difference of a logit.
        unlikeness_tolerance: Largest accepted difference of unlikeness.
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
    other_abstention: int
    rounding: float | None
    unlikeness_rounding: float | None
    tolerance: float
    unlikeness_tolerance: float

    @property
    def has_passed(self) -> bool:
        """Whether the export agrees with PyTorch."""
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """What differs by more than is allowed, each as a clause for a message; empty if the export agrees."""
        outputs = (
            ("logits differ", self.logits, self.tolerance),
            ("calibrated probabilities differ", self.probabilities, PROBABILITY_TOLERANCE),
            ("unlikeness differs", self.unlikeness, self.unlikeness_tolerance),
        )
        clauses = [
            f"the export's {output} from PyTorch's by up to {max(differences):.3g} at batch size "
            f"{self.batches[differences.index(max(differences))]} (allowed: {tolerance:.3g})"
            for output, differences, tolerance in outputs
            if not max(differences) <= tolerance
        ]
        if self.other_class:
            clauses.append(
                f"the export predicts another class than PyTorch for {format_count(self.other_class, 'image')}"
            )
        if self.other_abstention:
            images = format_count(self.other_abstention, "image")
            clauses.append(f"the export and PyTorch do not both abstain, or for other reasons, on {images}")
        return tuple(clauses)


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
    accepted, accepted_unlikeness = compute_tolerance(largest), PROBABILITY_TOLERANCE
    rounding = unlikeness_rounding = None
    far = np.max(differences, axis=0)
    is_finite = bool(np.isfinite(far).all())
    if is_finite and (far[0] > accepted or far[2] > accepted_unlikeness):
        exact = compute_fp64_outputs(bundle, batch)
        rounding, unlikeness_rounding = (
            _compute_difference(pytorch_outputs[1][index], exact[index]) for index in (0, -1)
        )
        accepted = max(accepted, 2 * min(rounding, MAX_ROUNDING * largest))
        accepted_unlikeness = max(accepted_unlikeness, 2 * min(unlikeness_rounding, MAX_UNLIKENESS_ROUNDING))
    outputs = (*pytorch_outputs, *onnx_outputs)
    classes = [logits.argmax(axis=1) for logits, *_ in outputs]
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
        other_abstention=_count_other_abstentions(bundle, outputs) if is_finite else 0,
        rounding=rounding,
        unlikeness_rounding=unlikeness_rounding,
        tolerance=accepted,
        unlikeness_tolerance=accepted_unlikeness,
    )


def _count_other_abstentions(bundle: Bundle, outputs: Sequence[Outputs]) -> int:
    """Count the images on which not all models abstain for the same reason, except those that are on a threshold.

    A threshold is the score of a validation image, which rounding may move to the other side.

    Args:
        bundle: The bundle.
        outputs: Those of PyTorch first.
    """
    abstention = bundle.description.abstention
    answers = [
        bundle.apply_thresholds(NetworkOutput(torch.from_numpy(logits), torch.from_numpy(unlikeness)))
        for logits, _, unlikeness in outputs
    ]
    margins = (
        answers[0].unlikeness - abstention.unlike_above,
        answers[0].probabilities.max(axis=1) - abstention.unsure_below,
    )
    is_clear = np.min(np.abs(margins), axis=0) > PROBABILITY_TOLERANCE
    differs = np.any([answer.why != answers[0].why for answer in answers], axis=0)
    return int((differs & is_clear).sum())


def compute_tolerance(largest: float) -> float:
    """Return the largest accepted difference of a logit, given the largest absolute logit of PyTorch.

    It is 1e-4; less if all logits are below 1, since a wrong weight could hide below 1e-4 there; more if they are above
    10, since fp32 is not more exact. For networks with larger rounding errors, `check_parity` accepts twice the
    difference between PyTorch in fp32 and in fp64, of logits and of unlikeness: if both err by that much, they differ
    by up to twice as much.

    Example:
        >>> [f"{compute_tolerance(largest):.0e}" for largest in (0.001, 0.1, 1.0, 10.0, 50.0)]
        ['1e-06', '1e-05', '1e-04', '1e-04', '5e-04']
    """
    return max(min(PROBABILITY_TOLERANCE, 1e-4 * largest), 1e-5 * largest, 1e-6)


def run_in_batches(compute: Callable[[NDArray[np.uint8]], Outputs], images: NDArray[np.uint8], size: int) -> Outputs:
    """Apply `compute` to images in batches of `size`, and concatenate the outputs."""
    parts = [compute(images[start : start + size]) for start in range(0, len(images), size)]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def compute_fp64_outputs(bundle: Bundle, images: NDArray[np.uint8]) -> Outputs:
    """Compute logits (n, classes) and unlikeness (n,) of uint8 images (n, size, size, 3) with PyTorch in fp64."""
    classifier = copy.deepcopy(bundle.classifier).double()

    def compute(batch: NDArray[np.uint8]) -> Outputs:
        pixels = torch.from_numpy(batch.transpose(0, 3, 1, 2).copy()).double()
        with torch.inference_mode():
            output: NetworkOutput = classifier(pixels)
        return output.logits.numpy(), output.unlikeness.numpy()

    return run_in_batches(compute, images, BATCH)


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


BATCHES = (1, 16)
REPEATS, SECONDS = 31, 20.0
"""Repetitions of each batch, or as many as fit into this number of seconds; at least five."""


@dataclass(frozen=True)
class Speed:
    """Median speed for one batch size.

    Attributes:
        batch: Images per batch.
        repeats: Number of repetitions.
        milliseconds: Time per image, by model name.
        times_pytorch: Speed relative to PyTorch, by model name (2: twice as fast); median ratio of paired repetitions.
    """

    batch: int
    repeats: int
    milliseconds: dict[str, float]
    times_pytorch: dict[str, float]


def measure_speed(
    pytorch: InferenceModel, others: Mapping[str, InferenceModel], images: NDArray[np.uint8]
) -> list[Speed]:
    """Measure models in turns, so that other load on the machine affects all of them alike.

    Args:
        pytorch: The reference.
        others: Models to compare, by name.
        images: uint8 RGB of shape (n, size, size, 3); repeated if n is less than the batch.
    """
    models = {"pytorch": pytorch, **others}
    speeds = []
    for size in BATCHES:
        batch = np.resize(images, (size, *images.shape[1:]))
        for model in models.values():
            model.run_network(batch)
        times: dict[str, list[float]] = {name: [] for name in models}
        begin = time.perf_counter()
        while (repeats := len(times["pytorch"])) < REPEATS and (repeats < 5 or time.perf_counter() - begin < SECONDS):
            for name, model in models.items():
                start = time.perf_counter()
                model.run_network(batch)
                times[name].append(time.perf_counter() - start)
        speeds.append(
            Speed(
                batch=size,
                repeats=len(times["pytorch"]),
                milliseconds={name: 1000 * statistics.median(each) / size for name, each in times.items()},
                times_pytorch={
                    name: statistics.median(a / b for a, b in zip(times["pytorch"], times[name], strict=True))
                    for name in others
                },
            )
        )
    return speeds
