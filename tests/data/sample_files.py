"""One generated file of every format that the decoder supports."""

import io
import struct
import zlib
from functools import cache
from typing import Any

import cv2
import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64


def picture() -> np.ndarray:
    """Smooth colours with some noise, so that every format has something to compress; (48, 64, 3)."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    smooth = np.stack([rows * 5, columns * 3, (rows + columns) * 2], axis=2)
    return (smooth + np.random.default_rng(1).integers(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def deep(suffix: str, channels: int = 3) -> bytes:
    blue_first = np.dstack([picture()[:, :, ::-1], np.full((HEIGHT, WIDTH), 200, np.uint8)])
    pixels = blue_first[:, :, :channels].astype(np.uint16) * 257
    return cv2.imencode(suffix, pixels)[1].tobytes()


def tiled_tiff() -> bytes:
    """An uncompressed grey TIFF of 16 × 16 tiles, which neither Pillow nor OpenCV writes."""
    grey = picture()[:, :, 0]
    tiles = [
        grey[top : top + 16, left : left + 16].tobytes() for top in range(0, HEIGHT, 16) for left in range(0, WIDTH, 16)
    ]
    count = len(tiles)
    tags = [(256, WIDTH), (257, HEIGHT), (258, 8), (259, 1), (262, 1), (277, 1), (322, 16), (323, 16)]
    behind = 8 + 2 + 12 * (len(tags) + 2) + 4
    offsets = np.arange(count, dtype="<u4") * 256 + behind + 8 * count
    entries = b"".join(_entry(tag, 1, value) for tag, value in tags)
    entries += _entry(324, count, behind) + _entry(325, count, behind + 4 * count)
    header = b"II*\0" + (8).to_bytes(4, "little") + (len(tags) + 2).to_bytes(2, "little")
    lengths = np.full(count, 256, dtype="<u4")
    return header + entries + bytes(4) + offsets.tobytes() + lengths.tobytes() + b"".join(tiles)


def _entry(tag: int, count: int, value: int) -> bytes:
    return b"".join(n.to_bytes(size, "little") for n, size in ((tag, 2), (4, 2), (count, 4), (value, 4)))


def interlaced_png() -> bytes:
    """A grey PNG in the seven passes of Adam7, which Pillow does not write."""
    grey = picture()[:, :, 0]
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    lines = [b"\0" + row.tobytes() for top, left, down, right in passes for row in grey[top::down, left::right]]
    header = WIDTH.to_bytes(4, "big") + HEIGHT.to_bytes(4, "big") + bytes([8, 0, 0, 0, 1])
    return png((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b""))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, with right checksums."""
    parts = [
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_tiff(levels: np.ndarray, bits: int, photometric: int, order: str, *extra: tuple[int, int, int]) -> bytes:
    """An uncompressed grey TIFF of these stored values; `order`: < or >; `extra`: tag, type (3 or 4) and value."""
    rows = [_pack_row(row, bits, order) for row in levels]
    height, width = levels.shape
    tags = [
        *((256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 0)),
        *((277, 3, 1), (278, 4, height), (279, 4, sum(map(len, rows)))),
        *extra,
    ]
    behind = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, kind, value in sorted(tags):
        stored = struct.pack(
            order + ("I" if kind == 4 else "HH"), *([behind if tag == 273 else value] + [0] * (kind == 3))
        )
        entries += struct.pack(order + "HHI", tag, kind, 1) + stored
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    return start + entries + bytes(4) + b"".join(rows)


def _pack_row(row: np.ndarray, bits: int, order: str) -> bytes:
    if bits == 16:
        return row.astype(f"{order}u2").tobytes()
    text = "".join(format(int(value), f"0{bits}b") for value in row)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


def encode_grey_png(values: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    height, width = values.shape
    header = struct.pack(">II5B", width, height, 16, 0, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b""))


def drop_preamble(content: bytes) -> bytes:
    return content[132:]


def drop_meta(content: bytes) -> bytes:
    """Without preamble, prefix and file meta information: the data set alone."""
    length = int.from_bytes(content[140:144], "little")
    return content[144 + length :]


def dicom(pixels: np.ndarray | bytes, kind: str, *, syntax: str = "1.2.840.10008.1.2.1", **changes: Any) -> bytes:
    """A DICOM file of these stored pixels; bytes are one compressed frame. `changes` set elements, None drops one."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    array = pixels if isinstance(pixels, np.ndarray) else np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.77.1.1"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3.4"
    data.PatientID = "4711"
    data.Rows, data.Columns = array.shape[:2]
    data.SamplesPerPixel = array.shape[2] if array.ndim == 3 else 1
    if data.SamplesPerPixel > 1:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = kind
    data.BitsAllocated = data.BitsStored = array.dtype.itemsize * 8
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(array.dtype.kind == "i")
    raw = pixels if isinstance(pixels, bytes) else pixels.tobytes()
    data.PixelData = encapsulate([raw]) if isinstance(pixels, bytes) else raw + bytes(len(raw) % 2)
    data["PixelData"].VR = "OB" if isinstance(pixels, bytes) or array.dtype.itemsize == 1 else "OW"
    for name, value in changes.items():
        if value is None:
            del data[name]
        else:
            setattr(data, name, value)
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


@cache
def samples() -> dict[str, bytes]:
    """A file of every kind, by its name; DICOM only where pydicom is installed."""
    image = Image.fromarray(picture())
    grey, palette, clear = image.convert("L"), image.quantize(16), image.copy()
    clear.putalpha(grey)
    empty, values = image.copy(), picture()[:, :, 0].astype(int)
    empty.putalpha(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {
        "jpeg": encoded(image, "JPEG", quality=90),
        "jpeg progressive": encoded(image, "JPEG", progressive=True),
        "jpeg grey": encoded(grey, "JPEG"),
        "jpeg cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "jpeg turned": encoded(image, "JPEG", exif=exif),
        "jpeg profile": encoded(image, "JPEG", icc_profile=bytes(300)),
        "png": encoded(image, "PNG"),
        "png 1 bit": encoded(grey.convert("1"), "PNG"),
        "png 2 bits": encoded(image.quantize(4), "PNG", bits=2),
        "png 4 bits": encoded(palette, "PNG", bits=4),
        "png palette": encoded(image.quantize(200), "PNG"),
        "png alpha": encoded(clear, "PNG"),
        "png 16 bits": deep(".png"),
        "png 16 bits alpha": deep(".png", 4),
        "png interlaced": interlaced_png(),
        "bmp": encoded(image, "BMP"),
        "bmp palette": encoded(palette, "BMP"),
        "tiff": encoded(image, "TIFF"),
        "tiff lzw": encoded(image, "TIFF", compression="tiff_lzw"),
        "tiff deflate": encoded(image, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": encoded(image, "TIFF", compression="jpeg"),
        "tiff tiles": tiled_tiff(),
        "tiff 16 bits": deep(".tiff"),
        "tiff 16 bits alpha": deep(".tiff", 4),
        "tiff white is zero": write_tiff(65535 - values * 257, 16, 0, ">"),
        "tiff 12 bits": write_tiff(values * 16, 12, 1, "<"),
        "tiff 12 bits in 16": write_tiff(values * 16, 16, 0, "<", (281, 3, 4095)),
        "png 12 bits in 16": encode_grey_png(values * 16),
        "png 10 bits in 16": encode_grey_png(values * 4, (b"sBIT", b"\x0a")),
        "png empty alpha": encoded(empty, "PNG"),
        "webp": encoded(image, "WEBP"),
        "webp lossless": encoded(image, "WEBP", lossless=True),
        "webp alpha": encoded(clear, "WEBP"),
    }
    try:
        return found | dicom_samples()
    except ImportError:
        return found


def dicom_samples() -> dict[str, bytes]:
    image = Image.fromarray(picture())
    grey, ycc = np.asarray(image.convert("L")), np.asarray(image.convert("YCbCr"))
    halved = np.concatenate([ycc[:, ::2, :1], ycc[:, 1::2, :1], ycc[:, ::2, 1:]], axis=2)  # Y Y Cb Cr
    baseline, lossless, rle = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5"
    planes = [np.ascontiguousarray(picture()[:, :, channel]).tobytes() for channel in range(3)]
    return {
        "dicom rgb": dicom(picture(), "RGB"),
        "dicom rgb implicit": dicom(picture(), "RGB", syntax="1.2.840.10008.1.2"),
        "dicom ybr": dicom(ycc, "YBR_FULL"),
        "dicom ybr 422": dicom(halved, "YBR_FULL_422", Columns=WIDTH, SamplesPerPixel=3),
        "dicom grey": dicom(grey, "MONOCHROME2"),
        "dicom grey 16 bits": dicom(grey.astype(np.uint16) * 16, "MONOCHROME2", BitsStored=12, HighBit=11),
        "dicom monochrome1": dicom(grey, "MONOCHROME1", PixelPaddingValue=0, WindowCenter=128, WindowWidth=256),
        "dicom without preamble": drop_preamble(dicom(picture(), "RGB")),
        "dicom without meta": drop_meta(dicom(picture(), "RGB", syntax="1.2.840.10008.1.2")),
        "dicom palette": dicom(np.asarray(image.quantize(16)), "PALETTE COLOR", **_palette()),
        "dicom jpeg": dicom(encoded(image, "JPEG", quality=95), "YBR_FULL_422", syntax=baseline),
        "dicom jpeg 2000": dicom(encoded(image, "JPEG2000", no_jp2=True), "RGB", syntax=lossless),
        "dicom rle": dicom(_run_lengths(planes), "RGB", syntax=rle),
    }


def _palette() -> dict[str, Any]:
    table = np.asarray(Image.fromarray(picture()).quantize(16).getpalette()[:48], np.uint16).reshape(16, 3) * 257
    found: dict[str, Any] = {}
    for channel, colour in enumerate(("Red", "Green", "Blue")):
        found[f"{colour}PaletteColorLookupTableDescriptor"] = [16, 0, 16]
        found[f"{colour}PaletteColorLookupTableData"] = table[:, channel].tobytes()
    return found


def _run_lengths(planes: list[bytes]) -> bytes:
    """DICOM's RLE of 8-bit planes, all as literal runs of one row."""
    segments = [
        b"".join(bytes([WIDTH - 1]) + plane[at : at + WIDTH] for at in range(0, len(plane), WIDTH)) for plane in planes
    ]
    segments = [segment + bytes(len(segment) % 2) for segment in segments]
    offsets = [64 + sum(map(len, segments[:index])) for index in range(len(segments))]
    header = b"".join(n.to_bytes(4, "little") for n in [len(planes), *offsets, *[0] * (15 - len(planes))])
    return header + b"".join(segments)
