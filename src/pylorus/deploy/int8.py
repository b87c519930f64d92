"""Quantize an export to 8-bit integers, and measure the loss on the same labelled images before and after."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pylorus.core.distributed import compute_seed
from pylorus.core.errors import PylorusError
from pylorus.core.io import write_atomically
from pylorus.data.input_format import InputFormat
from pylorus.deploy.description import IntervalEstimate
from pylorus.deploy.model import ModelPredictions
from pylorus.deploy.onnx import IMAGE, ExportedModel, import_onnx_package, remove_machine_details
from pylorus.deploy.parity import BATCH, UNKNOWN_LABEL, TrialImages, select_evenly
from pylorus.deploy.thresholds import convert_estimate
from pylorus.evaluation.comparison import mcnemar, paired_differences
from pylorus.evaluation.predictions import Predictions

MAX_CALIBRATION_IMAGES = 64
"""Maximum number of images that calibrate the integer ranges."""
CALIBRATION_SHARE = 4
"""Of images in a folder, one group in this many is used for calibration and never for measuring the loss."""


@dataclass(frozen=True)
class QuantizationLoss:
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
    accuracy_difference: IntervalEstimate
    other_class: int
    other_decision: int
    other_abstention: int
    largest_difference: float


def split_for_calibration(images: TrialImages) -> tuple[TrialImages, TrialImages]:
    """Split labelled images by group into those for calibration and those for measuring the loss.

    Raises:
        PylorusError: If too few images are labelled.
    """
    labelled = images.select_files(np.flatnonzero(images.labels != UNKNOWN_LABEL))
    groups = np.unique(labelled.groups)
    if len(labelled) < 2 * BATCH or len(groups) < CALIBRATION_SHARE:
        raise PylorusError(
            f"--int8: {len(labelled)} of {len(images)} images ({images.source}) of {len(groups)} groups are in a "
            "folder named after a class, too few to measure the loss by quantization: "
            f"expected at least {2 * BATCH} images of {CALIBRATION_SHARE} groups."
        )
    order = np.random.default_rng(compute_seed(0, "int8")).permutation(len(groups))
    is_calibration = np.isin(labelled.groups, groups[order[: len(groups) // CALIBRATION_SHARE]])
    return labelled.select_files(np.flatnonzero(is_calibration)), labelled.select_files(np.flatnonzero(~is_calibration))


def convert_to_int8(source: Path, target: Path, images: TrialImages, input_format: InputFormat) -> int:
    """Write an int8 version of an export: weights quantized per channel, activations per layer.

    Args:
        source: The fp32 export.
        target: File to write, in the same folder.
        images: Images that calibrate the integer ranges; at most `MAX_CALIBRATION_IMAGES`, evenly chosen.
        input_format: Preprocessing of the image files.

    Returns:
        The number of images used for calibration.

    Raises:
        PylorusError: If none of the images can be read, or onnxruntime can't quantize this network.
    """
    onnx, quantization = import_onnx_package("onnx"), import_onnx_package("onnxruntime.quantization")
    prepare = import_onnx_package("onnxruntime.quantization.shape_inference").quant_pre_process
    pixels = [
        image[np.newaxis]
        for _, block in select_evenly(images, MAX_CALIBRATION_IMAGES).read_blocks(input_format)
        for image in block
    ]
    if not pixels:
        raise PylorusError(f"--int8: none of the {len(images)} calibration images can be read.")
    prepared = source.with_name(f".prepared-{source.name}")
    try:
        prepare(str(source), str(prepared), skip_symbolic_shape=True)
        with write_atomically(target) as temporary:
            quantization.quantize_static(
                str(prepared),
                str(temporary),
                _create_reader(quantization.CalibrationDataReader, pixels),
                nodes_to_exclude=_find_non_logit_nodes(onnx.load(str(prepared)).graph),
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
            model = onnx.load(str(temporary))
            remove_machine_details(model)
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


def _create_reader(base: Any, pixels: list[NDArray[np.uint8]]) -> Any:
    class Reader(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.remaining = iter(pixels)

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            image = next(self.remaining, None)
            return None if image is None else {IMAGE: image}

    return Reader()


def _find_non_logit_nodes(graph: Any) -> list[str]:
    """Return the nodes that the logits don't depend on: unlikeness is an angle and stays in fp32."""
    producers = {name: node for node in graph.node for name in node.output}
    pending, visited = ["logits"], set()
    while pending:
        node = producers.get(pending.pop())
        if node is not None and node.name not in visited:
            visited.add(node.name)
            pending += list(node.input)
    return [node.name for node in graph.node if node.name not in visited]


def measure_loss(
    first: ExportedModel, second: ExportedModel, images: TrialImages, calibration_images: int
) -> QuantizationLoss:
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
    for block_indices, pixels in images.read_blocks(first.input):
        indices.append(block_indices)
        fp32_parts.append(first.predict_images(pixels))
        int8_parts.append(second.predict_images(pixels))
    count = sum(map(len, indices))
    if count < BATCH:
        raise PylorusError(
            f"--int8: {count} labelled images can be read, expected at least {BATCH} to measure the loss."
        )
    measured = images.select_files(np.concatenate(indices))
    names = first.description.short_names
    fp32_answers, int8_answers = _join_answers(fp32_parts), _join_answers(int8_parts)
    fp32_predictions, int8_predictions = (
        _create_predictions(measured, answers, names) for answers in (fp32_answers, int8_answers)
    )
    test = mcnemar(fp32_predictions, int8_predictions)
    return QuantizationLoss(
        images=count,
        groups=test.groups,
        source=measured.source,
        calibration_images=calibration_images,
        right_32=test.right_first,
        right_8=test.right_second,
        only_32=test.only_first,
        only_8=test.only_second,
        p_value=test.p_value,
        accuracy_difference=convert_estimate(paired_differences(int8_predictions, fp32_predictions, seed=0).accuracy),
        other_class=int((fp32_answers.predicted != int8_answers.predicted).sum()),
        other_decision=int((fp32_answers.positive != int8_answers.positive).sum()),
        other_abstention=int((fp32_answers.why != int8_answers.why).sum()),
        largest_difference=float(np.abs(fp32_answers.probabilities - int8_answers.probabilities).max()),
    )


def _join_answers(parts: list[ModelPredictions]) -> ModelPredictions:
    joined: dict[str, Any] = {
        name: None if value is None else np.concatenate([getattr(part, name) for part in parts])
        for name, value in vars(parts[0]).items()
    }
    return ModelPredictions(**joined)


def _create_predictions(images: TrialImages, answers: ModelPredictions, names: tuple[str, ...]) -> Predictions:
    return Predictions(
        sample=np.array([str(file) for file in images.files], dtype=np.str_),
        group=images.groups,
        true=images.labels,
        probabilities=answers.probabilities,
        class_names=names,
    )
