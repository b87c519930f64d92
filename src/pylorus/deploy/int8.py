"""An export in 8-bit whole numbers, and what that costs: the same labelled images, before and after."""

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
"""Images whose values fix the ranges of the whole numbers, at most."""
CALIBRATION_SHARE = 4
"""Of images in a folder, every fourth group is kept for calibration, and never measured on."""


@dataclass(frozen=True)
class Loss:
    """What 8-bit whole numbers cost, measured on labelled images; differences are 8 bits less 32 bits.

    Attributes:
        images: How many were measured on.
        groups: Of how many groups (patients); the interval keeps them together.
        source: Where they come from, in words.
        calibration_images: How many other images fixed the ranges.
        right_32: Images recognised in 32 bits.
        right_8: Images recognised in 8 bits.
        only_32: Images that 32 bits alone recognise.
        only_8: Images that 8 bits alone recognise.
        p_value: McNemar's exact test, by group.
        accuracy_difference: With its 95 % interval; null where no or one group tells the two apart.
        other_class: Images whose likeliest class is another.
        other_decision: Images that are on another side of the deciding class's threshold.
        other_abstention: Images that are answered by one alone, or not answered for another reason.
        largest_difference: Of any calibrated probability.
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
    """Labelled images cut in two, whole groups: those that fix the ranges, and those that are measured on.

    Raises:
        PylorusError: If too few are labelled.
    """
    labelled = images.taken(np.flatnonzero(images.labels != UNKNOWN))
    groups = np.unique(labelled.groups)
    if len(labelled) < 2 * BATCH or len(groups) < CALIBRATION_SHARE:
        raise PylorusError(
            f"--int8: {len(labelled)} of {len(images)} images ({images.source}) of {len(groups)} groups lie in a "
            "folder that has the name of a class. What 8 bits cost can't be measured on so few: "
            f"expected {2 * BATCH} at least, of {CALIBRATION_SHARE} groups."
        )
    order = np.random.default_rng(derived_seed(0, "int8")).permutation(len(groups))
    kept = np.isin(labelled.groups, groups[order[: len(groups) // CALIBRATION_SHARE]])
    return labelled.taken(np.flatnonzero(kept)), labelled.taken(np.flatnonzero(~kept))


def quantise(source: Path, target: Path, images: TrialImages, form: InputFormat) -> int:
    """Writes an export in 8-bit whole numbers: weights of each channel, activations of each layer, ranges from images.

    Args:
        source: In 32 bits.
        target: Of the same folder.
        images: That fix the ranges; at most `CALIBRATED_ON` are taken, evenly.
        form: How a file becomes the network's input.

    Returns:
        How many images fixed the ranges.

    Raises:
        PylorusError: If none of them can be read, or onnxruntime can't do it for this network.
    """
    onnx, quantization = onnx_package("onnx"), onnx_package("onnxruntime.quantization")
    prepare = onnx_package("onnxruntime.quantization.shape_inference").quant_pre_process
    pixels = [image[np.newaxis] for _, block in spread(images, CALIBRATED_ON).read(form) for image in block]
    if not pixels:
        raise PylorusError(f"--int8: none of the {len(images)} images that are to fix the ranges can be read.")
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
    except Exception as error:  # of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise PylorusError(f"--int8: onnxruntime can't quantise this network: {reason}") from error
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
    """Nodes that the logits do not come from: unlikeness is an angle, and stays in 32 bits."""
    makers = {name: node for node in graph.node for name in node.output}
    wanted, seen = ["logits"], set()
    while wanted:
        node = makers.get(wanted.pop())
        if node is not None and node.name not in seen:
            seen.add(node.name)
            wanted += list(node.input)
    return [node.name for node in graph.node if node.name not in seen]


def measured_loss(first: ExportedModel, second: ExportedModel, images: TrialImages, calibration_images: int) -> Loss:
    """What the second export loses against the first.

    Args:
        first: In 32 bits.
        second: In 8.
        images: Labelled.
        calibration_images: How many others fixed the ranges.

    Raises:
        PylorusError: If fewer than `BATCH` of them can be read.
    """
    read, before, after = [], [], []
    for places, pixels in images.read(first.input):
        read.append(places)
        before.append(first.answer(pixels))
        after.append(second.answer(pixels))
    count = sum(map(len, read))
    if count < BATCH:
        raise PylorusError(f"--int8: {count} labelled images can be read, expected at least {BATCH} to measure on.")
    taken = images.taken(np.concatenate(read))
    names = first.description.short_names
    one, two = _joined(before), _joined(after)
    said_32, said_8 = (_predictions(taken, answers, names) for answers in (one, two))
    found = mcnemar(said_32, said_8)
    return Loss(
        images=count,
        groups=found.groups,
        source=taken.source,
        calibration_images=calibration_images,
        right_32=found.right_first,
        right_8=found.right_second,
        only_32=found.only_first,
        only_8=found.only_second,
        p_value=found.p_value,
        accuracy_difference=figure(paired_differences(said_8, said_32, seed=0).accuracy),
        other_class=int((one.predicted != two.predicted).sum()),
        other_decision=int((one.positive != two.positive).sum()),
        other_abstention=int((one.why != two.why).sum()),
        largest_difference=float(np.abs(one.probabilities - two.probabilities).max()),
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
