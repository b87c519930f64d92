"""Measures of one image or file: metadata, fingerprints for the search for copies, and quality.

Of tags that may identify a person, only the names are read, never the values. Fingerprints are thumbnails of 1,024
bytes and 64-bit perceptual hashes of their eight orientations. The black around the field of view, the same in every
frame of an endoscope, has no weight in them; otherwise two frames would be similar because the octagon around them is
the same. Quality is sharpness, brightness, black border and burned-in text.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from pylorus.data.files import FORMATS, RGB

FORMAT_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""File name suffixes of each format."""

ORIENTATION, EXIF, GPS = 0x0112, 0x8769, 0x8825

PERSONAL_TAGS = frozenset(
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
    return orientation, tuple(sorted(names | (tag_names & PERSONAL_TAGS)))


def _has_text(value: object) -> bool:
    if isinstance(value, bytes):
        return bool(value.removeprefix(b"ASCII\0\0\0").strip(b"\0 "))
    return bool(str(value).strip("\0 "))


THUMBNAIL_SIDE = 32
"""Side length of a thumbnail in pixels."""
BLACK, FULL_WEIGHT = 10.0, 34.0
"""Grey levels up to which a pixel has weight 0, and from which it has weight 1."""
BLOCK = 8192
"""Thumbnails that are processed at once."""
ORIENTATIONS = (
    "as it is",
    "rotated by 90°",
    "rotated by 180°",
    "rotated by 270°",
    "mirrored",
    "mirrored and rotated by 90°",
    "mirrored and rotated by 180°",
    "mirrored and rotated by 270°",
)
"""Names of the eight orientations, in the order of `transform_thumbnails`."""

Thumbnails = NDArray[np.uint8]
"""Grey thumbnails of shape (images, SIDE, SIDE)."""


def reduce_image(image: RGB) -> RGB:
    """Reduce an image by a whole factor, so that its longer side has at most `TEXT_SIDE` pixels.

    Averaging over whole pixels is fast: nothing measured here needs the full resolution.

    Args:
        image: RGB, uint8 of shape (height, width, 3).

    Returns:
        RGB, uint8 of shape (height // factor, width // factor, 3); the image itself if it is small.
    """
    factor = -(-max(image.shape) // TEXT_SIDE)
    height, width = image.shape[:2]
    if factor == 1 or min(height, width) < factor:
        return image
    # Further rows and columns that don't fill a whole block are left out.
    whole = image[: height // factor * factor, : width // factor * factor]
    size = (width // factor, height // factor)
    return np.asarray(cv2.resize(whole, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def compute_thumbnail(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Resize a grey image of shape (height, width) to (SIDE, SIDE), without keeping its proportions."""
    return np.asarray(cv2.resize(grey, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def transform_thumbnails(thumbnails: Thumbnails, position: int) -> Thumbnails:
    """Return all thumbnails in one of the eight orientations; `position` is an index into `ORIENTATIONS`."""
    oriented = thumbnails[:, :, ::-1] if position >= 4 else thumbnails
    return np.rot90(oriented, k=position % 4, axes=(1, 2))


def compute_hashes(thumbnails: Thumbnails) -> NDArray[np.uint64]:
    """Compute the perceptual hash of each thumbnail: which of its 64 lowest frequencies exceed their median.

    The transform is the discrete cosine transform without its constant, over SIDE × SIDE pixels (Zauner 2010).

    Returns:
        Hashes of shape (images,).
    """
    return _map_blocks(_compute_block_hashes, thumbnails, np.uint64)


def _compute_block_hashes(thumbnails: Thumbnails) -> NDArray[np.uint64]:
    filled = _replace_black(thumbnails)
    frequencies, pixels = np.arange(1, 9)[:, None], np.arange(THUMBNAIL_SIDE)[None, :]
    basis = np.cos(np.pi * frequencies * (2 * pixels + 1) / (2 * THUMBNAIL_SIDE)).astype(np.float32)
    spectrum = (basis @ filled @ basis.T).reshape(-1, 64)
    bits = spectrum > np.median(spectrum, axis=1, keepdims=True)
    return np.ascontiguousarray(np.packbits(bits, axis=1)).view(np.uint64).reshape(-1)


def compute_contrast(thumbnails: Thumbnails) -> NDArray[np.float32]:
    """Compute the standard deviation of each thumbnail's grey levels outside the black; near 0, an image is blank."""
    return _map_blocks(_compute_block_contrast, thumbnails, np.float32)


def _compute_block_contrast(thumbnails: Thumbnails) -> NDArray[np.float32]:
    weight = _compute_weight(thumbnails)
    total = np.maximum(weight.sum(axis=(1, 2)), 1.0)
    offset = thumbnails - ((weight * thumbnails).sum(axis=(1, 2)) / total)[:, None, None]
    return np.asarray(np.sqrt((weight * offset**2).sum(axis=(1, 2)) / total), dtype=np.float32)


def compute_similarity(first: Thumbnails, second: Thumbnails) -> NDArray[np.float32]:
    """Compute the similarity of pairs of thumbnails: the correlation of their fine structure, in [-1, 1].

    What is smooth over a quarter of the frame is subtracted first: images of different subjects share a pale center on
    a darker background, or illumination that falls off toward the edge.

    Returns:
        Similarities of shape (pairs,).
    """
    weight = _compute_weight(first) * _compute_weight(second)
    total = np.maximum(weight.sum(axis=(1, 2), keepdims=True), 1e-6)

    def filter_fine_structure(thumbnails: Thumbnails) -> NDArray[np.float32]:
        filled = _replace_black(thumbnails)
        smooth = np.stack([cv2.GaussianBlur(each, (0, 0), THUMBNAIL_SIDE / 8) for each in filled])
        fine = filled - smooth
        return np.asarray(fine - (weight * fine).sum(axis=(1, 2), keepdims=True) / total, dtype=np.float32)

    if not len(first):
        return np.zeros(0, dtype=np.float32)
    first_fine, second_fine = filter_fine_structure(first), filter_fine_structure(second)
    covariance = (weight * first_fine * second_fine).sum(axis=(1, 2))
    norm = np.sqrt((weight * first_fine**2).sum(axis=(1, 2)) * (weight * second_fine**2).sum(axis=(1, 2)))
    return np.asarray(covariance / np.maximum(norm, 1e-6), dtype=np.float32)


def _map_blocks(measure: Callable[[Thumbnails], NDArray[Any]], thumbnails: Thumbnails, kind: type) -> NDArray[Any]:
    """Apply `measure` in blocks: all thumbnails as floating-point numbers would take four times the memory."""
    parts = [measure(thumbnails[begin : begin + BLOCK]) for begin in range(0, len(thumbnails), BLOCK)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=kind)


def _compute_weight(thumbnails: Thumbnails) -> NDArray[np.float32]:
    return np.asarray(
        np.clip((thumbnails.astype(np.float32) - BLACK) / (FULL_WEIGHT - BLACK), 0.0, 1.0), dtype=np.float32
    )


def _replace_black(thumbnails: Thumbnails) -> NDArray[np.float32]:
    """Replace black by the mean of the visible pixels, without a hard edge that noise could shift."""
    weight = _compute_weight(thumbnails)
    mean = (weight * thumbnails).sum(axis=(1, 2)) / np.maximum(weight.sum(axis=(1, 2)), 1e-6)
    return np.asarray(mean[:, None, None] + weight * (thumbnails - mean[:, None, None]), dtype=np.float32)


MEASURED_SIDE = 256
"""Longer side in pixels at which sharpness and border are measured: otherwise sharpness would depend on the size."""
TEXT_SIDE = 1024
"""Longest side in pixels at which text is searched for."""
MAX_BORDER_LEVEL = 24
"""Grey level up to which a pixel connected to the frame's edge is border."""

Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageMeasures:
    """Measures of one image.

    Attributes:
        sharpness: Variance of the Laplacian outside the border, in grey levels squared.
        brightness: Mean grey level outside the border, in [0, 255].
        border: Fraction of the frame that is dark and connected to its edge, in [0, 1].
        letters: Number of small bright shapes of the size of letters in the border.
    """

    sharpness: float
    brightness: float
    border: float
    letters: int


def measure_image(grey: Grey) -> ImageMeasures:
    """Measure a grey image of shape (height, width), reduced by `reduce_image`."""
    resized = _resize_to_limit(grey, MEASURED_SIDE)
    border = _find_edge_regions(resized <= MAX_BORDER_LEVEL)
    interior = cv2.erode((~border).astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=1).astype(bool)
    if not interior.any():
        interior = np.ones_like(border)
    laplacian = cv2.Laplacian(resized, cv2.CV_32F)
    return ImageMeasures(
        sharpness=float(laplacian[interior].var()),
        brightness=float(resized[interior].mean()),
        border=float(border.mean()),
        letters=count_letters(grey),
    )


def count_letters(grey: Grey) -> int:
    """Count bright shapes of the size of letters in the dark border of a frame.

    This indicates text but does not read it. It misses text over the mucosa, letters that touch the field of view and
    dark letters on a bright bar; a logo or a scale in the border counts as letters.

    Args:
        grey: Image of shape (height, width).

    Returns:
        Number of shapes; four or more indicate text.
    """
    longest = max(grey.shape)
    if longest < 96:
        return 0  # letters would have a few pixels only
    stroke = max(5, round(longest / 40) | 1)
    background = cv2.morphologyEx(grey, cv2.MORPH_OPEN, np.ones((stroke, stroke), np.uint8))
    border = _find_edge_regions(np.asarray(background <= 2 * MAX_BORDER_LEVEL))
    strokes = border & (cv2.subtract(grey, background) >= 60)
    rows, columns = np.flatnonzero(strokes.any(axis=1)), np.flatnonzero(strokes.any(axis=0))
    if not len(rows):
        return 0
    strokes = strokes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # the search takes long in a large image
    count, _, stats, _ = cv2.connectedComponentsWithStats(strokes.astype(np.uint8), connectivity=8)
    height, width, area = (stats[1:count, which] for which in (cv2.CC_STAT_HEIGHT, cv2.CC_STAT_WIDTH, cv2.CC_STAT_AREA))
    has_letter_height = (height >= max(4, longest / 100)) & (height <= longest / 16)
    return int((has_letter_height & (width <= longest / 8) & (area >= 4)).sum())


def _resize_to_limit(grey: Grey, longest: int) -> Grey:
    scale = longest / max(grey.shape)
    if scale >= 1:
        return grey
    target = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    return np.asarray(cv2.resize(grey, target, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _find_edge_regions(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the connected components of a mask that touch the frame's edge."""
    padded = np.ones((mask.shape[0] + 2, mask.shape[1] + 2), np.uint8)
    padded[1:-1, 1:-1] = mask
    cv2.floodFill(padded, None, (0, 0), 2)
    return np.asarray(padded[1:-1, 1:-1] == 2, dtype=np.bool_)
