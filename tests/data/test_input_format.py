"""A file as the network's input."""

import numpy as np
from PIL import Image

from pylorus.data.decode import resize_image
from pylorus.data.field_of_view import FINDER, crop_to_field
from pylorus.data.first_field_finder import find_field_as_in_version_1
from pylorus.data.input_format import InputFormat
from pylorus.data.synthetic import generate_frame
from tests.data.device_frames import draw_frame


def test_cropping_removes_console_text(tmp_path):
    frame = generate_frame("gastric_cancer", seed=2, size=256, overlay=True)
    Image.fromarray(frame.image).save(tmp_path / "frame.png")
    whole = InputFormat(128, "pad", "bilinear").load_image(tmp_path / "frame.png")
    cropped = InputFormat(128, "pad", "bilinear", crop="auto").load_image(tmp_path / "frame.png")
    assert cropped.shape == whole.shape == (128, 128, 3)
    assert np.array_equal(
        cropped, resize_image(crop_to_field(frame.image), size=128, how="pad", interpolation="bilinear")
    )
    beside = crop_to_field(frame.image)
    assert beside.shape[0] < 256 or (beside > 40).any(axis=-1).sum() < (frame.image > 40).any(axis=-1).sum()


def test_a_frame_without_a_field_is_not_cropped(tmp_path):
    pixels = np.random.default_rng(0).integers(90, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photograph.png")
    form = {"size": 64, "fit": "pad", "interpolation": "bilinear"}
    read = [InputFormat(**form, crop=crop).load_image(tmp_path / "photograph.png") for crop in ("none", "auto")]
    assert np.array_equal(*read)
    assert np.array_equal(read[0], pixels)


def test_cropped_images_have_their_own_cache_entries():
    assert InputFormat(64, "pad", "bilinear").get_key() != InputFormat(64, "pad", "bilinear", crop="auto").get_key()


def test_a_bundle_of_an_earlier_release_crops_as_in_its_training():
    image = draw_frame("round above a status bar", 0, device=3, longest=640).image
    old, new = (InputFormat(128, "pad", "bilinear", crop="auto", finder=finder) for finder in (1, FINDER))
    cropped = crop_to_field(image, find_field_as_in_version_1(image))
    assert np.array_equal(
        old.prepare_image(image), resize_image(cropped, size=128, how="pad", interpolation="bilinear")
    )
    assert not np.array_equal(old.prepare_image(image), new.prepare_image(image))
    assert old.get_key() != new.get_key()
