"""The field of view is found in synthetic frames of known geometry, and frames without one are unchanged."""

import os
from pathlib import Path

import numpy as np
import pytest

from pylorus.data.decode import read_image
from pylorus.data.field_of_view import crop_to_field, find_field
from pylorus.data.field_shape import FieldOfView
from pylorus.data.synthetic import CLASSES, generate_frame
from tests.data.device_frames import LAYOUTS, draw_frame
from tests.data.synthetic_frames import SHAPES, Mask, drawn_frame

IMAGES = Path(__file__).parents[3] / "shared" / "data" / "bloodcells"
LEAST_OVERLAP = 0.97
FRAMES, LONGEST = (1000, 1920) if os.environ.get("PYLORUS_ALL_FRAMES") else (40, 640)


def found_pixels(field: FieldOfView, shape: tuple[int, ...]) -> Mask:
    """A field as a mask of the frame."""
    pixels = np.zeros(shape[:2], dtype=bool)
    left, top, right, bottom = field.box
    pixels[top:bottom, left:right] = True if field.mask is None else field.mask
    return pixels


def overlap(found: Mask, true: Mask) -> float:
    """Intersection over union."""
    return float((found & true).sum() / (found | true).sum())


@pytest.mark.parametrize("seed", range(FRAMES))
def test_a_synthetic_field_is_found_to_within_three_percent(seed):
    frame = drawn_frame(seed, longest=LONGEST)
    field = find_field(frame.image)
    assert overlap(found_pixels(field, frame.image.shape), frame.field) >= LEAST_OVERLAP, (frame.shape, field.reason)


def test_fields_of_all_device_layouts_are_found_and_keep_their_mucosa():
    """The targets hold over 2,000 frames of full size; see `benchmarks/field_of_view.py`."""
    measured = {}
    for layout in LAYOUTS:
        for seed in range(3):
            frame = draw_frame(layout, seed, device=seed + 40, longest=800)
            found = found_pixels(find_field(frame.image), frame.image.shape)
            lost = 1 - (found & frame.field).sum() / frame.field.sum()
            measured[layout, seed] = overlap(found, frame.field), float(lost)
    missed = {key: values for key, values in measured.items() if values[0] < LEAST_OVERLAP}
    cut = {key: values for key, values in measured.items() if values[1] > 0.01}
    assert len(missed) <= 0.02 * len(measured), missed
    assert len(cut) <= 0.01 * len(measured), cut


@pytest.mark.parametrize("colour", [(0, 0, 0), (6, 10, 40), (60, 60, 62), (110, 70, 40), (250, 250, 250)])
def test_the_ground_may_have_any_flat_colour(colour):
    frame = draw_frame("octagon", 2, device=3, longest=640)
    frame.image[~frame.field] = colour
    assert overlap(found_pixels(find_field(frame.image), frame.image.shape), frame.field) >= LEAST_OVERLAP


def test_a_status_bar_below_the_field_is_cropped_off():
    frame = draw_frame("round above a status bar", 1, device=2)
    bottom = find_field(frame.image).box[3]
    true = int(np.flatnonzero(frame.field.any(axis=1))[-1]) + 1
    assert abs(bottom - true) <= 4 < frame.image.shape[0] - bottom


@pytest.mark.parametrize("line", [1, 2])
def test_a_hairline_around_the_frame_changes_nothing(line):
    image = draw_frame("octagon", 5, device=9, longest=960).image
    framed = image.copy()
    framed[:line], framed[-line:], framed[:, :line], framed[:, -line:] = (255,) * 4
    plain, found = find_field(image), find_field(framed)
    assert found.shape == plain.shape == "octagon"
    assert np.abs(np.subtract(found.box, plain.box)).max() <= 4


