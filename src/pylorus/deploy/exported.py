"""An export, read: one ONNX file that onnxruntime computes on the CPU, checked like a bundle."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pylorus.deploy.answers import TrainedModel
from pylorus.deploy.files import CARD, DESCRIPTION, MODEL, checked_sums
from pylorus.deploy.load import described, try_out
from pylorus.deploy.network import Output
from pylorus.deploy.onnx_packages import onnx_package
from pylorus.errors import PylorusError

RECORD, README = "export.json", "README.md"
FILES = (MODEL, DESCRIPTION, RECORD, CARD, README)
"""What an export holds beside the list of their hashes."""
IMAGE = "image"
OUTPUTS = ("logits", "probabilities", "unlikeness")
DESCRIBED = "pylorus.model.json"
"""The entry of the file's metadata that holds all of model.json."""
DOMAINS = ("", "ai.onnx", "com.microsoft")
"""Whose operators are computed: the standard's, and those that onnxruntime has for whole numbers."""


@dataclass(frozen=True, eq=False)
class ExportedModel(TrainedModel):
    """A trained network, ready to be asked, in onnxruntime on the CPU.

    Attributes:
        session: Of onnxruntime.
    """

    session: Any

    def output(self, images: NDArray[np.uint8]) -> Output:
        """What the network says of images (n, size, size, 3) as `input` reads them."""
        logits, unlikeness = computed(self.session, images, "logits", "unlikeness")
        return Output(torch.from_numpy(logits), torch.from_numpy(unlikeness))


def load_exported(folder: Path) -> ExportedModel:
    """Reads and checks an export.

    Args:
        folder: As `pylorus export` wrote it.

    Raises:
        PylorusError: If it is no export, a file of it is missing, changed or not what it should be, or onnxruntime is
            not installed.
    """
    sums = checked_sums(folder, FILES)
    description = described(folder)
    path = folder / MODEL
    _check_graph(path)
    session = opened(path)
    size, classes = description.input.size, len(description.classes)
    found = _signature([*session.get_inputs(), *session.get_outputs()])
    wanted = [
        (IMAGE, "tensor(uint8)", (None, size, size, 3)),
        ("logits", "tensor(float)", (None, classes)),
        ("probabilities", "tensor(float)", (None, classes)),
        ("unlikeness", "tensor(float)", (None,)),
    ]
    if found != wanted:
        raise PylorusError(f"{path}: takes and gives {str(found)[:400]}, expected {wanted}, as {DESCRIPTION} says.")
    if session.get_modelmeta().custom_metadata_map.get(DESCRIBED) != (folder / DESCRIPTION).read_text("utf-8"):
        raise PylorusError(f"{path}: was not exported with the {DESCRIPTION} beside it: its metadata say another.")
    model = ExportedModel(folder, description, sums, session)
    try_out(model, path)
    return model


def is_export(folder: Path) -> bool:
    """Whether a folder holds an export rather than a bundle."""
    return (folder / MODEL).is_file()


def opened(path: Path) -> Any:
    """A session of onnxruntime on the CPU, with as many threads as PyTorch has.

    Raises:
        PylorusError: If onnxruntime can't open the file.
    """
    runtime = onnx_package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; its warnings are about its own rewriting of the graph
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes of errors share no other base
        raise PylorusError(f"{path}: onnxruntime can't open it: {_first_line(error)}.") from error


def computed(session: Any, images: NDArray[np.uint8], *names: str) -> list[NDArray[np.float32]]:
    """Some outputs of a session for images (n, size, size, 3).

    Raises:
        RuntimeError: If it can't be computed.
    """
    try:
        found: list[NDArray[np.float32]] = session.run(list(names), {IMAGE: np.ascontiguousarray(images)})
    except Exception as error:
        raise RuntimeError(_first_line(error)) from error
    return found


def _check_graph(path: Path) -> None:
    """Refuses what no export has and what could reach out of the file or go round for ever."""
    onnx = onnx_package("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own classes
        raise PylorusError(f"{path}: can't be read as ONNX: {_first_line(error)}.") from error
    nodes = model.graph.node
    tensors = [*model.graph.initializer, *(part.t for node in nodes for part in node.attribute)]
    if any(tensor.external_data or tensor.data_location for tensor in tensors) or model.graph.sparse_initializer:
        raise PylorusError(f"{path}: keeps weights outside of itself, expected all in this one file.")
    odd = {node.op_type for node in nodes if node.domain not in DOMAINS}
    odd |= {node.op_type for node in nodes for part in node.attribute if part.HasField("g") or part.graphs}
    if odd or model.functions or model.training_info:
        named = ", ".join(sorted(odd))[:200] or "functions"
        raise PylorusError(f"{path}: holds operators that no export has: {named}.")


def _signature(given: list[Any]) -> list[tuple[str, str, tuple[int | None, ...]]]:
    return [(one.name, one.type, tuple(n if isinstance(n, int) else None for n in one.shape)) for one in given]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
