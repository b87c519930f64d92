"""One check of the doctor, and those of Python and the installed packages against Pylorus's metadata.

A check says what was checked, what was found and how to fix it. No package is imported.
"""

import importlib
import importlib.metadata as metadata
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from pylorus.config.schema import CONF

if TYPE_CHECKING:
    from packaging.requirements import Requirement


class State(StrEnum):
    """Outcome of a check, from best to worst; optional: an extra that is not installed, which is no fault."""

    OPTIONAL = "optional"
    GOOD = "good"
    WARNING = "warning"
    WRONG = "wrong"


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        area: Heading under which it is printed.
        name: What was checked, such as a package or a disk.
        state: Whether Pylorus can work with what was found.
        found: What was found, as text.
        remedy: How to fix or install it; for a good result, an optional improvement. Empty if there is nothing to do.
    """

    area: str
    name: str
    state: State
    found: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the check with the keys of `pylorus doctor --json`, where the remedy is called `mend`."""
        content = asdict(self)
        return {**{key: content[key] for key in ("area", "name", "state", "found")}, "mend": self.remedy}

    def to_json(self) -> str:
        """Return the check as one line of JSON, for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Check":
        """Return the check that `to_json` wrote."""
        content = json.loads(line)
        return cls(**{**content, "state": State(content["state"])})


def get_worst_state(checks: Iterable[Check]) -> State:
    """Return the worst state of the checks; good if there are none.

    Example:
        >>> get_worst_state([Check("a", "b", State.WARNING, "c"), Check("a", "b", State.GOOD, "c")])
        <State.WARNING: 'warning'>
    """
    order = list(State)
    return max((State.GOOD, *(check.state for check in checks)), key=order.index)


def run_guarded(area: str, name: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """Yield the checks of `look`; if it raises an error, yield that as a failed check.

    The doctor is called because something is broken, so one failure must not hide the remaining checks.
    """
    try:
        yield from look()
    except Exception as error:
        fix = "If another line names a broken package, fix that first. Otherwise report this with the output of --json."
        yield Check(area, name, State.WRONG, f"the check itself failed: {format_first_line(error)}", fix)


def format_first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


PACKAGES = "Python and packages"
TESTED_VERSIONS = CONF.parent / "constraints.txt"
"""Versions tested together. Like conf/, the file lies at the top level of a clone and inside the package of a wheel."""

MALWARE = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
"""Releases that stole passwords: two of `lightning` in April 2026; its sister package is barred too."""

CONFLICTING_PACKAGES = (
    ("opencv-python-headless", "opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
    ("albumentations", "albumentationsx"),
    ("pillow", "pillow-simd"),
)
"""Packages that install files under the same names, ours first. The one that was installed last wins."""

PRINTED_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "pytorch-lightning",
    "hydra-core",
    "albumentations",
    "opencv-python-headless",
)
"""Packages whose versions are printed if there is no problem."""


def check_packages() -> Iterator[Check]:
    """Check Python, package versions, packages that overwrite each other and releases that were malware."""
    yield check_python(platform.python_version())
    required = [requirement for requirement in list_requirements("pylorus") if _is_applicable(requirement, "")]
    problems = [found for requirement in required if (found := check_requirement(requirement)) is not None]
    if not problems:
        versions = ", ".join(f"{name} {get_installed_version(name)}" for name in PRINTED_PACKAGES)
        yield Check(
            PACKAGES,
            "packages",
            State.GOOD,
            f"all {len(required)} required packages in compatible versions: {versions}",
        )
    yield from problems
    yield from check_newer([requirement.name for requirement in required], read_tested_versions())
    yield from check_malware()
    yield from check_same_files()
    yield from check_bytecode("torch")


def check_bytecode(package: str) -> Iterator[Check]:
    """Check that Python need not compile a package's modules at each start, as it does in some containers."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.cached is None or Path(spec.cached).exists():
        return
    folder = next(parent for parent in Path(spec.cached).parents if parent.exists())
    if sys.dont_write_bytecode:
        reason, remedy = "PYTHONDONTWRITEBYTECODE is set", "unset PYTHONDONTWRITEBYTECODE"
    elif not os.access(folder, os.W_OK):
        reason, remedy = f"{folder} can't be written to", "export PYTHONPYCACHEPREFIX=FOLDER, with a folder of yours"
    else:
        return
    yield Check(
        PACKAGES,
        "bytecode",
        State.WARNING,
        f"{package} is compiled anew at each start, and so are other packages, which takes seconds: {reason}",
        remedy,
    )


