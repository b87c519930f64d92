"""A file that would cost a decoder far more than its size is refused before, or decoded where it can be ended."""

import os
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

import pylorus
from benchmarks.fuzz import build_element, build_file, build_scans, seal_png, split_jpeg, split_png
from pylorus.core import limited_process
from pylorus.core.errors import UnreadableImageError
from pylorus.core.limited_process import LimitsRequiredError
from pylorus.data.decode import decode_image
from pylorus.data.files import identify_format
from pylorus.data.image_facts import compute_facts
from pylorus.data.structure import MAX_CHUNKS, MAX_ELEMENTS, check_container, check_dicom, check_header
from tests.data.sample_files import dicom, encoded, picture, samples

pytest.importorskip("pydicom")


def write_jpeg(scans, size=(5000, 5000), *, progressive=False):
    """A JPEG of this size whose scans hold nothing."""
    parts = split_jpeg(encoded(Image.new("RGB", (16, 16), (10, 20, 30)), "JPEG", subsampling=0))
    frame = next(index for index, part in enumerate(parts) if part[1] == 0xC0)
    header = bytearray(parts[frame])
    header[1] = 0xC2 if progressive else 0xC0
    header[5:9] = struct.pack(">HH", *size)
    parts[frame] = bytes(header)
    head = [part for part in parts if part[1] not in (0xDA, 0xD9)]
    last = 0 if progressive else 63
    scan = [b"\xff\xda\0\x08\1" + bytes([1 + n, 0x11 if n else 0, 0, last, 0]) + b"\0" for n in range(3)]
    return b"".join([*head, *(scan[n % 3] for n in range(scans)), b"\xff\xd9"])


def repeat_frame_header():
    parts = split_jpeg(samples()["jpeg"])
    return b"".join(part * (2 if part[1] == 0xC0 else 1) for part in parts)


def write_tiff(*tags, pages=1, following=0, data=bytes(100)):
    """A grey TIFF of 10 × 10 pixels with these tags besides; its last page points to `following`."""
    all_tags = [*((256, 4, 10), (257, 4, 10), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 0), (277, 3, 1)),
                *((278, 4, 10), (279, 4, 100)), *tags]  # fmt: skip
    size = 2 + 12 * len(all_tags) + 4
    body = b""
    for page in range(pages):
        entries = [struct.pack("<HHII", *(*tag[:2], tag[3] if len(tag) > 3 else 1, tag[2])) for tag in all_tags]
        entries[5] = struct.pack("<HHII", 273, 4, 1, 8 + size * pages)
        last = following if page == pages - 1 else 8 + size * (page + 1)
        body += struct.pack("<H", len(all_tags)) + b"".join(entries) + struct.pack("<I", last)
    return b"II*\0\x08\0\0\0" + body + data


def write_jp2(side):
    return encoded(Image.new("RGB", (side, side)), "JPEG2000", no_jp2=False)


def insert_elements(content, elements):
    """Put elements behind the file meta information."""
    end = 144 + int.from_bytes(content[140:144], "little")
    return content[:end] + elements + content[end:]


def deflate(content, *, padding):
    """Deflate the data set behind a file meta information whose transfer syntax lies behind so many bytes."""
    meta = build_element(2, 1, b"OB", b"\0\1" + bytes(padding)) + build_element(2, 16, b"UI", b"1.2.840.10008.1.2.1.99")
    head = content[:132] + build_element(2, 0, b"UL", struct.pack("<I", len(meta))) + meta
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    return head + compressor.compress(insert_elements(content, b"")[300:]) + compressor.flush()


def repeat_chunk(kind, times):
    parts = split_png(samples()["png"])
    chunk = len(b"a\0b").to_bytes(4, "big") + kind + b"a\0b" + bytes(4)
    return seal_png([*parts[:2], *[chunk] * times, *parts[2:]])


