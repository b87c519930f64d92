"""Write a bundle as an ONNX graph: from uint8 images to logits, calibrated probabilities and unlikeness."""

import contextlib
import importlib
import io
import json
import logging
import math
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pylorus.core.errors import PylorusError, format_path
from pylorus.core.io import write_atomically
from pylorus.core.limited_process import call_in_fork
from pylorus.core.system import get_free_memory
from pylorus.data.input_format import InputFormat
from pylorus.deploy.bundle_files import read_description
from pylorus.deploy.description import INTENDED_USE, Description
from pylorus.deploy.model import Bundle, InferenceModel, verify_inference
from pylorus.deploy.signature import build_manifest_check
from pylorus.deploy.verified_files import DESCRIPTION, EXPORT_FILES, MODEL, open_verified_folder
from pylorus.model.inference import NetworkOutput


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


IMAGE = "image"
OUTPUTS = ("logits", "probabilities", "unlikeness")
DESCRIPTION_KEY = "pylorus.model.json"
"""Entry of the file's metadata that holds the whole of model.json."""
STANDARD_DOMAINS, RUNTIME_DOMAIN = ("", "ai.onnx"), "com.microsoft"
"""Permitted domains of operators: the ONNX standard, and onnxruntime's own, of which only a few are permitted."""
RUNTIME_OPERATORS = (
    *("Attention", "MultiHeadAttention", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    *("DequantizeLinear", "QuantizeLinear", "QGemm", "FusedConv", "FusedGemm", "FusedMatMul"),
    *("Gelu", "FastGelu", "QuickGelu", "BiasGelu", "BiasSoftmax", "BiasAdd"),
    *("LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "GroupNorm", "NhwcMaxPool"),
)
"""Operators of onnxruntime that its optimizer and its quantizer write, besides those that begin with QLinear."""
FORBIDDEN_OPERATORS = (
    *("If", "Loop", "Scan", "SequenceMap", "ImageDecoder"),
    *("RandomNormal", "RandomUniform", "Multinomial", "Bernoulli"),
    *("String", "Regex", "TfIdfVectorizer", "LabelEncoder"),
)
"""Operators of the standard that no export has: those with graphs of their own, random ones, decoders, and for texts.

Those for texts compute for any time, or crash, on a hostile pattern.
"""
MAX_TEXT_LENGTH = 200
"""The most characters of a text among the attributes of an operator, such as the equation of an Einsum."""
MAX_NODES = 100_000
"""The most operators of a graph: ten times those of timm's largest networks."""
MAX_ELEMENTS = 2**30
"""The most numbers of a tensor in a graph whose size follows from it, for one image."""
TRIAL_SECONDS = 120.0
"""The most time that a graph may take for one image, in seconds, before its optimization."""


@dataclass(frozen=True, eq=False)
class ExportedModel(InferenceModel):
    """A trained model that runs in onnxruntime on the CPU.

    Attributes:
        session: onnxruntime's InferenceSession.
    """

    session: Any

    def run_network(self, images: NDArray[np.uint8]) -> NetworkOutput:
        """Run inference on uint8 images of shape (n, *input.shape), preprocessed by `input`."""
        logits, unlikeness = run_session(self.session, images, "logits", "unlikeness")
        return NetworkOutput(torch.from_numpy(logits), torch.from_numpy(unlikeness))


def load_export(folder: Path, *, trust: Sequence[Path] = ()) -> ExportedModel:
    """Load and check an export; the file that was hashed and checked is the one that onnxruntime gets, in memory.

    Args:
        folder: Folder that `pylorus export` wrote.
        trust: Files with public keys; the export must be signed with one of them. Empty to accept any export.

    Raises:
        PylorusError: If it is not an export, a file is missing, changed or invalid, it is not signed as it should be,
            or onnxruntime is not installed.
    """
    with open_verified_folder(folder, EXPORT_FILES, check_manifest=build_manifest_check(trust)) as files:
        contents = dict(files.contents)
    description = read_description(contents[DESCRIPTION], where=str(folder / DESCRIPTION))
    path, graph = folder / MODEL, contents.pop(MODEL)
    metadata = _examine_graph(graph, path, shape=description.form.shape, classes=len(description.classes))
    session = open_session(path, graph)
    if metadata.get(DESCRIPTION_KEY, "").encode() != contents[DESCRIPTION]:
        raise PylorusError(
            f"{path}: was not exported with the {DESCRIPTION} next to it: its metadata differ from that file."
        )
    model = ExportedModel(folder, description, files.hashes, contents, session)
    verify_inference(model, path)
    return model


def open_session(path: Path, content: bytes | None = None) -> Any:
    """Open an ONNX file in onnxruntime on the CPU, with as many threads as PyTorch uses.

    Args:
        path: The file.
        content: Its content, if that was read and checked before; the file itself is not opened then.

    Raises:
        PylorusError: If onnxruntime can't open the file.
    """
    runtime = import_onnx_package("onnxruntime")
    options = _create_session_options(runtime)
    try:
        source = str(path) if content is None else content
        return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no other common base class
        raise PylorusError(f"{path}: onnxruntime can't open it: {_get_first_line(error)}.") from error


def _create_session_options(runtime: Any) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # A thread without work would keep its core busy, which processes that read images need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Otherwise it would guess the format from the content, and could read another one than what was checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.log_severity_level = 3  # errors only; its warnings concern its own graph optimization
    return options


def _examine_graph(content: bytes, path: Path, *, shape: tuple[int, ...], classes: int) -> dict[str, str]:
    """Check a graph and run it once, on Linux in a forked process: libraries in C++ may crash on it, or never end.

    Returns:
        Its metadata.

    Raises:
        PylorusError: If it is refused, crashes a library or takes too long.
    """
    for name in ("onnx", "onnxruntime"):
        import_onnx_package(name)

    def examine(is_forked: bool) -> dict[str, str]:
        with limit_memory(get_free_memory()) if is_forked else contextlib.nullcontext():
            metadata = check_graph(content, path)
        if is_forked:
            signal.setitimer(signal.ITIMER_PROF, TRIAL_SECONDS * torch.get_num_threads())
        _try_graph(content, path, shape=shape, classes=classes)
        return metadata

    if sys.platform != "linux":
        return examine(False)
    results, code = call_in_fork(examine, True)
    if not results:
        is_slow = code in (None, -signal.SIGPROF)
        problem = "takes too long to be checked" if is_slow else f"crashes the process that checks it (code {code})"
        raise PylorusError(f"{path}: {problem}. No export does; ask whoever made it.")
    return results[0]


def _try_graph(content: bytes, path: Path, *, shape: tuple[int, ...], classes: int) -> None:
    """Run a graph on one black image as it is, with limits on memory and time, before onnxruntime optimizes it.

    The optimizer computes what does not depend on the image, and nothing can interrupt it.

    Raises:
        PylorusError: If onnxruntime can't open or run it, it has other inputs or outputs than it should, or it exceeds
            a limit.
    """
    runtime = import_onnx_package("onnxruntime")
    options = _create_session_options(runtime)
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    run_options = runtime.RunOptions()
    timer = threading.Timer(TRIAL_SECONDS, lambda: setattr(run_options, "terminate", True))
    timer.daemon = True
    try:
        with limit_memory(get_free_memory() + torch.get_num_threads() * RESERVED_BYTES):
            session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            _check_signature(session, path, shape=shape, classes=classes)
            image = np.zeros((1, *shape), dtype=np.uint8)
            timer.start()
            session.run(None, {IMAGE: image}, run_options)
    except PylorusError:
        raise
    except Exception as error:
        reason = (
            f"takes more than {TRIAL_SECONDS:g} s for one image"
            if run_options.terminate
            else f"onnxruntime can't open it, or can't run it: {_get_first_line(error)}"
        )
        raise PylorusError(f"{path}: {reason}.") from error
    finally:
        timer.cancel()


RESERVED_BYTES = 2**28
"""Address space that a thread reserves without using it, in bytes."""


def _check_signature(session: Any, path: Path, *, shape: tuple[int, ...], classes: int) -> None:
    signature = _get_signature([*session.get_inputs(), *session.get_outputs()])
    expected = [
        (IMAGE, "tensor(uint8)", (None, *shape)),
        ("logits", "tensor(float)", (None, classes)),
        ("probabilities", "tensor(float)", (None, classes)),
        ("unlikeness", "tensor(float)", (None,)),
    ]
    if signature != expected:
        raise PylorusError(
            f"{path}: inputs and outputs are {str(signature)[:400]}, expected {expected} according to {DESCRIPTION}."
        )


@contextlib.contextmanager
def limit_memory(more: int) -> Iterator[None]:
    """Let this process reserve at most so many bytes more in the body of the `with` statement, where the system can."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (ImportError, OSError, ValueError):  # not Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + more
    if soft != resource.RLIM_INFINITY:
        wanted = min(wanted, soft)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run_session(session: Any, images: NDArray[np.uint8], *names: str) -> list[NDArray[np.float32]]:
    """Run a session on uint8 images of shape (n, height, width, 3) and return the named outputs.

    Raises:
        RuntimeError: If onnxruntime fails.
    """
    try:
        outputs: list[NDArray[np.float32]] = session.run(list(names), {IMAGE: np.ascontiguousarray(images)})
    except Exception as error:
        raise RuntimeError(_get_first_line(error)) from error
    return outputs


def check_graph(content: bytes, path: Path) -> dict[str, str]:
    """Refuse graphs that no export has: those that could read other files, run other code, loop or exhaust the memory.

    Args:
        content: The content of an ONNX file.
        path: The file, for error messages.

    Returns:
        Its metadata.

    Raises:
        PylorusError: If it holds anything else than operators of an export and weights.
    """
    onnx = import_onnx_package("onnx")
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own exceptions
        raise PylorusError(f"{path}: can't be read as ONNX: {_get_first_line(error)}.") from error
    graph, nodes = model.graph, model.graph.node
    attributes = [attribute for node in nodes for attribute in node.attribute]
    tensors = [*graph.initializer]
    for attribute in attributes:
        tensors += [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
    if any(tensor.external_data or tensor.data_location for tensor in tensors) or graph.sparse_initializer:
        raise PylorusError(f"{path}: stores weights outside this file, expected all of them in it.")
    if len(nodes) > MAX_NODES:
        raise PylorusError(f"{path}: has {len(nodes):,} operators, expected {MAX_NODES:,} at most.")
    unexpected = {format_path(node.op_type[:50]) for node in nodes if not _is_permitted(node)}
    if unexpected or model.functions or model.training_info:
        listed = ", ".join(sorted(unexpected))[:200] or "functions"
        raise PylorusError(f"{path}: contains operators that no export has: {listed}.")
    if any(attribute.HasField("sparse_tensor") or attribute.sparse_tensors for attribute in attributes):
        raise PylorusError(f"{path}: contains sparse tensors, which no export has.")
    if any(len(text) > MAX_TEXT_LENGTH for attribute in attributes for text in (attribute.s, *attribute.strings)):
        raise PylorusError(f"{path}: an operator has a text of over {MAX_TEXT_LENGTH} characters, which no export has.")
    for tensor in tensors:
        _check_tensor_size(tensor, path)
    keys = [entry.key for entry in model.metadata_props]
    if len(set(keys)) != len(keys) or not all(key.startswith("pylorus.") for key in keys):
        raise PylorusError(f"{path}: has metadata that no export has: {format_path(', '.join(sorted(keys))[:200])}.")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    for tensor in graph.initializer:
        if len(tensor.raw_data) > MAX_SHAPE_BYTES:  # the memory is needed, and no shape depends on weights
            tensor.ClearField("raw_data")
    _check_computed_sizes(onnx, model, path)
    return metadata


MAX_SHAPE_BYTES = 65_536
"""The most bytes of a constant from which shapes are inferred."""


def _is_permitted(node: Any) -> bool:
    if node.domain == RUNTIME_DOMAIN:
        is_known = node.op_type in RUNTIME_OPERATORS or node.op_type.startswith("QLinear")
    else:
        is_known = node.domain in STANDARD_DOMAINS and not node.op_type.startswith(FORBIDDEN_OPERATORS)
    return is_known and not any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)


def _check_tensor_size(tensor: Any, path: Path) -> None:
    """Check that a tensor has as many numbers as its shape says: otherwise a few bytes could ask for any memory."""
    numbers = math.prod(tensor.dims)
    lists = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    stored = len(tensor.raw_data) + sum(map(len, lists))
    if min(tensor.dims, default=0) < 0 or 2 * stored < numbers or tensor.string_data:
        raise PylorusError(
            f"{path}: the tensor {tensor.name[:100]!r} has the shape {list(tensor.dims)[:8]}, but only {stored:,} "
            "numbers or bytes."
        )


def _check_computed_sizes(onnx: Any, model: Any, path: Path) -> None:
    """Check the sizes of all tensors that follow from the graph without running it."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # of several types
        raise PylorusError(f"{path}: its shapes can't be inferred: {_get_first_line(error)}.") from error
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        sides = [side.dim_value for side in value.type.tensor_type.shape.dim if side.HasField("dim_value")]
        if math.prod(sides) > MAX_ELEMENTS:
            raise PylorusError(
                f"{path}: computes a tensor of {math.prod(sides):,} numbers for an image, expected at most "
                f"{MAX_ELEMENTS:,}."
            )


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

    def __init__(self, classifier: nn.Module, temperature: float, bias: Sequence[float]):
        super().__init__()
        self.classifier, self.temperature = classifier, temperature
        self.has_bias = bool(bias)
        self.register_buffer("bias", torch.tensor([*bias], dtype=torch.float32), persistent=False)
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, unlikeness = self.classifier(image.permute(0, 3, 1, 2))
        calibrated = logits / self.temperature + self.bias if self.has_bias else logits / self.temperature
        return logits, torch.softmax(calibrated, dim=1), unlikeness


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
    calibration = bundle.description.calibration
    module = _ExportModule(bundle.classifier, calibration.temperature, calibration.bias)
    images = torch.zeros((2, *bundle.input.shape), dtype=torch.uint8)
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
        DESCRIPTION_KEY: bundle.contents[DESCRIPTION].decode("utf-8"),
        "pylorus.classes": json.dumps(description.classes, ensure_ascii=False),
        "pylorus.short_names": json.dumps(description.short_names, ensure_ascii=False),
        "pylorus.input": format_input_description(description),
        "pylorus.outputs": format_outputs_description(description),
        "pylorus.intended_use": INTENDED_USE,
    }


def format_input_description(description: Description) -> str:
    """Describe the graph's input and the preprocessing that it needs."""
    input_format = description.form
    height, width, _ = input_format.shape
    squares, top = [], 0
    for form in input_format.forms:
        squares.append(
            (f"rows {top} to {top + form.size - 1}, columns 0 to {form.size - 1}", _format_preparation(form))
        )
        top += form.size
    prepared = squares[0][1]
    if len(squares) > 1:
        parts = "; ".join(f"{place}: {text}" for place, text in squares)
        prepared = f"decoded once, and prepared for the networks as {len(squares)} squares on black: {parts}"
    return (
        f"{IMAGE}: uint8 RGB of shape (n, {height}, {width}, 3), n >= 1. Before the graph: {prepared}. The graph "
        "itself does the rest: (value / 255 - mean) / std."
    )


def _format_preparation(form: InputFormat) -> str:
    """Describe how a file becomes a square of pixels."""
    size = form.size
    methods = {
        "pad": f"scaled to fit a square of {size} pixels, keeping its aspect ratio, centered on black",
        "stretch": f"scaled to a square of {size} pixels, ignoring its aspect ratio",
        "crop": f"scaled so that its shorter side has {size} pixels, then cropped to the square in its center",
    }
    mask = "covered where the console draws text or plates (pylorus.data.overlays), " if form.mask == "overlays" else ""
    field = "cropped to the endoscopic field of view (pylorus.data.field_of_view), " if form.crop == "auto" else ""
    halving = (
        "; first halved by averaging 2 × 2 pixels, rounded half up, while both sides are at least four times as long "
        "as needed"
        if form.policy > 2
        else ""
    )
    return (
        f"decoded with its EXIF orientation applied, {mask}{field}{methods[form.fit]} "
        f"({form.interpolation} with antialiasing, as Pillow does{halving})"
    )


def format_outputs_description(description: Description) -> str:
    """Describe the graph's outputs."""
    bias = description.calibration.bias
    networks = 0 if description.ensemble is None else len(description.ensemble.members)
    averaged = f"; the logarithm of the mean of the calibrated probabilities of {networks} networks" if networks else ""
    added = f" + ({', '.join(f'{value:.6g}' for value in bias)})" if bias else ""
    return (
        f"logits: float32 (n, {len(description.classes)}), classes in the order of pylorus.classes{averaged}. "
        "probabilities: the "
        f"same, calibrated: softmax(logits / {description.calibration.temperature:.6g}{added}). unlikeness: float32 "
        f"(n,), 0 to 2; above {description.abstention.unlike_above:.6g} the model abstains, and if the largest "
        f"probability is below {description.abstention.unsure_below:.6g}."
    )
