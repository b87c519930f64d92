"""Decode DICOM endoscopy images to RGB, and derive a pseudonym of the patient to group them by.

Needs the extra `dicom` (pydicom), which is imported only when a DICOM file is found. Only elements of the image module
are used: private elements are never read, nothing is downloaded, and nothing in the file is executed.

=======================  ========================================================================================
RGB, YBR_FULL(_422)      8 bits are converted as they are; RGB of up to 16 bits loses its lower bits
YBR_RCT, YBR_ICT         of JPEG 2000: the decoder returns RGB
MONOCHROME1, MONOCHROME2 rescaled, then the first window as 0…255; without a window the whole range of the stored
                         bits; MONOCHROME1 is inverted, so that white is bright; PixelPaddingValue, and values up to
                         PixelPaddingRangeLimit, become black
PALETTE COLOR            through the file's palette; 16 bits lose their lower half
pixel data               native, RLE, JPEG baseline, JPEG 2000; other JPEG variants if pydicom has a plugin
missing                  preamble and prefix, transfer syntax, and elements of the image that can have only one
                         value: a photometric interpretation is MONOCHROME2, RGB or, in JPEG, YBR_FULL_422
after the pixel data     trailing padding, signatures, private elements, an even number of zeros
refused                  several frames; 1, 12 or 32 bits allocated; lookup tables in place of rescale and window;
                         deflated files, whose size can't be known in advance; pixel data of an unexpected length
=======================  ========================================================================================
"""

import contextlib
import hashlib
import importlib.util
import io
import logging
import math
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pylorus.core.errors import UnreadableImageError, format_path
from pylorus.core.formatting import format_count
from pylorus.core.limited_process import call_within_limits, require_limits
from pylorus.data.files import MAX_FIRST_LENGTH, ImageLocation, read_head, read_image_bytes
from pylorus.data.structure import PLAIN_SYNTAXES, check_container, check_dicom, read_jpeg2000_size

if TYPE_CHECKING:
    from pydicom import Dataset
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pylorus.core.errors import PylorusError, format_name_list
from pylorus.data.files import Root

Pixels = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.int8] | NDArray[np.int16]

COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
GREYS = ("MONOCHROME1", "MONOCHROME2")
PALETTE = "PALETTE COLOR"
GROUP_DIGITS = 16

_SIGNATURE = slice(128, 132)
_ALLOWED_TRAILERS = (
    b"\xfc\xff\xfc\xff",
    b"\xff\xfc\xff\xfc",
    b"\xfa\xff\xfa\xff",
    b"\xff\xfa\xff\xfa",
)  # what may follow the pixel data: padding, signatures
JPEG_BASELINE, JPEG_EXTENDED, JPEG_LOSSLESS, JPEG_LS, JPEG_2000, RLE = (
    *("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.70"),
    *("1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.5"),
)
PIXEL_DATA = 0x7FE00010


def is_dicom(content: bytes) -> bool:
    """Return whether a file is DICOM: `DICM` after a preamble of 128 arbitrary bytes, or an element at its beginning.

    Files of some archives lack preamble and prefix. They begin with an element of group 2 or 8.
    """
    if content[_SIGNATURE] == b"DICM":
        return True
    is_explicit = content[4:6].isalpha() and content[4:6].isupper()
    is_element = is_explicit or int.from_bytes(content[4:8], "little") <= MAX_FIRST_LENGTH
    return content[:2] in (b"\2\0", b"\x08\0") and content[3:4] == b"\0" and is_element


def decode_dicom(content: bytes, *, max_pixels: int, policy: int) -> NDArray[np.uint8]:
    """Decode the single frame of a DICOM file; the module docstring lists what is supported.

    Args:
        content: All bytes of the file.
        max_pixels: A file whose header claims more is rejected before decoding.
        policy: One of `pylorus.data.decode.POLICIES`; with policy 2, padding is not blackened.

    Returns:
        RGB of shape (height, width, 3).

    Raises:
        UnreadableImageError: If pydicom is missing, the kind of file is not supported, or it is damaged.
    """
    dataset = _read_dataset(content)
    if "PixelData" not in dataset:
        raise UnreadableImageError("a DICOM file without pixel data, expected an image")
    _complete_elements(dataset)
    if dataset.file_meta.TransferSyntaxUID not in PLAIN_SYNTAXES:
        require_limits()
    _check_claims(dataset, max_pixels)
    from pydicom.pixels.decoders.base import get_decoder

    decoder = get_decoder(dataset.file_meta.TransferSyntaxUID)
    if not decoder.is_available:
        missing = "; ".join(decoder.missing_dependencies)
        raise UnreadableImageError(f"pydicom has no plugin that decodes {decoder.UID.name}; install one of: {missing}")
    _check_pixel_data(dataset, content)
    has_unused_bits = int(dataset.HighBit) >= int(dataset.BitsStored) and policy > 2  # shifted by `_convert_to_rgb`
    options: Any = {"correct_unused_bits": not has_unused_bits}
    pixels, properties = decoder.as_array(dataset, index=0, raw=True, **options)
    return _convert_to_rgb(pixels, str(properties["photometric_interpretation"]), dataset, policy)


