"""What a file tells beside its pixels: its format, colour mode, and names of tags that may name a person.

Values of tags are never kept, only that they are there.
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
"""Which suffixes go with a format."""

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
"""EXIF tags that may name a person, a place, a time or one device."""

BESIDE_EXIF = {"xmp": "XMP", "XML:com.adobe.xmp": "XMP", "photoshop": "IPTC", "comment": "comment"}
"""Other places for texts, as Pillow calls them."""


@dataclass(frozen=True)
class Metadata:
    """What a file's head says.

    Attributes:
        format: JPEG, PNG, BMP, TIFF, WEBP or MPO; empty where the head can't be read.
        mode: Pillow's name of the colour mode, such as RGB, L, CMYK.
        orientation: Of EXIF, 1 to 8; 1 is upright.
        personal: Names of tags that may name a person, in alphabetical order.
    """

    format: str = ""
    mode: str = ""
    orientation: int = 1
    personal: tuple[str, ...] = ()


def metadata_of(content: bytes) -> Metadata:
    """Reads the head of a file; no pixels. A head that can't be read gives nothing: the decoder says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                orientation, personal = _exif(image)
                return Metadata(image.format or "", image.mode, orientation, personal)
    except Exception:  # Pillow raises nearly anything on a damaged head
        deep = content[:4] in (b"II*\0", b"MM\0*")
        return Metadata(format="TIFF", mode="16 bits") if deep else Metadata()


def _exif(image: Image.Image) -> tuple[int, tuple[str, ...]]:
    names = {BESIDE_EXIF[key] for key in image.info if key in BESIDE_EXIF}
    if image.format == "PNG" and getattr(image, "text", None):
        names.add("PNG text")
    try:
        tags = image.getexif()
        every = dict(tags) | dict(tags.get_ifd(EXIF))
        if tags.get_ifd(GPS):
            names.add("GPS")
        value = every.get(ORIENTATION, 1)
    except Exception:  # damaged EXIF is not a damaged image
        return 1, tuple(sorted(names))
    found = {ExifTags.TAGS.get(tag, "") for tag, held in every.items() if _says_something(held)}
    orientation = value if isinstance(value, int) and 1 <= value <= 8 else 1
    return orientation, tuple(sorted(names | (found & PERSONAL)))


def _says_something(held: object) -> bool:
    if isinstance(held, bytes):
        return bool(held.removeprefix(b"ASCII\0\0\0").strip(b"\0 "))
    return bool(str(held).strip("\0 "))
