"""Decode an image file to an RGB array and resize the array to the network's input: the one decoder and the one resize.

Training and prediction follow the same policy. The format is detected from the content, not from the name.

=============================  ==================================================================================
file                           result
=============================  ==================================================================================
JPEG, PNG, BMP, TIFF, WebP     an image, upright by its EXIF orientation; previews in a JPEG (MPO) are ignored
DICOM (`dicom.py`)             an image, if the extra `dicom` is installed; otherwise an error that says what to install
grey, palette, CMYK            converted to RGB; an ICC profile is not applied
alpha                          composited over black, as around the field of view; none if it is zero everywhere; a mask
                               if it is 0 or 1
zero is white (TIFF)           inverted, at any depth
16 bits per channel            the upper 8 of the bits in use: as the tag MaxSampleValue (TIFF) or sBIT (PNG) says, else
                               16, or 12 if no value is above 4095 (`files.choose_bits`)
16 bits, no value above 1023   rejected without such a tag: 10 or 12 bits
10, 12, 14 bits packed (TIFF)  the upper 8 bits
32 bits, signed, floats        rejected: the range of values is undefined
several pages or frames        rejected: not a single image
empty, text, HTML, GIF, …      rejected by name (`FOREIGN_FORMATS`); else the message quotes the first bytes
truncated anywhere             rejected as truncated or damaged (`files.py`)
wrong checksum (PNG)           rejected as damaged
over `MAX_PIXELS`              rejected before the pixels are decompressed, as are decompression bombs
of any cost (`structure.py`)   decoded in a process with limits, and rejected if it exceeds them (`limited_process.py`)
of hostile structure           rejected (`structure.py`): very many scans, a tag twice, pages in a circle, …
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

import hashlib
import io
import re
import warnings

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from pylorus.core.errors import UnreadableImageError as UnreadableImageError
from pylorus.core.errors import format_path
from pylorus.core.limited_process import LimitsRequiredError, call_within_limits, is_memory_error, read_budget
from pylorus.data.files import (
    DECODED_FORMATS,
    FORMATS,
    HEAD_BYTES,
    RGB,
    ImageLocation,
    check_pieces,
    convert_deep_to_rgb,
    decode_deep_tiff,
    get_tiff_bits,
    identify_format,
    is_deep_color,
    is_deep_grey,
    is_webp,
    read_image_bytes,
    read_png_bits,
    rotate_upright,
)
from pylorus.data.structure import check_container, check_header, is_tiff, read_webp_size

DECODER_VERSION = 3
"""Increase it, and the policy, when the same file would decode to another image: all facts are then recomputed."""
POLICY_VERSION = 3
"""Increase it when the same file would give the network another input: what is cached of inputs is then recomputed."""
POLICIES = (2, 3)
"""Policies that can be followed, for bundles of earlier versions.

