"""The optional parts: which of them are installed. None is needed, so none that is missing is a fault."""

import importlib.metadata as metadata
from collections.abc import Iterator

from pylorus.doctor.check import Check, State
from pylorus.doctor.packages import check_requirement, installed, of_extra

AREA = "Optional parts"
LEFT_OUT = ("dev", "docs")
"""Extras for those who work on Pylorus itself."""

GIVES = {
    "dicom": "DICOM images",
    "explain": "heat maps",
    "shards": "shards behind http(s)",
    "parallel": "a sweep's jobs at once",
    "slurm": "sweeps on SLURM",
    "optuna": "searches",
    "ray": "sweeps with Ray",
    "onnx": "export, and prediction with it",
}
"""What an extra is for."""


def check_extras() -> Iterator[Check]:
    """One line for each extra of the package."""
    names = metadata.metadata("pylorus").get_all("Provides-Extra") or []
    for extra in names:
        if extra not in LEFT_OUT:
            yield check_extra(extra)


def check_extra(extra: str) -> Check:
    """Whether an extra is there as a whole, and in versions that fit."""
    wanted = of_extra("pylorus", extra)
    purpose = f" ({GIVES[extra]})" if extra in GIVES else ""
    install = f"pip install 'pylorus[{extra}]'"
    there = [found for found in wanted if installed(found.name) is not None]
    amiss = [found for requirement in there if (found := check_requirement(requirement)) is not None]
    if amiss:
        told = "; ".join(f"{check.name} {check.found}" for check in amiss)
        return Check(AREA, extra, State.WARNING, told, install)
    if len(there) < len(wanted):
        return Check(AREA, extra, State.GOOD, f"not installed{purpose}", install)
    versions = ", ".join(f"{name} {installed(name)}" for name in dict.fromkeys(found.name for found in wanted))
    return Check(AREA, extra, State.GOOD, f"{versions}{purpose}")
