"""The optional packages for ONNX, taken in only where they are needed."""

import importlib
from types import ModuleType

from pylorus.errors import PylorusError


def onnx_package(name: str) -> ModuleType:
    """One of `onnx`, `onnxruntime` and `onnxscript`, or a part of it such as `onnxruntime.quantization`.

    Raises:
        PylorusError: If it is not installed; says the command that installs it.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise PylorusError(
            f"ONNX needs {name.split('.')[0]}, which can't be imported ({error}). pip install 'pylorus[onnx]', or, in "
            "a clone, pip install -e '.[onnx]'."
        ) from error
    if name == "onnxruntime":
        module.disable_telemetry_events()  # Windows only; elsewhere there is none
    return module
