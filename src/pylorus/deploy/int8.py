"""Quantize an export to 8-bit integers, and measure the loss on the same labelled images before and after."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pylorus.chance import derived_seed
from pylorus.data.input import InputFormat
from pylorus.deploy.answers import Answers
from pylorus.deploy.description import Figure
from pylorus.deploy.exported import IMAGE, ExportedModel
from pylorus.deploy.fixing import figure
from pylorus.deploy.onnx_graph import strip
from pylorus.deploy.onnx_packages import onnx_package
from pylorus.deploy.parity import BATCH
from pylorus.deploy.trial_images import UNKNOWN, TrialImages, spread
from pylorus.errors import PylorusError
from pylorus.evaluation.comparison import mcnemar, paired_differences
from pylorus.evaluation.predictions import Predictions
from pylorus.files import whole

CALIBRATED_ON = 64
"""Maximum number of images that calibrate the integer ranges."""
CALIBRATION_SHARE = 4
"""Of images in a folder, one group in this many is used for calibration and never for measuring the loss."""


@dataclass(frozen=True)
class Loss:
    """Loss by int8 quantization, measured on labelled images; differences are int8 minus fp32.

    Attributes:
        images: Number of measured images.
        groups: Number of their groups (patients); the interval is clustered by group.
        source: Where the images come from, as text.
        calibration_images: Number of other images that calibrated the integer ranges.
        right_32: Images classified correctly in fp32.
        right_8: Images classified correctly in int8.
        only_32: Images correct only in fp32.
        only_8: Images correct only in int8.
        p_value: Of McNemar's exact test, by group.
        accuracy_difference: With its 95 % interval, which is null if fewer than two groups differ.
        other_class: Images with another predicted class.
        other_decision: Images on the other side of the decision threshold.
        other_abstention: Images answered by only one of both, or abstained for another reason.
        largest_difference: Largest difference of a calibrated probability.
    """

    images: int
    groups: int
    source: str
    calibration_images: int
    right_32: int
    right_8: int
    only_32: int
    only_8: int
    p_value: float
    accuracy_difference: Figure
    other_class: int
    other_decision: int
    other_abstention: int
    largest_difference: float


def calibration_and_measured(images: TrialImages) -> tuple[TrialImages, TrialImages]:
    """Split labelled images by group into those for calibration and those for measuring the loss.

    Raises:
        PylorusError: If too few images are labelled.
    """
    labelled = images.taken(np.flatnonzero(images.labels != UNKNOWN))
    groups = np.unique(labelled.groups)
    if len(labelled) < 2 * BATCH or len(groups) < CALIBRATION_SHARE:
        raise PylorusError(
            f"--int8: {len(labelled)} of {len(images)} images ({images.source}) of {len(groups)} groups are in a "
            "folder named after a class, too few to measure the loss by quantization: "
            f"expected at least {2 * BATCH} images of {CALIBRATION_SHARE} groups."
        )
    order = np.random.default_rng(derived_seed(0, "int8")).permutation(len(groups))
    is_calibration = np.isin(labelled.groups, groups[order[: len(groups) // CALIBRATION_SHARE]])
    return labelled.taken(np.flatnonzero(is_calibration)), labelled.taken(np.flatnonzero(~is_calibration))


def quantise(source: Path, target: Path, images: TrialImages, input_format: InputFormat) -> int:
    """Write an int8 version of an export: weights quantized per channel, activations per layer.

    Args:
        source: The fp32 export.
        target: File to write, in the same folder.
        images: Images that calibrate the integer ranges; at most `CALIBRATED_ON`, evenly chosen.
        input_format: Preprocessing of the image files.

    Returns:
        The number of images used for calibration.

    Raises:
        PylorusError: If none of the images can be read, or onnxruntime can't quantize this network.
    """
    onnx, quantization = onnx_package("onnx"), onnx_package("onnxruntime.quantization")
    prepare = onnx_package("onnxruntime.quantization.shape_inference").quant_pre_process
    pixels = [image[np.newaxis] for _, block in spread(images, CALIBRATED_ON).read(input_format) for image in block]
    if not pixels:
        raise PylorusError(f"--int8: none of the {len(images)} calibration images can be read.")
    prepared = source.with_name(f".prepared-{source.name}")
    try:
        prepare(str(source), str(prepared), skip_symbolic_shape=True)
        with whole(target) as temporary:
            quantization.quantize_static(
                str(prepared),
                str(temporary),
                _reader(quantization.CalibrationDataReader, pixels),
                nodes_to_exclude=_beside_logits(onnx.load(str(prepared)).graph),
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
            model = onnx.load(str(temporary))
            strip(model)
            del model.metadata_props[:]
            model.metadata_props.extend(onnx.load(str(source)).metadata_props)
            temporary.write_bytes(model.SerializeToString())
    except PylorusError:
        raise
    except Exception as error:  # onnxruntime raises many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise PylorusError(f"--int8: onnxruntime can't quantize this network: {reason}") from error
    finally:
        prepared.unlink(missing_ok=True)
    return len(pixels)


def _reader(base: Any, pixels: list[NDArray[np.uint8]]) -> Any:
    class Reader(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.remaining = iter(pixels)

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            image = next(self.remaining, None)
            return None if image is None else {IMAGE: image}

    return Reader()


def _beside_logits(graph: Any) -> list[str]:
    """Return the nodes that the logits don't depend on: unlikeness is an angle and stays in fp32."""
    producers = {name: node for node in graph.node for name in node.output}
    pending, visited = ["logits"], set()
    while pending:
        node = producers.get(pending.pop())
        if node is not None and node.name not in visited:
            visited.add(node.name)
            pending += list(node.input)
    return [node.name for node in graph.node if node.name not in visited]


