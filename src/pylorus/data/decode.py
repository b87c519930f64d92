"""Decode an image file to an RGB array and resize the array to the network's input: the one decoder and the one resize.

Training and prediction follow the same policy. The format is detected from the content, not from the name.

=============================  ==================================================================================
file                           result
=============================  ==================================================================================
JPEG, PNG, BMP, TIFF, WebP     an image, upright by its EXIF orientation; previews in a JPEG (MPO) are ignored
DICOM (`dicom.py`)             an image, if the extra `dicom` is installed; otherwise an error that says what to install
grey, palette, CMYK            converted to RGB; an ICC profile is not applied
alpha                          composited over black, as around the field of view
16 bits per channel            the upper 8 bits, so that the full range of 16 bits maps to that of 8
32 bits, floating point        rejected: the range of values is undefined
several pages or frames        rejected: not a single image
empty, text, HTML, GIF, …      rejected: not a readable image; the message quotes the first bytes
truncated anywhere             rejected as truncated or damaged (`files.py`)
wrong checksum (PNG)           rejected as damaged
over `MAX_PIXELS`              rejected before the pixels are decompressed, as are decompression bombs
over `files.MAX_BYTES`         rejected before it is read
folder, pipe, device, socket   rejected at once, without waiting for a writer
missing, broken, looping link  rejected with the system's reason
no permission                  rejected with the system's reason
changes while it is read       rejected: is it still being copied?
any name                       read; unprintable characters are escaped in messages
=============================  ==================================================================================

Not detected: flipped or shifted bytes in pixel data without checksums (all formats except PNG), and a JPEG that was
truncated and then closed with an end marker. Such files give an image with wrong colours or a grey band. For damaged
TIFF files, libtiff prints its own messages to the terminal.
"""

import io
import warnings

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from pylorus.core.errors import UnreadableImageError as UnreadableImageError
from pylorus.core.errors import format_path
from pylorus.data.files import (
    FORMATS,
    RGB,
    ImageLocation,
    check_container,
    check_pieces,
    decode_deep_tiff,
    is_tiff,
    is_webp,
    read_image_bytes,
    read_webp_size,
)

DECODER_VERSION = 2
"""Increase it, and the policy, when the same file would decode to another image: all facts are then recomputed."""
POLICY_VERSION = 3
"""Increase it when the same file would give the network another input: what is cached of inputs is then recomputed."""
POLICIES = (2, 3)
"""Policies that can be followed, for bundles of earlier versions; policy 2 resizes large frames in a single step."""
MAX_PIXELS = 25_000_000
"""A file that declares more is treated as a decompression bomb; decoding this many, with alpha, takes < 1 GiB."""

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def decode_image(content: bytes) -> RGB:
    """Decode the content of an image file.

    Args:
        content: All bytes of the file.

    Returns:
        RGB, upright, uint8 of shape (height, width, 3).

    Raises:
        UnreadableImageError: If it is not an image, is damaged, or is of a kind that the policy rejects.
    """
    if not content:
        raise UnreadableImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            # Pylorus has its own pixel limit, and damaged EXIF data do not make an image unusable.
            warnings.simplefilter("ignore")
            return _decode_content(content)
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(f"its pixels are over the limit of {MAX_PIXELS:,}") from error
    except Exception as error:  # the decoders of Pillow and pydicom raise almost anything on damaged files
        raise UnreadableImageError(f"damaged: {error or type(error).__name__}") from error


def read_image(path: ImageLocation) -> RGB:
    """Read and decode an image from a file or a shard.

    Raises:
        UnreadableImageError: Names the file and what is wrong with it.
    """
    try:
        return decode_image(read_image_bytes(path))
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{format_path(path)}: {error}") from error