def read_patient_pseudonym(path: ImageLocation, *, salt: str = "") -> str | None:
    """Compute a pseudonym of the patient of a DICOM file, to group images by.

    The PatientID itself never leaves this function. The pseudonym is the start of the SHA-256 of salt,
    IssuerOfPatientID and PatientID, so one patient has the same pseudonym in all files. It is safe only with a secret
    salt: without one, whoever knows how a hospital numbers its patients can hash all numbers and find the patient.

    Args:
        path: Any file.
        salt: A secret; another salt gives other pseudonyms.

    Returns:
        16 hexadecimal digits; None if the file is not DICOM or names no patient.

    Raises:
        UnreadableImageError: If the file can't be read or pydicom is missing; the message names the file.
    """
    try:
        content = read_image_bytes(path)
        if not is_dicom(content):
            return None
        patient, issuer = call_within_limits(_read_patient, content)
    except Exception as error:  # pydicom raises almost any exception on damaged files
        raise UnreadableImageError(f"{format_path(path)}: {error}") from error
    if not patient:
        return None
    return hashlib.sha256("\0".join((salt, issuer, patient)).encode(errors="backslashreplace")).hexdigest()[
        :GROUP_DIGITS
    ]


def _read_patient(content: bytes) -> tuple[str, str]:
    dataset = _read_dataset(content, pixels=False)
    patient, issuer = (str(dataset.get(name) or "").strip() for name in ("PatientID", "IssuerOfPatientID"))
    return patient, issuer


DATE_ELEMENTS = ("AcquisitionDateTime", "AcquisitionDate", "ContentDate", "SeriesDate", "StudyDate")
"""Elements that tell when an image was acquired, the most precise first."""


def read_acquisition_date(path: Path) -> str:
    """Read the day on which the image of a DICOM file was acquired, by the first of `DATE_ELEMENTS` that it has.

    Returns:
        The day, such as 2026-11-27; empty if the file is not DICOM, can't be read or states no valid date.
    """
    try:
        if not is_dicom(read_head(str(path))):
            return ""
        return call_within_limits(_read_date, read_image_bytes(path))
    except Exception:  # pydicom raises almost any exception on damaged files; the decoder tells what is wrong
        return ""


def _read_date(content: bytes) -> str:
    dataset = _read_dataset(content, pixels=False)
    for name in DATE_ELEMENTS:
        digits = str(dataset.get(name) or "").strip()[:8]
        with contextlib.suppress(ValueError):
            return datetime.strptime(digits, "%Y%m%d").date().isoformat()
    return ""


def _read_dataset(content: bytes, *, pixels: bool = True) -> "Dataset":
    if importlib.util.find_spec("pydicom") is None:
        raise UnreadableImageError("a DICOM file, and pydicom is not installed: pip install 'pylorus[dicom]'")
    check_dicom(content)
    import pydicom

    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)  # it prints what we raise
    return pydicom.dcmread(io.BytesIO(content), stop_before_pixels=not pixels, force=is_dicom(content))