Policy 2 resizes large frames in a single step, reads an alpha that is zero everywhere as black, takes all of 16 bits
for the range of values, and zero for black in a grey TIFF of 16 bits.
"""
MAX_PIXELS = read_budget().pixels
"""A file that declares more is treated as a decompression bomb."""
MAX_SIDE = 65_535
"""Longest side in pixels, as in a JPEG: an image of 25 million rows takes three times the memory of a square one."""

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def decode_image(content: bytes, *, policy: int = POLICY_VERSION) -> RGB:
    """Decode the content of an image file.

    Args:
        content: All bytes of the file.
        policy: One of `POLICIES`.

    Returns:
        RGB, upright, uint8 of shape (height, width, 3).

    Raises:
        UnreadableImageError: If it is not an image, is damaged, or is of a kind that the policy rejects.
    """
    if not content:
        raise UnreadableImageError("the file is empty")
    return call_within_limits(_decode_here, content, policy, MAX_PIXELS)


def _decode_here(content: bytes, policy: int, max_pixels: int) -> RGB:
    """Decode in this process; see `decode_image`.

    Raises:
        LimitsRequiredError: If only a process with limits may do this.
        MemoryError: If this machine has no memory for it.
    """
    try:
        with warnings.catch_warnings():
            # Pylorus has its own pixel limit, and damaged EXIF data do not make an image unusable.
            warnings.simplefilter("ignore")
            return _decode_content(content, policy, max_pixels)
    except (UnreadableImageError, LimitsRequiredError):
        raise
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        found = f"{int(count[0]):,}" if count is not None else "its"
        raise UnreadableImageError(f"{found} pixels are over the limit of {max_pixels:,}") from error
    except RecursionError as error:
        raise UnreadableImageError("damaged: its parts are nested too deeply") from error
    except Exception as error:  # the decoders of Pillow and pydicom raise almost anything on damaged files
        if is_memory_error(error):
            raise MemoryError(str(error)) from error
        if isinstance(error, cv2.error):  # its message names a file of OpenCV's source
            raise UnreadableImageError(f"an unsupported kind of image, or damaged: {error.err}") from error
        raise UnreadableImageError(f"damaged: {str(error) or type(error).__name__}") from error


def read_image(path: ImageLocation, *, policy: int = POLICY_VERSION, sha256: str | None = None) -> RGB:
    """Read and decode an image from a file or a shard, by one of `POLICIES`.

    Args:
        path: Where the image is.
        policy: One of `POLICIES`.
        sha256: SHA-256 that the file's content must have, of the very bytes that are decoded; None for any.

    Raises:
        UnreadableImageError: Names the file and what is wrong with it.
    """
    try:
        content = read_image_bytes(path)
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise UnreadableImageError("it has another content than when the images were listed")
        return decode_image(content, policy=policy)
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


def _decode_content(content: bytes, policy: int, max_pixels: int) -> RGB:
    if content[128:132] == b"DICM":
        return _decode_dicom(content, policy, max_pixels)
    if is_webp(content):
        _check_size(*read_webp_size(content), max_pixels)
    check_header(content)
    try:
        pillow_image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        if is_tiff(content):
            return decode_deep_tiff(content, max_pixels=max_pixels)
        if content[:2] in (b"\2\0", b"\x08\0") and _is_dicom(content):
            return _decode_dicom(content, policy, max_pixels)
        raise UnreadableImageError(describe_content(content)) from None
    with pillow_image as image:
        _check_size(*image.size, max_pixels)
        check_container(content)
        if isinstance(image, TiffImageFile):
            check_pieces(image.tag_v2, len(content))
            if policy > 2 and is_deep_grey(image.tag_v2):
                return decode_deep_tiff(content, max_pixels=max_pixels)
        return _convert_to_rgb(image, content, policy, max_pixels)


def _is_dicom(content: bytes) -> bool:
    from pylorus.data.dicom import is_dicom

    return is_dicom(content)


def _decode_dicom(content: bytes, policy: int, max_pixels: int) -> RGB:
    from pylorus.data.dicom import decode_dicom

    return decode_dicom(content, max_pixels=max_pixels, policy=policy)


FOREIGN_FORMATS = (
    (0, b"8BPS", "a Photoshop file"),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR image"),
    (0, b"\0\0\1\0", "a Windows icon"),
    *((0, f"P{digit}{end}".encode(), "a PNM image") for digit in range(1, 8) for end in "\n\r\t "),
    (0, b"%PDF-", "a PDF document"),
    (0, b"%!PS", "a PostScript document"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"PK\x05\x06", "a ZIP archive"),
    (0, b"\x1f\x8b", "a file compressed by gzip"),
    (0, b"7z\xbc\xaf", "a 7-Zip archive"),
    (0, b"Rar!", "a RAR archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\xd0\xcf\x11\xe0", "a file of an old Microsoft Office, or Thumbs.db"),
    (0, b"\0\x05\x16\x07", "data that macOS stores beside a file (AppleDouble)"),
    (0, b"\0\0\0\1Bud1", "a .DS_Store of macOS"),
    *((4, b"ftyp" + brand, "an MP4 or MOV video") for brand in (b"iso", b"mp4", b"M4V", b"qt", b"avc1", b"3gp")),
    (8, b"AVI ", "an AVI video"),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (0, b"\0\0\1\xba", "an MPEG video"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (344, b"n+1\0", "a NIfTI image"),
    (0, b"\xef\xbf\xbd", "an image that was saved as text, which destroys it"),
)
"""Where a file of another kind has which bytes, and what it is called; `identify_format` knows formats of images."""
FOREIGN_TEXTS = (
    ("version https://git-lfs", "a pointer of Git LFS, in place of the file: run git lfs pull"),
    ("annex/objects/", "a pointer of git-annex, in place of the file: run git annex get"),
    ("<svg", "an SVG drawing"),
    ("<html", "a web page, perhaps an error message of the server that it was downloaded from"),
    ("<!doctype html", "a web page, perhaps an error message of the server that it was downloaded from"),
    ("<error", "an error message of the server that it was downloaded from"),
    ("<?xml", "an XML document"),
    ("data:image/", "an image as base64 text"),
    ("/9j/", "an image as base64 text"),
    ("ivborw0k", "an image as base64 text"),
    ("{", "a JSON text, perhaps an error message of the server that it was downloaded from"),
)
"""What the beginning of a text contains, in lower case, and what it is called."""


def describe_content(content: bytes) -> str:
    r"""Say what a file is that is no image of a kind that is read.

    Example:
        >>> describe_content(b"GIF89a...")
        'no readable JPEG, PNG, BMP, TIFF or WebP image: it is a GIF image'
        >>> describe_content(b"\x89PNG\r\n\x1a\n...")
        'no readable JPEG, PNG, BMP, TIFF or WebP image: it is a damaged PNG image'
    """
    name = _name_content(content)
    nature = f"is {name}" if name else f"begins with the bytes {content[:8].hex(' ')}"
    return f"no readable JPEG, PNG, BMP, TIFF or WebP image: it {nature}"


def _name_content(content: bytes) -> str:
    for offset, signature, name in FOREIGN_FORMATS:
        if content.startswith(signature, offset):
            return name
    if not content.strip(b"\0"):
        return "a file of zeros: it was not copied or downloaded completely"
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    text = content[:2000].decode(encoding, errors="replace").lstrip("\ufeff \r\n\t").lower()
    for word, name in FOREIGN_TEXTS:
        if text.startswith(word) or (
            word[0] == "<" and text.startswith(("<?xml", "<!--", "<!doctype")) and word in text
        ):
            return name
    if (start := content.find(b"\xff\xd8\xff", 0, 64)) >= 0:
        return _name_jpeg(content, start)
    if "annex/objects/" in text[:200]:
        return "a pointer of git-annex, in place of the file: run git annex get"
    image_format = identify_format(content[:HEAD_BYTES])
    if image_format in DECODED_FORMATS:
        return f"a damaged {image_format} image"
    return f"a{'n' if image_format.startswith('A') else ''} {image_format} image" if image_format else ""


def _name_jpeg(content: bytes, start: int) -> str:
    if start > 0:
        return f"a JPEG after {start} bytes that do not belong to it"
    frame = re.search(rb"\xff([\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xf7])\0.(.)", content[:100_000], re.DOTALL)
    if frame is not None and frame[1] == b"\xf7":
        return "a JPEG-LS image"
    if frame is not None and frame[2] != b"\x08":
        return f"a JPEG of {frame[2][0]} bits per channel"
    return (
        "a damaged JPEG image" if frame is None or frame[1] <= b"\xc2" else "a JPEG with arithmetic or lossless coding"
    )


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise UnreadableImageError(f"{width} × {height} pixels are over the limit of {max_pixels:,}")
    if max(width, height) > MAX_SIDE:
        raise UnreadableImageError(f"{width} × {height} pixels: a side is over the limit of {MAX_SIDE:,}")


def _convert_to_rgb(image: Image.Image, content: bytes, policy: int, max_pixels: int) -> RGB:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # an MPO from a camera is one photograph with a preview
        raise UnreadableImageError(f"holds {frames} pages or frames, expected a single image")
    if policy > 2 and _has_low_values(image, content):
        is_png = image.format == "PNG"
        return _decode_deep_png(image, content) if is_png else decode_deep_tiff(content, max_pixels=max_pixels)
    ImageOps.exif_transpose(image, in_place=True)  # otherwise it copies an image that is upright
    upright = image
    if upright.mode in ("I;16", "I;16B", "I;16L", "I;16N"):
        deep = np.asarray(upright).astype(np.uint16)
        return convert_deep_to_rgb(deep, bits=_get_stated_bits(image, content) if policy > 2 else 16)
    if upright.mode in ("I", "F"):
        raise UnreadableImageError(
            f"pixels of mode {upright.mode} (32 bits) have an undefined range, expected 8 or 16 bits"
        )
    if upright.has_transparency_data:
        upright = _apply_alpha(upright, policy)
    return _export_rgb(upright if upright.mode == "RGB" else upright.convert("RGB"))


def _apply_alpha(image: Image.Image, policy: int) -> Image.Image:
    """Composite an image over black.

    An alpha that is zero everywhere is none: other programs ignore it. One of zeros and ones is a mask.
    """
    rgba = image.convert("RGBA")
    highest = rgba.getchannel("A").getextrema()[1]
    if policy > 2 and highest == 0:
        return rgba.convert("RGB")
    if policy > 2 and highest == 1:
        rgba.putalpha(rgba.getchannel("A").point(lambda value: 255 * value))
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)


def _get_stated_bits(image: Image.Image, content: bytes) -> int | None:
    return read_png_bits(content) if image.format == "PNG" else get_tiff_bits(getattr(image, "tag_v2", {}))


def _has_low_values(image: Image.Image, content: bytes) -> bool:
    """Return whether the upper bits of a color image of 16 bits per channel are unused: Pillow keeps only these."""
    is_deep_png = image.format == "PNG" and content[24:25] == b"\x10"
    if image.mode not in ("RGB", "RGBA", "LA") or not (is_deep_png or is_deep_color(getattr(image, "tag_v2", {}))):
        return False
    used_bits = _get_stated_bits(image, content) or 12
    is_alpha = np.array([name == "A" for name in image.getbands()])
    return int(np.asarray(image)[:, :, ~is_alpha].max()) < int(2 ** max(used_bits - 8, 0))


def _decode_deep_png(image: Image.Image, content: bytes) -> RGB:
    deep = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if deep is None or deep.dtype != np.uint16:
        raise UnreadableImageError("an unsupported kind of PNG, or damaged")
    orientation = image.getexif().get(274)
    rgb = convert_deep_to_rgb(np.asarray(deep, np.uint16), bits=read_png_bits(content))
    return np.ascontiguousarray(rotate_upright(rgb, orientation))


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
