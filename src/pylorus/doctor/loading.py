"""Whether the packages load, one after the other. Run in a process of its own: a broken one may end it."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator

from pylorus.doctor.check import Check, State, first_line
from pylorus.doctor.packages import installed

AREA = "What loads"

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
"""Modules with parts in C, which may fail on a machine though their versions fit, and their packages."""

ON_TORCH = ("torchvision", "timm", "albumentations", "pytorch_lightning", "torchmetrics")
"""Modules that can't load without torch."""


def check_loading(doing: Callable[[str], None]) -> Iterator[Check]:
    """Loads each module.

    Args:
        doing: Told of each before it is loaded: its process may not live to say more.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else it asks the package index for a newer version
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
                continue  # that it is missing stands in another line
            yield Check(AREA, package, State.WRONG, f"does not load: {first_line(error)}", mend_of(package))
    if not failed:
        yield Check(AREA, "packages", State.GOOD, f"all {len(LOADED)} that hold machine code load")
    elif "torch" in failed:
        found = "cores, GPU, weights and bundles were not looked at: that needs torch"
        yield Check(AREA, "the rest", State.WARNING, found, "Mend torch first, then look again.")


def mend_of(package: str) -> str:
    """The command that puts a package back as it was."""
    version = installed(package)
    return f"pip install --force-reinstall --no-deps '{package}{f'=={version}' if version else ''}'"
