"""Every supported format decodes to the image that was encoded."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pylorus.data.decode import UnreadableImageError, decode_image
from pylorus.data.files import MAX_SCANS
from tests.data.sample_files import deep, encoded, picture, samples

EXACT = ["png", "png 16 bits", "bmp", "tiff", "tiff lzw", "tiff deflate", "tiff 16 bits", "webp lossless"]
LOSSY = ["jpeg", "jpeg progressive", "jpeg profile", "webp", "tiff jpeg"]
GREY = ["png interlaced", "tiff tiles"]


@pytest.mark.parametrize("name", EXACT)
def test_a_lossless_format_gives_exact_pixels(name):
    assert np.array_equal(decode_image(samples()[name]), picture())


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_format_gives_nearly_exact_pixels(name):
    assert np.abs(decode_image(samples()[name]).astype(int) - picture()).mean() < 8


@pytest.mark.parametrize("name", GREY)
def test_interlaced_and_tiled_grey_gives_exact_pixels(name):
    assert np.array_equal(decode_image(samples()[name]), np.repeat(picture()[:, :, :1], 3, axis=2))


@pytest.mark.parametrize(
    ("name", "colours"), [("png 1 bit", 2), ("png 2 bits", 4), ("png 4 bits", 16), ("bmp palette", 16)]
)
def test_few_bits_give_at_most_as_many_colors(name, colours):
    found = decode_image(samples()[name])
    assert found.shape == picture().shape
    assert 1 < len(np.unique(found.reshape(-1, 3), axis=0)) <= colours


@pytest.mark.parametrize("name", ["png 16 bits alpha", "tiff 16 bits alpha"])
def test_alpha_with_16_bits_is_composited_over_black(name):
    assert np.abs(decode_image(samples()[name]).astype(int) - picture() * (200 / 255)).max() <= 1


def test_a_16_bit_tiff_is_rotated_upright():
    content = deep(".tiff")
    at = content.index((258).to_bytes(2, "little"), int.from_bytes(content[4:8], "little"))
    directory = int.from_bytes(content[4:8], "little")
    count = int.from_bytes(content[directory : directory + 2], "little")
    body = content[directory + 2 : directory + 2 + 12 * count]
    turned = b"".join(n.to_bytes(size, "little") for n, size in ((274, 2), (3, 2), (1, 4), (6, 4)))
    entries = sorted([body[i : i + 12] for i in range(0, len(body), 12)] + [turned], key=lambda e: e[1] * 256 + e[0])
    moved = content + (count + 1).to_bytes(2, "little") + b"".join(entries) + bytes(4)
    assert at > directory
    assert np.array_equal(
        decode_image(moved[:4] + len(content).to_bytes(4, "little") + moved[8:]), np.rot90(picture(), -1)
    )


@pytest.mark.parametrize("name", [name for name in samples() if name.startswith("jpeg")])
def test_a_jpeg_without_its_last_bytes_is_refused(name):
    with pytest.raises(UnreadableImageError, match="truncated: the JPEG's end is missing"):
        decode_image(samples()[name][:-2])


def test_a_jpeg_may_have_bytes_after_its_end():
    assert decode_image(samples()["jpeg"] + bytes(512)).shape == picture().shape


def test_the_end_of_an_embedded_thumbnail_is_not_the_end_of_the_jpeg():
    whole = samples()["jpeg"]
    thumbnail = b"\xff\xe1" + (2 + len(whole)).to_bytes(2, "big") + whole
    with pytest.raises(UnreadableImageError, match="end is missing"):
        decode_image(whole[:2] + thumbnail + whole[2:-2])


def test_a_jpeg_with_too_many_scans_is_refused():
    whole = samples()["jpeg progressive"]
    with pytest.raises(UnreadableImageError, match="scans, over the limit"):
        decode_image(whole[:-2] + b"\xff\xda\0\x06\x01\x01\0\0\0\0" * MAX_SCANS + whole[-2:])


def test_a_colour_profile_changes_nothing():
    image = Image.fromarray(picture())
    plain = decode_image(encoded(image, "PNG"))
    assert np.array_equal(decode_image(encoded(image, "PNG", icc_profile=b"no profile" * 20)), plain)


@pytest.mark.slow
def test_pydicom_is_imported_only_for_a_dicom_file():
    program = (
        "import sys\nfrom pylorus.data.decode import decode_image\nfrom tests.data.sample_files import encoded, picture\n"
        "from PIL import Image\ndecode_image(encoded(Image.fromarray(picture()), 'PNG'))\nassert 'pydicom' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