def resize_image(
    image: RGB,
    *,
    size: int,
    how: str,
    interpolation: str,
    policy: int = POLICY_VERSION,
    half: RGB | None = None,
) -> RGB:
    """Resize an image to a square of `size` pixels.

    While both sides are at least four times as long as needed, the image is first halved by averaging 2 × 2 pixels.
    That takes half the time of a single step. In synthetic frames of 1280 × 1024 pixels, the results differ by 0.1 grey
    levels on average and by 4 at most.

    Args:
        image: RGB, uint8 of shape (height, width, 3).
        size: Side of the square in pixels.
        how: `pad` keeps the whole frame and its aspect ratio and fills the rest with black; `stretch` keeps the whole
            frame but not its aspect ratio; `crop` keeps the aspect ratio and the centre.
        interpolation: nearest, bilinear, bicubic or lanczos, with antialiasing as in timm's own evaluation.
        policy: One of `POLICIES`; with policy 2, no frame is halved.
        half: The image halved in the same way, if that is known already.

    Returns:
        RGB, uint8 of shape (size, size, 3).
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    reference_sides = {"pad": max(height, width), "crop": min(height, width)}
    scale = size / reference_sides[how] if how in reference_sides else 0.0
    target = (max(1, round(width * scale)), max(1, round(height * scale))) if how in reference_sides else (size, size)
    left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    while policy > 2 and interpolation != "nearest" and right >= 4 * target[0] and bottom >= 4 * target[1]:
        image, half = (_halve_image(image) if half is None else half), None
        right, bottom = right / 2, bottom / 2
    box = left, top, right, bottom
    resized = np.asarray(Image.fromarray(image).resize(target, RESAMPLING[interpolation], box))
    if how == "crop":
        top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
        return resized[top : top + size, left : left + size]
    if how == "stretch":
        return resized
    square = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - resized.shape[0]) // 2, (size - resized.shape[1]) // 2
    square[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
    return square


def _halve_image(image: RGB) -> RGB:
    """Average 2 × 2 pixels, rounded half up, as Pillow's `reduce(2)` does; a last odd row or column counts twice."""
    height, width = image.shape[:2]
    if height % 2 or width % 2:
        image = np.asarray(cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE), np.uint8)
    return np.asarray(cv2.resize(image, (-(-width // 2), -(-height // 2)), interpolation=cv2.INTER_AREA), np.uint8)


def _decode_content(content: bytes) -> RGB:
    if content[128:132] == b"DICM":
        from pylorus.data.dicom import decode_dicom

        return decode_dicom(content, max_pixels=MAX_PIXELS)
    if is_webp(content):
        _check_size(*read_webp_size(content))
    try:
        pillow_image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        if is_tiff(content):
            return decode_deep_tiff(content, max_pixels=MAX_PIXELS)
        raise UnreadableImageError(
            f"no readable JPEG, PNG, BMP, TIFF or WebP image: it begins with {content[:8]!r}"
        ) from None
    with pillow_image as image:
        _check_size(*image.size)
        check_container(content)
        if isinstance(image, TiffImageFile):
            check_pieces(image.tag_v2, len(content))
        return _convert_to_rgb(image)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(f"{width} × {height} pixels are over the limit of {MAX_PIXELS:,}")


def _convert_to_rgb(image: Image.Image) -> RGB:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # an MPO from a camera is one photograph with a preview
        raise UnreadableImageError(f"holds {frames} pages or frames, expected a single image")
    ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies an image that is upright
    upright = image
    if upright.mode in ("I;16", "I;16B", "I;16L", "I;16N"):
        return _convert_grey_to_rgb((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.mode in ("I", "F"):
        raise UnreadableImageError(
            f"pixels of mode {upright.mode} (32 bits) have an undefined range, expected 8 or 16 bits"
        )
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        upright = Image.alpha_composite(background, rgba)
    return _export_rgb(upright if upright.mode == "RGB" else upright.convert("RGB"))


def _export_rgb(image: Image.Image) -> RGB:
    """Return the pixels of an RGB image.

    Pillow stores four bytes a pixel and shares them through Arrow's interface, except those of a very large image.
    NumPy's interface copies them twice, for a fifth of the time that decoding takes.
    """
    try:
        shared = pa.array(image).flatten().to_numpy(zero_copy_only=True)
    except (ValueError, TypeError, pa.ArrowException):  # several blocks of memory, or a Pillow before 11.3
        return np.asarray(image)
    return np.asarray(cv2.cvtColor(shared.reshape(image.height, image.width, 4), cv2.COLOR_RGBA2RGB), dtype=np.uint8)


def _convert_grey_to_rgb(grey: NDArray[np.uint8]) -> RGB:
    return np.repeat(grey[:, :, None], 3, axis=2)
