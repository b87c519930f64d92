"""A bundle as an ONNX graph: from uint8 images to logits, calibrated probabilities and unlikeness."""

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pylorus.deploy.description import Description
from pylorus.deploy.exported import DESCRIBED, IMAGE, OUTPUTS
from pylorus.deploy.files import DESCRIPTION
from pylorus.deploy.load import Bundle
from pylorus.deploy.network import BundledClassifier
from pylorus.deploy.onnx_packages import onnx_package
from pylorus.errors import PylorusError
from pylorus.files import whole

LARGEST = 1_900_000_000
"""Bytes of weights: one ONNX file can't hold 2 GiB."""


class _Whole(nn.Module):
    """All from the image on; gives what `OUTPUTS` names."""

    def __init__(self, classifier: BundledClassifier, temperature: float):
        super().__init__()
        self.classifier, self.temperature = classifier, temperature
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, unlikeness = self.classifier(image.permute(0, 3, 1, 2))
        return logits, torch.softmax(logits / self.temperature, dim=1), unlikeness


def write_onnx(bundle: Bundle, path: Path) -> None:
    """Writes a bundle as one ONNX file for any number of images at a time.

    Args:
        bundle: On the CPU.
        path: The file.

    Raises:
        PylorusError: If its weights are over `LARGEST`, torch can't export this network, or a package is missing.
    """
    for name in ("onnx", "onnxscript"):
        onnx_package(name)
    size = sum(tensor.numel() * tensor.element_size() for tensor in bundle.classifier.state_dict().values())
    if size > LARGEST:
        raise PylorusError(f"{bundle.folder}: has {size:,} bytes of weights; an ONNX file holds {LARGEST:,} at most.")
    model = _traced(bundle)
    strip(model)
    for key, text in _metadata(bundle).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, text
    with whole(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _traced(bundle: Bundle) -> Any:
    module = _Whole(bundle.classifier, bundle.description.calibration.temperature)
    side = bundle.input.size
    # Two images: of one, torch would take the number for a constant.
    images = torch.zeros((2, side, side, 3), dtype=torch.uint8)
    level = logging.getLogger().manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # about torch's own ways
            program = torch.onnx.export(
                module,
                (images,),
                input_names=[IMAGE],
                output_names=list(OUTPUTS),
                dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            return program.model_proto
    except Exception as error:  # the exporter fails in many ways, all of them its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise PylorusError(
            f"{bundle.folder}: torch {torch.__version__} can't export {bundle.description.architecture}: {reason}"
        ) from error
    finally:
        logging.disable(level)


def strip(model: Any) -> None:
    """Takes out what the exporter notes of this machine, such as the paths of source files."""
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info, graph, model):
        del part.metadata_props[:]
        part.doc_string = ""


def _metadata(bundle: Bundle) -> dict[str, str]:
    said = bundle.description
    return {
        DESCRIBED: (bundle.folder / DESCRIPTION).read_text("utf-8"),
        "pylorus.classes": json.dumps(said.classes, ensure_ascii=False),
        "pylorus.short_names": json.dumps(said.short_names, ensure_ascii=False),
        "pylorus.input": input_in_words(said),
        "pylorus.outputs": outputs_in_words(said),
        "pylorus.intended_use": said.intended_use,
    }


def input_in_words(said: Description) -> str:
    """What the graph takes, and what must be done before."""
    given = said.input
    ways = {
        "pad": f"scaled to fit a square of {given.size} pixels, its aspect kept, centred on black",
        "stretch": f"scaled to a square of {given.size} pixels, whatever its aspect",
        "crop": f"scaled so that its shorter side has {given.size} pixels, then cut to the square in its middle",
    }
    field = "cropped to the endoscopic field of view (pylorus.data.field), " if given.crop == "auto" else ""
    return (
        f"{IMAGE}: uint8 RGB of shape (n, {given.size}, {given.size}, 3), n any number from 1. Before the graph: "
        f"decoded with its EXIF orientation applied, {field}{ways[given.fit]} ({given.interpolation} with "
        "antialiasing, as Pillow does). The graph itself does the rest: values / 255, less mean, divided by std."
    )


def outputs_in_words(said: Description) -> str:
    """What the graph gives."""
    return (
        f"logits: float32 (n, {len(said.classes)}), classes in the order of pylorus.classes. probabilities: the same "
        f"calibrated, softmax(logits / {said.calibration.temperature:.6g}). unlikeness: float32 (n,), 0 to 2; above "
        f"{said.abstention.unlike_above:.6g} the model abstains, as it does where the largest probability is below "
        f"{said.abstention.unsure_below:.6g}."
    )
