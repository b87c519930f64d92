"""A file as the network's input."""

from functools import partial

import numpy as np
import pytest
import timm
from PIL import Image

from pylorus.config.schema import CONF
from pylorus.data.decode import resize_image
from pylorus.data.field_of_view import FINDER, crop_to_field, find_field
from pylorus.data.first_field_finder import find_field_as_in_version_1
from pylorus.data.input_format import (
    InputFormat,
    guess_input_format,
    read_timm_format,
    resolve_input_format,
    stack_formats,
)
from pylorus.data.overlays import cover_overlays, find_overlays
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


@pytest.mark.slow
@pytest.mark.parametrize("model", sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "timm"))
@pytest.mark.parametrize("image_size", [None, 96])
def test_the_format_of_a_shipped_model_is_known_without_timm(compose_config, tmp_path, model, image_size):
    size = "null" if image_size is None else image_size
    config = compose_config(f"model={model}", f"data.image_size={size}", f"cache.folder={tmp_path}")
    expected = resolve_input_format(
        config.model.name,
        image_size=image_size,
        fit=config.data.fit,
        crop=config.data.crop,
        mask=config.data.mask,
    )
    assert guess_input_format(config) == expected


@pytest.mark.slow
def test_the_format_of_nearly_every_network_of_timm_is_known_without_it():
    names = timm.list_models()[::20] + timm.list_pretrained()[::40]
    wrong, unknown = [], []
    for name in names:
        expected, found = resolve_input_format(name, image_size=None, fit="pad", crop="none"), read_timm_format(name)
        if found is None:
            unknown.append(name)
        elif found != (expected.size, expected.interpolation):
            wrong.append(name)
    assert len(names) > 80
    assert wrong == []
    assert len(unknown) <= len(names) // 20


def test_without_timm_no_format_is_known_of_a_network_that_timm_lacks():
    assert read_timm_format("no_such_network") is None


def test_overlays_are_masked_with_the_crop_unless_told_otherwise():
    resolve = partial(resolve_input_format, None, image_size=64, fit="pad")
    assert [resolve(crop=crop).mask for crop in ("none", "auto")] == ["none", "overlays"]
    assert [resolve(crop="none", mask="overlays").mask, resolve(crop="auto", mask="none").mask] == ["overlays", "none"]


def test_masked_images_have_their_own_cache_entries_and_no_text():
    frame = draw_frame("whole with text", 0)
    plain, masked = (InputFormat(512, "pad", "bilinear", mask=mask) for mask in ("none", "overlays"))
    assert plain.get_key() != masked.get_key()
    expected = plain.prepare_image(cover_overlays(frame.image, find_overlays(frame.image)))
    assert np.array_equal(masked.prepare_image(frame.image), expected)
    assert not np.array_equal(plain.prepare_image(frame.image), expected)


def test_the_field_is_found_in_the_frame_before_it_is_masked():
    frame = draw_frame("octagon, cropped, scope map", 5)
    field = find_field(frame.image)
    masked = cover_overlays(frame.image, find_overlays(frame.image))
    expected = resize_image(crop_to_field(masked, field), size=256, how="pad", interpolation="bilinear")
    assert np.array_equal(InputFormat(256, "pad", "bilinear", "auto", "overlays").prepare_image(frame.image), expected)


def test_several_formats_of_one_image_are_the_same_pixels_as_each_alone(tmp_path):
    Image.fromarray(generate_frame("gastric_ulcer", seed=3, size=160).image).save(tmp_path / "frame.png")
    forms = [
        InputFormat(32, "pad", "bicubic", "auto", "overlays"),
        InputFormat(64, "stretch", "bilinear"),
        InputFormat(32, "crop", "bicubic", "auto", finder=1),
    ]
    stacked = stack_formats([*forms, forms[0]])
    image = stacked.load_image(tmp_path / "frame.png")
    assert image.shape == stacked.shape == (128, 64, 3)
    for form in forms:
        square = stacked.get_square(image, stacked.forms.index(form))
        np.testing.assert_array_equal(square, form.load_image(tmp_path / "frame.png"))
    assert not image[64:, 32:].any()
