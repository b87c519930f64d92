"""DICOM frames by kind, patients as groups through a salted hash, and what happens without pydicom."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pylorus.config.schema import DataConfig
from pylorus.core.errors import PylorusError
from pylorus.data.catalog import ReadOptions, read_folders
from pylorus.data.decode import UnreadableImageError, decode_image
from pylorus.data.dicom import ensure_salt, read_patient_pseudonym
from pylorus.data.split import split_catalog, write_split
from tests.data.sample_files import dicom, encoded, picture, samples

pytest.importorskip("pydicom")


GREY = np.array([[0, 1, 100], [200, 254, 255]], np.uint8)
EXPLICIT = "1.2.840.10008.1.2.1"


@pytest.mark.parametrize("name", ["dicom rgb", "dicom rgb implicit", "dicom jpeg 2000", "dicom rle"])
def test_lossless_color_gives_exact_pixels(name):
    assert np.array_equal(decode_image(samples()[name]), picture())


@pytest.mark.parametrize(("name", "most"), [("dicom ybr", 3), ("dicom ybr 422", 24), ("dicom jpeg", 40)])
def test_ybr_gives_nearly_exact_colors(name, most):
    assert np.abs(decode_image(samples()[name]).astype(int) - picture()).max() <= most


def test_the_palette_is_applied():
    expected = np.asarray(Image.fromarray(picture()).quantize(16).convert("RGB"))
    assert np.array_equal(decode_image(samples()["dicom palette"]), expected)


@pytest.mark.parametrize("planar", [0, 1])
def test_colors_may_be_stored_in_planes(planar):
    stored = picture().transpose(2, 0, 1).tobytes() if planar else picture().tobytes()
    assert np.array_equal(
        decode_image(dicom(picture(), "RGB", PlanarConfiguration=planar, PixelData=stored)), picture()
    )


def test_grey_of_8_bits_is_as_stored_and_monochrome1_is_turned_over():
    assert np.array_equal(decode_image(dicom(GREY, "MONOCHROME2"))[:, :, 1], GREY)
    assert np.array_equal(decode_image(dicom(GREY, "MONOCHROME1"))[:, :, 1], 255 - GREY)


def test_without_a_window_the_range_is_that_of_the_stored_bits():
    stored = np.array([[0, 16, 4095]], np.uint16)
    assert decode_image(dicom(stored, "MONOCHROME2", BitsStored=12, HighBit=11))[0, :, 0].tolist() == [0, 1, 255]
    assert decode_image(dicom(stored * 16, "MONOCHROME2"))[0, :, 0].tolist() == [0, 1, 255]
    signed = np.array([[-32768, 0, 32767]], np.int16)
    assert decode_image(dicom(signed, "MONOCHROME2"))[0, :, 0].tolist() == [0, 128, 255]


def test_rescale_and_window_are_applied():
    stored = np.array([[0, 100, 150, 200, 4000]], np.uint16)
    found = decode_image(
        dicom(stored, "MONOCHROME2", RescaleSlope=2, RescaleIntercept=-100, WindowCenter=[200, 5], WindowWidth=[200, 5],
              VOILUTFunction="LINEAR_EXACT")
    )  # fmt: skip
    assert found[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_the_window_follows_the_standard():
    """PS3.3, C.11.2.1.2.1: centre 128, width 256 leaves 8 bits as they are."""
    assert np.array_equal(decode_image(dicom(GREY, "MONOCHROME2", WindowCenter=128, WindowWidth=256))[:, :, 0], GREY)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda: dicom(GREY, "MONOCHROME2", NumberOfFrames=2), "holds 2 frames, expected a single image"),
        (lambda: dicom(GREY, "MONOCHROME2", PixelData=bytes(8)), "damaged: 8 bytes of pixel data, expected 6"),
        (lambda: dicom(GREY, "MONOCHROME2", PixelData=bytes(4)), "damaged: 4 bytes of pixel data, expected 6"),
        (lambda: dicom(GREY, "MONOCHROME2") + bytes(5), "damaged: 5 bytes after the pixel data"),
        (lambda: dicom(encoded(Image.new("RGB", (64, 48)), "JPEG"), "YBR_FULL_422",
                       syntax="1.2.840.10008.1.2.4.50").replace(b"\xff\xd9", b"\xd9"), "damaged: "),
        (lambda: dicom(GREY, "MONOCHROME2", PixelData=None), "without pixel data"),
        (lambda: dicom(GREY, "MONOCHROME2", BitsAllocated=32), "with 32 bits, expected 8 or"),
        (lambda: dicom(GREY, "MONOCHROME2", BitsStored=9), "9 bits stored in 8, expected 8 to 8"),
        (lambda: dicom(GREY, "HSV"), "of kind 'HSV', expected RGB"),
        (lambda: dicom(GREY, "MONOCHROME2", VOILUTFunction="SIGMOID", WindowCenter=1, WindowWidth=2), "SIGMOID"),
        (lambda: dicom(GREY, "MONOCHROME2", Rows=0), "damaged: 3 × 0 pixels"),
        (lambda: dicom(b"\0" * 90, "RGB", syntax="1.2.840.10008.1.2.4.80"), "pydicom has no plugin that decodes JPEG-LS"),
        (lambda: dicom(GREY, "MONOCHROME2").replace(EXPLICIT.encode() + b"\0", EXPLICIT.encode() + b".99", 1),
         "a deflated DICOM file"),
        (lambda: dicom(encoded(Image.new("RGB", (9, 9)), "JPEG"), "YBR_FULL_422", syntax="1.2.840.10008.1.2.4.50"),
         r"a frame of 9 × 9 pixels, expected 64 × 48"),
    ],
)  # fmt: skip
def test_a_refused_dicom_file_has_a_reason(content, why):
    with pytest.raises(UnreadableImageError, match=why):
        decode_image(content())


def test_private_elements_are_ignored():
    from pydicom import dcmread
    from pydicom.filebase import DicomBytesIO

    data = dcmread(DicomBytesIO(samples()["dicom rgb"]))
    data.private_block(0x0029, "SOMEONE", create=True).add_new(1, "UN", b"\xff" * 64)
    stream = DicomBytesIO()
    data.save_as(stream)
    assert np.array_equal(decode_image(stream.getvalue()), picture())


def test_a_patient_has_one_pseudonym(tmp_path):
    for name, changes in [("a", {}), ("b", {"Rows": 1}), ("c", {"PatientID": "4712"}), ("d", {"PatientID": ""})]:
        (tmp_path / name).write_bytes(dicom(GREY, "MONOCHROME2", **changes))
    first = read_patient_pseudonym(tmp_path / "a")
    assert first is not None
    assert len(first) == 16
    assert "4711" not in first
    assert read_patient_pseudonym(tmp_path / "b") == first
    assert read_patient_pseudonym(tmp_path / "c") not in (first, None)
    assert read_patient_pseudonym(tmp_path / "d") is None
    assert read_patient_pseudonym(tmp_path / "a", salt="ours") not in (first, None)


def test_another_file_names_no_patient(tmp_path):
    (tmp_path / "a.dcm").write_bytes(samples()["png"])
    assert read_patient_pseudonym(tmp_path / "a.dcm") is None


def test_without_pydicom_the_error_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pydicom" else find(name))
    with pytest.raises(UnreadableImageError, match=r"pip install 'pylorus\[dicom\]'"):
        decode_image(samples()["dicom rgb"])


pytest.importorskip("pydicom")


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


def test_images_of_one_patient_form_one_pseudonymous_group(frames):
    catalog = read_folders(frames, reading=ReadOptions(salt="secret"))
    assert catalog.grouped
    assert catalog.table["group"].nunique() == 12
    assert catalog.table["group"].str.fullmatch("[0-9a-f]{16}").all()
    assert (split_catalog(catalog, DataConfig()).table.groupby("group")["split"].nunique() == 1).all()


def test_another_salt_gives_other_groups_and_the_same_split(frames):
    first, other = (read_folders(frames, reading=ReadOptions(salt=salt)) for salt in ("one", "two"))
    assert set(first.table["group"]).isdisjoint(other.table["group"])
    assert split_catalog(first, DataConfig()).table["split"].equals(split_catalog(other, DataConfig()).table["split"])


def test_the_split_contains_no_patient_id(frames, tmp_path):
    catalog = read_folders(frames, reading=ReadOptions(salt="secret"))
    write_split(split_catalog(catalog, DataConfig()).table, catalog.classes, tmp_path / "split.csv")
    assert "MUSTERMANN" not in (tmp_path / "split.csv").read_text()


def test_a_file_that_names_no_patient_is_named(frames):
    path = frames / "a" / "00.dcm"
    path.write_bytes(path.read_bytes().replace(b"MUSTERMANN-0", b" " * 12))
    with pytest.raises(PylorusError, match=r"data.patients=dicom: 1 of 24 files (?s:.*)a/00.dcm"):
        read_folders(frames, reading=ReadOptions(salt="secret"))


@pytest.mark.slow
def test_the_salt_is_created_once_and_readable_by_its_owner_only(tmp_path):
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


def test_a_truncated_salt_is_refused(tmp_path):
    (tmp_path / "salt").write_text("short")
    with pytest.raises(PylorusError, match="found 5 characters, expected a salt of 64"):
        ensure_salt(tmp_path)


def test_two_sources_of_patients_are_refused(compose_config):
    with pytest.raises(PylorusError, match="both define the patients"):
        compose_config("data=folders", "data.root=x", "data.patients=dicom", "data.group='p'")