def _complete_elements(dataset: "Dataset") -> None:
    """Set elements that a file lacks although the standard requires them, where only one value makes sense."""
    from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    compressed = bytes(dataset.PixelData) if dataset["PixelData"].is_undefined_length else b""
    if "TransferSyntaxUID" not in dataset.file_meta:
        is_implicit, is_little_endian = dataset.original_encoding
        plain = ExplicitVRLittleEndian if is_little_endian else ExplicitVRBigEndian
        native = ImplicitVRLittleEndian if is_implicit else plain
        dataset.file_meta.TransferSyntaxUID = UID(_guess_transfer_syntax(compressed)) if compressed else native
    samples = int(
        dataset.get("SamplesPerPixel") or (1 if str(dataset.get("PhotometricInterpretation")) in GREYS else 3)
    )
    is_jpeg = dataset.file_meta.TransferSyntaxUID in (JPEG_BASELINE, JPEG_EXTENDED)
    colour = "YBR_FULL_422" if is_jpeg else "RGB"
    defaults = {
        "SamplesPerPixel": samples,
        "PhotometricInterpretation": GREYS[1] if samples == 1 else colour,
        "BitsAllocated": 8,
        "PixelRepresentation": 0,
    }
    for name, value in defaults.items():
        if dataset.get(name) in (None, ""):
            setattr(dataset, name, value)
    if dataset.get("BitsStored") in (None, ""):
        dataset.BitsStored = dataset.BitsAllocated
    if dataset.get("HighBit") in (None, ""):
        dataset.HighBit = int(dataset.BitsStored) - 1
    if samples == 3 and dataset.get("PlanarConfiguration") in (None, ""):
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = dataset.PhotometricInterpretation.strip().upper()


def _guess_transfer_syntax(pixel_data: bytes) -> str:
    """Return the transfer syntax of compressed pixel data by the first bytes of its first fragment."""
    for signature, syntax in ((b"\xff\x4f\xff\x51", JPEG_2000), (b"\xff\xd8\xff", JPEG_BASELINE)):
        start = pixel_data.find(signature, 0, 4096)
        if start >= 0:
            frames = {0xC1: JPEG_EXTENDED, 0xC3: JPEG_LOSSLESS, 0xF7: JPEG_LS}
            marker = next((kind for kind in frames if bytes((0xFF, kind)) in pixel_data[start : start + 4096]), None)
            return frames[marker] if marker is not None and syntax == JPEG_BASELINE else syntax
    return RLE


def _check_claims(dataset: "Dataset", max_pixels: int) -> None:
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames != 1:
        raise UnreadableImageError(f"holds {frames} frames, expected a single image")
    kind, bits = str(dataset.PhotometricInterpretation), int(dataset.BitsAllocated)
    if kind not in (*COLOURS, *GREYS, PALETTE):
        raise UnreadableImageError(f"DICOM pixels of kind {kind!r}, expected RGB, YBR, MONOCHROME or PALETTE COLOR")
    if bits not in (8, 16) or (kind.startswith("YBR") and bits != 8):
        raise UnreadableImageError(f"{kind} with {bits} bits, expected 8 or (except for YBR) 16")
    if not (1 if kind == PALETTE else 8) <= int(dataset.BitsStored) <= bits:
        raise UnreadableImageError(f"{dataset.BitsStored} bits stored in {bits}, expected 8 to {bits}")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if int(dataset.SamplesPerPixel) != (1 if kind in (*GREYS, PALETTE) else 3):
        raise UnreadableImageError(f"damaged: {kind} with {format_count(int(dataset.SamplesPerPixel), 'channel')}")
    if min(rows, columns) < 1:
        raise UnreadableImageError(f"damaged: {columns} × {rows} pixels")
    if rows * columns > max_pixels:
        raise UnreadableImageError(f"{columns} × {rows} pixels are over the limit of {max_pixels:,}")


def _check_pixel_data(dataset: "Dataset", content: bytes) -> None:
    """Check that the pixel data is as long as the header claims: pydicom ignores excess bytes."""
    from pydicom.encaps import generate_frames
    from pydicom.pixels.utils import get_expected_length

    pixel_data = dataset.PixelData
    if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        expected_length = get_expected_length(dataset)
        if len(pixel_data) not in (expected_length, expected_length + expected_length % 2):
            raise UnreadableImageError(f"damaged: {len(pixel_data)} bytes of pixel data, expected {expected_length}")
        trailing = content[int(dataset["PixelData"].file_tell or 0) + len(pixel_data) :]
        if not _is_allowed_trailer(trailing, dataset):
            raise UnreadableImageError(f"damaged: {len(trailing)} bytes after the pixel data")
        return
    if pixel_data[-8:-4] == b"\xfe\xff\xdd\xe0":
        pixel_data = pixel_data[:-8]
    _check_items(pixel_data)
    frames = list(generate_frames(pixel_data, number_of_frames=1))
    if len(frames) != 1:
        raise UnreadableImageError(f"damaged: pixel data of {len(frames)} frames, expected 1")
    if dataset.file_meta.TransferSyntaxUID != RLE:
        _check_jpeg_frame(frames[0], dataset)


