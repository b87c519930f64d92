"""Files as scanners, archives and browsers leave them: read with their true brightness, or refused by name."""

import io
import os
import struct
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pylorus.core.errors import PylorusError
from pylorus.data.catalog import read_folders
from pylorus.data.decode import UnreadableImageError, decode_image
from pylorus.data.files import HEAD_BYTES, choose_bits, identify_format, read_image_bytes
from pylorus.data.sources import pack_shards
from tests.data.sample_files import (
    dicom,
    drop_meta,
    drop_preamble,
    encode_grey_png,
    encoded,
    picture,
    samples,
    write_tiff,
)

RAMP = np.linspace(0, 255, 48).round().astype(np.uint8).reshape(4, 12)
"""Grey levels from black to white, of shape (4, 12)."""


def scale(bits: int) -> np.ndarray:
    """The ramp in whole values of so many bits."""
    return (RAMP.astype(int) * (2**bits - 1) / 255).round().astype(int)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 10, 12, 14, 16])
def test_white_is_zero_at_every_depth_and_byte_order(bits, order):
    values = scale(bits)
    black_is_zero = decode_image(write_tiff(values, bits, 1, order))
    white_is_zero = decode_image(write_tiff(2**bits - 1 - values, bits, 0, order))
    assert np.abs(black_is_zero[:, :, 0].astype(int) - scale(bits) * 255 // (2**bits - 1)).max() <= 1
    assert np.array_equal(black_is_zero, white_is_zero)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "raw"])
