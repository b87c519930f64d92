"""Check which optional extras are installed. None is required, so a missing one is no fault."""

import importlib.metadata as metadata
from collections.abc import Iterator

from pylorus.doctor.check import Check, State
from pylorus.doctor.packages import check_requirement, get_installed_version, list_extra_requirements

EXTRAS = "Optional extras"
LEFT_OUT = ("dev", "docs")
"""Extras for developers of Pylorus, which are not checked."""

GIVES = {
    "dicom": "DICOM images",
    "explain": "heat maps",
    "shards": "shards at http(s) URLs",
    "parallel": "parallel jobs of a sweep",
    "slurm": "sweeps on SLURM",
    "optuna": "hyperparameter searches",
    "ray": "sweeps with Ray",
    "serve": "web page of a trained model",
    "onnx": "ONNX export and prediction with an export",
}
"""What each extra is for."""


def check_extras() -> Iterator[Check]:
    """Yield one check for each extra of the package."""
    names = metadata.metadata("pylorus").get_all("Provides-Extra") or []
    for extra in names:
        if extra not in LEFT_OUT:
            yield check_extra(extra)


def check_extra(extra: str) -> Check:
    """Check that an extra is completely installed, in compatible versions."""
    required = list_extra_requirements("pylorus", extra)
    purpose = f" ({GIVES[extra]})" if extra in GIVES else ""
    install = f"pip install 'pylorus[{extra}]'"
    present = [found for found in required if get_installed_version(found.name) is not None]
    problems = [found for requirement in present if (found := check_requirement(requirement)) is not None]
    if problems:
        details = "; ".join(f"{check.name} {check.found}" for check in problems)
        return Check(EXTRAS, extra, State.WARNING, details, install)
    if len(present) < len(required):
        return Check(EXTRAS, extra, State.GOOD, f"not installed{purpose}", install)
    versions = ", ".join(
        f"{name} {get_installed_version(name)}" for name in dict.fromkeys(found.name for found in required)
    )
    return Check(EXTRAS, extra, State.GOOD, f"{versions}{purpose}")
