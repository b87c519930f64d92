"""An image file as an RGB array, and the array as the network's square: the one decoder and the one resize.

The policy, the same in training and in prediction. The format is told by the content, not by the name.

=============================  ==================================================================================
what is found                  what it gives
=============================  ==================================================================================
JPEG, PNG, BMP, TIFF, WebP     an image, upright as its EXIF orientation says; a JPEG's preview frames (MPO) are left
DICOM (`dicom.py`)             an image, if the extra `dicom` is installed; else an error that says what to install
grey, palette, CMYK            RGB; an ICC profile is not applied
alpha                          laid over black, as around the field of view
16 bits a channel              the upper half: 8 bits over the full range of 16
32 bits, floating point        refused: they have no stated range
several pages or frames        refused: no single image
empty, text, HTML, GIF, …      refused: no readable image, with its first bytes
cut anywhere                   refused as truncated or damaged (`whole.py`, `tiff.py`)
wrong checksum (PNG)           refused as damaged
over `MOST_PIXELS`             refused before the pixels are unpacked, so are decompression bombs
over `content.MOST_BYTES`      refused before it is read
folder, pipe, device, socket   refused at once, nothing waits for a writer
gone, broken or looping link   refused with the system's reason
no permission                  refused with the system's reason
changes while it is read       refused: is it still being copied?
any name                       read; what is unprintable in it is escaped in messages
=============================  ==================================================================================

What is not found: flipped or shifted bytes among pixels that have no checksum (all formats but PNG), and a JPEG that
was cut and then closed with an end marker. They give an image with false colours or a grey band. About damaged TIFF,
libtiff writes lines of its own to the terminal.
"""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from pylorus.data.content import Place, contents
from pylorus.data.tiff import check_pieces, deep_colour, is_tiff
from pylorus.data.unreadable import UnreadableImageError as UnreadableImageError
from pylorus.data.unreadable import shown
from pylorus.data.whole import check_whole, is_webp, webp_size

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom")
POLICY_VERSION = 2
"""Counts up when the same file would give another image: what was kept of images is then computed anew."""
MOST_PIXELS = 25_000_000
"""A file that claims more is taken for a decompression bomb; so many, with alpha, take less than 1 GiB to decode."""

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

RGB = NDArray[np.uint8]
"""An image of shape (height, width, 3)."""


def decode(content: bytes) -> RGB:
    """The image that a file's content holds.

    Args:
        content: All bytes of the file.

    Returns:
        RGB, upright, of shape (height, width, 3).

    Raises:
        UnreadableImageError: If it is not an image, is damaged, or is of a kind that the policy refuses.
    """
    if not content:
        raise UnreadableImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit, and damaged EXIF is not damaged image
            return _decoded(content)
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"its pixels are over the limit of {MOST_PIXELS:,}") from error
    except Exception as error:  # Pillow's and pydicom's decoders raise nearly anything on damaged files
        raise UnreadableImageError(f"damaged: {error or type(error).__name__}") from error


def read(path: Place) -> RGB:
    """The image at a place: in a file, or in a shard.

    Raises:
        UnreadableImageError: Names the file and what is wrong with it.
    """
    try:
        return decode(contents(path))
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{shown(path)}: {error}") from error


def fit(image: RGB, *, size: int, how: str, interpolation: str) -> RGB:
    """The image as a square of `size` pixels.

    Args:
        image: Of shape (height, width, 3).
        size: Side of the square in pixels.
        how: `pad` keeps all of the frame and its proportions, black fills the rest; `stretch` keeps all of it;
            `crop` keeps the proportions and the centre.
        interpolation: nearest, bilinear, bicubic or lanczos, with antialiasing as in timm's own evaluation.

    Returns:
        Of shape (size, size, 3).
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    sides = {"pad": max(height, width), "crop": min(height, width)}
    scale = size / sides[how] if how in sides else 0.0
    target = (max(1, round(width * scale)), max(1, round(height * scale))) if how in sides else (size, size)
    resized = np.asarray(Image.fromarray(image).resize(target, RESAMPLING[interpolation]))
    if how == "crop":
        top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
        return resized[top : top + size, left : left + size]
    if how == "stretch":
        return resized
    square = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - resized.shape[0]) // 2, (size - resized.shape[1]) // 2
    square[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
    return square


def _decoded(content: bytes) -> RGB:
    if content[128:132] == b"DICM":
        from pylorus.data.dicom import decode_dicom

        return decode_dicom(content, most_pixels=MOST_PIXELS)
    if is_webp(content):
        _check_size(*webp_size(content))
    try:
        opened = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        if is_tiff(content):
            return deep_colour(content, most_pixels=MOST_PIXELS)
        raise UnreadableImageError(
            f"no readable JPEG, PNG, BMP, TIFF or WebP image: it begins with {content[:8]!r}"
        ) from None
    with opened as image:
        _check_size(*image.size)
        check_whole(content)
        if isinstance(image, TiffImageFile):
            check_pieces(image.tag_v2, len(content))
        return _upright_rgb(image)


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UnreadableImageError(f"{width} × {height} pixels are over the limit of {MOST_PIXELS:,}")


def _upright_rgb(image: Image.Image) -> RGB:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's MPO is one photograph with a preview
        raise UnreadableImageError(f"holds {frames} pages or frames, expected a single image")
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I;16", "I;16B", "I;16L", "I;16N"):
        return _three_channels((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.mode in ("I", "F"):
        raise UnreadableImageError(
            f"pixels of mode {upright.mode} (32 bits) have no stated range, expected 8 or 16 bits"
        )
    if upright.has_transparency_data:
        shown_pixels = upright.convert("RGBA")
        ground = Image.new("RGBA", shown_pixels.size, (0, 0, 0, 255))
        upright = Image.alpha_composite(ground, shown_pixels)
    return np.asarray(upright.convert("RGB"))


def _three_channels(grey: NDArray[np.uint8]) -> RGB:
    return np.repeat(grey[:, :, None], 3, axis=2)
