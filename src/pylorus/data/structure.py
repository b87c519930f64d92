"""Check the structure of image files before a decoder gets them: it says what decoding will cost at most.

A file is refused if it is damaged, or of a structure that no honest program writes: thousands of scans, a tag twice. If
its cost can't be bounded in this way, `core.limited_process.require_limits` says so, and it is decoded in a process
that is ended when it takes too long. All other files are decoded where they are read.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from pylorus.core.errors import UnreadableImageError
from pylorus.core.limited_process import require_limits
from pylorus.data.files import JPEG, MAX_SCANS, PNG, is_webp

MAX_SCAN_PIXELS = 1_000_000_000
"""Pixels times scans that are decoded where a file is read: ten seconds at most."""
MAX_SEGMENTS, MAX_METADATA = 2_000, 16_000_000
"""Segments of a JPEG before its first scan, and their bytes, that are read without limits: Pillow joins them."""
MAX_CHUNKS = 100_000
"""Chunks of a PNG that are read without limits: most programs write 8 kB each, some 4 kB."""
MAX_PAGES = 1_000
"""Pages of a TIFF that are counted for the message that refuses it."""
MAX_TAGS, MAX_STRIPS = 500, 100_000
"""Tags of a TIFF, and strips or tiles, that are read without limits."""
MAX_ELEMENTS, MAX_DEPTH = 10_000, 50
"""Elements and fragments of a DICOM file that are read without limits, and sequences within one another."""

_MARKERS_WITHOUT_LENGTH = frozenset([0x00, 0x01, *range(0xD0, 0xD9)])
_SCAN, _END = 0xDA, 0xD9
_FRAMES = frozenset([*range(0xC0, 0xD0)]) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset([0xC2, 0xC6, 0xCA, 0xCE])
_ARITHMETIC = frozenset(range(0xC9, 0xD0))
_FILL = re.compile(rb"\xff*")
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # neither stuffing nor a restart


def check_container(content: bytes) -> None:
    """Check the container of a JPEG, PNG or WebP, from its first byte to its last; other content is accepted.

    Args:
        content: All bytes of the file.

    Raises:
        UnreadableImageError: If the file is truncated, a checksum is wrong, or a JPEG has too many scans.
        LimitsRequiredError: See the module's docstring.
    """
    if content.startswith(JPEG):
        _check_jpeg(content)
    elif content.startswith(PNG):
        _check_png(content)
    elif is_webp(content):
        claimed = int.from_bytes(content[4:8], "little") + 8
        if claimed > len(content):
            raise UnreadableImageError(f"damaged: truncated: {len(content)} of {claimed} bytes")


def check_header(content: bytes) -> None:
    """Check what a library reads of a file when it opens it; see `check_container`."""
    if content.startswith(JPEG):
        _read_jpeg_header(content)
    elif is_tiff(content):
        check_tiff(content)
    elif content[:2] == b"BM" and content[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        require_limits()  # run lengths, which Pillow decodes byte by byte


def read_webp_size(content: bytes) -> tuple[int, int]:
    """Read width and height from the header of a WebP file: its decoder allocates memory for them on opening.

    Returns:
        Width and height in pixels; (0, 0) if the header is damaged.
    """
    kind, data = content[12:16], content[20:30]
    if len(data) < 10:
        return 0, 0
    if kind == b"VP8X":
        return int.from_bytes(data[4:7], "little") + 1, int.from_bytes(data[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF
    return 0, 0


class JpegHeader(NamedTuple):
    """What a JPEG says before its first scan.

    Attributes:
        scan: Offset of the first scan; -1 if there is none.
        frame: Kind of the frame header, 0xC0 to 0xCF; 0 if there is none.
        width: Width in pixels.
        height: Height in pixels.
        components: Number of components.
    """

    scan: int = -1
    frame: int = 0
    width: int = 0
    height: int = 0
    components: int = 0


def _check_jpeg(content: bytes) -> None:
    header = _read_jpeg_header(content)
    scan = header.scan
    if scan < 0 or content.rfind(b"\xff\xd9", scan) < 0:
        raise UnreadableImageError("damaged: truncated: the JPEG's end is missing")
    if header.frame in _ARITHMETIC:
        require_limits()
    is_progressive = header.frame in _PROGRESSIVE
    if not is_progressive and content[scan + 4 : scan + 5] == bytes([header.components]):
        return  # the first scan has all components: the decoder stops behind it
    scans = content.count(b"\xff\xda", scan)
    if scans > header.components:
        scans = _count_scans(content, scan)
    if scans > (MAX_SCANS if is_progressive else header.components):
        limit = MAX_SCANS if is_progressive else header.components
        found = f"over {MAX_SCANS}" if scans > MAX_SCANS else scans
        raise UnreadableImageError(f"has {found} scans, over the limit of {limit}")
    if scans * header.width * header.height > MAX_SCAN_PIXELS:
        require_limits()


def _count_scans(content: bytes, offset: int) -> int:
    """Count the scans up to the end marker, but no more than one above the limit."""
    count = 0
    while count <= MAX_SCANS and (match := _MARKER.search(content, offset)) is not None:
        marker, offset = match[1][0], match.end()
        if marker == _END:
            break
        count += marker == _SCAN
        if marker not in _MARKERS_WITHOUT_LENGTH:
            offset += int.from_bytes(content[offset : offset + 2], "big")
    return count


def _read_jpeg_header(content: bytes) -> JpegHeader:
    """Read the segments before the first scan, including those of metadata, with a thumbnail's end marker in them.

    Raises:
        UnreadableImageError: If there are several frame headers.
        LimitsRequiredError: If there are very many segments, or long ones.
    """
    header, offset, count = JpegHeader(), 2, 0
    while 0 <= offset < len(content) - 3:
        count += 1
        if count > MAX_SEGMENTS:
            require_limits()
        marker = content[offset + 1]
        if content[offset] != 0xFF:  # stray bytes
            offset = content.find(b"\xff", offset + 1)
        elif marker == 0xFF:
            offset = _FILL.match(content, offset).end() - 1  # type: ignore[union-attr]
        elif marker == _SCAN:
            if offset > MAX_METADATA:
                require_limits()
            return header._replace(scan=offset)
        elif marker == _END:
            break
        elif marker in _MARKERS_WITHOUT_LENGTH:
            offset += 2
        else:
            if marker in _FRAMES:
                if header.frame:
                    raise UnreadableImageError("damaged: a JPEG with several frame headers")
                height, width = struct.unpack(">HH", content[offset + 5 : offset + 9].ljust(4, b"\0"))
                header = JpegHeader(-1, marker, width, height, int.from_bytes(content[offset + 9 : offset + 10], "big"))
            offset += 2 + int.from_bytes(content[offset + 2 : offset + 4], "big")
    return header


def _check_png(content: bytes) -> None:
    view = memoryview(content)
    offset, count, has_data = len(PNG), 0, False
    while offset + 12 <= len(content):
        count += 1
        if count > MAX_CHUNKS:
            require_limits()
        length = int.from_bytes(view[offset : offset + 4], "big")
        kind, end = content[offset + 4 : offset + 8], offset + 8 + length
        if end + 4 > len(content):
            break
        if zlib.crc32(view[offset + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise UnreadableImageError(f"damaged: the PNG's chunk {kind!r} at byte {offset} has a wrong checksum")
        if (kind == b"IHDR") != (offset == len(PNG)):
            raise UnreadableImageError("damaged: a PNG must have one header, and begin with it")
        if kind == b"IEND":
            if not has_data:
                raise UnreadableImageError("damaged: a PNG without pixels")
            return
        has_data |= kind == b"IDAT"
        offset = end + 4
    raise UnreadableImageError("damaged: truncated: the PNG's end is missing")


def is_tiff(content: bytes) -> bool:
    """Return whether a file has the signature of a TIFF."""
    return content[:4] in (b"II*\0", b"MM\0*")


_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of a value of each type of a TIFF's tags."""
_SINGLE_TAGS = frozenset([256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 338, 339])
"""Tags that say how pixels are stored. If one is there twice, libraries differ in which they take."""
_PLAIN_COMPRESSIONS = frozenset([1, 5, 8, 32773, 32946])
"""None, LZW, deflate, PackBits: the decoder stops when a strip is full."""


