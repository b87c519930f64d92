"""Import the packages one by one. Runs in a process of its own, which a broken package may crash."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator

from pylorus.doctor.check import Check, State, format_first_line
from pylorus.doctor.packages import get_installed_version

LOADING = "Package loading"

LOADED = {
    "numpy": "numpy",
    "cv2": "opencv-python-headless",
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "albumentations": "albumentations",
    "pytorch_lightning": "pytorch-lightning",
    "torchmetrics": "torchmetrics",
    "pandas": "pandas",
    "pyarrow": "pyarrow",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "statsmodels": "statsmodels",
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "PIL": "pillow",
}
"""Modules with compiled code, which may fail on a machine even in compatible versions, and their packages."""

ON_TORCH = ("torchvision", "timm", "albumentations", "pytorch_lightning", "torchmetrics")
"""Modules that can't load without torch."""


def check_loading(doing: Callable[[str], None]) -> Iterator[Check]:
    """Import each module; yield a check for each failure, or one for all if there is none.

    Args:
        doing: Called with each step before it begins: the process may not survive it.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # otherwise it asks the package index for a newer version
    failed: list[str] = []
    for module, package in LOADED.items():
        if "torch" in failed and module in ON_TORCH:
            continue
        doing(f"loading {package}")
        try:
            importlib.import_module(module)
        except Exception as error:
            failed.append(module)
            if importlib.util.find_spec(module) is None:
                continue  # missing: another check reports that
            yield Check(
                LOADING,
                package,
                State.WRONG,
                f"can't be imported: {format_first_line(error)}",
                format_reinstall_command(package),
            )
    if not failed:
        yield Check(LOADING, "packages", State.GOOD, f"all {len(LOADED)} packages with compiled code can be imported")
    elif "torch" in failed:
        summary = "cores, GPU, weights and bundle were not checked: this needs torch"
        yield Check(
            LOADING, "skipped checks", State.WARNING, summary, "Fix torch first, then run pylorus doctor again."
        )


def format_reinstall_command(package: str) -> str:
    """Return the command that reinstalls a package in its present version."""
    version = get_installed_version(package)
    return f"pip install --force-reinstall --no-deps '{package}{f'=={version}' if version else ''}'"
