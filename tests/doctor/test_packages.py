"""Packages by their metadata: missing, too old, damaged, overwritten, malware. The installations are simulated."""

import py_compile
import sys
from importlib.metadata import PackageNotFoundError

import pytest
from packaging.requirements import Requirement

from pylorus.doctor import packages
from pylorus.doctor.packages import State


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes `install("torch", "1.0")` look like an installed package, found before the real one."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, version: str | None, *further: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version or '1'}.dist-info"
        folder.mkdir()
        if version is not None:
            lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *further, ""]
            (folder / "METADATA").write_text("\n".join(lines))

    return make


def test_this_environment_passes_the_package_checks():
    found = list(packages.check_packages())
    assert not [check for check in found if check.state is State.WRONG]
    assert any("torch 2" in check.found for check in found)


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it():
    check = packages.check_requirement(Requirement("no-such-package>=2"))
    assert check is not None
    assert check.state is State.WRONG
    assert check.found == "not installed; expected no-such-package>=2"
    assert check.remedy == "pip install 'no-such-package>=2'"


def test_a_package_that_is_too_old_is_named_with_both_versions(install):
    install("torch", "1.13.1")
    check = packages.check_requirement(Requirement("torch>=2.6"))
    assert check is not None
    assert check.state is State.WRONG
    assert check.found == "1.13.1; expected torch>=2.6"


@pytest.mark.parametrize("version", ["2.14.1+cu128", "2.15.0.dev20261101"])
def test_local_builds_and_prereleases_of_a_compatible_version_pass(install, version):
    install("torch", version)
    assert packages.check_requirement(Requirement("torch>=2.6")) is None


def test_an_installation_without_a_version_is_damaged(install):
    install("no-version", None)
    check = packages.check_requirement(Requirement("no-version>=2"))
    assert check is not None
    assert "damaged" in check.found
    assert "--force-reinstall" in check.remedy


def test_packages_that_are_compiled_at_each_start_are_a_warning(tmp_path, monkeypatch):
    (tmp_path / "some_package.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert list(packages.check_bytecode("some_package")) == []
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (check,) = packages.check_bytecode("some_package")
    assert (check.state, check.remedy) == (State.WARNING, "unset PYTHONDONTWRITEBYTECODE")
    assert "PYTHONDONTWRITEBYTECODE is set" in check.found
    py_compile.compile(str(tmp_path / "some_package.py"))
    assert list(packages.check_bytecode("some_package")) == []


@pytest.mark.parametrize(("name", "version"), [("lightning", "2.6.2"), ("lightning", "2.6.3"), ("pytorch-lightning", "2.6.3")])  # fmt: skip
def test_malware_releases_are_errors(install, name, version):
    install(name, version)
    (check,) = packages.check_malware()
    assert check.state is State.WRONG
    assert check.name == name
    assert version in check.found
    assert "change every password" in check.remedy


def test_a_second_opencv_is_reported_with_the_command_that_removes_it(install):
    assert list(packages.check_same_files()) == []
    install("opencv-python", "4.10.0")
    (check,) = packages.check_same_files()
    assert check.state is State.WARNING
    assert "opencv-python beside opencv-python-headless" in check.found
    assert check.remedy.startswith(
        "pip uninstall opencv-python && pip install --force-reinstall --no-deps opencv-python-"
    )


def test_a_major_version_above_the_tested_one_is_a_warning(install):
    install("numpy", "9.0")
    (check,) = packages.check_newer(["numpy", "pandas"], packages.read_tested_versions())
    assert check.state is State.WARNING
    assert check.found.startswith("9.0; the newest tested version is 2.")


def test_an_old_python_is_an_error():
    assert packages.check_python("3.10.4").state is State.WRONG
    assert packages.check_python("3.13.0").state is State.GOOD


def test_requirements_of_an_uninstalled_distribution_raise_an_error():
    with pytest.raises(PackageNotFoundError):
        packages.list_requirements("no-such-package")


def test_an_extra_is_reported_as_installed_missing_or_too_old(install):
    install("pylorus", "0.1.0", "Provides-Extra: dicom", "Provides-Extra: gone", 'Requires-Dist: pydicom<4,>=3.0; extra == "dicom"', 'Requires-Dist: no-such-package; extra == "gone"')  # fmt: skip
    gone = packages.check_extra("gone")
    assert (gone.state, gone.found, gone.remedy) == (State.OPTIONAL, "not installed", "pip install 'pylorus[gone]'")
    install("pydicom", "2.4.4")
    old = packages.check_extra("dicom")
    assert old.state is State.WARNING
    assert old.found == "pydicom 2.4.4; expected pydicom<4,>=3.0"
