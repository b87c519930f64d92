"""Handle what Pillow does not do for TIFF: detect truncated pixel data, and decode color with 16 bits per channel."""

import io
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from pylorus.data.unreadable import UnreadableImageError

_WIDTH, _HEIGHT, _ORIENTATION = 256, 257, 274
_PIECES = ((273, 279), (324, 325))  # offsets and byte counts of strips, and of tiles


def is_tiff(content: bytes) -> bool:
    """Return whether a file has the signature of a TIFF."""
    return content[:4] in (b"II*\0", b"MM\0*")


def check_pieces(tags: Mapping[int, object], length: int) -> None:
    """Check that all strips or tiles are within the file.

    Args:
        tags: Tags of the page, by number.
        length: Length of the file in bytes.

    Raises:
        UnreadableImageError: If one is not: the file is truncated.
    """
    for offsets, counts in _PIECES:
        for offset, count in zip(
            _extract_integers(tags.get(offsets)), _extract_integers(tags.get(counts)), strict=False
        ):
            if offset + count > length:
                raise UnreadableImageError(
                    f"damaged: truncated: pixels end at byte {offset + count}, the file at byte {length}"
                )


def decode_deep_tiff(content: bytes, *, most_pixels: int) -> NDArray[np.uint8]:
    """Decode a TIFF of three or four channels with 16 bits each, which Pillow does not support.

    Args:
        content: All bytes of the file.
        most_pixels: A file whose header claims more is rejected before decoding.

    Returns:
        RGB of shape (height, width, 3), upright, the upper 8 of the 16 bits; alpha is composited over black.

    Raises:
        UnreadableImageError: If it is another kind of TIFF, is damaged or has several pages.
    """
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it would print what is raised here
    tags = _read_only_page(content)
    width, height = _extract_integers(tags.get(_WIDTH)), _extract_integers(tags.get(_HEIGHT))
    if len(width) != 1 or len(height) != 1 or min(width[0], height[0]) < 1:
        raise UnreadableImageError("damaged: a TIFF without width and height")
    if width[0] * height[0] > most_pixels:
        raise UnreadableImageError(f"{width[0]} × {height[0]} pixels are over the limit of {most_pixels:,}")
    check_pieces(tags, len(content))
    is_decoded, pages = cv2.imdecodemulti(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if not is_decoded or len(pages) != 1 or pages[0].dtype != np.uint16 or pages[0].ndim != 3:
        raise UnreadableImageError("an unsupported kind of TIFF, or damaged")
    deep = np.asarray(pages[0], dtype=np.uint16)
    if deep.shape[2] == 4:
        _apply_alpha(deep)
    rgb = (deep[:, :, 2::-1] >> 8).astype(np.uint8)  # OpenCV returns BGR
    return np.ascontiguousarray(_rotate_upright(rgb, tags.get(_ORIENTATION)))


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


def _apply_alpha(deep: NDArray[np.uint16]) -> None:
    for channel in range(3):  # one at a time: the product needs twice the memory of its factors
        deep[:, :, channel] = deep[:, :, channel].astype(np.uint32) * deep[:, :, 3] // 65535


def _rotate_upright(image: NDArray[np.uint8], orientation: object) -> NDArray[np.uint8]:
    """Rotate an image upright by its EXIF orientation, 1 to 8; any other value counts as 1, as in Pillow."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image