class _Entry(NamedTuple):
    """A tag of a TIFF: its number, type and number of values, their length in bytes, and the field for a short one."""

    tag: int
    kind: int
    number: int
    length: int
    field: bytes


def check_tiff(content: bytes) -> None:
    """Check the pages and tags of a TIFF, without their values.

    Raises:
        UnreadableImageError: If there are several pages, if pages form a circle, if a tag that says how pixels are
            stored is there twice, or if tags claim more bytes than the file has.
        LimitsRequiredError: If there are very many tags or strips, or the compression is a rare one.
    """
    order = "<" if content[:2] == b"II" else ">"
    offset = int.from_bytes(content[4:8], "little" if order == "<" else "big")
    pages, visited, entries = 0, set[int](), list[_Entry]()
    while offset and pages <= MAX_PAGES:
        if offset in visited:
            raise UnreadableImageError("damaged: the pages of a TIFF form a circle")
        visited.add(offset)
        if offset + 2 > len(content):
            break  # truncated: the decoder says so
        pages += 1
        (count,) = struct.unpack_from(f"{order}H", content, offset)
        if pages == 1:
            entries = list(_iter_entries(content, offset + 2, count, order))
        end = offset + 2 + 12 * count
        offset = struct.unpack_from(f"{order}I", content, end)[0] if end + 4 <= len(content) else 0
    if pages > 1:
        found = f"over {MAX_PAGES:,}" if pages > MAX_PAGES else pages
        raise UnreadableImageError(f"holds {found} pages or frames, expected a single image")
    _check_entries(entries, len(content), order)


