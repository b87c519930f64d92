"""The benchmark splits a user's images by patient, as Pylorus requires it."""

import pytest

from benchmarks.images import arrange

PATIENT = r"patient_\d+"


def read_patients(folder):
    """The patients in each split."""
    return {part: {path.name[:11] for path in folder.glob(f"{part}/*/*.png")} for part in ("train", "val", "test")}


@pytest.fixture
def class_images(tmp_path):
    """Three images of each of 20 patients, whose last two have images of both classes."""
    for number in range(60):
        patient = number // 3
        label = "b" if patient % 2 or (patient >= 18 and number % 3 == 2) else "a"
        path = tmp_path / "images" / label / f"patient_{patient:03d}_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "images"


def test_no_patient_is_in_two_splits(class_images, tmp_path):
    patients = read_patients(arrange(class_images, tmp_path / "parted", group=PATIENT))
    assert all(patients.values())
    assert sum(map(len, patients.values())) == len(set.union(*patients.values())) == 20


def test_validation_images_of_patients_are_not_training_images(class_images, tmp_path):
    source = tmp_path / "source"
    (source / "test" / "a").mkdir(parents=True)
    (source / "test" / "b").mkdir()
    (source / "test" / "a" / "patient_100_0.png").touch()
    class_images.rename(source / "train")
    patients = read_patients(arrange(source, tmp_path / "parted", group=PATIENT))
    assert patients["val"]
    assert not patients["val"] & patients["train"]
    assert patients["test"] == {"patient_100"}


def test_too_few_patients_are_refused(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "patient_000_0.png").touch()
    with pytest.raises(SystemExit, match="found 1 patients, so few that none is in val and test"):
        arrange(tmp_path / "images", tmp_path / "parted", group=PATIENT)
    assert not (tmp_path / "parted").exists()
