"""Python and the packages: what Pylorus asks for, by its own metadata, beside what is installed. Loads none of them."""

import importlib.metadata as metadata
import platform
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pylorus.config import CONF
from pylorus.doctor.check import Check, State

if TYPE_CHECKING:
    from packaging.requirements import Requirement

AREA = "Python and packages"
SEEN = CONF.parent / "constraints.txt"
"""Versions seen to work together: as conf/, in a clone at its top level, in a wheel inside the package."""

MALWARE = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
"""Releases that stole passwords: two of `lightning`, of April 2026; its sister's numbers are kept out too."""

SAME_FILES = (
    ("opencv-python-headless", "opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
    ("albumentations", "albumentationsx"),
    ("pillow", "pillow-simd"),
)
"""Packages that install files of the same names: ours first. Which of them is loaded is a matter of chance."""

TOLD = ("torch", "torchvision", "timm", "pytorch-lightning", "hydra-core", "albumentations", "opencv-python-headless")
"""Packages whose versions are printed where all is well."""


def check_packages() -> Iterator[Check]:
    """Python, the packages' versions, packages that overwrite each other, releases that were malware."""
    yield check_python(platform.python_version())
    wanted = [requirement for requirement in requirements("pylorus") if _applies(requirement, "")]
    amiss = [found for requirement in wanted if (found := check_requirement(requirement)) is not None]
    if not amiss:
        versions = ", ".join(f"{name} {installed(name)}" for name in TOLD)
        yield Check(AREA, "packages", State.GOOD, f"all {len(wanted)} in the versions that are asked for: {versions}")
    yield from amiss
    yield from check_newer([requirement.name for requirement in wanted], seen())
    yield from check_malware()
    yield from check_same_files()


def check_python(version: str) -> Check:
    """Whether Pylorus works with this Python."""
    from packaging.specifiers import SpecifierSet

    asked = metadata.metadata("pylorus")["Requires-Python"]
    found = f"{version} on {platform.system()} {platform.machine()}, {sys.prefix}"
    if SpecifierSet(asked).contains(version, prereleases=True):
        return Check(AREA, "Python", State.GOOD, found)
    return Check(AREA, "Python", State.WRONG, f"{found}; expected {asked}", "Install Pylorus with another Python.")


def requirements(package: str) -> list["Requirement"]:
    """What an installed package asks for, its extras' packages too.

    Raises:
        importlib.metadata.PackageNotFoundError: If it is not installed.
    """
    from packaging.requirements import Requirement

    return [Requirement(line) for line in metadata.requires(package) or []]


def _applies(requirement: "Requirement", extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def of_extra(package: str, extra: str) -> list["Requirement"]:
    """What an extra of a package adds to what the package itself asks for."""
    added = [found for found in requirements(package) if _applies(found, extra) and not _applies(found, "")]
    inner = [
        further
        for found in added
        for name in found.extras
        if installed(found.name) is not None
        for further in of_extra(found.name, name)
    ]
    return added + inner


def installed(package: str) -> str | None:
    """The version of a package; None where it is missing; empty where its installation is broken."""
    try:
        return metadata.version(package) or ""
    except metadata.PackageNotFoundError:
        return None
    except KeyError:
        return ""


def check_requirement(requirement: "Requirement") -> Check | None:
    """What is wrong with a package that is asked for, or None."""
    version = installed(requirement.name)
    asked = f"{requirement.name}{requirement.specifier}"
    mend = f"pip install '{asked}'"
    if version is None:
        return Check(AREA, requirement.name, State.WRONG, f"not installed; expected {asked}", mend)
    if not version:
        mend = f"pip install --force-reinstall '{asked}'"
        return Check(AREA, requirement.name, State.WRONG, "its installation is damaged: it has no version", mend)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(AREA, requirement.name, State.WRONG, f"{version}; expected {asked}", mend)
    return None


def seen() -> dict[str, str]:
    """The versions that were seen to work together, by package."""
    if not SEEN.is_file():
        return {}
    pairs = (line.split("==") for line in SEEN.read_text(encoding="utf-8").splitlines() if "==" in line)
    return {normal(name): version.strip() for name, version in pairs}


def normal(name: str) -> str:
    """A package's name as the index writes it.

    Example:
        >>> normal("huggingface_hub")
        'huggingface-hub'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def check_newer(names: list[str], known: dict[str, str]) -> Iterator[Check]:
    """Packages whose first number is higher than that of the version seen to work."""
    from packaging.version import InvalidVersion, Version

    for name in names:
        version, worked = installed(name), known.get(normal(name))
        if not version or worked is None:
            continue
        try:
            newer = Version(version).major > Version(worked).major
        except InvalidVersion:
            newer = True
        if newer:
            found = f"{version}; the newest seen to work is {worked}"
            mend = f"Where something fails, go back: pip install '{name}=={worked}'"
            yield Check(AREA, name, State.WARNING, found, mend)


def check_malware() -> Iterator[Check]:
    """Releases that must not stay on any machine."""
    for name, releases in MALWARE.items():
        version = installed(name)
        if version in releases:
            found = f"{version}, a release number that was malware (it stole passwords and keys)"
            mend = (
                f"Take the machine off the network, pip uninstall {name}, set it up anew, and change every password, "
                "token and key that it held."
            )
            yield Check(AREA, name, State.WRONG, found, mend)


def check_same_files() -> Iterator[Check]:
    """Packages that overwrite each other's files."""
    for ours, *others in SAME_FILES:
        there = [name for name in others if installed(name) is not None]
        if installed(ours) is None or not there:
            continue
        found = f"{', '.join(there)} beside {ours}: they overwrite each other's files, so which one runs is chance"
        mend = f"pip uninstall {' '.join(there)} && pip install --force-reinstall --no-deps {ours}=={installed(ours)}"
        yield Check(AREA, there[0], State.WARNING, found, mend)