@pytest.mark.parametrize("mode", ["1", "L"])
def test_white_is_zero_in_compressed_files(mode, compression):
    image = Image.fromarray(picture()).convert(mode)
    turned = encoded(image, "TIFF", compression=compression, tiffinfo={262: 0})  # Pillow inverts what it stores
    assert Image.open(io.BytesIO(turned)).tag_v2[262] == 0
    assert np.array_equal(decode_image(turned)[:, :, 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize("compression", [1, 5, 8])  # none, LZW, deflate: OpenCV adds a predictor to the last two
def test_white_is_zero_in_compressed_files_of_16_bits(compression):
    values = picture()[:, :, 0].astype(np.uint16) * 257
    content = cv2.imencode(".tiff", values, [cv2.IMWRITE_TIFF_COMPRESSION, compression])[1].tobytes()
    black = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert content.count(black) == 1
    assert np.array_equal(decode_image(content)[:, :, 0], picture()[:, :, 0])
    turned = content.replace(black, struct.pack("<HHIHH", 262, 3, 1, 0, 0))
    assert np.array_equal(decode_image(turned)[:, :, 0], 255 - picture()[:, :, 0])


def test_a_fax_is_black_on_white():
    page = np.full((40, 64), 255, np.uint8)
    page[10:20] = 0
    content = encoded(Image.fromarray(page).convert("1"), "TIFF", compression="group4")
    assert np.array_equal(decode_image(content)[:, :, 0], page)


def test_bundles_of_policy_2_keep_their_reading():
    values = scale(16)
    assert np.array_equal(decode_image(write_tiff(values, 16, 0, "<"), policy=2)[:, :, 0], values >> 8)
    clear = Image.fromarray(picture())
    clear.putalpha(0)
    assert not decode_image(encoded(clear, "PNG"), policy=2).any()
    assert decode_image(encode_grey_png(scale(12)), policy=2).max() == 15


def test_signed_values_are_refused():
    with pytest.raises(UnreadableImageError, match="signed pixels have an undefined range|undefined range"):
        decode_image(write_tiff(scale(16), 16, 0, "<", (339, 3, 2)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_alpha_that_is_zero_everywhere_is_none(kind, mode):
    if kind == "WEBP" and mode == "L":
        pytest.skip("WebP has no grey")
    image = Image.fromarray(picture()).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    image.putalpha(0)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert np.array_equal(decode_image(encoded(image, kind, **options)), expected)


def test_a_transparent_palette_of_zeros_and_16_bits_keep_their_colors():
    palette = Image.fromarray(picture()).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(decode_image(encoded(palette, "PNG", transparency=bytes(16))), expected)
    deep = np.dstack([picture()[:, :, ::-1].astype(np.uint16) * 257, np.zeros((48, 64), np.uint16)])
    for suffix in (".png", ".tiff"):
        assert np.array_equal(decode_image(cv2.imencode(suffix, deep)[1].tobytes()), picture())


def test_an_alpha_of_zeros_and_ones_is_a_mask():
    image = Image.fromarray(picture())
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 32:] = 1
    image.putalpha(Image.fromarray(mask))
    assert np.array_equal(decode_image(encoded(image, "PNG")), picture() * mask[:, :, None])


def test_a_black_frame_with_alpha_zero_stays_black():
    assert not decode_image(encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "PNG")).any()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_12_bits_in_16_have_their_own_range(photometric, order):
    stored = scale(12) if photometric else 4095 - scale(12)
    assert np.array_equal(decode_image(write_tiff(stored, 16, photometric, order))[:, :, 0], scale(12) >> 4)
    assert np.array_equal(decode_image(encode_grey_png(scale(12)))[:, :, 0], scale(12) >> 4)


def test_12_bits_of_color_in_16_have_their_own_range():
    values = picture()[:, :, ::-1].astype(np.uint16) * 16
    for suffix in (".png", ".tiff"):
        assert np.array_equal(decode_image(cv2.imencode(suffix, values)[1].tobytes()), picture())
    clear = np.dstack([values, np.full((48, 64), 4095, np.uint16)])
    for suffix in (".png", ".tiff"):
        assert np.array_equal(decode_image(cv2.imencode(suffix, clear)[1].tobytes()), picture())


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
def test_a_tag_states_the_range(bits):
    stored = scale(bits) // 2  # a dark frame, which would look like fewer bits
    expected = stored >> (bits - 8)
    tagged = [
        write_tiff(stored, 16, 1, "<", (281, 3, 2**bits - 1)),
        write_tiff(stored, 16, 1, ">", (281, 3, 2**bits - 1)),
        write_tiff(2**bits - 1 - stored, 16, 0, "<", (281, 3, 2**bits - 1)),
        encode_grey_png(stored, (b"sBIT", bytes([bits]))),
        dicom(stored.astype(np.uint16), "MONOCHROME2", BitsStored=bits, HighBit=bits - 1),
    ]
    for content in tagged:
        assert np.array_equal(decode_image(content)[:, :, 0], expected)


def test_10_bits_without_a_tag_are_refused_with_what_to_do():
    for content in (encode_grey_png(scale(10)), write_tiff(scale(10), 16, 1, "<"), write_tiff(scale(10), 16, 0, ">")):
        with pytest.raises(UnreadableImageError, match="end at 1023.*MaxSampleValue.*sBIT.*or convert it to 8 bits"):
            decode_image(content)


def test_a_black_frame_of_16_bits_is_read():
    assert not decode_image(encode_grey_png(np.zeros((4, 12), int))).any()
    assert choose_bits(0) == 16


def test_a_dark_and_a_bright_frame_of_16_bits_have_one_scale():
    assert decode_image(encode_grey_png(scale(16))).max() == 255
    assert decode_image(encode_grey_png(scale(16) // 8)).max() == 31


FOREIGN = {
    "a GIF image": encoded(Image.fromarray(picture()), "GIF"),
    "an AVIF image": b"\0\0\0\x20ftypavif" + bytes(40),
    "a HEIC image": b"\0\0\0\x18ftypheic" + bytes(40),
    "a JPEG 2000 image": encoded(Image.fromarray(picture()), "JPEG2000"),
    "a JPEG XL image": b"\xff\x0a" + bytes(40),
    "a BigTIFF image": b"II+\0\x08\0\0\0" + bytes(40),
    "a Photoshop file": b"8BPS\0\1" + bytes(40),
    "a PDF document": b"%PDF-1.7\n" + bytes(40),
    "an SVG drawing": b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="x"></svg>',
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "a pointer of git-annex": b"/annex/objects/SHA256E-s3--00.jpg\n",
    "a web page": b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><head><title>403</title>",
    "a web page, perhaps": "<html lang=de>".encode("utf-16"),
    "an error message of the server": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a JSON text": b'{"message": "Not Found"}',
    "a ZIP archive": b"PK\x03\x04" + bytes(40),
    "a file of zeros": bytes(4000),
    "an MP4 or MOV video": b"\0\0\0\x18ftypisom" + bytes(40),
    "AppleDouble": b"\0\x05\x16\x07\0\2\0\0Mac OS X" + bytes(40),
    "saved as text": b"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\0\x10JFIF",
    "a PNM image": encoded(Image.fromarray(picture()), "PPM"),
    "a Windows icon": b"\0\0\1\0\1\0" + bytes(40),
}


def change_frame(marker: int, bits: int) -> bytes:
    """A JPEG whose frame header says another process and other bits per channel."""
    content = samples()["jpeg"]
    at = content.index(b"\xff\xc0")
    return content[:at] + bytes((0xFF, marker)) + content[at + 2 : at + 4] + bytes([bits]) + content[at + 5 :]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (lambda: change_frame(0xC1, 12), "a JPEG of 12 bits per channel"),
        (lambda: change_frame(0xF7, 8), "a JPEG-LS image"),
        (lambda: b"\r\n" + samples()["jpeg"], "a JPEG after 2 bytes that do not belong to it"),
        (lambda: b"/9j/4AAQSkZJRgABAQ", "an image as base64 text"),
    ],
)
def test_a_jpeg_of_another_kind_is_called_by_its_name(content, name):
    with pytest.raises(UnreadableImageError, match=f": it is {name}"):
        decode_image(content())


@pytest.mark.parametrize("name", FOREIGN)
def test_a_format_that_is_not_read_is_called_by_its_name(name):
    with pytest.raises(UnreadableImageError, match=f"no readable JPEG, PNG, .*: it is .*{name}"):
        decode_image(FOREIGN[name])


GREY = RAMP


@pytest.mark.parametrize("drop", [drop_preamble, drop_meta])
def test_dicom_without_preamble_is_read(drop, tmp_path):
    from pylorus.data.dicom import read_patient_pseudonym

    whole = dicom(GREY, "MONOCHROME2")
    assert np.array_equal(decode_image(drop(whole))[:, :, 0], GREY)
    (tmp_path / "a").write_bytes(whole)
    (tmp_path / "b").write_bytes(drop(whole))
    assert read_patient_pseudonym(tmp_path / "b") == read_patient_pseudonym(tmp_path / "a")


def test_implicit_dicom_without_preamble_and_meta_is_read():
    whole = dicom(picture(), "RGB", syntax="1.2.840.10008.1.2")
    assert np.array_equal(decode_image(drop_meta(whole)), picture())
    assert identify_format(drop_meta(whole)[:HEAD_BYTES]) == "DICOM"  # so that it is found without a suffix


@pytest.mark.parametrize("name", ["PhotometricInterpretation", "BitsStored", "HighBit", "PixelRepresentation"])
def test_a_missing_element_that_can_have_one_value_is_added(name):
    assert np.array_equal(decode_image(dicom(GREY, "MONOCHROME2", **{name: None}))[:, :, 0], GREY)
    assert np.array_equal(decode_image(dicom(picture(), "RGB", **{name: None})), picture())


def test_a_missing_photometric_interpretation_of_a_jpeg_is_that_of_jpeg():
    content = encoded(Image.fromarray(picture()), "JPEG", quality=95)
    options = {"syntax": "1.2.840.10008.1.2.4.50", "PhotometricInterpretation": None}
    found = decode_image(dicom(content, "YBR_FULL_422", **options))
    assert np.abs(found.astype(int) - decode_image(content)).mean() < 2


def test_a_missing_transfer_syntax_is_told_by_the_content():
    import pydicom

    for content, expected in [
        (dicom(GREY, "MONOCHROME2"), np.repeat(GREY[:, :, None], 3, axis=2)),
        (samples()["dicom jpeg"], decode_image(samples()["dicom jpeg"])),
    ]:
        data = pydicom.dcmread(io.BytesIO(content))
        del data.file_meta.TransferSyntaxUID
        stream = io.BytesIO()
        pydicom.dcmwrite(stream, data, implicit_vr=False, little_endian=True, enforce_file_format=False)
        assert np.array_equal(decode_image(stream.getvalue()), expected)


def test_zeros_that_fill_a_dicom_file_up_are_allowed():
    whole = dicom(GREY, "MONOCHROME2")
    for count in (2, 100, 512 - len(whole) % 512):
        assert np.array_equal(decode_image(whole + bytes(count - count % 2))[:, :, 0], GREY)
    with pytest.raises(UnreadableImageError, match="bytes after the pixel data"):
        decode_image(whole + b"\1\2" * 50)


def test_trailing_padding_of_the_standard_is_allowed():
    padding = b"\xfc\xff\xfc\xffOB\0\0" + struct.pack("<I", 64) + bytes(64)
    assert np.array_equal(decode_image(dicom(GREY, "MONOCHROME2") + padding)[:, :, 0], GREY)


def test_pixel_data_of_odd_length_are_read():
    odd = np.arange(15, dtype=np.uint8).reshape(3, 5) * 17
    whole = dicom(odd, "MONOCHROME2")
    assert np.array_equal(decode_image(whole)[:, :, 0], odd)
    length = whole.rindex(struct.pack("<I", 16))
    cut = whole[:length] + struct.pack("<I", 15) + whole[length + 4 : -1]
    assert np.array_equal(decode_image(cut)[:, :, 0], odd)


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_around_the_image_becomes_black(kind):
    stored = RAMP.copy()
    stored[0, :] = 200
    found = decode_image(dicom(stored, kind, PixelPaddingValue=200))
    expected = 255 - stored if kind == "MONOCHROME1" else stored.copy()
    expected[stored == 200] = 0
    assert np.array_equal(found[:, :, 0], expected)
    found = decode_image(dicom(stored, kind, PixelPaddingValue=0, PixelPaddingRangeLimit=100))
    expected = 255 - stored if kind == "MONOCHROME1" else stored.copy()
    expected[stored <= 100] = 0
    assert np.array_equal(found[:, :, 0], expected)


@pytest.mark.parametrize("bits", [10, 12])
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_monochrome_of_10_or_12_bits_at_either_end_of_16(kind, bits):
    expected = scale(bits) >> (bits - 8)
    stored = scale(bits) if kind == "MONOCHROME2" else 2**bits - 1 - scale(bits)
    low = dicom(stored.astype(np.uint16), kind, BitsStored=bits, HighBit=bits - 1)
    high = dicom((stored << (16 - bits)).astype(np.uint16), kind, BitsStored=bits, HighBit=15)
    for content in (low, high):
        assert np.abs(decode_image(content)[:, :, 0].astype(int) - expected).max() <= (kind == "MONOCHROME1")


def test_a_photometric_interpretation_in_other_letters_is_known():
    assert np.array_equal(
        decode_image(dicom(GREY, "MONOCHROME2").replace(b"MONOCHROME2 ", b"Monochrome2 "))[:, :, 0], GREY
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of other systems are Unicode")
@pytest.mark.parametrize("name", [b"caf\xe9.png", b"p\xfct/frame.png", b"\xff\xfe.png"])
def test_names_that_are_not_utf_8_are_refused_by_name_where_tables_are_written(name, tmp_path):
    for folder in (b"a", b"b"):
        path = os.path.join(os.fsencode(tmp_path), folder, name)  # noqa: PTH118 bytes
        os.makedirs(os.path.dirname(path))  # noqa: PTH103, PTH120
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(samples()["png"])
    assert decode_image(read_image_bytes(Path(os.fsdecode(path)))).shape == picture().shape
    for read in (lambda: read_folders(tmp_path), lambda: pack_shards(tmp_path, tmp_path / "shards")):
        with pytest.raises(PylorusError, match=r"names that are not UTF-8:\n  a/.*\\udc.*\n(.|\n)*convmv"):
            read()
