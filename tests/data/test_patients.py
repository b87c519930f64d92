"""DICOM's patients as groups: hashed with a salt that stays on this machine, and a split that does not hang on it."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("pydicom")

from pylorus.config.schema import DataConfig
from pylorus.core.errors import PylorusError
from pylorus.data.catalog import ReadOptions, read_folders
from pylorus.data.dicom import ensure_salt
from pylorus.data.split import split_catalog, write_split
from tests.data.sample_files import dicom


@pytest.fixture
def frames(tmp_path):
    """Two classes of six patients with two frames each."""
    rng = np.random.default_rng(0)
    root = tmp_path / "set"
    for number in range(24):
        folder = root / "ab"[number // 12]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (48, 64), dtype=np.uint8)
        content = dicom(pixels, "MONOCHROME2", PatientID=f"MUSTERMANN-{number // 2}", Rows=48, Columns=64)
        (folder / f"{number:02d}.dcm").write_bytes(content)
    return root


def test_images_of_one_patient_are_one_group_that_does_not_say_who(frames):
    catalog = read_folders(frames, reading=ReadOptions(salt="secret"))
    assert catalog.grouped
    assert catalog.table["group"].nunique() == 12
    assert catalog.table["group"].str.fullmatch("[0-9a-f]{16}").all()
    assert (split_catalog(catalog, DataConfig()).table.groupby("group")["split"].nunique() == 1).all()


def test_another_salt_gives_other_groups_and_the_same_split(frames):
    first, other = (read_folders(frames, reading=ReadOptions(salt=salt)) for salt in ("one", "two"))
    assert set(first.table["group"]).isdisjoint(other.table["group"])
    assert split_catalog(first, DataConfig()).table["split"].equals(split_catalog(other, DataConfig()).table["split"])


def test_no_patients_number_stands_in_the_split(frames, tmp_path):
    catalog = read_folders(frames, reading=ReadOptions(salt="secret"))
    write_split(split_catalog(catalog, DataConfig()).table, catalog.classes, tmp_path / "split.csv")
    assert "MUSTERMANN" not in (tmp_path / "split.csv").read_text()


def test_a_file_that_names_no_patient_is_named(frames):
    path = frames / "a" / "00.dcm"
    path.write_bytes(path.read_bytes().replace(b"MUSTERMANN-0", b" " * 12))
    with pytest.raises(PylorusError, match=r"data.patients=dicom: 1 of 24 files (?s:.*)a/00.dcm"):
        read_folders(frames, reading=ReadOptions(salt="secret"))


def test_the_salt_is_made_once_whoever_comes_first_and_is_for_its_owner_only(tmp_path):
    program = (
        "import sys, pathlib\nfrom pylorus.data.dicom import ensure_salt\nprint(ensure_salt(pathlib.Path(sys.argv[1])))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "cache")], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = {run.communicate(timeout=120)[0].strip() for run in runs}
    assert said == {ensure_salt(tmp_path / "cache")}
    assert (tmp_path / "cache" / "salt").stat().st_mode & 0o077 == 0


def test_a_salt_that_someone_cut_is_refused(tmp_path):
    (tmp_path / "salt").write_text("short")
    with pytest.raises(PylorusError, match="found 5 characters, expected a salt of 64"):
        ensure_salt(tmp_path)


def test_two_ways_of_telling_patients_are_refused(composed):
    with pytest.raises(PylorusError, match="both define the patients"):
        composed("data=folders", "data.root=x", "data.patients=dicom", "data.group='p'")
