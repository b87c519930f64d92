"""Every damaged or unusual file and its outcome: an image, or an error with the reason. One table."""

import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pylorus.data.decode import UnreadableImageError, read_image
from tests.data.sample_files import deep, encoded, picture, png, samples, tiled_tiff

IMAGE = None
"""The outcome of a file that gives an image; any other outcome is a pattern of the refusal."""
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
POSIX = os.name == "posix"
Make = Callable[[Path], Path]


def file(name: str, content: Callable[[], bytes]) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content())
        return folder / name

    return make


def cut(sample: str, share: float) -> Make:
    return file("a.jpg", lambda: samples()[sample][: int(len(samples()[sample]) * share)])


def bomb_png() -> bytes:
    """Claims 60,000 × 60,000 pixels and holds 10 MB of zeros in 10 kB."""
    header = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return png((b"IHDR", header), (b"IDAT", zlib.compress(bytes(10_000_000))), (b"IEND", b""))


def text_bomb_png() -> bytes:
    """A small valid PNG with a comment that decompresses to 100 MB."""
    whole = encoded(Image.fromarray(picture()), "PNG")
    packed = zlib.compressobj(9)
    comment = b"note\0\0" + b"".join(packed.compress(bytes(1_000_000)) for _ in range(100)) + packed.flush()
    return whole[:33] + png((b"zTXt", comment))[8:] + whole[33:]


def too_much_png() -> bytes:
    """A small PNG whose pixels unpack to 100 MB."""
    packed = zlib.compressobj(9)
    data = b"".join(packed.compress(bytes(1_000_000)) for _ in range(100)) + packed.flush()
    return png((b"IHDR", bytes([0, 0, 0, 8] * 2 + [8, 2, 0, 0, 0])), (b"IDAT", data), (b"IEND", b""))


def resized_tiff(content: bytes) -> bytes:
    """The TIFF with 65,000 as its width and height."""
    directory = int.from_bytes(content[4:8], "little")
    changed = bytearray(content)
    for index in range(int.from_bytes(content[directory : directory + 2], "little")):
        at = directory + 2 + 12 * index
        if int.from_bytes(content[at : at + 2], "little") in (256, 257):
            changed[at + 8 : at + 12] = (65_000).to_bytes(4, "little")
    return bytes(changed)


def resized_webp() -> bytes:
    content = bytearray(samples()["webp alpha"])
    content[24:30] = (16_000).to_bytes(3, "little") * 2
    return bytes(content)


def resized_dicom() -> bytes:
    pytest.importorskip("pydicom")
    content = bytearray(samples()["dicom rgb"])
    for tag in (0x10, 0x11):
        at = content.index(b"\x28\0" + bytes([tag, 0]) + b"US")
        content[at + 8 : at + 10] = (65_000).to_bytes(2, "little")
    return bytes(content)


def float_tiff() -> bytes:
    return encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")


def moving(kind: str) -> bytes:
    pages = [Image.fromarray(picture()), Image.fromarray(255 - picture())]
    return encoded(pages[0], kind, save_all=True, append_images=pages[1:])


def named(name: str) -> Make:
    return file(name, lambda: samples()["png"])


def bytes_name(folder: Path) -> Path:
    path = folder / os.fsdecode(b"caf\xe9 \xff.png")
    path.write_bytes(samples()["png"])
    return path


def case_twins(folder: Path) -> Path:
    (folder / "A.png").write_bytes(b"another file, unless names are folded")
    (folder / "a.png").write_bytes(samples()["png"])
    return folder / "a.png"


def linked(target: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / "whole.png").write_bytes(samples()["png"])
        (folder / "link.png").symlink_to(folder / target)
        return folder / "link.png"

    return make


def with_mode(mode: int) -> Make:
    def make(folder: Path) -> Path:
        path = named("a.png")(folder)
        path.chmod(mode)
        return path

    return make


def subfolder(folder: Path) -> Path:
    (folder / "x.jpg").mkdir()
    return folder / "x.jpg"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.jpg")
    return folder / "pipe.jpg"


def piped_link(folder: Path) -> Path:
    (folder / "link.jpg").symlink_to(pipe(folder))
    return folder / "link.jpg"


def device(folder: Path) -> Path:
    (folder / "zero.jpg").symlink_to("/dev/zero")
    return folder / "zero.jpg"


def sparse(folder: Path) -> Path:
    with (folder / "huge.jpg").open("wb") as stream:
        stream.truncate(10**12)
    return folder / "huge.jpg"


def vanished(folder: Path) -> Path:
    path = named("a.png")(folder)
    path.unlink()
    return path


LIMIT = "pixels are over the limit of 25,000,000"
CUT = "damaged: "
NO_IMAGE = "no readable JPEG, PNG, BMP, TIFF or WebP image: it begins with"

