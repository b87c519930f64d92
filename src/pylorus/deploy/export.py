"""`pylorus export`: export a bundle as one ONNX file that agrees with PyTorch; otherwise write nothing.

On request the file is quantized to 8-bit integers; the loss is measured on the same labelled images before and after.
"""

import importlib.metadata
import secrets
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pylorus import __version__
from pylorus.core.distributed import compute_seed
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_command, format_number, format_p_value, format_percent
from pylorus.core.io import check_new_folder, convert_to_plain, write_atomically, write_json, write_text
from pylorus.data.input_format import InputFormat
from pylorus.deploy.description import INTENDED_USE, Description, IntervalEstimate
from pylorus.deploy.licences import ACCEPT_OPTION, accept_licences, check_passing_on
from pylorus.deploy.model import Bundle, ModelPredictions, load_bundle
from pylorus.deploy.onnx import (
    IMAGE,
    OUTPUTS,
    ExportedModel,
    format_input_description,
    format_outputs_description,
    import_onnx_package,
    load_export,
    open_session,
    remove_machine_details,
    write_onnx,
)
from pylorus.deploy.parity import (
    BATCH,
    PROBABILITY_TOLERANCE,
    UNKNOWN_LABEL,
    Parity,
    Speed,
    TrialImages,
    check_parity,
    find_run_images,
    find_user_images,
    measure_speed,
    select_evenly,
)
from pylorus.deploy.predict import resolve_device
from pylorus.deploy.thresholds import convert_estimate
from pylorus.deploy.verified_files import CARD, DESCRIPTION, EXPORT_FILES, MODEL, README, RECORD, SUMS
from pylorus.evaluation.comparison import mcnemar, paired_differences
from pylorus.evaluation.predictions import Predictions
from pylorus.model.weights import compute_sha256

RECORD_VERSION = 1
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


def build_export_record(
    description: Description,
    parity: Parity,
    loss: QuantizationLoss | None,
    speed: Sequence[Speed],
    *,
    bundle: str,
    versions: Mapping[str, str],
) -> dict[str, object]:
    """Return the content of export.json as plain values.

    Args:
        description: The bundle's description.
        parity: Result of the parity check, in fp32.
        loss: Loss by int8 quantization; None for fp32.
        speed: Speed compared with PyTorch; empty if not measured.
        bundle: SHA-256 of the bundle's list of file hashes.
        versions: Versions of the packages used, by name.
    """
    return {
        "format_version": RECORD_VERSION,
        "format": "onnx",
        "precision": "32" if loss is None else "int8",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "bundle": bundle,
        "intended_use": INTENDED_USE,
        "weights": convert_to_plain(description.weights),
        "input": {IMAGE: format_input_description(description)},
        "outputs": {"names": list(OUTPUTS), "meaning": format_outputs_description(description)},
        "classes": list(description.classes),
        "short_names": list(description.short_names),
        "preprocessing": convert_to_plain(description.input)
        if description.ensemble is None
        else [convert_to_plain(network.input) for network in description.list_networks()],
        "parity": convert_to_plain(parity),
        "int8": convert_to_plain(loss),
        "speed": {"threads": torch.get_num_threads(), "measured": [convert_to_plain(each) for each in speed]}
        if speed
        else None,
        "versions": dict(versions),
    }


def format_export_summary(
    description: Description, parity: Parity, loss: QuantizationLoss | None, speed: Sequence[Speed]
) -> str:
    """Return the summary for the terminal."""
    lines = [f"{description.architecture}, classes {', '.join(description.short_names)}", *_format_parity(parity)]
    if loss is not None:
        lines += ["", *_format_loss(loss, description)]
    threads = "thread" if torch.get_num_threads() == 1 else "threads"
    for each in speed:
        lines.append(
            f"speed at batch {each.batch}: {format_number(each.milliseconds['onnx'], 1)} ms per image, PyTorch "
            f"{format_number(each.milliseconds['pytorch'], 1)} ms: "
            f"{format_number(each.times_pytorch['onnx'], 2)} times as fast (median of "
            f"{each.repeats}, {torch.get_num_threads()} {threads} each; depends on the load of this machine)"
        )
    return "\n".join(lines)


