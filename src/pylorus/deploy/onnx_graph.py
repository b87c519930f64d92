"""Write a bundle as an ONNX graph: from uint8 images to logits, calibrated probabilities and unlikeness."""

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
from pylorus.deploy.network import BundleClassifier
from pylorus.deploy.onnx_packages import import_onnx_package
from pylorus.errors import PylorusError
from pylorus.files import write_atomically

LARGEST = 1_900_000_000
"""Maximum size of the weights in bytes: one ONNX file can't hold 2 GiB."""


class _ExportModule(nn.Module):
    """The whole computation from the uint8 image on; returns the outputs that `OUTPUTS` names."""

    def __init__(self, classifier: BundleClassifier, temperature: float):
        super().__init__()
        self.classifier, self.temperature = classifier, temperature
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, unlikeness = self.classifier(image.permute(0, 3, 1, 2))
        return logits, torch.softmax(logits / self.temperature, dim=1), unlikeness


def write_onnx(bundle: Bundle, path: Path) -> None:
    """Write a bundle as one ONNX file for any batch size.

    Args:
        bundle: The bundle, on the CPU.
        path: File to write.

    Raises:
        PylorusError: If its weights exceed `LARGEST`, torch can't export this network, or a package is missing.
    """
    for name in ("onnx", "onnxscript"):
        import_onnx_package(name)
    size = sum(tensor.numel() * tensor.element_size() for tensor in bundle.classifier.state_dict().values())
    if size > LARGEST:
        raise PylorusError(f"{bundle.folder}: has {size:,} bytes of weights; an ONNX file holds at most {LARGEST:,}.")
    model = _export_graph(bundle)
    remove_machine_details(model)
    for key, text in _build_metadata(bundle).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, text
    with write_atomically(path) as temporary:
        temporary.write_bytes(model.SerializeToString())


def _export_graph(bundle: Bundle) -> Any:
    module = _ExportModule(bundle.classifier, bundle.description.calibration.temperature)
    side = bundle.input.size
    # Two images: with one, torch would treat the batch size as a constant.
    images = torch.zeros((2, side, side, 3), dtype=torch.uint8)
    level = logging.getLogger().manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # about torch's own internals
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
    except Exception as error:  # the exporter raises many types of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise PylorusError(
            f"{bundle.folder}: torch {torch.__version__} can't export {bundle.description.architecture}: {reason}"
        ) from error
    finally:
        logging.disable(level)


def remove_machine_details(model: Any) -> None:
    """Remove what the exporter records about this machine, such as paths of source files."""
    graph = model.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info, graph, model):
        del item.metadata_props[:]
        item.doc_string = ""


def _build_metadata(bundle: Bundle) -> dict[str, str]:
    description = bundle.description
    return {
        DESCRIBED: (bundle.folder / DESCRIPTION).read_text("utf-8"),
        "pylorus.classes": json.dumps(description.classes, ensure_ascii=False),
        "pylorus.short_names": json.dumps(description.short_names, ensure_ascii=False),
        "pylorus.input": format_input_description(description),
        "pylorus.outputs": format_outputs_description(description),
        "pylorus.intended_use": description.intended_use,
    }


def format_input_description(description: Description) -> str:
    """Describe the graph's input and the preprocessing that it needs."""
    input_format = description.input
    size = input_format.size
    methods = {
        "pad": f"scaled to fit a square of {size} pixels, keeping its aspect ratio, centered on black",
        "stretch": f"scaled to a square of {size} pixels, ignoring its aspect ratio",
        "crop": f"scaled so that its shorter side has {size} pixels, then cropped to the square in its center",
    }
    field = "cropped to the endoscopic field of view (pylorus.data.field), " if input_format.crop == "auto" else ""
    return (
        f"{IMAGE}: uint8 RGB of shape (n, {size}, {size}, 3), n >= 1. Before the graph: "
        f"decoded with its EXIF orientation applied, {field}{methods[input_format.fit]} ({input_format.interpolation} "
        "with antialiasing, as Pillow does). The graph itself does the rest: (value / 255 - mean) / std."
    )


def format_outputs_description(description: Description) -> str:
    """Describe the graph's outputs."""
    return (
        f"logits: float32 (n, {len(description.classes)}), classes in the order of pylorus.classes. probabilities: the "
        f"same, calibrated: softmax(logits / {description.calibration.temperature:.6g}). unlikeness: float32 (n,), "
        f"0 to 2; above {description.abstention.unlike_above:.6g} the model abstains, and if the largest "
        f"probability is below {description.abstention.unsure_below:.6g}."
    )
