"""`pylorus export`: a bundle as one ONNX file that says what PyTorch says, or nothing at all."""

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
    """Choices of an export.

    Attributes:
        output: A folder that does not exist yet, or is empty; None: beside the bundle.
        images: Folder of images to try the export on; None: those of the run that the bundle lies in.
        group: Regular expression that finds the patient in a path below it.
        int8: Whether to compute in 8-bit whole numbers.
        speed: Whether to measure how fast it is beside PyTorch.
    """

    output: Path | None = None
    images: Path | None = None
    group: str | None = None
    int8: bool = False
    speed: bool = False


def export(folder: Path, options: ExportOptions) -> Path:
    """Writes an export; it is there whole and proven, or not at all.

    Args:
        folder: The bundle's.
        options: See there.

    Returns:
        The folder of the export.

    Raises:
        PylorusError: If the bundle, the images or the output are not what they should be, or the export does not say
            what PyTorch says.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        onnx_package(name)
    ending = "-onnx-int8" if options.int8 else "-onnx"
    output = options.output or folder.absolute().with_name(folder.absolute().name + ending)
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise PylorusError(f"{output}: is there already, expected a new or empty folder. Give another --output.")
    settled_device("cpu")
    bundle = load_bundle(folder)
    images = _trial_images(folder, bundle, options)
    with _appearing(output) as place:
        write_onnx(bundle, place / MODEL)
        parity = tried(bundle, opened(place / MODEL), images[0])
        if not parity.passed:
            raise PylorusError(_refusal(folder, parity))
        loss = _in_int8(bundle, place, images) if options.int8 else None
        speed = _speed(bundle, place, images[0]) if options.speed else []
        _write_beside(bundle, place, parity, loss, speed)
        load_exported(place)
    print(told(bundle.description, parity, loss, speed))
    print(f"\nexport: {output}\nto predict with it:\n  pylorus predict {output} IMAGES --output predictions.csv")
    return output


def _trial_images(folder: Path, bundle: Bundle, options: ExportOptions) -> list[TrialImages]:
    """Images to try it on; for 8 bits, after them those that fix the ranges and those that are measured on."""
    said = bundle.description
    if options.images is not None:
        given = given_images(options.images, said, group=options.group)
        return [given, *(calibration_and_measured(given) if options.int8 else ())]
    of_int8 = [run_images(folder, said, part) for part in ("val", "test")] if options.int8 else []
    return [run_images(folder, said), *of_int8]


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name on success, and goes on any error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    place = output.with_name(f".{output.name}-{secrets.token_hex(4)}")
    place.mkdir()
    try:
        yield place
        if output.is_dir():
            output.rmdir()  # Windows renames no folder over another, not even over an empty one
        place.rename(output)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _refusal(folder: Path, parity: Parity) -> str:
    found = ", ".join(f"{far:.2g} at batch {size}" for far, size in zip(parity.logits, parity.batches, strict=True))
    return (
        f"{folder}: REFUSED, nothing was written: on {parity.images} images ({parity.source}) the export's logits "
        f"differ from PyTorch's by up to {found}, expected at most {parity.tolerance:.2g}; calibrated probabilities by "
        f"up to {max(parity.probabilities):.2g}, unlikeness by up to {max(parity.unlikeness):.2g}; "
        f"{parity.other_class} are of another class. The network or these versions of torch, onnxscript and "
        "onnxruntime can't be trusted with each other: try the versions in constraints.txt, or predict with the bundle."
    )


def _in_int8(bundle: Bundle, place: Path, images: Sequence[TrialImages]) -> Loss:
    """Puts the export in 8 bits in the place of that in 32, and measures what that costs."""
    said, eight = bundle.description, place / "int8.onnx"
    count = quantise(place / MODEL, eight, images[1], bundle.input)
    first, second = (ExportedModel(place, said, {}, opened(path)) for path in (place / MODEL, eight))
    loss = measured_loss(first, second, images[2], count)
    eight.replace(place / MODEL)
    return loss


def _speed(bundle: Bundle, place: Path, images: TrialImages) -> list[Speed]:
    _, pixels = next(spread(images, 16).read(bundle.input))
    model = ExportedModel(place, bundle.description, {}, opened(place / MODEL))
    return measured_speed(bundle, {"onnx": model}, pixels)


def _write_beside(bundle: Bundle, place: Path, parity: Parity, loss: Loss | None, speed: Sequence[Speed]) -> None:
    for name in (DESCRIPTION, CARD):
        with whole(place / name) as temporary:
            temporary.write_bytes((bundle.folder / name).read_bytes())
    write_text(place / exported.README, readme(bundle.description, parity, loss))
    versions: dict[str, Any] = {"pylorus": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
    about = record(bundle.description, parity, loss, speed, bundle=sha256(bundle.folder / SUMS), versions=versions)
    write_json(place / exported.RECORD, about)
    write_text(place / SUMS, "".join(f"{sha256(place / name)}  {name}\n" for name in FILES))