def _is_allowed_trailer(trailing: bytes, dataset: "Dataset") -> bool:
    """Return whether these bytes after the pixel data are padding, or begin an element of a higher number.

    Some archives fill files up with zeros, to an even number as everything in DICOM.
    """
    if not trailing.strip(b"\0"):
        return len(trailing) % 2 == 0
    tag = int.from_bytes(trailing[:2], "little") << 16 | int.from_bytes(trailing[2:4], "little")
    return trailing.startswith(_ALLOWED_TRAILERS) or (tag > PIXEL_DATA and tag in dataset)


def _check_items(pixel_data: bytes) -> None:
    """Check that the items of compressed pixel data are contiguous up to its very end."""
    offset = 0
    while pixel_data[offset : offset + 4] == b"\xfe\xff\x00\xe0":
        offset += 8 + int.from_bytes(pixel_data[offset + 4 : offset + 8], "little")
    if offset != len(pixel_data):
        raise UnreadableImageError(f"damaged: {len(pixel_data)} bytes of compressed pixel data, expected {offset}")


def _check_jpeg_frame(frame: bytes, dataset: "Dataset") -> None:
    """Check that a compressed frame has the size that the header claims: the decoder follows the frame."""
    expected = int(dataset.Columns), int(dataset.Rows), int(dataset.SamplesPerPixel)
    check_container(frame)
    if frame.startswith(b"\xff\xd8"):
        found = _read_jpeg_size(frame)
    else:
        found = read_jpeg2000_size(frame)
        if b"\xff\xd9" not in frame[-3:]:
            raise UnreadableImageError("damaged: truncated: the end of the JPEG 2000 frame is missing")
    if found is not None and found[:2] != expected[:2]:
        raise UnreadableImageError(
            f"damaged: a frame of {found[0]} × {found[1]} pixels, expected {expected[0]} × {expected[1]}"
        )
    if found is not None and found[2] != expected[2]:
        raise UnreadableImageError(f"damaged: a frame with {format_count(found[2], 'channel')}, expected {expected[2]}")


def _read_jpeg_size(frame: bytes) -> tuple[int, int, int] | None:
    try:
        with Image.open(io.BytesIO(frame), formats=("JPEG",)) as image:
            return *image.size, len(image.getbands())
    except OSError:
        return None  # a JPEG variant that needs another plugin


def _convert_to_rgb(pixels: Pixels, kind: str, dataset: "Dataset", policy: int) -> NDArray[np.uint8]:
    unused = int(dataset.HighBit) + 1 - int(dataset.BitsStored)  # lower bits that hold no values
    if policy > 2 and 0 < unused < int(dataset.BitsAllocated):
        pixels = pixels >> unused
    if kind in GREYS:
        grey = _convert_to_grey_levels(pixels, dataset, inverted=kind == "MONOCHROME1")
        if policy > 2:
            grey[_find_padding(pixels, dataset)] = 0
        return np.repeat(grey[:, :, None], 3, axis=2)
    if kind == PALETTE:
        from pydicom.pixels.processing import apply_color_lut

        colors = apply_color_lut(pixels, dataset)
        return (colors >> 8 if colors.dtype == np.uint16 else colors).astype(np.uint8)
    if kind in ("YBR_FULL", "YBR_FULL_422"):
        ycbcr = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8), "YCbCr")
        return np.asarray(ycbcr.convert("RGB"))
    return (pixels >> (int(dataset.BitsStored) - 8)).astype(np.uint8)


def _find_padding(pixels: Pixels, dataset: "Dataset") -> NDArray[np.bool_]:
    """Return which pixels the file declares to be padding around the image; DICOM PS3.3, C.7.5.1.1.2."""
    value = _parse_number(dataset.get("PixelPaddingValue"))
    if value is None:
        return np.zeros(pixels.shape, np.bool_)
    limit = _parse_number(dataset.get("PixelPaddingRangeLimit"))
    low, high = sorted((value, value if limit is None else limit))
    return np.asarray((low <= pixels) & (pixels <= high))


