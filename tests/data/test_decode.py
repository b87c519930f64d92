"""The decoding policy, format by format, and the one resize."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from pylorus.data.decode import POLICY_VERSION, UnreadableImageError, decode_image, read_image, resize_image
from pylorus.data.synthetic import generate_frame

RED_TOP = np.zeros((20, 30, 3), dtype=np.uint8)
RED_TOP[:10, :, 0] = 255


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_a_lossless_file_gives_exact_pixels(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode_image(encoded(Image.fromarray(RED_TOP), kind, **options)), RED_TOP)


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_a_jpeg_gives_nearly_exact_pixels(options):
    found = decode_image(encoded(Image.fromarray(RED_TOP), "JPEG", quality=100, subsampling=0, **options))
    assert np.abs(found.astype(int) - RED_TOP).max() <= 3


def test_cmyk_becomes_rgb():
    found = decode_image(encoded(Image.fromarray(RED_TOP).convert("CMYK"), "JPEG", quality=100))
    assert found[2, 2, 0] > 200
    assert found[2, 2, 1] < 60
    assert found[15, 2].max() < 60


def test_an_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    found = decode_image(encoded(Image.fromarray(RED_TOP), "JPEG", quality=100, subsampling=0, exif=exif))
    assert found.shape == (30, 20, 3)
    assert found[15, 17, 0] > 250
    assert found[15, 2, 0] < 5


def test_grey_is_copied_to_three_channels():
    found = decode_image(encoded(Image.fromarray(RED_TOP).convert("L"), "PNG"))
    assert found.shape == (20, 30, 3)
    assert np.array_equal(found[:, :, 0], found[:, :, 2])


def test_alpha_is_composited_over_black():
    pixels = np.dstack([RED_TOP, np.full((20, 30), 255, np.uint8)])
    pixels[:5, :, 3] = 0
    found = decode_image(encoded(Image.fromarray(pixels), "PNG"))
    assert found[:5].max() == 0
    assert np.array_equal(found[5:], RED_TOP[5:])


def test_a_transparent_palette_is_composited_over_black():
    image = Image.fromarray((RED_TOP[:, :, 0] > 0).astype(np.uint8), "P")
    image.putpalette([0, 255, 0, 255, 0, 0])
    found = decode_image(encoded(image, "PNG", transparency=0))
    assert np.array_equal(found, RED_TOP)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_upper_half(kind):
    deep = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    found = decode_image(encoded(Image.fromarray(deep), kind))
    assert found[:, :, 0].tolist() == [[0, 0, 1], [128, 255, 255]]


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_16_bit_colour_keeps_its_upper_half(suffix):
    deep = np.zeros((4, 5, 3), dtype=np.uint16)
    deep[:, :, 0] = 0xAB12  # red: OpenCV writes blue first
    found = decode_image(cv2.imencode(suffix, deep[:, :, ::-1])[1].tobytes())
    assert found[0, 0].tolist() == [0xAB, 0, 0]


def test_the_format_is_detected_from_content_not_name(tmp_path):
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encoded(Image.fromarray(RED_TOP), "PNG"))
    assert np.array_equal(read_image(path), RED_TOP)


JPEG = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
PNG = encoded(Image.fromarray(RED_TOP), "PNG")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "the file is empty"),
        (b"patient,age\n1,44\n", "no readable JPEG, PNG, BMP, TIFF or WebP"),
        (encoded(Image.fromarray(RED_TOP), "GIF"), "no readable JPEG, PNG, BMP, TIFF or WebP"),
        (JPEG[: len(JPEG) // 2], "damaged: .*truncated"),
        (PNG[: len(PNG) // 2], "damaged"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "mode F .* an undefined range"),
        (b"II*\0" + bytes(40), "damaged: truncated"),
    ],
    ids=["empty", "text", "gif", "cut jpeg", "cut png", "float", "broken tiff"],
)
def test_a_file_that_is_not_an_image_is_refused_with_a_reason(content, why):
    with pytest.raises(UnreadableImageError, match=why):
        decode_image(content)


@pytest.mark.parametrize("kind", ["TIFF", "WEBP"])
def test_a_file_with_several_pages_is_refused(kind):
    pages = [Image.fromarray(RED_TOP), Image.fromarray(255 - RED_TOP)]
    with pytest.raises(UnreadableImageError, match="holds 2 pages or frames"):
        decode_image(encoded(pages[0], kind, save_all=True, append_images=pages[1:]))


def test_an_image_with_too_many_pixels_is_refused_before_decompression(monkeypatch):
    monkeypatch.setattr("pylorus.data.decode.MAX_PIXELS", 599)
    with pytest.raises(UnreadableImageError, match="30 × 20 pixels are over the limit of 599"):
        decode_image(PNG)


def test_read_names_the_file(tmp_path):
    with pytest.raises(UnreadableImageError, match=r"gone\.png: .*No such file"):
        read_image(tmp_path / "gone.png")


def test_pad_keeps_the_whole_frame_and_its_proportions():
    found = resize_image(np.full((20, 40, 3), 200, np.uint8), size=16, how="pad", interpolation="bilinear")
    assert found.shape == (16, 16, 3)
    assert (found[4:12] == 200).all()
    assert (found[:4] == 0).all()
    assert (found[12:] == 0).all()


def test_stretch_fills_the_square_and_crop_keeps_the_centre():
    frame = np.zeros((20, 40, 3), np.uint8)
    frame[:, 10:30] = 200
    assert (resize_image(frame, size=20, how="crop", interpolation="bilinear") == 200).all()
    stretched = resize_image(frame, size=20, how="stretch", interpolation="nearest")
    assert (stretched[:, 5:15] == 200).all()
    assert (stretched[:, :5] == 0).all()


def test_an_image_of_the_right_size_is_left_alone():
    assert np.array_equal(resize_image(RED_TOP[:, :20], size=20, how="pad", interpolation="bicubic"), RED_TOP[:, :20])


def test_resizing_averages_pixels():
    """As timm's own evaluation does; without it fine texture turns into noise."""
    checks = np.indices((128, 128)).sum(axis=0) % 2 * 255
    found = resize_image(np.dstack([checks] * 3).astype(np.uint8), size=16, how="pad", interpolation="bilinear")
    assert np.abs(found.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("shape", [(512, 640), (511, 643), (1030, 1281)])
@pytest.mark.parametrize("how", ["pad", "stretch", "crop"])
def test_a_frame_four_times_as_large_as_needed_is_halved_as_pillow_does(shape, how):
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    half, width, height = Image.fromarray(frame), *shape[::-1]
    ratio = 1 if how == "stretch" else 64 / (max if how == "pad" else min)(shape)
    target = (64, 64) if how == "stretch" else (round(width * ratio), round(height * ratio))
    while width >= 4 * target[0] and height >= 4 * target[1]:
        half, width, height = half.reduce(2), width / 2, height / 2
    expected = np.asarray(half.resize(target, Image.Resampling.BICUBIC, (0, 0, width, height)))
    found = resize_image(frame, size=64, how=how, interpolation="bicubic")
    top, left = (abs(64 - side) // 2 for side in expected.shape[:2])
    found = found if how != "pad" else found[top : top + expected.shape[0], left : left + expected.shape[1]]
    expected = expected if how != "crop" else expected[top : top + 64, left : left + 64]
    assert np.array_equal(found, expected)


def test_an_image_less_than_four_times_as_large_is_resized_in_one_step():
    frame = np.random.default_rng(0).integers(0, 256, (255, 255, 3), dtype=np.uint8)
    found = resize_image(frame, size=64, how="pad", interpolation="bicubic")
    assert np.array_equal(found, np.asarray(Image.fromarray(frame).resize((64, 64), Image.Resampling.BICUBIC)))


def test_halving_first_changes_a_frame_by_a_few_grey_levels_at_most():
    frame = generate_frame("gastric_ulcer", seed=1, size=1024).image
    halved, single = (
        resize_image(frame, size=224, how="pad", interpolation="bilinear", policy=policy).astype(int)
        for policy in (POLICY_VERSION, 2)
    )
    assert 0 < np.abs(halved - single).max() <= 6
    assert np.abs(halved - single).mean() < 0.3
