"""Whether an image file is whole: what the decoders overlook.

Pillow gives an image from a JPEG that lost its end marker and from a PNG whose checksums are wrong or whose last
chunk is missing. Such a file was cut or damaged on its way. It may look right, or end in a grey band.
"""

import zlib

from pylorus.data.unreadable import UnreadableImageError

MOST_SCANS = 200
"""A progressive JPEG has about ten; thousands of them keep a decoder busy for minutes."""

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_ALONE = frozenset([0x00, 0x01, *range(0xD0, 0xD9)])  # JPEG markers that carry no length
_SCAN, _END = 0xDA, 0xD9
_PROGRESSIVE = frozenset([0xC2, 0xC6, 0xCA, 0xCE])


def check_whole(content: bytes) -> None:
    """Look through the container of a JPEG, PNG or WebP; other content passes.

    Args:
        content: All bytes of the file.

    Raises:
        UnreadableImageError: If the file is cut or a checksum is wrong.
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
    """Whether a file says that it is a WebP image."""
    return content[:4] == b"RIFF" and content[8:12] == b"WEBP"


def webp_size(content: bytes) -> tuple[int, int]:
    """Width and height that a WebP file claims: its decoder takes memory for them as soon as it is opened.

    Returns:
        Pixels; (0, 0) where the file is too damaged to claim any.
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
    scan, progressive = _first_scan(content)
    if scan < 0 or content.rfind(b"\xff\xd9", scan) < 0:
        raise UnreadableImageError("damaged: truncated: the JPEG's end is missing")
    if progressive and (scans := content.count(b"\xff\xda", scan)) > MOST_SCANS:
        raise UnreadableImageError(f"holds {scans} scans, over the limit of {MOST_SCANS}")


def _first_scan(content: bytes) -> tuple[int, bool]:
    """Where the pixels begin, or -1, and whether they come in scans.

    That is behind all metadata and its thumbnail, which has an end marker of its own.
    """
    at, progressive = 2, False
    while 0 <= at < len(content) - 3:
        marker = content[at + 1]
        if content[at] != 0xFF or marker == 0xFF:  # stray or filling bytes
            at = content.find(b"\xff", at + 1)
        elif marker == _SCAN:
            return at, progressive
        elif marker == _END:
            break
        elif marker in _ALONE:
            at += 2
        else:
            progressive |= marker in _PROGRESSIVE
            at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return -1, progressive


def _check_png(content: bytes) -> None:
    view = memoryview(content)
    at = len(_PNG)
    while at + 12 <= len(content):
        length = int.from_bytes(view[at : at + 4], "big")
        kind, end = content[at + 4 : at + 8], at + 8 + length
        if end + 4 > len(content):
            break
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise UnreadableImageError(f"damaged: the PNG's chunk {kind!r} at byte {at} has a wrong checksum")
        if kind == b"IEND":
            return
        at = end + 4
    raise UnreadableImageError("damaged: truncated: the PNG's end is missing")