def test_a_soft_octagon_does_not_become_a_disc_with_ground_inside():
    frame = draw_frame("octagon, soft edge", 3, device=7)
    found = found_pixels(find_field(frame.image), frame.image.shape)
    assert (found & ~frame.field).sum() <= 0.02 * found.sum()


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("seed", range(6))
def test_the_field_of_a_demo_image_is_found_with_text_over_it(label, seed):
    frame = generate_frame(label, seed=seed, size=256, overlay=True)
    assert overlap(found_pixels(find_field(frame.image), frame.image.shape), frame.field) >= LEAST_OVERLAP


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "full"])
def test_no_bright_area_is_left_outside_the_field(shape):
    frame = drawn_frame(3, longest=640, shape=shape)
    frame.image[~frame.field] = 255 * (np.indices(frame.field.shape)[1] // 3 % 9 == 0)[~frame.field, None]
    left, top, right, bottom = find_field(frame.image).box
    cropped = crop_to_field(frame.image)
    true = frame.field[top:bottom, left:right]
    assert cropped.shape == (bottom - top, right - left, 3)
    assert (cropped[~true] > 0).any(axis=-1).sum() <= 0.02 * true.sum()


@pytest.mark.parametrize("seed", range(0, 45, 4))
def test_a_cropped_frame_is_hardly_cropped_again(seed):
    once = crop_to_field(drawn_frame(seed, longest=640).image)
    again = find_field(once)
    assert found_pixels(again, once.shape)[once.max(axis=-1) > 0].mean() >= 0.985


def test_the_same_frame_always_gives_the_same_field():
    image = drawn_frame(4, longest=640).image
    first, second = find_field(image), find_field(image.copy())
    assert (first.box, first.shape, first.reason) == (second.box, second.shape, second.reason)
    assert np.array_equal(first.mask, second.mask)


def test_the_image_is_not_written_to():
    image = drawn_frame(4, longest=640).image
    image.flags.writeable = False
    before = image.copy()
    crop_to_field(image)
    assert np.array_equal(image, before)


NOISE = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
GRADIENT = np.repeat(np.linspace(60, 220, 300, dtype=np.uint8)[None, :, None], 200, axis=0).repeat(3, axis=2)


@pytest.mark.parametrize(
    "image",
    [
        np.full((8, 8, 3), 90, np.uint8),
        np.zeros((1, 1, 3), np.uint8),
        np.zeros((240, 320, 3), np.uint8),
        np.full((240, 320, 3), 255, np.uint8),
        np.full((240, 320, 3), 128, np.uint8),
        np.full((240, 320, 3), 20, np.uint8),
        NOISE // 10,
        NOISE,
        GRADIENT,
        drawn_frame(5, longest=640, shape="full").image,
    ],
    ids=["8 x 8", "1 x 1", "black", "white", "grey", "dark grey", "noise of 25", "noise", "gradient", "full"],
)
def test_a_frame_without_a_field_is_returned_unchanged(image):
    field = find_field(image)
    assert crop_to_field(image) is image
    assert (field.shape, field.mask, field.box) == ("full", None, (0, 0, image.shape[1], image.shape[0]))
    assert field.reason


def test_text_on_black_is_not_a_field():
    image = np.zeros((400, 500, 3), np.uint8)
    image[40:360:20, 30:200:4] = 255
    assert crop_to_field(image) is image


@pytest.mark.parametrize("image", [np.zeros((40, 40), np.uint8), np.zeros((40, 40, 3), np.float32)])
def test_an_array_that_is_not_an_rgb_image_is_refused(image):
    with pytest.raises(ValueError, match=r"expected uint8 of shape \(height, width, 3\)"):
        find_field(image)


@pytest.mark.skipif(not IMAGES.is_dir(), reason=f"no real images in {IMAGES}")
def test_microscopy_images_are_not_cropped():
    paths = sorted(path for path in IMAGES.rglob("*") if path.suffix in (".jpg", ".jpeg", ".png"))
    assert paths
    assert [path.name for path in paths if find_field(read_image(path)).shape != "full"] == []
