"""Write a bundle as an ONNX graph: from uint8 images to logits, calibrated probabilities and unlikeness."""

import contextlib
import importlib
import io
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pylorus.core.errors import PylorusError
from pylorus.core.io import write_atomically
from pylorus.deploy.bundle_files import CARD, DESCRIPTION, MODEL, verify_checksums
from pylorus.deploy.description import Description
from pylorus.deploy.model import Bundle, InferenceModel, load_description, verify_inference
from pylorus.model.inference import BundleClassifier, NetworkOutput


def import_onnx_package(name: str) -> ModuleType:
    """Import `onnx`, `onnxruntime` or `onnxscript`, or a submodule such as `onnxruntime.quantization`.

    Raises:
        PylorusError: If it is not installed; names the command that installs it.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise PylorusError(
            f"ONNX needs {name.split('.')[0]}, which can't be imported ({error}). Type: pip install 'pylorus[onnx]' "
            "or, in a clone, pip install -e '.[onnx]'."
        ) from error
    if name == "onnxruntime":
        module.disable_telemetry_events()  # exists on Windows only; has no effect elsewhere
    return module


RECORD, README = "export.json", "README.md"
FILES = (MODEL, DESCRIPTION, RECORD, CARD, README)
"""Files of an export, besides the list of their hashes."""
IMAGE = "image"
OUTPUTS = ("logits", "probabilities", "unlikeness")
DESCRIPTION_KEY = "pylorus.model.json"
"""Entry of the file's metadata that holds the whole of model.json."""
DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Permitted operator domains: the ONNX standard, and onnxruntime's integer operators."""


@dataclass(frozen=True, eq=False)
class ExportedModel(InferenceModel):
    """A trained model that runs in onnxruntime on the CPU.

    Attributes:
        session: onnxruntime's InferenceSession.
    """

    session: Any

    def run_network(self, images: NDArray[np.uint8]) -> NetworkOutput:
        """Run inference on uint8 images of shape (n, size, size, 3), preprocessed by `input`."""
        logits, unlikeness = run_session(self.session, images, "logits", "unlikeness")
        return NetworkOutput(torch.from_numpy(logits), torch.from_numpy(unlikeness))


def load_export(folder: Path) -> ExportedModel:
    """Load and check an export.

    Args:
        folder: Folder that `pylorus export` wrote.

    Raises:
        PylorusError: If it is not an export, a file is missing, changed or invalid, or onnxruntime is not installed.
    """
    hashes = verify_checksums(folder, FILES)
    description = load_description(folder)
    path = folder / MODEL
    _check_graph(path)
    session = open_session(path)
    size, classes = description.input.size, len(description.classes)
    signature = _get_signature([*session.get_inputs(), *session.get_outputs()])
    expected = [
        (IMAGE, "tensor(uint8)", (None, size, size, 3)),
        ("logits", "tensor(float)", (None, classes)),
        ("probabilities", "tensor(float)", (None, classes)),
        ("unlikeness", "tensor(float)", (None,)),
    ]
    if signature != expected:
        raise PylorusError(
            f"{path}: inputs and outputs are {str(signature)[:400]}, expected {expected} according to {DESCRIPTION}."
        )
    if session.get_modelmeta().custom_metadata_map.get(DESCRIPTION_KEY) != (folder / DESCRIPTION).read_text("utf-8"):
        raise PylorusError(
            f"{path}: was not exported with the {DESCRIPTION} next to it: its metadata differ from that file."
        )
    model = ExportedModel(folder, description, hashes, session)
    verify_inference(model, path)
    return model


def is_export(folder: Path) -> bool:
    """Return whether a folder holds an export rather than a bundle."""
    return (folder / MODEL).is_file()


def open_session(path: Path) -> Any:
    """Open an ONNX file in onnxruntime on the CPU, with as many threads as PyTorch uses.

    Raises:
        PylorusError: If onnxruntime can't open the file.
    """
    runtime = import_onnx_package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # A thread without work would keep its core busy, which processes that read images need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only; its warnings concern its own graph optimization
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no other common base class
        raise PylorusError(f"{path}: onnxruntime can't open it: {_get_first_line(error)}.") from error