TABLE: list[tuple[str, Make, str | None]] = [
    ("a PNG bomb", file("a.png", bomb_png), LIMIT),
    ("a comment that unpacks to 100 MB", file("a.png", text_bomb_png), "damaged: .*too large"),
    ("pixels that unpack to more than claimed", file("a.png", too_much_png), IMAGE),
    ("a TIFF bomb", file("a.tif", lambda: resized_tiff(samples()["tiff deflate"])), LIMIT),
    ("a TIFF bomb of tiles", file("a.tif", lambda: resized_tiff(tiled_tiff())), LIMIT),
    ("a TIFF bomb of 16-bit colour", file("a.tif", lambda: resized_tiff(deep(".tiff"))), LIMIT),
    ("a WebP bomb", file("a.webp", resized_webp), LIMIT),
    ("a DICOM bomb", file("a.dcm", resized_dicom), LIMIT),
    ("zero bytes", file("a.jpg", lambda: b""), "the file is empty"),
    ("one byte", file("a.jpg", lambda: b"\xff"), NO_IMAGE),
    ("text named .jpg", file("a.jpg", lambda: b"patient,age\n1,44\n"), NO_IMAGE),
    ("an HTML page named .png", file("a.png", lambda: b"<!DOCTYPE html><title>404</title>"), "it is a web page"),
    ("a GIF", file("a.png", lambda: encoded(Image.fromarray(picture()), "GIF")), "it is a GIF image"),
    ("floating point", file("a.tif", float_tiff), "mode F .* an undefined range"),
    ("two pages of TIFF", file("a.tif", lambda: moving("TIFF")), "holds 2 pages or frames"),
    ("a moving WebP", file("a.webp", lambda: moving("WEBP")), "holds 2 pages or frames"),
    ("a moving PNG", file("a.png", lambda: moving("PNG")), "holds 2 pages or frames"),
    ("a PNG named .jpg", named("a.jpg"), IMAGE),
    ("a JPEG named .dcm", file("a.dcm", lambda: samples()["jpeg"]), IMAGE),
    ("a link to an image", linked("whole.png"), IMAGE),
    ("a broken link", linked("gone.png"), "No such file"),
    ("a link to itself", linked("link.png"), "symbolic links"),
    ("a folder", subfolder, "is a folder, expected an image file"),
    ("a pipe without a writer", pipe, "is a pipe"),
    ("a link to a pipe", piped_link, "is a pipe"),
    ("an endless device", device, "is a device"),
    ("a file of 10¹² bytes", sparse, "over the limit of 500,000,000"),
    ("gone since it was listed", vanished, "No such file"),
    ("read-only", with_mode(0o400), IMAGE),
    ("unreadable", with_mode(0), "Permission denied"),
    ("Unicode in the name", named("胃镜 ångström 🔬.png"), IMAGE),
    ("a name of 255 bytes", named("é" * 125 + "1.png"), IMAGE),
    ("a line break in the name", named("a\nb.png"), IMAGE),
    ("no UTF-8 in the name", bytes_name, IMAGE),
    ("a name that differs in case only", case_twins, IMAGE),
]
CUTS = [
    (
        f"{sample} cut at {share:.0%}",
        cut(sample, share),
        CUT + "|no readable|an unsupported kind of TIFF|without pixel data|claims",
    )
    for sample in samples()
    for share in (0.1, 0.5, 0.99)
]


@pytest.mark.parametrize(("make", "outcome"), [pytest.param(*row[1:], id=row[0]) for row in TABLE + CUTS])
@pytest.mark.timeout(20)
def test_each_bad_file_has_its_stated_outcome(make, outcome, tmp_path):
    if make in (device, pipe, piped_link) and not POSIX:
        pytest.skip("this system has no such files")
    if make.__name__ == "make" and outcome == "Permission denied" and ROOT:
        pytest.skip("root reads every file")
    path = make(tmp_path)
    if outcome is IMAGE:
        found = read_image(path)
        assert found.dtype == np.uint8
        assert found.ndim == 3
        assert found.shape[2] == 3
        return
    with pytest.raises(UnreadableImageError, match=outcome) as caught:
        read_image(path)
    assert path.name in str(caught.value)


def test_a_wrong_checksum_is_reported_as_damage(tmp_path):
    content = bytearray(samples()["png"])
    content[60] ^= 1
    with pytest.raises(UnreadableImageError, match="chunk b'IDAT' at byte 33 has a wrong checksum"):
        read_image(file("a.png", lambda: bytes(content))(tmp_path))


def test_a_file_that_is_still_growing_is_refused(tmp_path, monkeypatch):
    path = named("a.png")(tmp_path)
    plain = os.fstat

    def growing(descriptor):
        found = plain(descriptor)
        with path.open("ab") as writer:
            writer.write(b"more")
        return found

    monkeypatch.setattr("pylorus.data.files.os.fstat", growing)
    with pytest.raises(UnreadableImageError, match="changed while it was being read; is it still being copied"):
        read_image(path)


@pytest.mark.parametrize("name", ["a\nb.png", os.fsdecode(b"\xff.png")])
def test_any_name_can_be_printed_in_a_message(name, tmp_path):
    with pytest.raises(UnreadableImageError) as caught:
        read_image(tmp_path / name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.encode("utf-8")


@pytest.mark.slow
def test_opencv_and_pydicom_write_nothing_to_the_terminal_about_damaged_files(tmp_path):
    """Pillow's libtiff does; its output can't be suppressed without affecting the whole process."""
    for index, (name, content) in enumerate(samples().items()):
        if name.startswith("tiff") and "16 bits" not in name:
            continue
        flipped = bytearray(content)
        for at in range(len(flipped) // 3, len(flipped), 97):
            flipped[at] ^= 0x55
        (tmp_path / f"{index}-{re.sub(r'[^a-z0-9]', '-', name)}").write_bytes(flipped)
    program = (
        "import sys, pathlib\nfrom pylorus.data.decode import UnreadableImageError, read_image\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try: read_image(path)\n    except UnreadableImageError: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
