"""`pylorus export`: export a bundle as one ONNX file that agrees with PyTorch; otherwise write nothing."""

import importlib.metadata
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pylorus import __version__
from pylorus.deploy import exported
from pylorus.deploy.export_about import build_export_record, format_export_summary, render_readme
from pylorus.deploy.export_speed import Speed, measure_speed
from pylorus.deploy.exported import FILES, ExportedModel, load_export, open_session
from pylorus.deploy.files import CARD, DESCRIPTION, MODEL, SUMS
from pylorus.deploy.int8 import QuantizationLoss, convert_to_int8, measure_loss, split_for_calibration
from pylorus.deploy.load import Bundle, load_bundle
from pylorus.deploy.onnx_graph import write_onnx
from pylorus.deploy.onnx_packages import import_onnx_package
from pylorus.deploy.parity import Parity, check_parity
from pylorus.deploy.predict import resolve_device
from pylorus.deploy.trial_images import TrialImages, find_run_images, find_user_images, select_evenly
from pylorus.errors import PylorusError
from pylorus.files import write_atomically, write_json, write_text
from pylorus.model.weights import compute_sha256

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
    """

    output: Path | None = None
    images: Path | None = None
    group: str | None = None
    int8: bool = False
    speed: bool = False


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
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise PylorusError(f"{output}: already exists, expected a new or empty folder. Choose another --output.")
    resolve_device("cpu")
    bundle = load_bundle(folder)
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
    print(f"\nexport: {output}\nTo predict with it:\n  pylorus predict {output} IMAGES --output predictions.csv")
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
    differences = ", ".join(
        f"{difference:.2g} at batch {size}" for difference, size in zip(parity.logits, parity.batches, strict=True)
    )
    return (
        f"{folder}: REFUSED, nothing was written: on {parity.images} images ({parity.source}) the export's logits "
        f"differ from PyTorch's by up to {differences}, expected at most {parity.tolerance:.2g}; calibrated "
        f"probabilities by up to {max(parity.probabilities):.2g}, unlikeness by up to {max(parity.unlikeness):.2g}; "
        f"the predicted class differs for {parity.other_class}. This network can't be exported reliably with these "
        "versions of torch, onnxscript and onnxruntime: install those in constraints.txt, or predict with the bundle."
    )


def _replace_by_int8(bundle: Bundle, staging: Path, images: Sequence[TrialImages]) -> QuantizationLoss:
    """Replace the fp32 export by its int8 version, and measure the loss."""
    description, int8_path = bundle.description, staging / "int8.onnx"
    count = convert_to_int8(staging / MODEL, int8_path, images[1], bundle.input)
    fp32_model, int8_model = (
        ExportedModel(staging, description, {}, open_session(path)) for path in (staging / MODEL, int8_path)
    )
    loss = measure_loss(fp32_model, int8_model, images[2], count)
    int8_path.replace(staging / MODEL)
    return loss


def _measure_onnx_speed(bundle: Bundle, staging: Path, images: TrialImages) -> list[Speed]:
    _, pixels = next(select_evenly(images, 16).read_blocks(bundle.input))
    model = ExportedModel(staging, bundle.description, {}, open_session(staging / MODEL))
    return measure_speed(bundle, {"onnx": model}, pixels)


def _write_other_files(
    bundle: Bundle, staging: Path, parity: Parity, loss: QuantizationLoss | None, speed: Sequence[Speed]
) -> None:
    for name in (DESCRIPTION, CARD):
        with write_atomically(staging / name) as temporary:
            temporary.write_bytes((bundle.folder / name).read_bytes())
    write_text(staging / exported.README, render_readme(bundle.description, parity, loss))
    versions: dict[str, Any] = {"pylorus": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
    content = build_export_record(
        bundle.description, parity, loss, speed, bundle=compute_sha256(bundle.folder / SUMS), versions=versions
    )
    write_json(staging / exported.RECORD, content)
    write_text(staging / SUMS, "".join(f"{compute_sha256(staging / name)}  {name}\n" for name in FILES))