def _convert_to_grey_levels(pixels: Pixels, dataset: "Dataset", *, inverted: bool) -> NDArray[np.uint8]:
    """Return grey levels of shape (height, width), mapped by a table over all values that the stored bits can hold."""
    for table in ("ModalityLUTSequence", "VOILUTSequence"):
        if dataset.get(table):
            raise UnreadableImageError(f"grey levels are defined by a {table}, expected rescale and window")
    bits = int(dataset.BitsStored)
    lowest = -(2 ** (bits - 1)) if dataset.PixelRepresentation else 0
    slope, intercept = (_parse_number(dataset.get(name)) for name in ("RescaleSlope", "RescaleIntercept"))
    centre, width = (_parse_number(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    slope = 1.0 if slope is None else slope
    stored = np.arange(2**bits)
    if centre is None or width is None:
        levels = stored >> (bits - 8)
        inverted ^= slope < 0
    else:
        values = (stored + lowest) * slope + (intercept or 0.0)
        levels = np.rint(_apply_window(values, centre, width, str(dataset.get("VOILUTFunction") or "LINEAR")))
    gray_levels = (255 - levels if inverted else levels).astype(np.uint8)
    return gray_levels[np.clip(pixels, lowest, lowest + 2**bits - 1).astype(np.int32) - lowest]


def _apply_window(values: NDArray[np.float64], centre: float, width: float, function: str) -> NDArray[np.float64]:
    """Map values to grey levels from 0 to 255 by a window; DICOM PS3.3, C.11.2.1.2."""
    if function == "LINEAR_EXACT" and width > 0:
        levels = ((values - centre) / width + 0.5) * 255
    elif function == "LINEAR" and width > 1:
        levels = ((values - (centre - 0.5)) / (width - 1) + 0.5) * 255
    elif function == "LINEAR" and width == 1:
        levels = np.where(values <= centre - 0.5, 0.0, 255.0)
    else:
        raise UnreadableImageError(
            f"a window of function {function} and width {width:g}, expected LINEAR and at least 1"
        )
    return np.clip(levels, 0.0, 255.0)


def _parse_number(value: object) -> float | None:
    """Return the finite number of an element, the first one if it has several, or None if it is empty."""
    if value is None or value == "":
        return None
    number = float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else str(value))
    if not math.isfinite(number):
        raise UnreadableImageError(f"damaged: found the number {number}")
    return number


SALT = "salt"
"""File of the salt in the cache folder. With it, whoever knows a hospital's patient numbers can reverse a hash."""


def ensure_salt(folder: Path) -> str:
    """Return the salt stored in a folder; the first call creates it, readable by its owner only.

    Raises:
        PylorusError: If the folder can't be written to, or the file does not contain a salt.
    """
    path = folder / SALT
    try:
        if not path.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _create_salt(path)
        salt = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PylorusError(f"{path}: can't read or create the salt of the patients' hashes: {error}") from error
    if len(salt) != 64:
        raise PylorusError(
            f"{path}: found {len(salt)} characters, expected a salt of 64. Delete the file to create a new salt."
        )
    return salt


def read_patient_pseudonyms(root: Root, paths: Sequence[str], reasons: Sequence[str], *, salt: str) -> list[str]:
    """Return a pseudonym of the patient of each file.

    Args:
        root: What the paths are relative to.
        paths: Paths of the files.
        reasons: Why each file is unreadable, empty if it is readable; unreadable files get an empty pseudonym.
        salt: Secret that the pseudonyms are hashed with.

    Raises:
        PylorusError: If a readable file names no patient; the message names it.
    """

    def read_pseudonym(path: str, reason: str) -> str | None:
        if reason:
            return ""
        try:
            return read_patient_pseudonym(root / path, salt=salt)
        except UnreadableImageError:
            return None

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        patients = list(pool.map(read_pseudonym, paths, reasons))
    nameless = [format_path(Path(path)) for path, patient in zip(paths, patients, strict=True) if patient is None]
    if nameless:
        raise PylorusError(
            f"data.patients=dicom: {len(nameless)} of {len(paths)} files are not DICOM or name no patient:\n"
            f"{format_name_list(nameless)}\nDefine the patients by data.group or by a manifest's column group instead."
        )
    return [str(patient) for patient in patients]


def _create_salt(path: Path) -> None:
    """Write a new salt atomically; if another process was first, its salt stays."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()