def render_readme(description: Description, parity: Parity, loss: QuantizationLoss | None) -> str:
    """Return the text of README.md."""
    lines = [*_format_parity(parity), *([] if loss is None else _format_loss(loss, description))]
    measured = "\n".join(f"{'  ' if line.startswith(' ') else ''}- {line.strip()}" for line in lines)
    shape = ", ".join(map(str, description.form.shape))
    pairs = zip(description.classes, description.short_names, strict=True)
    classes = ", ".join(f"{name} ({short_name})" for name, short_name in pairs)
    return f"""# {description.architecture} as ONNX

**{INTENDED_USE}** The model card beside this file describes its training data and its measured performance, in the
words of whoever made the bundle.

`{MODEL}` needs only onnxruntime.
`pylorus predict THIS_FOLDER IMAGES --output predictions.csv` does everything described below.

## Input

{format_input_description(description)}

## Outputs

{format_outputs_description(description)}

Classes, in order: {classes}.

```python
import json
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("{MODEL}", providers=["CPUExecutionProvider"])
classes = json.loads(session.get_modelmeta().custom_metadata_map["pylorus.classes"])
images = np.zeros((2, {shape}), dtype=np.uint8)  # your images, preprocessed as described above
logits, probabilities, unlikeness = session.run(["logits", "probabilities", "unlikeness"], {{"{IMAGE}": images}})
```

## How it was verified

{measured}

`sha256sum -c SHA256SUMS` checks the files; `export.json` holds the same information for programs.
"""


def _format_parity(parity: Parity) -> list[str]:
    return [
        f"parity with PyTorch on {parity.images} images ({parity.source}), in fp32:",
        *(
            f"  batch {size}: logits differ by at most {logits:.1e} (allowed: {parity.tolerance:.1e}; the largest "
            f"logit is {parity.largest_logit:.3g}), probabilities by {probabilities:.1e} (allowed: "
            f"{PROBABILITY_TOLERANCE:.1e}), unlikeness by {unlikeness:.1e} (allowed: "
            f"{parity.unlikeness_tolerance:.1e})"
            for size, logits, probabilities, unlikeness in zip(
                parity.batches, parity.logits, parity.probabilities, parity.unlikeness, strict=True
            )
        ),
        f"  {parity.other_class} images with another predicted class, {parity.other_abstention} on which only one "
        f"abstains; PyTorch's own batches differ by {parity.pytorch_alone:.1e}"
        + (
            f", and PyTorch differs from fp64 by {parity.rounding:.1e}, its unlikeness by "
            f"{parity.unlikeness_rounding:.1e}"
            if parity.rounding is not None and parity.unlikeness_rounding is not None
            else ""
        ),
    ]


def _format_loss(loss: QuantizationLoss, description: Description) -> list[str]:
    difference = loss.accuracy_difference
    interval = "no interval: fewer than two groups differ"
    if difference.value is not None and difference.low is not None and difference.high is not None:
        interval = "95 % interval {} to {}".format(
            *(format_percent(end, signed=True) for end in (difference.low, difference.high))
        )
    change = format_percent((loss.right_8 - loss.right_32) / loss.images, signed=True)
    return [
        f"int8 compared with fp32, on {loss.images} images of {loss.groups} groups ({loss.source}); calibrated on "
        f"{loss.calibration_images} other images:",
        f"  accuracy {format_percent(loss.right_8 / loss.images)} % instead of "
        f"{format_percent(loss.right_32 / loss.images)} %: {change} points ({interval})",
        f"  {loss.only_32} images correct only in fp32, {loss.only_8} only in int8; McNemar's "
        f"{format_p_value(loss.p_value)}",
        f"  {loss.other_class} images with another predicted class, {loss.other_decision} with another decision for "
        f"{description.decision.class_name}, {loss.other_abstention} answered by only one of both or abstained "
        "for another reason",
        f"  calibrated probabilities differ by at most {loss.largest_difference:.2g}; the thresholds are those of fp32",
    ]


PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        output: A new or empty folder; None for one next to the bundle.
        images: Folder of images to verify the export on; None for the images of the bundle's run.
        group: Regular expression that finds the patient in a path below `images`; None for no groups.
        int8: Whether to quantize to 8-bit integers.
        speed: Whether to measure the speed compared with PyTorch.
        network: Class or function that builds a network of the user's own; None for a model of timm.
        trust: Files with public keys of which one must have signed the bundle; empty to accept any.
        accept_licences: Licences of the bundle's weights that limit passing on and that the user accepts.
    """

    output: Path | None = None
    images: Path | None = None
    group: str | None = None
    int8: bool = False
    speed: bool = False
    network: Callable[..., Any] | None = None
    trust: tuple[Path, ...] = ()
    accept_licences: tuple[str, ...] = ()


def export(folder: Path, options: ExportOptions) -> Path:
    """Write an export: complete and verified, or not at all.

    Args:
        folder: Folder of the bundle.
        options: Options of the export.

    Returns:
        The folder of the export.

    Raises:
        PylorusError: If the bundle, the images or the output folder are invalid, or the export does not agree with
            PyTorch.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        import_onnx_package(name)
    suffix = "-onnx-int8" if options.int8 else "-onnx"
    output = options.output or folder.absolute().with_name(folder.absolute().name + suffix)
    check_new_folder(output, hint="Choose another --output.", allow_links=False)
    resolve_device("cpu")
    bundle = load_bundle(folder, network=options.network, trust=options.trust)
    if options.int8 and bundle.members:
        raise PylorusError(
            "--int8: an ensemble is exported in fp32 only. Leave the option out, or export a member: pylorus export "
            "RUN/model --int8"
        )
    description, contents = accept_licences(bundle.description, bundle.contents, options.accept_licences)
    bundle = replace(bundle, description=description, contents=contents)
    warnings = check_passing_on(
        [each.weights for each in bundle.description.list_networks()],
        what="the export",
        how=f"type {ACCEPT_OPTION} {{licence}}",
    )
    images = _collect_trial_images(folder, bundle, options)
    with _create_folder_atomically(output) as staging:
        write_onnx(bundle, staging / MODEL)
        parity = check_parity(bundle, open_session(staging / MODEL), images[0])
        if not parity.has_passed:
            raise PylorusError(_format_refusal(folder, parity))
        loss = _replace_by_int8(bundle, staging, images) if options.int8 else None
        speed = _measure_onnx_speed(bundle, staging, images[0]) if options.speed else []
        _write_other_files(bundle, staging, parity, loss, speed)
        load_export(staging)
    print(format_export_summary(bundle.description, parity, loss, speed))
    for warning in warnings:
        print(f"warning: {warning}")
    command = f"pylorus predict {shlex.quote(str(output))} IMAGES --output predictions.csv"
    print(f"\nexport: {output}\nTo predict with it:\n  {command}")
    return output


def _collect_trial_images(folder: Path, bundle: Bundle, options: ExportOptions) -> list[TrialImages]:
    """Return the images for the parity check; for int8 also those for calibration and those for measuring the loss."""
    description = bundle.description
    if options.images is not None:
        trial = find_user_images(options.images, description, group=options.group)
        return [trial, *(split_for_calibration(trial) if options.int8 else ())]
    int8_images = [find_run_images(folder, description, split) for split in ("val", "test")] if options.int8 else []
    return [find_run_images(folder, description), *int8_images]


@contextmanager
def _create_folder_atomically(output: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `output`, renamed to `output` on success and deleted on any error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}-{secrets.token_hex(4)}")
    staging.mkdir()
    try:
        yield staging
        if output.is_dir():
            output.rmdir()  # Windows can't rename a folder to the name of an existing one, even if that is empty
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _format_refusal(folder: Path, parity: Parity) -> str:
    command = format_command(["pylorus", "predict", str(folder), "IMAGES", "--output", "predictions.csv"])
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "onnxruntime", "onnxscript")
    )
    return (
        f"{folder}: REFUSED, nothing was written: on {parity.images} images ({parity.source}) "
        f"{'; '.join(parity.failures)}. Predict with the bundle itself: {command}. Other versions of the packages may "
        f"export this network correctly; found {versions}."
    )


def _replace_by_int8(bundle: Bundle, staging: Path, images: Sequence[TrialImages]) -> QuantizationLoss:
    """Replace the fp32 export by its int8 version, and measure the loss."""
    description, int8_path = bundle.description, staging / "int8.onnx"
    count = convert_to_int8(staging / MODEL, int8_path, images[1], bundle.input)
    fp32_model, int8_model = (
        ExportedModel(staging, description, {}, {}, open_session(path)) for path in (staging / MODEL, int8_path)
    )
    loss = measure_loss(fp32_model, int8_model, images[2], count)
    int8_path.replace(staging / MODEL)
    return loss


def _measure_onnx_speed(bundle: Bundle, staging: Path, images: TrialImages) -> list[Speed]:
    _, pixels = next(select_evenly(images, 16).read_blocks(bundle.input))
    model = ExportedModel(staging, bundle.description, {}, {}, open_session(staging / MODEL))
    return measure_speed(bundle, {"onnx": model}, pixels)


def _write_other_files(
    bundle: Bundle, staging: Path, parity: Parity, loss: QuantizationLoss | None, speed: Sequence[Speed]
) -> None:
    for name in (DESCRIPTION, CARD):
        with write_atomically(staging / name) as temporary:
            temporary.write_bytes(bundle.contents[name])
    write_text(staging / README, render_readme(bundle.description, parity, loss))
    versions: dict[str, Any] = {"pylorus": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
    content = build_export_record(bundle.description, parity, loss, speed, bundle=bundle.identity, versions=versions)
    write_json(staging / RECORD, content)
    write_text(staging / SUMS, "".join(f"{compute_sha256(staging / name)}  {name}\n" for name in EXPORT_FILES))


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
