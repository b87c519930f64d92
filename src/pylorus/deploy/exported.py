"""Load an export: one ONNX file, run by onnxruntime on the CPU, checked as strictly as a bundle."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pylorus.deploy.answers import InferenceModel
from pylorus.deploy.files import CARD, DESCRIPTION, MODEL, verify_checksums
from pylorus.deploy.load import load_description, verify_inference
from pylorus.deploy.network import NetworkOutput
from pylorus.deploy.onnx_packages import import_onnx_package
from pylorus.errors import PylorusError

RECORD, README = "export.json", "README.md"
FILES = (MODEL, DESCRIPTION, RECORD, CARD, README)
"""Files of an export, besides the list of their hashes."""
IMAGE = "image"
OUTPUTS = ("logits", "probabilities", "unlikeness")
DESCRIBED = "pylorus.model.json"
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
    if session.get_modelmeta().custom_metadata_map.get(DESCRIBED) != (folder / DESCRIPTION).read_text("utf-8"):
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