def measured_loss(first: ExportedModel, second: ExportedModel, images: TrialImages, calibration_images: int) -> Loss:
    """Measure the loss of the second export compared with the first.

    Args:
        first: The fp32 export.
        second: The int8 export.
        images: Labelled images.
        calibration_images: Number of other images used for calibration.

    Raises:
        PylorusError: If fewer than `BATCH` images can be read.
    """
    indices, fp32_parts, int8_parts = [], [], []
    for block_indices, pixels in images.read(first.input):
        indices.append(block_indices)
        fp32_parts.append(first.answer(pixels))
        int8_parts.append(second.answer(pixels))
    count = sum(map(len, indices))
    if count < BATCH:
        raise PylorusError(
            f"--int8: {count} labelled images can be read, expected at least {BATCH} to measure the loss."
        )
    measured = images.taken(np.concatenate(indices))
    names = first.description.short_names
    fp32_answers, int8_answers = _joined(fp32_parts), _joined(int8_parts)
    fp32_predictions, int8_predictions = (
        _predictions(measured, answers, names) for answers in (fp32_answers, int8_answers)
    )
    test = mcnemar(fp32_predictions, int8_predictions)
    return Loss(
        images=count,
        groups=test.groups,
        source=measured.source,
        calibration_images=calibration_images,
        right_32=test.right_first,
        right_8=test.right_second,
        only_32=test.only_first,
        only_8=test.only_second,
        p_value=test.p_value,
        accuracy_difference=figure(paired_differences(int8_predictions, fp32_predictions, seed=0).accuracy),
        other_class=int((fp32_answers.predicted != int8_answers.predicted).sum()),
        other_decision=int((fp32_answers.positive != int8_answers.positive).sum()),
        other_abstention=int((fp32_answers.why != int8_answers.why).sum()),
        largest_difference=float(np.abs(fp32_answers.probabilities - int8_answers.probabilities).max()),
    )


def _joined(parts: list[Answers]) -> Answers:
    joined: dict[str, Any] = {
        name: None if value is None else np.concatenate([getattr(part, name) for part in parts])
        for name, value in vars(parts[0]).items()
    }
    return Answers(**joined)


def _predictions(images: TrialImages, answers: Answers, names: tuple[str, ...]) -> Predictions:
    return Predictions(
        sample=np.array([str(file) for file in images.files], dtype=np.str_),
        group=images.groups,
        true=images.labels,
        probabilities=answers.probabilities,
        class_names=names,
    )