HOSTILE = {
    "a JPEG of 300 scans": (lambda: write_jpeg(300), "over 200 scans, over the limit of 3"),
    "a JPEG of 30,000 scans": (lambda: write_jpeg(30_000), "over 200 scans, over the limit of 3"),
    "a JPEG of 4 scans": (lambda: write_jpeg(4), "has 4 scans, over the limit of 3"),
    "a progressive JPEG of 201 scans": (lambda: write_jpeg(201, progressive=True), "over the limit of 200"),
    "a JPEG of two sizes": (lambda: repeat_frame_header(), "several frame headers"),
    "a TIFF of 5,000 pages": (lambda: write_tiff(pages=5_000), "holds over 1,000 pages or frames"),
    "a TIFF of 3 pages": (lambda: write_tiff(pages=3), "holds 3 pages or frames"),
    "a TIFF whose pages form a circle": (lambda: write_tiff(following=8), "form a circle"),
    "a TIFF with two widths": (lambda: write_tiff((256, 4, 9000)), "with the tag 256 twice"),
    "a TIFF whose tags overlap": (lambda: write_tiff(*[(50_000 + n, 1, 8, 200) for n in range(9)]), "more bytes than"),
    "a PNG with two headers": (
        lambda: seal_png([(parts := split_png(samples()["png"]))[0], parts[1], parts[1], *parts[2:]]),
        "must have one header",
    ),
    "a PNG of 20 million rows": (
        lambda: seal_png(
            [
                b"\x89PNG\r\n\x1a\n",
                b"\0\0\0\x0dIHDR" + struct.pack(">II5B", 1, 20_000_000, 8, 2, 0, 0, 0) + bytes(4),
                *split_png(samples()["png"])[2:],
            ]
        ),
        "a side is over the limit of 65,535",
    ),
    "a deflated DICOM file that says so late": (
        lambda: deflate(samples()["dicom rgb"], padding=5000),
        "a deflated DICOM file; convert it",
    ),
    "a JP2 in DICOM, larger than it says": (
        lambda: dicom(write_jp2(300), "RGB", syntax="1.2.840.10008.1.2.4.90"),
        "a frame of 300 × 300 pixels, expected 64 × 48",
    ),
    "a DICOM file of 2,000 nested sequences": (
        lambda: insert_elements(
            samples()["dicom rgb"],
            b"\x08\0\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 2000,
        ),
        "more than 50 nested sequences",
    ),
    "a DICOM file of grey with three channels": (
        lambda: dicom(picture(), "MONOCHROME2"),
        "MONOCHROME2 with 3 channels",
    ),
    "a DICOM file of colours with one channel": (
        lambda: dicom(picture()[:, :, 0], "RGB"),
        "RGB with 1 channel",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(20)
def test_a_hostile_file_is_refused_by_its_structure(name):
    build, reason = HOSTILE[name]
    content = build()
    start = time.process_time()
    with pytest.raises(UnreadableImageError, match=reason):
        decode_image(content)
    assert time.process_time() - start < 2
    assert compute_facts(content).problem != ""


def test_an_honest_jpeg_of_several_scans_is_read():
    assert decode_image(write_jpeg(3, (48, 64))).shape == (48, 64, 3)
    assert decode_image(samples()["jpeg progressive"]).shape == (48, 64, 3)


COSTLY = {
    "very many chunks": (check_container, lambda: repeat_chunk(b"tEXt", MAX_CHUNKS + 1)),
    "many scans of a large image": (check_container, lambda: write_jpeg(100, progressive=True)),
    "a TIFF that holds JPEG": (check_header, lambda: samples()["tiff jpeg"]),
    "very many strips": (check_header, lambda: write_tiff((324, 4, 8, 200_000), data=bytes(2_000_000))),
    "very many elements": (
        check_dicom,
        lambda: insert_elements(samples()["dicom rgb"], build_element(9, 1, b"LO", b"") * MAX_ELEMENTS),
    ),
    "JPEG 2000": (check_dicom, lambda: samples()["dicom jpeg 2000"]),
    "run lengths": (check_dicom, lambda: samples()["dicom rle"]),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_file_whose_cost_is_unknown_needs_a_process_with_limits(name):
    check, build = COSTLY[name]
    content = build()
    limited_process.assume_limits(False)
    if os.name == "posix":
        with pytest.raises(LimitsRequiredError):
            check(content)
    limited_process.assume_limits(True)
    check(content)


@pytest.mark.parametrize(
    "name", ["jpeg", "jpeg progressive", "jpeg cmyk", "png", "png interlaced", "bmp", "tiff", "tiff lzw", "tiff tiles",
             "webp", "dicom rgb", "dicom rgb implicit", "dicom jpeg", "dicom grey 16 bits", "dicom without meta",
             "dicom without preamble", "dicom palette"],
)  # fmt: skip
def test_common_files_are_decoded_where_they_are_read(name):
    limited_process.assume_limits(False)
    decode_image(samples()[name])  # a fast test that starts a process fails


def test_a_file_in_the_preamble_of_another_is_dicom_for_all():
    whole = samples()["dicom rgb"]
    for start in (b"II*\0\x08\0\0\0", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"):
        content = start.ljust(128, b"\0") + whole[128:]
        assert np.array_equal(decode_image(content), picture())
        assert identify_format(content[:160]) == "DICOM"
        assert compute_facts(content).format == compute_facts(whole).format


@pytest.mark.parametrize("name", ["jpeg", "png", "bmp", "webp", "tiff"])
def test_what_follows_an_image_changes_nothing(name):
    content = samples()[name]
    for trailer in (b"PK\3\4" + bytes(300), samples()["jpeg"], b"\xff\xda\0\x0c" * 1000):
        assert np.array_equal(decode_image(content + trailer), decode_image(content))


def test_exif_whose_directories_form_a_circle_is_read():
    exif = (
        b"Exif\0\0II*\0\x08\0\0\0\2\0" + struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<HHII", 0x0112, 3, 1, 6)
    )
    segment = b"\xff\xe1" + (len(exif) + 6).to_bytes(2, "big") + exif + struct.pack("<I", 8)
    parts = split_jpeg(samples()["jpeg"])
    assert decode_image(b"".join([parts[0], segment, *parts[1:]])).shape == (64, 48, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiff jpeg", "dicom jpeg 2000", "dicom rle"])
def test_a_process_with_limits_decodes_the_same(name):
    there = decode_image(samples()[name])
    limited_process.assume_limits(True)
    assert np.array_equal(there, decode_image(samples()[name]))


@pytest.mark.slow
def test_the_audit_lists_a_file_that_takes_too_long_and_reads_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv("PYLORUS_MAX_SECONDS", "1")
    limited_process.end_limited_processes()
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(picture() + number).save(tmp_path / "images" / name / f"{number}.png")
    elements = build_element(9, 1, b"LO", b"") * 2_000_000  # pydicom needs several seconds for them
    (tmp_path / "images" / "a" / "slow.dcm").write_bytes(insert_elements(samples()["dicom rgb"], elements))
    result = pylorus.audit(tmp_path / "images")
    unreadable = next(finding for finding in result.findings if finding.code == "unreadable")
    assert [result.images.table["path"].iloc[item.files[0]] for item in unreadable.items] == ["a/slow.dcm"]
    assert "over 1 s of CPU time" in unreadable.items[0].detail
    assert result.readable == 6


def test_the_fuzzer_builds_the_same_file_again():
    assert build_file(3, 5) == build_file(3, 5)
    assert build_file(3, 5) != build_file(4, 5)
    assert build_scans.__doc__


def test_a_palette_image_without_a_palette_is_refused_with_a_reason():
    def build_chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    parts = (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(72))), (b"IEND", b"")
    content = b"\x89PNG\r\n\x1a\n" + b"".join(build_chunk(*part) for part in parts)
    with pytest.raises(UnreadableImageError, match=r"damaged: \w+"):
        decode_image(content)
