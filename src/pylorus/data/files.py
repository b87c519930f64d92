"""Read the bytes of image files, and check and decode what Pillow is too lenient or unable to.

Reading never blocks on a pipe or exhausts memory. Pillow decodes a JPEG without its end marker, a PNG with wrong
checksums or without its last chunk, and a truncated TIFF; such files may look right or end in a grey band. It reads no
color TIFF with 16 bits per channel, and misreads grey ones with 12 bits or in which zero is white.
"""

import io
import os
import shlex
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from pylorus.core.errors import PylorusError, UnreadableImageError, format_name_list, format_path

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp", ".png", ".bmp", ".dib"),
    *(".tif", ".tiff", ".webp", ".dcm", ".dicom"),
)
"""A file with one of these is an image, or a damaged one. Of other files the content decides; see `walk.py`."""
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
RGB = NDArray[np.uint8]
"""An image of shape (height, width, 3)."""
MAX_BYTES = 500_000_000
"""More than any image within the pixel limit needs, even uncompressed with four channels of 16 bits."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
# A plain open() of a pipe without a writer would block forever. Windows has none of these flags, but a text mode.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)


class Member(ABC):
    """An image inside a larger file. Its string form is what messages call it."""

    @abstractmethod
    def read_content(self) -> bytes:
        """Return all bytes of the image.

        Raises:
            UnreadableImageError: If they are missing or differ from the catalogued content; the message says why.
        """

    @abstractmethod
    def __str__(self) -> str: ...


ImageLocation = Path | Member
"""Location of an image."""


class Root(Protocol):
    """What image paths are relative to: a folder, or anything that maps a path to a location by `root / path`."""

    def __truediv__(self, path: str, /) -> ImageLocation: ...


def is_utf8(path: str) -> bool:
    """Return whether a path is UTF-8, and not one of an old Windows or Linux."""
    return path.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in path)


def check_names(paths: Iterable[str], root: Path) -> None:
    """Check that paths can be written to tables, which are UTF-8.

    Raises:
        PylorusError: If a name is not UTF-8, such as one of an old Windows or Linux; names the files.
    """
    wrong = [path for path in paths if not is_utf8(path)]
    if wrong:
        raise PylorusError(
            f"{root}: found names that are not UTF-8:\n{format_name_list(map(format_path, wrong))}\nRename them, for "
            f"example with: convmv -r -f latin1 -t utf8 --notest {shlex.quote(str(root))}"
        )


def read_image_bytes(path: ImageLocation) -> bytes:
    """Read all bytes of an image; symbolic links are followed.

    Raises:
        UnreadableImageError: If the file is missing, may not be read, is a folder, pipe or device, exceeds
            `MAX_BYTES`, or changes while it is read; the message says which, without the file's name.
    """
    if isinstance(path, Member):
        return path.read_content()
    try:
        _check_regular_file(os.stat(path))  # noqa: PTH116 as fstat below, but before a device is opened
        descriptor = os.open(path, _FLAGS)
        with os.fdopen(descriptor, "rb") as file:
            before = os.fstat(descriptor)
            _check_regular_file(before)
            content = file.read(before.st_size + 1)
            after = os.fstat(descriptor)
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error
    if len(content) != before.st_size or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UnreadableImageError("changed while it was being read; is it still being copied?")
    return content


def open_local_file(path: str) -> BinaryIO:
    """Open a file of any size for reading, without waiting for a pipe.

    Raises:
        OSError: If it is missing, may not be read, or is not a regular file.
    """
    descriptor = os.open(path, _FLAGS)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(f"is {_KINDS.get(stat.S_IFMT(mode), 'not a regular file')}, expected a file")
    return os.fdopen(descriptor, "rb")


def _check_regular_file(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "not a regular file")
        raise UnreadableImageError(f"is {kind}, expected an image file")
    if status.st_size > MAX_BYTES:
        raise UnreadableImageError(f"has {status.st_size:,} bytes, over the limit of {MAX_BYTES:,}")


def read_head(path: str) -> bytes:
    """Read the first `HEAD_BYTES` bytes of a file, from which `identify_format` tells its format.

    Raises:
        UnreadableImageError: If it is a pipe or a device.
        OSError: If it can't be read.
    """
    _check_regular_file(os.stat(path))  # noqa: PTH116
    descriptor = os.open(path, _FLAGS)
    try:
        return os.read(descriptor, HEAD_BYTES)
    finally:
        os.close(descriptor)


JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
MAX_SCANS = 200
"""Scans allowed in a progressive JPEG, which has about ten; any other one has one per component at most."""


def is_webp(content: bytes) -> bool:
    """Return whether a file has the signature of a WebP image."""
    return content[:4] == b"RIFF" and content[8:12] == b"WEBP"


HEAD_BYTES = 160
DECODED_FORMATS = frozenset((*FORMATS, "DICOM"))
_SIGNATURES = (
    (128, b"DICM", "DICOM"),  # first: its preamble may be the beginning of a TIFF or JPEG
    (0, JPEG, "JPEG"),
    (0, PNG, "PNG"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"GIF8", "GIF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
    *((4, b"ftyp" + brand, "HEIC") for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"8BPS", "Photoshop"),
    (0, b"II+\0", "BigTIFF"),
    (0, b"MM\0+", "BigTIFF"),
    (0, b"II\xbc", "JPEG XR"),
    (0, b"%PDF-", "PDF"),
    (0, b"version https://git-lfs", "Git LFS pointer"),
)


MAX_FIRST_LENGTH = 64
"""Longest value of the first element of a file without preamble, in bytes: a character set, an image type or a date."""


def identify_format(head: bytes) -> str:
    """Return the name of an image format by the first bytes of a file; empty if they are of none.

    Args:
        head: The first 160 bytes, or the whole file if it is shorter.

    Example:
        >>> identify_format(b"GIF89a"), identify_format(b"BM: a note")
        ('GIF', '')
    """
    for offset, signature, name in _SIGNATURES:
        if head.startswith(signature, offset):
            return name
    if is_webp(head):
        return "WEBP"
    # Two letters are no signature: the four reserved bytes are zero and the length of the next header is small.
    if head[:2] == b"BM" and head[6:10] == bytes(4) and head[15:18] == bytes(3) and head[14:15] > b"\x0b":
        return "BMP"
    # DICOM without its preamble: the first element, of group 2 or 8, has a value representation of two capitals.
    if head[:2] in (b"\x02\0", b"\x08\0") and head[3:4] == b"\0" and head[4:6].isalpha() and head[4:6].isupper():
        return "DICOM"
    return "DICOM" if _is_implicit_dicom(head) else ""


def _is_implicit_dicom(head: bytes) -> bool:
    """Return whether a file begins with two short elements of group 8 without value representation, in their order."""
    length = int.from_bytes(head[4:8], "little")
    second = head[8 + length : 12 + length]
    is_short = length <= MAX_FIRST_LENGTH and length % 2 == 0
    return is_short and head[:2] == second[:2] == b"\x08\0" and head[3:4] == b"\0" and _get_tag(second) > _get_tag(head)


def _get_tag(element: bytes) -> int:
    return int.from_bytes(element[2:4], "little")


_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION, _MAX_VALUE, _SAMPLE_FORMAT = 256, 257, 258, 262, 274, 281, 339
PACKED_BITS = (10, 12, 14)
"""Bits per channel that a TIFF stores without gaps."""
_STRIP_AND_TILE_TAGS = ((273, 279), (324, 325))  # offsets and byte counts of strips, and of tiles


def check_pieces(tags: Mapping[int, object], length: int) -> None:
    """Check that all strips or tiles are within the file.

    Args:
        tags: Tags of the page, by number.
        length: Length of the file in bytes.

    Raises:
        UnreadableImageError: If one is not: the file is truncated.
    """
    for offsets, counts in _STRIP_AND_TILE_TAGS:
        for offset, count in zip(
            _extract_integers(tags.get(offsets)), _extract_integers(tags.get(counts)), strict=False
        ):
            if offset + count > length:
                raise UnreadableImageError(
                    f"damaged: truncated: pixels end at byte {offset + count}, the file at byte {length}"
                )


def is_deep_grey(tags: Mapping[int, object]) -> bool:
    """Return whether a page of a TIFF is grey with 10 to 16 bits that are not just 16 bits in which zero is black."""
    bits, photometric = _extract_integers(tags.get(_BITS)), tags.get(_PHOTOMETRIC)
    return len(bits) == 1 and (bits[0] in PACKED_BITS or (bits[0] == 16 and photometric == 0))


def is_deep_color(tags: Mapping[int, object]) -> bool:
    """Return whether a page of a TIFF has several channels of 16 bits."""
    bits = _extract_integers(tags.get(_BITS))
    return len(bits) > 1 and set(bits) == {16}


def decode_deep_tiff(content: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """Decode a TIFF with 10 to 16 bits per channel of a kind that Pillow does not support or misreads.

    Args:
        content: All bytes of the file.
        max_pixels: A file whose header claims more is rejected before decoding.

    Returns:
        RGB of shape (height, width, 3), upright; alpha is composited over black.

    Raises:
        UnreadableImageError: If it is another kind of TIFF, is damaged, has several pages, or values of unknown range.
    """
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it would print what is raised here
    tags = _read_only_page(content)
    width, height = _extract_integers(tags.get(_WIDTH)), _extract_integers(tags.get(_HEIGHT))
    if len(width) != 1 or len(height) != 1 or min(width[0], height[0]) < 1:
        raise UnreadableImageError("damaged: a TIFF without width and height")
    if width[0] * height[0] > max_pixels:
        raise UnreadableImageError(f"{width[0]} × {height[0]} pixels are over the limit of {max_pixels:,}")
    check_pieces(tags, len(content))
    if _extract_integers(tags.get(_SAMPLE_FORMAT))[:1] == (2,):
        raise UnreadableImageError("signed pixels have an undefined range, expected unsigned ones of 8 or 16 bits")
    is_decoded, pages = cv2.imdecodemulti(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if not is_decoded or len(pages) != 1 or pages[0].dtype != np.uint16:
        raise UnreadableImageError("an unsupported kind of TIFF, or damaged")
    deep = np.asarray(pages[0], dtype=np.uint16)
    photometric = tags.get(_PHOTOMETRIC)
    if deep.ndim == 2 and photometric not in (0, 1):
        raise UnreadableImageError("an unsupported kind of TIFF, or damaged")
    # OpenCV shifts packed values of 10, 12 or 14 bits to the upper end of 16 bits.
    is_packed = _extract_integers(tags.get(_BITS))[:1] not in ((), (16,))
    bits = 16 if is_packed else get_tiff_bits(tags)
    rgb = convert_deep_to_rgb(deep, bits=bits, inverted=deep.ndim == 2 and photometric == 0)
    return np.ascontiguousarray(rotate_upright(rgb, tags.get(_ORIENTATION)))


def get_tiff_bits(tags: Mapping[int, object]) -> int | None:
    """Return the bits that values up to the tag MaxSampleValue need; None if there is none, or if it is not 2ⁿ - 1."""
    highest = max(_extract_integers(tags.get(_MAX_VALUE)), default=0)
    bits = highest.bit_length()
    return bits if 9 <= bits <= 16 and highest == 2**bits - 1 else None


def convert_deep_to_rgb(deep: NDArray[np.uint16], *, bits: int | None, inverted: bool = False) -> NDArray[np.uint8]:
    """Convert an image of 16 bits per channel to RGB of 8 bits, by the range of its values.

    Args:
        deep: Grey of shape (height, width), or blue, green, red and possibly alpha of shape (height, width, 3 or 4).
        bits: How many lower bits hold the values, where the file says so; None: see `choose_bits`.
        inverted: Whether zero is white.

    Raises:
        UnreadableImageError: If the range is unknown.
    """
    colours = deep if deep.ndim == 2 else deep[:, :, 2::-1]
    bits = choose_bits(int(colours.max()), stated=bits)
    if inverted:
        colours = (2**bits - 1) - colours
    if deep.ndim == 3 and deep.shape[2] == 4:
        colours = _apply_alpha(colours, deep[:, :, 3], bits)
    reduced = (colours >> (bits - 8)).astype(np.uint8)
    return np.repeat(reduced[:, :, None], 3, axis=2) if reduced.ndim == 2 else np.ascontiguousarray(reduced)


def choose_bits(highest: int, *, stated: int | None = None) -> int:
    """Choose how many of 16 bits hold the values of an image.

    A file that says nothing has 16 bits if a value is above 4095, else 12 bits: no frame of 16 bits is so dark. If no
    value is above 1023, they may be 10 or 12 bits, so such a file is refused: one set must not be read in two ways.

    Args:
        highest: Highest value of the image.
        stated: What the file says: the tag MaxSampleValue of a TIFF, sBIT of a PNG.

    Raises:
        UnreadableImageError: If the range is unknown.

    Example:
        >>> choose_bits(60_000), choose_bits(4000), choose_bits(500, stated=10), choose_bits(0)
        (16, 12, 10, 16)
    """
    if stated is not None and stated >= 8 and highest < 2**stated:
        return stated
    if highest == 0 or highest > 4095:
        return 16
    if highest > 1023:
        return 12
    raise UnreadableImageError(
        f"its values of 16 bits end at {highest}, and it does not say whether they are 10 or 12 bits. State the range "
        "in the tag MaxSampleValue (TIFF, 1023 or 4095) or sBIT (PNG, 10 or 12), or convert it to 8 bits"
    )


def read_png_bits(content: bytes) -> int | None:
    """Return the significant bits of the channels of a PNG by its chunk sBIT; None if it has none."""
    offset = len(PNG)
    while offset + 12 <= len(content) and (kind := content[offset + 4 : offset + 8]) != b"IDAT":
        length = int.from_bytes(content[offset : offset + 4], "big")
        if kind == b"sBIT":
            return max(content[offset + 8 : offset + 8 + min(length, 3)], default=None)
        offset += 12 + length
    return None


def _read_only_page(content: bytes) -> ImageFileDirectory_v2:
    file = io.BytesIO(content)
    tags = ImageFileDirectory_v2(file.read(8))
    file.seek(tags.next)
    first = tags.next
    tags.load(file)
    if tags.next == first:  # Pillow only warns, and returns what it has read
        raise UnreadableImageError("damaged: truncated: the TIFF's tag directory is missing")
    if tags.next:
        raise UnreadableImageError("holds several pages, expected a single image")
    return tags


def _extract_integers(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, tuple) else (value,)
    return tuple(entry for entry in values if isinstance(entry, int))


def _apply_alpha(colours: NDArray[np.uint16], alpha: NDArray[np.uint16], bits: int) -> NDArray[np.uint16]:
    """Composite colours over black; an alpha that is zero everywhere is none."""
    highest = int(alpha.max())
    if highest == 0:
        return colours
    full = 1 if highest == 1 else 2**bits - 1 if highest < 2**bits else 65535
    composited = np.empty_like(colours)
    for channel in range(3):  # one at a time: the product needs twice the memory of its factors
        composited[:, :, channel] = colours[:, :, channel].astype(np.uint32) * alpha // full
    return composited


def rotate_upright(image: NDArray[np.uint8], orientation: object) -> NDArray[np.uint8]:
    """Rotate an image upright by its EXIF orientation, 1 to 8; any other value counts as 1, as in Pillow."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image