def run_session(session: Any, images: NDArray[np.uint8], *names: str) -> list[NDArray[np.float32]]:
    """Run a session on uint8 images of shape (n, size, size, 3) and return the named outputs.

    Raises:
        RuntimeError: If onnxruntime fails.
    """
    try:
        outputs: list[NDArray[np.float32]] = session.run(list(names), {IMAGE: np.ascontiguousarray(images)})
    except Exception as error:
        raise RuntimeError(_get_first_line(error)) from error
    return outputs


def _check_graph(path: Path) -> None:
    """Refuse graphs that no export has: those that could read other files or loop forever."""
    onnx = import_onnx_package("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own exceptions
        raise PylorusError(f"{path}: can't be read as ONNX: {_get_first_line(error)}.") from error
    nodes = model.graph.node
    tensors = [*model.graph.initializer, *(attribute.t for node in nodes for attribute in node.attribute)]
    if any(tensor.external_data or tensor.data_location for tensor in tensors) or model.graph.sparse_initializer:
        raise PylorusError(f"{path}: stores weights outside this file, expected all of them in it.")
    unexpected = {node.op_type for node in nodes if node.domain not in DOMAINS}
    unexpected |= {
        node.op_type for node in nodes for attribute in node.attribute if attribute.HasField("g") or attribute.graphs
    }
    if unexpected or model.functions or model.training_info:
        listed = ", ".join(sorted(unexpected))[:200] or "functions"
        raise PylorusError(f"{path}: contains operators that no export has: {listed}.")


def _get_signature(values: list[Any]) -> list[tuple[str, str, tuple[int | None, ...]]]:
    return [
        (value.name, value.type, tuple(side if isinstance(side, int) else None for side in value.shape))
        for value in values
    ]


def _get_first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


MAX_WEIGHT_BYTES = 1_900_000_000
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
        PylorusError: If its weights exceed `MAX_WEIGHT_BYTES`, torch can't export this network, or a package
            is missing.
    """
    for name in ("onnx", "onnxscript"):
        import_onnx_package(name)
    size = sum(tensor.numel() * tensor.element_size() for tensor in bundle.classifier.state_dict().values())
    if size > MAX_WEIGHT_BYTES:
        raise PylorusError(
            f"{bundle.folder}: has {size:,} bytes of weights; an ONNX file holds at most {MAX_WEIGHT_BYTES:,}."
        )
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
        DESCRIPTION_KEY: (bundle.folder / DESCRIPTION).read_text("utf-8"),
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
    mask = (
        "covered where the console draws text or plates (pylorus.data.overlays), "
        if input_format.mask == "overlays"
        else ""
    )
    field = (
        "cropped to the endoscopic field of view (pylorus.data.field_of_view), " if input_format.crop == "auto" else ""
    )
    halving = (
        "; first halved by averaging 2 × 2 pixels, rounded half up, while both sides are at least four times as long "
        "as needed"
        if input_format.policy > 2
        else ""
    )
    return (
        f"{IMAGE}: uint8 RGB of shape (n, {size}, {size}, 3), n >= 1. Before the graph: "
        f"decoded with its EXIF orientation applied, {mask}{field}{methods[input_format.fit]} "
        f"({input_format.interpolation} with antialiasing, as Pillow does{halving}). The graph itself does the rest: "
        "(value / 255 - mean) / std."
    )


def format_outputs_description(description: Description) -> str:
    """Describe the graph's outputs."""
    return (
        f"logits: float32 (n, {len(description.classes)}), classes in the order of pylorus.classes. probabilities: the "
        f"same, calibrated: softmax(logits / {description.calibration.temperature:.6g}). unlikeness: float32 (n,), "
        f"0 to 2; above {description.abstention.unlike_above:.6g} the model abstains, and if the largest "
        f"probability is below {description.abstention.unsure_below:.6g}."
    )
