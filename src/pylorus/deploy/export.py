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
from pylorus.deploy.export_about import readme, record, told
from pylorus.deploy.export_speed import Speed, measured_speed
from pylorus.deploy.exported import FILES, ExportedModel, load_exported, opened
from pylorus.deploy.files import CARD, DESCRIPTION, MODEL, SUMS
from pylorus.deploy.int8 import Loss, calibration_and_measured, measured_loss, quantise
from pylorus.deploy.load import Bundle, load_bundle
from pylorus.deploy.onnx_graph import write_onnx
from pylorus.deploy.onnx_packages import onnx_package
from pylorus.deploy.parity import Parity, tried
from pylorus.deploy.predict import settled_device
from pylorus.deploy.trial_images import TrialImages, given_images, run_images, spread
from pylorus.errors import PylorusError
from pylorus.files import whole, write_json, write_text
from pylorus.model.weights import sha256

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
        onnx_package(name)
    suffix = "-onnx-int8" if options.int8 else "-onnx"
    output = options.output or folder.absolute().with_name(folder.absolute().name + suffix)
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise PylorusError(f"{output}: already exists, expected a new or empty folder. Choose another --output.")
    settled_device("cpu")
    bundle = load_bundle(folder)
    images = _trial_images(folder, bundle, options)
    with _appearing(output) as staging:
        write_onnx(bundle, staging / MODEL)
        parity = tried(bundle, opened(staging / MODEL), images[0])
        if not parity.passed:
            raise PylorusError(_refusal(folder, parity))
        loss = _in_int8(bundle, staging, images) if options.int8 else None
        speed = _speed(bundle, staging, images[0]) if options.speed else []
        _write_beside(bundle, staging, parity, loss, speed)
        load_exported(staging)
    print(told(bundle.description, parity, loss, speed))
    print(f"\nexport: {output}\nTo predict with it:\n  pylorus predict {output} IMAGES --output predictions.csv")
    return output


def _trial_images(folder: Path, bundle: Bundle, options: ExportOptions) -> list[TrialImages]:
    """Return the images for the parity check; for int8 also those for calibration and those for measuring the loss."""
    description = bundle.description
    if options.images is not None:
        trial = given_images(options.images, description, group=options.group)
        return [trial, *(calibration_and_measured(trial) if options.int8 else ())]
    int8_images = [run_images(folder, description, split) for split in ("val", "test")] if options.int8 else []
    return [run_images(folder, description), *int8_images]


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
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


def _refusal(folder: Path, parity: Parity) -> str:
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


def _in_int8(bundle: Bundle, staging: Path, images: Sequence[TrialImages]) -> Loss:
    """Replace the fp32 export by its int8 version, and measure the loss."""
    description, int8_path = bundle.description, staging / "int8.onnx"
    count = quantise(staging / MODEL, int8_path, images[1], bundle.input)
    fp32_model, int8_model = (
        ExportedModel(staging, description, {}, opened(path)) for path in (staging / MODEL, int8_path)
    )
    loss = measured_loss(fp32_model, int8_model, images[2], count)
    int8_path.replace(staging / MODEL)
    return loss


def _speed(bundle: Bundle, staging: Path, images: TrialImages) -> list[Speed]:
    _, pixels = next(spread(images, 16).read(bundle.input))
    model = ExportedModel(staging, bundle.description, {}, opened(staging / MODEL))
    return measured_speed(bundle, {"onnx": model}, pixels)


def _write_beside(bundle: Bundle, staging: Path, parity: Parity, loss: Loss | None, speed: Sequence[Speed]) -> None:
    for name in (DESCRIPTION, CARD):
        with whole(staging / name) as temporary:
            temporary.write_bytes((bundle.folder / name).read_bytes())
    write_text(staging / exported.README, readme(bundle.description, parity, loss))
    versions: dict[str, Any] = {"pylorus": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
    content = record(bundle.description, parity, loss, speed, bundle=sha256(bundle.folder / SUMS), versions=versions)
    write_json(staging / exported.RECORD, content)
    write_text(staging / SUMS, "".join(f"{sha256(staging / name)}  {name}\n" for name in FILES))
