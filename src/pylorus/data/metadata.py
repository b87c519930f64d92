"""Read the metadata of an image file: format, colour mode, orientation, and names of tags that may identify a person.

Values of tags are never stored, only their names.
"""

import io
import warnings
from dataclasses import dataclass

from PIL import ExifTags, Image

from pylorus.data.image import FORMATS

SUFFIXES_OF = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""File name suffixes of each format."""

ORIENTATION, EXIF, GPS = 0x0112, 0x8769, 0x8825

PERSONAL = frozenset(
    [
        "Artist",
        "Copyright",
        "ImageDescription",
        "DateTime",
        "DateTimeOriginal",
        "DateTimeDigitized",
        "HostComputer",
        "DocumentName",
        "XPAuthor",
        "XPComment",
        "XPTitle",
        "XPSubject",
        "XPKeywords",
        "CameraOwnerName",
        "BodySerialNumber",
        "LensSerialNumber",
        "CameraSerialNumber",
        "ImageUniqueID",
        "UserComment",
        "MakerNote",
    ]
)
"""EXIF tags that may identify a person, a place, a time or a single device."""

TEXT_KEYS = {"xmp": "XMP", "XML:com.adobe.xmp": "XMP", "photoshop": "IPTC", "comment": "comment"}
"""Pillow's names of other places for text, and the names reported here."""


@dataclass(frozen=True)
class Metadata:
    """Contents of a file's header.

    Attributes:
        format: JPEG, PNG, BMP, TIFF, WEBP or MPO; empty if the header can't be read.
        mode: Pillow's name of the colour mode, such as RGB, L, CMYK.
        orientation: EXIF orientation, 1 to 8; 1 is upright.
        personal: Names of tags that may identify a person, in alphabetical order.
    """

    format: str = ""
    mode: str = ""
    orientation: int = 1
    personal: tuple[str, ...] = ()


def read_metadata(content: bytes) -> Metadata:
    """Read the header of a file, not its pixels. If it can't be read, the result is empty; the decoder says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                orientation, personal = _read_exif(image)
                return Metadata(image.format or "", image.mode, orientation, personal)
    except Exception:  # Pillow raises almost any exception on a damaged header
        is_deep_tiff = content[:4] in (b"II*\0", b"MM\0*")
        return Metadata(format="TIFF", mode="16 bits") if is_deep_tiff else Metadata()


def _read_exif(image: Image.Image) -> tuple[int, tuple[str, ...]]:
    names = {TEXT_KEYS[key] for key in image.info if key in TEXT_KEYS}
    if image.format == "PNG" and getattr(image, "text", None):
        names.add("PNG text")
    try:
        tags = image.getexif()
        all_tags = dict(tags) | dict(tags.get_ifd(EXIF))
        if tags.get_ifd(GPS):
            names.add("GPS")
        value = all_tags.get(ORIENTATION, 1)
    except Exception:  # damaged EXIF does not make the image unreadable
        return 1, tuple(sorted(names))
    tag_names = {ExifTags.TAGS.get(tag, "") for tag, content in all_tags.items() if _has_text(content)}
    orientation = value if isinstance(value, int) and 1 <= value <= 8 else 1
    return orientation, tuple(sorted(names | (tag_names & PERSONAL)))


def _has_text(value: object) -> bool:
    if isinstance(value, bytes):
        return bool(value.removeprefix(b"ASCII\0\0\0").strip(b"\0 "))
    return bool(str(value).strip("\0 "))
