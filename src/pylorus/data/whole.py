"""Check the integrity of image files, where decoders are too lenient.

Pillow decodes a JPEG without its end marker, and a PNG with wrong checksums or without its last chunk. Such a file was
truncated or damaged in transfer. It may look right, or end in a grey band.
"""

import zlib

from pylorus.data.unreadable import UnreadableImageError

MOST_SCANS = 200
"""Scans allowed in a progressive JPEG, which has about ten; thousands would keep a decoder busy for minutes."""

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_MARKERS_WITHOUT_LENGTH = frozenset([0x00, 0x01, *range(0xD0, 0xD9)])  # JPEG markers without a length
_SCAN, _END = 0xDA, 0xD9
_PROGRESSIVE = frozenset([0xC2, 0xC6, 0xCA, 0xCE])


def check_container(content: bytes) -> None:
    """Check the container of a JPEG, PNG or WebP; other content is accepted.

    Args:
        content: All bytes of the file.

    Raises:
        UnreadableImageError: If the file is truncated, a checksum is wrong, or a JPEG has too many scans.
    """
    if content.startswith(_JPEG):
        _check_jpeg(content)
    elif content.startswith(_PNG):
        _check_png(content)
    elif is_webp(content):
        claimed = int.from_bytes(content[4:8], "little") + 8
        if claimed > len(content):
            raise UnreadableImageError(f"damaged: truncated: {len(content)} of {claimed} bytes")


def is_webp(content: bytes) -> bool:
    """Return whether a file has the signature of a WebP image."""
    return content[:4] == b"RIFF" and content[8:12] == b"WEBP"


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


def _check_jpeg(content: bytes) -> None:
    scan, progressive = _find_first_scan(content)
    if scan < 0 or content.rfind(b"\xff\xd9", scan) < 0:
        raise UnreadableImageError("damaged: truncated: the JPEG's end is missing")
    if progressive and (scans := content.count(b"\xff\xda", scan)) > MOST_SCANS:
        raise UnreadableImageError(f"has {scans} scans, over the limit of {MOST_SCANS}")


def _find_first_scan(content: bytes) -> tuple[int, bool]:
    """Return the offset of the first scan, or -1, and whether the JPEG is progressive.

    The first scan follows all metadata, including a thumbnail with an end marker of its own.
    """
    offset, progressive = 2, False
    while 0 <= offset < len(content) - 3:
        marker = content[offset + 1]
        if content[offset] != 0xFF or marker == 0xFF:  # stray or fill bytes
            offset = content.find(b"\xff", offset + 1)
        elif marker == _SCAN:
            return offset, progressive
        elif marker == _END:
            break
        elif marker in _MARKERS_WITHOUT_LENGTH:
            offset += 2
        else:
            progressive |= marker in _PROGRESSIVE
            offset += 2 + int.from_bytes(content[offset + 2 : offset + 4], "big")
    return -1, progressive


def _check_png(content: bytes) -> None:
    view = memoryview(content)
    offset = len(_PNG)
    while offset + 12 <= len(content):
        length = int.from_bytes(view[offset : offset + 4], "big")
        kind, end = content[offset + 4 : offset + 8], offset + 8 + length
        if end + 4 > len(content):
            break
        if zlib.crc32(view[offset + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise UnreadableImageError(f"damaged: the PNG's chunk {kind!r} at byte {offset} has a wrong checksum")
        if kind == b"IEND":
            return
        offset = end + 4
    raise UnreadableImageError("damaged: truncated: the PNG's end is missing")