def _iter_entries(content: bytes, offset: int, count: int, order: str) -> Iterator[_Entry]:
    for position in range(offset, min(offset + 12 * count, len(content) - 11), 12):
        tag, kind, number, field = struct.unpack_from(f"{order}HHI4s", content, position)
        yield _Entry(tag, kind, number, number * _TYPE_BYTES.get(kind, 0), field)


def _check_entries(entries: list[_Entry], length: int, order: str) -> None:
    tags = [entry.tag for entry in entries]
    twice = next((tag for tag in _SINGLE_TAGS if tags.count(tag) > 1), None)
    if twice is not None:
        raise UnreadableImageError(f"damaged: a TIFF with the tag {twice} twice")
    if sum(entry.length for entry in entries) > length:
        raise UnreadableImageError("damaged: truncated: the tags of a TIFF claim more bytes than the file has")
    by_tag = {entry.tag: entry for entry in entries}
    strips = max((by_tag[tag].number for tag in (273, 279, 324, 325) if tag in by_tag), default=0)
    compression = by_tag.get(259)
    scheme = 1 if compression is None else struct.unpack(f"{order}H", compression.field[:2])[0]
    others = sum(entry.length for entry in entries if entry.tag not in (273, 279, 324, 325))
    if (
        len(entries) > MAX_TAGS
        or strips > MAX_STRIPS
        or scheme not in _PLAIN_COMPRESSIONS
        or others > MAX_METADATA
        or 330 in by_tag  # sub-pages
    ):
        require_limits()


def read_jpeg2000_size(content: bytes) -> tuple[int, int, int]:
    """Read the size of a JPEG 2000 image from its codestream, which the decoder follows, with or without a JP2 around.

    Returns:
        Width and height in pixels, and number of components.

    Raises:
        UnreadableImageError: If there is no codestream.
    """
    start = 0
    if content[4:8] == b"jP  ":
        start = _find_codestream(content)
    header = content[start : start + 42]
    if not header.startswith(b"\xff\x4f\xff\x51") or len(header) < 42:
        raise UnreadableImageError("damaged: a JPEG 2000 frame without a codestream")
    right, bottom, left, top, *_ = struct.unpack(">8I", header[8:40])
    return right - left, bottom - top, int.from_bytes(header[40:42], "big")


def _find_codestream(content: bytes) -> int:
    """Return the offset of the codestream in a JP2 file, whose boxes each begin with length and kind."""
    offset = 0
    for _ in range(MAX_ELEMENTS):
        length, kind = int.from_bytes(content[offset : offset + 4], "big"), content[offset + 4 : offset + 8]
        header = 8
        if length == 1:
            length, header = int.from_bytes(content[offset + 8 : offset + 16], "big"), 16
        if kind == b"jp2c":
            return offset + header
        if length < header or offset + length > len(content):
            break
        offset += length
    raise UnreadableImageError("damaged: a JPEG 2000 file without a codestream")


