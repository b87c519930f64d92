"""Properties of the synthetic images on which demo and tests rely."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pylorus.core.errors import PylorusError
from pylorus.data import synthetic
from pylorus.data.synthetic import CLASSES, SHORT_NAMES, Frame, generate_frame, generate_image_set

PATIENT = re.compile(r"patient_\d+")


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.jpg"))}


def test_every_class_has_a_short_name() -> None:
    assert CLASSES == ("gastric_cancer", "gastric_ulcer", "chronic_gastritis")
    assert SHORT_NAMES == ("GC", "GU", "CG")


@pytest.mark.parametrize("label", CLASSES)
def test_a_frame_is_a_function_of_its_arguments(label: str) -> None:
    np.random.seed(0)
    one = generate_frame(label, seed=3, view=1, size=64)
    two = generate_frame(label, seed=3, view=1, size=64)
    assert one.image.dtype == np.uint8
    assert one.image.shape == (64, 64, 3)
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_array_equal(one.field, two.field)
    assert np.random.random() == np.random.RandomState(0).random()


def test_label_seed_and_view_each_change_the_frame() -> None:
    frames = [generate_frame(label, seed=3, size=64).image for label in CLASSES]
    frames += [
        generate_frame(CLASSES[0], seed=4, size=64).image,
        generate_frame(CLASSES[0], seed=3, view=1, size=64).image,
    ]
    assert len({frame.tobytes() for frame in frames}) == len(frames)


def test_views_of_one_patient_share_the_field_of_view_and_patients_do_not() -> None:
    first, second = (generate_frame("gastric_ulcer", seed=5, view=view, size=96) for view in (0, 1))
    np.testing.assert_array_equal(first.field, second.field)
    fields = {generate_frame("gastric_ulcer", seed=seed, size=96).field.tobytes() for seed in range(8)}
    assert len(fields) == 8


@pytest.mark.parametrize("size", [32, 97, 256])
@pytest.mark.parametrize("label", CLASSES)
def test_a_frame_is_black_outside_its_field_of_view_and_nowhere_inside(label: str, size: int) -> None:
    for seed in range(4):
        frame = generate_frame(label, seed=seed, size=size)
        assert not frame.image[~frame.field].any()
        assert frame.image[frame.field].min() > 8
        assert 0.45 < frame.field.mean() < 0.95


def test_fields_of_view_are_discs_and_bevelled_squares_off_the_centre() -> None:
    fill, offset = [], []
    for seed in range(24):
        rows, columns = np.nonzero(generate_frame("gastric_cancer", seed=seed, size=128).field)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert abs(height - width) <= 1
        fill.append(len(rows) / (height * width))
        offset.append(np.hypot(rows.mean() - 63.5, columns.mean() - 63.5))
    assert any(abs(share - np.pi / 4) < 0.01 for share in fill)
    assert any(share > 0.81 for share in fill)
    assert max(offset) > 2


@pytest.mark.parametrize("label", CLASSES)
def test_size_changes_the_resolution_and_not_the_picture(label: str) -> None:
    large, small = (generate_frame(label, seed=2, size=size).image.astype(np.float32) for size in (256, 64))
    shrunk = cv2.resize(large, (64, 64), interpolation=cv2.INTER_AREA)
    other = generate_frame(label, seed=2, view=1, size=64).image
    assert np.abs(shrunk - small).mean() < 8
    assert np.abs(shrunk - small).mean() < 0.5 * np.abs(shrunk - other).mean()


def test_an_overlay_is_light_text_in_the_left_corners_and_changes_nothing_else() -> None:
    plain = generate_frame("chronic_gastritis", seed=1, size=256)
    written = generate_frame("chronic_gastritis", seed=1, size=256, overlay=True)
    np.testing.assert_array_equal(plain.field, written.field)
    changed = (plain.image != written.image).any(axis=-1)
    assert 0.003 < changed.mean() < 0.1
    assert not changed[:, 160:].any()
    assert not changed[64:220].any()
    assert written.image[~written.field].max() > 180


def test_an_image_set_holds_the_images_and_patients_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "new" / "set"
    assert generate_image_set(root, images=5, size=48, images_per_patient=2) == 15
    assert sorted(folder.name for folder in root.iterdir()) == sorted(CLASSES)
    classes_of: dict[str, set[str]] = {}
    for label in CLASSES:
        names = sorted(path.name for path in (root / label).iterdir())
        assert len(names) == 5
        assert all(re.fullmatch(r"patient_\d{4}_[12]\.jpg", name) for name in names)
        patients = [PATIENT.findall(name)[0] for name in names]
        assert sorted(patients.count(patient) for patient in set(patients)) == [1, 2, 2]
        for patient in patients:
            classes_of.setdefault(patient, set()).add(label)
    assert len(classes_of) == 9
    assert all(len(labels) == 1 for labels in classes_of.values())
    with Image.open(root / CLASSES[0] / "patient_0001_1.jpg") as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (48, 48), "RGB")
    assert [path.name for path in root.parent.iterdir()] == ["set"]


def test_an_image_set_is_the_same_for_the_same_seed_and_another_for_another(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        generate_image_set(tmp_path / name, images=2, size=32, seed=seed)
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one.keys() == other.keys()
    assert not set(one.values()) & set(other.values())


def test_an_existing_empty_folder_is_filled(tmp_path: Path) -> None:
    assert generate_image_set(tmp_path, images=1, size=32, overlay=True) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(CLASSES)


def test_a_nonempty_folder_is_refused_and_unchanged(tmp_path: Path) -> None:
    kept = tmp_path / "notes.txt"
    kept.write_text("mine")
    for taken in (tmp_path, kept):
        with pytest.raises(PylorusError, match=rf"{re.escape(str(taken))}: already exists, expected a new or empty"):
            generate_image_set(taken, images=1, size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existing", [True, False])
def test_an_interrupted_image_set_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], existing: bool
) -> None:
    drawn = 0

    def fail_at_the_fifth(label: str, *, seed: int, view: int, size: int, overlay: bool) -> Frame:
        nonlocal drawn
        drawn += 1
        if drawn == 5:
            raise error
        return generate_frame(label, seed=seed, view=view, size=size, overlay=overlay)

    monkeypatch.setattr(synthetic, "generate_frame", fail_at_the_fifth)
    root = tmp_path / "set"
    if existing:
        root.mkdir()
    with pytest.raises(error):
        generate_image_set(root, images=4, size=32)
    assert list(tmp_path.rglob("*")) == ([root] if existing else [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 31}, "size is 31; expected 32 or more"),
        ({"images": 0}, "images is 0; expected 1 or more"),
        ({"images_per_patient": 0}, "images_per_patient is 0; expected 1 or more"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
    ],
)
def test_an_image_set_out_of_range_is_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate_image_set(tmp_path / "set", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_frame_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="label is 'polyp'; expected one of gastric_cancer, gastric_ulcer, chron"):
        generate_frame("polyp", seed=0)
    with pytest.raises(ValueError, match="size is 16; expected 32 or more"):
        generate_frame("gastric_ulcer", seed=0, size=16)
    with pytest.raises(ValueError, match="view is -1; expected 0 or more"):
        generate_frame("gastric_ulcer", seed=0, view=-1)


def test_the_mean_color_does_not_reveal_the_class() -> None:
    def mean_colours(first: int) -> NDArray[np.float64]:
        frames = [[generate_frame(label, seed=first + patient, size=48) for patient in range(60)] for label in CLASSES]
        return np.array([[frame.image[frame.field].mean(axis=0) for frame in row] for row in frames])

    known, unseen = mean_colours(0), mean_colours(1000)
    within = known - known.mean(axis=1, keepdims=True)
    whiten = np.linalg.inv(np.linalg.cholesky(np.cov(within.reshape(-1, 3).T)))
    for scale in (np.eye(3), whiten):  # plain distance, then as linear discriminant analysis measures it
        centres, points = known.mean(axis=1) @ scale.T, unseen @ scale.T
        nearest = np.linalg.norm(points[:, :, None] - centres, axis=-1).argmin(axis=-1)
        assert (nearest == np.arange(3)[:, None]).mean() < 0.6
