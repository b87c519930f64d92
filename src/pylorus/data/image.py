"""An image file as an RGB array, and the array as the network's square: the one decoder and the one resize.

The policy, the same in training and in prediction:

* The format is told by the content, not by the name: JPEG, PNG, BMP, TIFF, WebP. Others are refused.
* An EXIF orientation is applied.
* Grey is copied to three channels; a palette and CMYK become RGB; alpha is laid over black,
  as around the field of view.
* 16 bits a channel are reduced to 8 by dropping the lower half, over the full range of 16 bits.
* 32-bit integers and floating point have no stated range: refused. So are files with several pages or frames, which
  hold no single image, and truncated files, which would train on grey bands.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
POLICY_VERSION = 1
"""Counts up when the same file would give another image: what was kept of images is then computed anew."""
MOST_PIXELS = 200_000_000
"""A file that claims more is taken for a decompression bomb."""

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

RGB = NDArray[np.uint8]
"""An image of shape (height, width, 3)."""


class UnreadableImageError(ValueError):
    """A file that gives no image under the policy; the message says why, without the file's name."""


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
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                return _upright_rgb(image)
    except UnidentifiedImageError:
        if content[:4] in (b"II*\0", b"MM\0*"):
            return _deep_tiff(content)
        raise UnreadableImageError(
            f"no readable JPEG, PNG, BMP, TIFF or WebP image: it begins with {content[:8]!r}"
        ) from None
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise UnreadableImageError(f"damaged: {error}") from error


def read(path: Path) -> RGB:
    """The image in a file.

    Raises:
        UnreadableImageError: Names the file and what is wrong with it.
    """
    try:
        return decode(path.read_bytes())
    except (OSError, UnreadableImageError) as error:
        raise UnreadableImageError(f"{path}: {error}") from error


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


def _upright_rgb(image: Image.Image) -> RGB:
    if image.width * image.height > MOST_PIXELS:
        raise UnreadableImageError(f"{image.width} × {image.height} pixels are over the limit of {MOST_PIXELS:,}")
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
        shown = upright.convert("RGBA")
        ground = Image.new("RGBA", shown.size, (0, 0, 0, 255))
        upright = Image.alpha_composite(ground, shown)
    return np.asarray(upright.convert("RGB"))


def _three_channels(grey: NDArray[np.uint8]) -> RGB:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _deep_tiff(content: bytes) -> RGB:
    """A TIFF of three channels with 16 bits each, which Pillow does not know."""
    import cv2

    known, decoded = cv2.imdecodemulti(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if not known or len(decoded) != 1 or decoded[0].dtype != np.uint16 or decoded[0].ndim != 3:
        raise UnreadableImageError("a TIFF of a kind that can't be read, or damaged")
    deep = np.asarray(decoded[0], dtype=np.uint16)
    if deep.shape[2] == 4:
        deep = _over_black(deep)
    return np.ascontiguousarray((deep[:, :, ::-1] >> 8).astype(np.uint8))


def _over_black(deep: NDArray[np.uint16]) -> NDArray[np.uint16]:
    opaque = deep[:, :, :3].astype(np.uint32) * deep[:, :, 3:] // 65535
    return opaque.astype(np.uint16)