def check_python(version: str) -> Check:
    """Check that Pylorus supports this Python version."""
    from packaging.specifiers import SpecifierSet

    supported = metadata.metadata("pylorus")["Requires-Python"]
    summary = f"{version} on {platform.system()} {platform.machine()}, {sys.prefix}"
    if SpecifierSet(supported).contains(version, prereleases=True):
        return Check(PACKAGES, "Python", State.GOOD, summary)
    return Check(
        PACKAGES,
        "Python",
        State.WRONG,
        f"{summary}; expected {supported}",
        "Install Pylorus with a supported Python version.",
    )


def list_requirements(package: str) -> list["Requirement"]:
    """Return the requirements of an installed package, including those of its extras.

    Raises:
        importlib.metadata.PackageNotFoundError: If it is not installed.
    """
    from packaging.requirements import Requirement

    return [Requirement(line) for line in metadata.requires(package) or []]


def _is_applicable(requirement: "Requirement", extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def list_extra_requirements(package: str, extra: str) -> list["Requirement"]:
    """Return the requirements that an extra adds to those of the package itself."""
    added = [
        requirement
        for requirement in list_requirements(package)
        if _is_applicable(requirement, extra) and not _is_applicable(requirement, "")
    ]
    nested = [
        inner
        for requirement in added
        for name in requirement.extras
        if get_installed_version(requirement.name) is not None
        for inner in list_extra_requirements(requirement.name, name)
    ]
    return added + nested


def get_installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed, empty if its installation is damaged."""
    try:
        return metadata.version(package) or ""
    except metadata.PackageNotFoundError:
        return None
    except KeyError:
        return ""


def check_requirement(requirement: "Requirement") -> Check | None:
    """Return what is wrong with a required package, or None."""
    version = get_installed_version(requirement.name)
    expected = f"{requirement.name}{requirement.specifier}"
    fix = f"pip install '{expected}'"
    if version is None:
        return Check(PACKAGES, requirement.name, State.WRONG, f"not installed; expected {expected}", fix)
    if not version:
        fix = f"pip install --force-reinstall '{expected}'"
        return Check(
            PACKAGES, requirement.name, State.WRONG, f"installation damaged: no version found; expected {expected}", fix
        )
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(PACKAGES, requirement.name, State.WRONG, f"{version}; expected {expected}", fix)
    return None


def read_tested_versions() -> dict[str, str]:
    """Return the versions that were tested together, by normalized package name."""
    if not TESTED_VERSIONS.is_file():
        return {}
    pairs = (line.split("==") for line in TESTED_VERSIONS.read_text(encoding="utf-8").splitlines() if "==" in line)
    return {normalize_package_name(name): version.strip() for name, version in pairs}


def normalize_package_name(name: str) -> str:
    """Return a package's name in normalized form (PEP 503).

    Example:
        >>> normalize_package_name("huggingface_hub")
        'huggingface-hub'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def check_newer(names: list[str], known: dict[str, str]) -> Iterator[Check]:
    """Yield a warning for each package whose major version is newer than the tested one.

    Args:
        names: Packages to check.
        known: Tested versions by normalized name, as from `read_tested_versions`.
    """
    from packaging.version import InvalidVersion, Version

    for name in names:
        version, tested = get_installed_version(name), known.get(normalize_package_name(name))
        if not version or tested is None:
            continue
        try:
            is_newer = Version(version).major > Version(tested).major
        except InvalidVersion:
            is_newer = True
        if is_newer:
            summary = f"{version}; the newest tested version is {tested}"
            fix = f"If something fails, go back to it: pip install '{name}=={tested}'"
            yield Check(PACKAGES, name, State.WARNING, summary, fix)


def check_malware() -> Iterator[Check]:
    """Yield an error for each installed release that was malware."""
    for name, releases in MALWARE.items():
        version = get_installed_version(name)
        if version in releases:
            summary = f"{version}, the number of a release that was malware (it stole passwords and keys)"
            fix = (
                f"Disconnect the machine from the network, pip uninstall {name}, reinstall the machine, and change "
                "every password, token and key that was on it."
            )
            yield Check(PACKAGES, name, State.WRONG, summary, fix)


def check_same_files() -> Iterator[Check]:
    """Yield a warning for installed packages that overwrite each other's files."""
    for ours, *others in CONFLICTING_PACKAGES:
        present = [name for name in others if get_installed_version(name) is not None]
        if get_installed_version(ours) is None or not present:
            continue
        summary = (
            f"{', '.join(present)} beside {ours}: they overwrite each other's files, so either may be the one that runs"
        )
        fix = (
            f"pip uninstall {' '.join(present)} && "
            f"pip install --force-reinstall --no-deps {ours}=={get_installed_version(ours)}"
        )
        yield Check(PACKAGES, present[0], State.WARNING, summary, fix)


EXTRAS = "Optional extras"
DEVELOPER_EXTRAS = ("dev", "docs")
"""Extras for developers of Pylorus, which are not checked."""

EXTRA_PURPOSES = {
    "dicom": "DICOM images",
    "docx": "drafts of a manuscript as Word files",
    "explain": "heat maps",
    "shards": "shards at http(s) URLs",
    "parallel": "parallel jobs of a sweep",
    "slurm": "sweeps on SLURM",
    "optuna": "hyperparameter searches",
    "mlflow": "curves in MLflow",
    "ray": "sweeps with Ray",
    "serve": "web page of a trained model",
    "sign": "signatures of bundles",
    "onnx": "ONNX export and prediction with an export",
}
"""What each extra is for."""


def check_extras() -> Iterator[Check]:
    """Yield one check for each extra of the package."""
    names = metadata.metadata("pylorus").get_all("Provides-Extra") or []
    for extra in names:
        if extra not in DEVELOPER_EXTRAS:
            yield check_extra(extra)


def check_extra(extra: str) -> Check:
    """Check that an extra is completely installed, in compatible versions."""
    required = list_extra_requirements("pylorus", extra)
    purpose = f" ({EXTRA_PURPOSES[extra]})" if extra in EXTRA_PURPOSES else ""
    install = f"pip install 'pylorus[{extra}]'"
    present = [found for found in required if get_installed_version(found.name) is not None]
    problems = [found for requirement in present if (found := check_requirement(requirement)) is not None]
    if problems:
        details = "; ".join(f"{check.name} {check.found}" for check in problems)
        return Check(EXTRAS, extra, State.WARNING, details, install)
    if len(present) < len(required):
        return Check(EXTRAS, extra, State.OPTIONAL, f"not installed{purpose}", install)
    versions = ", ".join(
        f"{name} {get_installed_version(name)}" for name in dict.fromkeys(found.name for found in required)
    )
    return Check(EXTRAS, extra, State.GOOD, f"{versions}{purpose}")


LOADING = "Package loading"

COMPILED_MODULES = {
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
    "matplotlib": "matplotlib",
    "safetensors": "safetensors",
    "PIL": "pillow",
}
"""Modules with compiled code, which may fail on a machine even in compatible versions, and their packages."""

TORCH_DEPENDENTS = ("torchvision", "timm", "albumentations", "pytorch_lightning", "torchmetrics")
"""Modules that can't load without torch."""


def check_loading(doing: Callable[[str], None]) -> Iterator[Check]:
    """Import each module; yield a check for each failure, or one for all if there is none.

    Args:
        doing: Called with each step before it begins: the process may not survive it.
    """
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # otherwise it asks the package index for a newer version
    failed: list[str] = []
    for module, package in COMPILED_MODULES.items():
        if "torch" in failed and module in TORCH_DEPENDENTS:
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
        yield Check(
            LOADING, "packages", State.GOOD, f"all {len(COMPILED_MODULES)} packages with compiled code can be imported"
        )
    elif "torch" in failed:
        summary = "cores, GPU, weights and bundle were not checked: this needs torch"
        yield Check(
            LOADING, "skipped checks", State.WARNING, summary, "Fix torch first, then run pylorus doctor again."
        )


def format_reinstall_command(package: str) -> str:
    """Return the command that reinstalls a package in its present version."""
    version = get_installed_version(package)
    return f"pip install --force-reinstall --no-deps '{package}{f'=={version}' if version else ''}'"


NETWORK = "Network"

NETWORK_USES = "model.weights=hub for weights that are not on this machine yet, shards at a URL, logger.offline=false"
"""What uses the network, each only if the user asks for it."""


def check_network(environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """State when the network is used; nothing is tested, so that the doctor itself makes no connection."""
    summary = (
        "not needed: training, report and all other commands work offline; this check made no connection either. "
        f"Used only if you ask for it: {NETWORK_USES}. To install on a machine without a network, see docs/offline.md"
    )
    yield Check(NETWORK, "network", State.GOOD, summary)
    if environment.get("WANDB_MODE") == "online":
        fix = "unset WANDB_MODE"
        yield Check(
            NETWORK,
            "WANDB_MODE",
            State.WARNING,
            "online: Weights & Biases may send metrics of your runs to its servers",
            fix,
        )
