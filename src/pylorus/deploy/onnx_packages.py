"""Import the optional packages for ONNX only when they are needed."""

import importlib
from types import ModuleType

from pylorus.errors import PylorusError


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