_UNDEFINED = 0xFFFFFFFF
_LONG_KINDS = frozenset([b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"])
"""Value representations whose length has four bytes."""
_PIXEL_DATA, _ITEM = (0x7FE0, 0x0010), 0xFFFE
PLAIN_SYNTAXES = frozenset(
    ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"]
)
"""Native pixels in little endian, and JPEG as other files hold it."""
DEFLATED_SYNTAXES = (b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.4.95", b"1.2.840.10008.1.2.4.205")
"""Transfer syntaxes that inflate to any size, which can't be known in advance."""
MIN_HEADER = 4096
"""First bytes of a file, in which none of these is accepted, whatever they say where."""


def check_dicom(content: bytes) -> None:
    """Check that a DICOM file has few elements and plain pixels, following them as pydicom does.

    Raises:
        UnreadableImageError: If it is deflated, or sequences are deeply nested.
        LimitsRequiredError: If it has very many elements, is compressed in a rare way, or can't be followed.
    """
    offset, syntax = _read_syntax(content, 132 if content[128:132] == b"DICM" else 0)
    meta = content[: max(offset, MIN_HEADER)]
    if any(each in meta for each in DEFLATED_SYNTAXES):
        raise UnreadableImageError("a deflated DICOM file; convert it to another transfer syntax")
    if syntax and syntax not in PLAIN_SYNTAXES:
        require_limits()
    is_implicit, depth = not _has_kind(content, offset), 0
    for _ in range(MAX_ELEMENTS):
        if offset + 8 > len(content):
            return
        group, element, length = struct.unpack_from("<HHI", content, offset)
        header, kind = 8, content[offset + 4 : offset + 6]
        if group == _ITEM:
            is_switched = element == 0xE000 and not (is_implicit or _has_kind(content, offset + 8))
            if is_switched or (element != 0xE000 and length):
                break
            length, depth = 0, depth - (element == 0xE0DD)  # the elements of the item follow
        elif not is_implicit:
            header, length = (12, 0) if kind in _LONG_KINDS else (8, length >> 16)
            if header == 12:
                length = int.from_bytes(content[offset + 8 : offset + 12], "little")
        if group == 0:
            break  # elements of a command, which pydicom reads in another way
        offset += header
        if length == _UNDEFINED and (group, element) == _PIXEL_DATA:
            end = content.find(b"\xfe\xff\xdd\xe0", offset)
            if end < 0 or _count_items(content, offset) > MAX_ELEMENTS:
                break
            length = end + 8 - offset
        elif length == _UNDEFINED:
            if not (is_implicit or kind == b"SQ"):
                break
            length, depth = 0, depth + 1  # the items of the sequence follow
            if depth > MAX_DEPTH:
                raise UnreadableImageError(f"damaged: a DICOM file with more than {MAX_DEPTH} nested sequences")
        offset += length
    require_limits()


def _count_items(content: bytes, offset: int) -> int:
    """Count the items of compressed pixel data, but not many more than the limit."""
    count = 0
    while count <= MAX_ELEMENTS and content[offset : offset + 4] == b"\xfe\xff\x00\xe0":
        offset += 8 + int.from_bytes(content[offset + 4 : offset + 8], "little")
        count += 1
    return count


def _has_kind(content: bytes, offset: int) -> bool:
    """Return whether an element names its value representation, by two capitals; a delimiter needs none."""
    is_delimiter = content[offset : offset + 2] == b"\xfe\xff"
    return is_delimiter or (content[offset + 4 : offset + 6].isalpha() and content[offset + 4 : offset + 6].isupper())


def _read_syntax(content: bytes, offset: int) -> tuple[int, str]:
    """Return where the elements of group 2 end, and the transfer syntax that they name; empty if they don't."""
    syntax = ""
    for _ in range(MAX_ELEMENTS):
        if content[offset : offset + 2] != b"\2\0":
            return offset, syntax
        if not _has_kind(content, offset):
            break
        if content[offset + 4 : offset + 6] in _LONG_KINDS:
            header, length = 12, int.from_bytes(content[offset + 8 : offset + 12], "little")
        else:
            header, length = 8, int.from_bytes(content[offset + 6 : offset + 8], "little")
        if content[offset + 2 : offset + 4] == b"\x10\0":
            syntax = content[offset + header : offset + header + length].decode("ascii", "replace").strip("\0 ")
        if length == _UNDEFINED:
            break
        offset += header + length
    require_limits()
    return offset, syntax
