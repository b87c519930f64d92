"""Read files whose structure is hostile, and report what became of each: a fuzzer of structure, not only of bytes.

`python benchmarks/fuzz.py --files 3000` takes one file of every kind apart into its segments, chunks, tags, boxes or
elements, and repeats, drops, reorders or enlarges them, lets lengths, sizes and offsets lie, nests and deflates, and
joins files of two kinds. Each file is read as `pylorus audit` and `pylorus predict` read it, in a process with limits,
and counted by kind:

read            an image, of the size that the header says
refused         an error in words
budget          the process with limits that decoded it was ended
crash           a bug: a process died, or an exception is none that names the fault of a file
over budget     a bug: it took over --seconds of CPU time or 1 GiB where there is no limit
another size    a bug: the header and the decoder differ on the size

File `number` of `--seed` is the same in every run: `--only NUMBER --keep FOLDER` writes it. The exit code is 1 if there
is a bug.
"""

import argparse
import io
import multiprocessing
import os
import random
import signal
import struct
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

WALL_SECONDS, MEMORY = 300.0, 2**30
BUGS = ("crash", "over budget", "another size")
LIES = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    15,
    16,
    31,
    255,
    256,
    4999,
    5000,
    32767,
    65535,
    100_000,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
)
"""Numbers that sizes, counts and offsets are replaced by."""
Parts = list[bytes]


@dataclass(frozen=True)
class Outcome:
    """What became of one file."""

    number: int
    kind: str
    change: str
    verdict: str
    reason: str
    seconds: float


def split_jpeg(content: bytes) -> Parts:
    """Split a JPEG into its segments; the pixels of a scan belong to its header."""
    parts, offset = [content[:2]], 2
    while offset < len(content):
        end = offset + 2
        if content[offset + 1] not in (0xD9, *range(0xD0, 0xD8)):
            end += int.from_bytes(content[end : end + 2], "big")
        if content[offset + 1] == 0xDA:
            while content[end : end + 2] != b"\xff\xd9" and end < len(content):
                if content[end] == 0xFF and content[end + 1] not in (0, *range(0xD0, 0xD8)):
                    break
                end += 1
        parts.append(content[offset:end])
        offset = end
    return parts


def split_png(content: bytes) -> Parts:
    """Split a PNG into its signature and its chunks."""
    parts, offset = [content[:8]], 8
    while offset < len(content):
        end = offset + 12 + int.from_bytes(content[offset : offset + 4], "big")
        parts.append(content[offset:end])
        offset = end
    return parts


def seal_png(parts: Parts) -> bytes:
    """Join a PNG with right checksums."""
    sealed = [part if len(part) < 12 or index == 0 else _seal_chunk(part) for index, part in enumerate(parts)]
    return b"".join(sealed)


def _seal_chunk(chunk: bytes) -> bytes:
    return chunk[:-4] + zlib.crc32(chunk[4:-4]).to_bytes(4, "big")


def split_riff(content: bytes) -> Parts:
    """Split a WebP into its header and its chunks."""
    parts, offset = [content[:12]], 12
    while offset < len(content):
        length = int.from_bytes(content[offset + 4 : offset + 8], "little")
        end = offset + 8 + length + length % 2
        parts.append(content[offset:end])
        offset = end
    return parts


def seal_riff(parts: Parts) -> bytes:
    """Join a WebP with its right length."""
    body = b"".join(parts[1:])
    return parts[0][:4] + (len(body) + 4).to_bytes(4, "little") + parts[0][8:12] + body


def split_tiff(content: bytes) -> Parts:
    """Split a TIFF into its header, the tags of its page, what follows these, and the pixels."""
    order = "little" if content[:2] == b"II" else "big"
    offset = int.from_bytes(content[4:8], order)
    count = int.from_bytes(content[offset : offset + 2], order)
    start = offset + 2
    tags = [content[start + 12 * index : start + 12 * index + 12] for index in range(count)]
    return [
        content[:offset],
        *tags,
        content[start + 12 * count : start + 12 * count + 4],
        content[start + 12 * count + 4 :],
    ]


def seal_tiff(parts: Parts) -> bytes:
    """Join a TIFF; the page begins where it did and tags that were added move what is behind it."""
    order = "little" if parts[0][:2] == b"II" else "big"
    return parts[0] + ((len(parts) - 3) & 0xFFFF).to_bytes(2, order) + b"".join(parts[1:])  # type: ignore[arg-type]


def split_dicom(content: bytes) -> Parts:
    """Split a DICOM file into its preamble and its elements; what can't be followed is the last part."""
    start = 132 if content[128:132] == b"DICM" else 0
    parts, offset = [content[:start]], start
    while offset + 8 <= len(content):
        kind = content[offset + 4 : offset + 6]
        if not kind.isalpha():
            length, header = int.from_bytes(content[offset + 4 : offset + 8], "little"), 8
        elif kind in (b"OB", b"OW", b"SQ", b"UN", b"UT"):
            length, header = int.from_bytes(content[offset + 8 : offset + 12], "little"), 12
        else:
            length, header = int.from_bytes(content[offset + 6 : offset + 8], "little"), 8
        end = len(content) if length == 2**32 - 1 else offset + header + length
        parts.append(content[offset:end])
        offset = end
    return parts


def split_fields(content: bytes) -> Parts:
    """Split a BMP into the fields of its header, and its pixels."""
    ends = [2, 6, 10, 14, 18, 22, 26, 28, 30, 34, 38, 42, 46, 50, 54]
    return [content[start:end] for start, end in zip([0, *ends], [*ends, len(content)], strict=True)]


FORMATS: dict[str, tuple[Callable[[bytes], Parts], Callable[[Parts], bytes]]] = {
    "jpeg": (split_jpeg, b"".join),
    "png": (split_png, seal_png),
    "webp": (split_riff, seal_riff),
    "tiff": (split_tiff, seal_tiff),
    "dicom": (split_dicom, b"".join),
    "bmp": (split_fields, b"".join),
}
"""How to take a file of each kind apart, and how to join it again."""


def choose_part(parts: Parts, rng: random.Random) -> int:
    """Choose a part, but not the signature."""
    return rng.randrange(1, len(parts)) if len(parts) > 1 else 0


def repeat(parts: Parts, rng: random.Random) -> Parts:
    """Repeat one part twice, some hundred or many thousand times."""
    index = choose_part(parts, rng)
    most = max(2, 2_000_000 // max(1, len(parts[index])))
    times = min(most, rng.choice([2, 3, 50, 300, 5_000, 100_000]))
    return [*parts[:index], *[parts[index]] * times, *parts[index + 1 :]]


def drop(parts: Parts, rng: random.Random) -> Parts:
    """Leave one part out."""
    index = choose_part(parts, rng)
    return parts[:index] + parts[index + 1 :] if len(parts) > 1 else parts


def reorder(parts: Parts, rng: random.Random) -> Parts:
    """Swap two parts, or shuffle all."""
    parts = list(parts)
    if rng.random() < 0.5:
        first, second = choose_part(parts, rng), choose_part(parts, rng)
        parts[first], parts[second] = parts[second], parts[first]
        return parts
    rest = parts[1:]
    rng.shuffle(rest)
    return [parts[0], *rest]


def enlarge(parts: Parts, rng: random.Random) -> Parts:
    """Put zeros or noise into a part, without a change of its length field."""
    index = choose_part(parts, rng)
    size = rng.choice([1, 10, 1_000, 100_000, 2_000_000])
    filler = bytes(size) if rng.random() < 0.5 else rng.randbytes(size)
    offset = rng.randrange(len(parts[index]) + 1)
    return [*parts[:index], parts[index][:offset] + filler + parts[index][offset:], *parts[index + 1 :]]


def lie(parts: Parts, rng: random.Random) -> Parts:
    """Replace one to three numbers of 2 or 4 bytes near the beginning of a part: lengths, sizes, counts, offsets."""
    parts = list(parts)
    for _ in range(rng.randint(1, 3)):
        index = choose_part(parts, rng)
        part = bytearray(parts[index])
        width = rng.choice([1, 2, 4])
        if len(part) < width:
            continue
        offset = rng.randrange(min(len(part), 40) - width + 1)
        value = rng.choice(LIES) & (2 ** (8 * width) - 1)
        part[offset : offset + width] = value.to_bytes(width, rng.choice(["little", "big"]))
        parts[index] = bytes(part)
    return parts


def mix(parts: Parts, rng: random.Random) -> Parts:
    """Put a part of another file of any kind in."""
    kind, others = rng.choice(list_samples())
    other = FORMATS[kind][0](others)
    index = rng.randrange(len(parts) + 1)
    return [*parts[:index], rng.choice(other), *parts[index:]]


CHANGES = {"repeat": repeat, "drop": drop, "reorder": reorder, "enlarge": enlarge, "lie": lie, "mix": mix}
"""Changes of the parts of a file of any kind."""


def build_scans(rng: random.Random) -> bytes:
    """A JPEG of many empty scans, sequential or progressive, of small or large size."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (10, 20, 30)).save(stream, "JPEG", subsampling=0, progressive=rng.random() < 0.5)
    parts = split_jpeg(stream.getvalue())
    head = [part for part in parts if part[1:2] != b"\xda"]
    scans = [part for part in parts if part[1:2] == b"\xda"]
    frame = next(index for index, part in enumerate(head) if part[1] in (0xC0, 0xC2))
    changed = bytearray(head[frame])
    changed[5:9] = struct.pack(">HH", *rng.choice([(16, 16), (5000, 5000), (1, 65535), (4000, 6000)]))
    head[frame] = bytes(changed)
    count = rng.choice([1, 5, 100, 199, 20_000])
    empty = [b"\xff\xda\0\x08\1" + bytes([1 + n % 3, 0x11 if n % 3 else 0, 0, 63, 0]) + b"\0" for n in range(3)]
    more = scans if changed[1] == 0xC2 else empty
    return b"".join([*head[:-1], *(more[n % len(more)] for n in range(count)), head[-1]])


def build_tiff(rng: random.Random) -> bytes:
    """A TIFF of one or many pages, in a chain or a circle, with tags that lie, twice or overlapping."""
    is_honest = rng.random() < 0.6  # but for the tags that are added, and the pages
    sizes = [(5000, 5000), (100_000, 200), (1, 10_000_000), (60_000, 60_000), (0, 5)]
    width, height = (10, 10) if is_honest else rng.choice(sizes)
    kind, bits = rng.choice([(1, 8), (2, 8)] if is_honest else [(1, 16), (2, 16), (0, 12), (3, 8), (6, 8), (5, 8)])
    scheme = rng.choice([1, 8] if is_honest else [1, 5, 7, 8, 32773, 2, 3, 4, 6, 34712, 34925, 50000])
    data = zlib.compress(bytes(rng.choice([300, 300, 10, 3_000_000]))) if scheme == 8 else rng.randbytes(300)
    samples = {0: 1, 1: 1, 3: 1, 5: 4}.get(kind, 3)
    pages = rng.choice([1, 1, 1, 1, 1, 1, 2, 50, 3000])
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, scheme), (262, 3, kind), (273, 4, 0)]
    tags += [(277, 3, samples), (278, 4, rng.choice([height, 1, 2**32 - 1])), (279, 4, len(data))]
    for _ in range(rng.choice([0, 0, 1, 3])):
        tags.append((rng.choice([256, 257, 258, 273, 274, 281, 330, 338, 339, 700, 34665, 34853, 50_001]),
                     rng.choice([1, 3, 4, 5, 12, 13]), rng.choice(LIES)))  # fmt: skip
    size = 2 + 12 * len(tags) + 4
    end = 8 + size * pages
    body = b""
    for page in range(pages):
        following = 8 + size * (page + 1) if page + 1 < pages else rng.choice([0, 0, 0, 8])
        entries = b""
        for tag, type_, value in sorted(tags) if rng.random() < 0.9 else tags:
            count = rng.choice(LIES) if rng.random() < 0.02 else 1
            entries += struct.pack("<HHII", tag, type_, count, end if tag == 273 else value)
        body += struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)
    return b"II*\0" + struct.pack("<I", 8) + body + data


def build_element(group: int, element: int, kind: bytes, value: bytes) -> bytes:
    """An element of DICOM in explicit little endian."""
    value += b"\0" * (len(value) % 2)
    if kind in (b"OB", b"OW", b"SQ", b"UN"):
        return struct.pack("<HH", group, element) + kind + b"\0\0" + struct.pack("<I", len(value)) + value
    return struct.pack("<HH", group, element) + kind + struct.pack("<H", len(value)) + value


SYNTAXES = ("1.2", "1.2.1", "1.2.2", "1.2.1.99", "1.2.4.50", "1.2.4.51", "1.2.4.57", "1.2.4.70", "1.2.4.80", "1.2.4.90",
            "1.2.4.91", "1.2.4.95", "1.2.4.100", "1.2.4.201", "1.2.5", "9.9")  # fmt: skip


def build_dicom(rng: random.Random) -> bytes:
    """A DICOM file whose elements lie about its pixels, deflated or nested, with a frame of any kind."""
    is_native, is_honest = rng.random() < 0.4, rng.random() < 0.5
    syntax = "1.2.840.10008." + rng.choice(["1.2.1"] if is_native else ["1.2.4.90", "1.2.4.50", "1.2.5", *SYNTAXES])
    meta = build_element(2, 1, b"OB", b"\0\1" + bytes(rng.choice([0, 0, 5000]))) + build_element(
        2, 16, b"UI", syntax.encode()
    )
    honest = {2: 3, 8: None, 6: 0, 0x10: 48, 0x11: 64, 0x100: 8, 0x101: 8, 0x102: 7, 0x103: 0}
    for _ in range(0 if is_honest else rng.choice([1, 1, 2, 4])):
        honest[rng.choice([2, 6, 0x10, 0x11, 0x100, 0x101, 0x102, 0x103])] = rng.choice(LIES) & 0xFFFF
    numbers = [
        build_element(0x28, tag, b"US", struct.pack("<H", value)) for tag, value in honest.items() if value is not None
    ]
    colour = rng.choice(
        ["RGB", "YBR_FULL", "YBR_FULL_422", "MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "YBR_RCT", "CMYK", ""]
    )
    colour = "RGB" if is_honest else colour
    frames = "1" if is_honest else rng.choice(["1", "0", "-1", "2", "4294967295", "1e9", "x"])
    body = [build_element(8, 0x16, b"UI", b"1.2"), build_element(0x28, 4, b"CS", colour.encode()),
            build_element(0x28, 8, b"IS", frames.encode()), *numbers]  # fmt: skip
    if rng.random() < 0.2:
        depth = rng.choice([1, 50, 2000])
        body.insert(0, b"\x08\0\x15\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth)
    if rng.random() < 0.15:
        body.insert(0, build_element(9, 0x1001, b"LO", b"x") * rng.choice([3, 20_000, 300_000]))
    raw = bytes(48 * 64 * 3 if is_honest else rng.choice([48 * 64 * 3, 48 * 64, 10, 48 * 64 * 6]))
    runs = struct.pack("<16I", 3, 64, 70, 80, *[0] * 12) + rng.randbytes(200)
    lies = struct.pack("<16I", *(rng.choice(LIES) for _ in range(16)))
    images = build_jpeg2000(rng), build_jpeg2000(rng), build_scans(rng), rng.choice(list_samples())[1]
    frame = raw if is_native else rng.choice([raw, runs, lies, *images])
    if not is_native and rng.random() < 0.9:
        items = rng.choice([1, 1, 1, 1, 1, 1, 2, 20_000])
        item = b"\xfe\xff\x00\xe0" + struct.pack("<I", len(frame)) + frame
        pixels = b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" + item
        pixels += b"\xfe\xff\x00\xe0\2\0\0\0\0\0" * (items - 1) + b"\xfe\xff\xdd\xe0\0\0\0\0"
    else:
        pixels = build_element(0x7FE0, 0x10, b"OW", frame)
    whole = b"".join(sorted(body) if rng.random() < 0.8 else body) + pixels
    if rng.random() < 0.1:
        compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
        whole = compressor.compress(whole + bytes(rng.choice([0, 200_000_000]))) + compressor.flush()
    preamble = rng.choice(
        [bytes(128), bytes(128), b"II*\0\x08\0\0\0".ljust(128, b"\0"), b"\xff\xd8\xff\xe0".ljust(128, b"\0")]
    )
    return preamble + b"DICM" + build_element(2, 0, b"UL", struct.pack("<I", len(meta))) + meta + whole


def build_jpeg2000(rng: random.Random) -> bytes:
    """A JPEG 2000 image, bare or in boxes, that may lie about its size."""
    from PIL import Image

    side = rng.choice([(64, 48), (64, 48), (100, 100), (1500, 1500)])
    stream = io.BytesIO()
    Image.new("RGB", side, (9, 8, 7)).save(
        stream, "JPEG2000", no_jp2=rng.random() < 0.5, tile_size=side if side[0] < 200 else (512, 512)
    )
    content = bytearray(stream.getvalue())
    start = content.find(b"\xff\x4f\xff\x51")
    for _ in range(rng.choice([0, 1, 2])):
        offset = start + rng.randrange(4, 60) if rng.random() < 0.7 else rng.randrange(0, max(1, start))
        content[offset : offset + 4] = rng.choice(LIES).to_bytes(4, "big")
    return bytes(content)


def build_exif(rng: random.Random) -> bytes:
    """A JPEG or PNG whose EXIF lies: several orientations, directories in a circle, counts beyond the end."""
    entries = [
        (0x0112, 3, 1, rng.choice([1, 3, 6, 8, 9, 255]) if rng.random() < 0.8 else 2**31)
        for _ in range(rng.choice([1, 2]))
    ]
    entries += [
        (rng.choice([0x8769, 0x8825, 0xA005, 0x014A]), 4, rng.choice([1, 1, 200_000]), rng.choice([8, 8, 0, 14, 2**31]))
        for _ in range(2)
    ]
    entries += [
        (rng.choice([0x010E, 0x9286, 0x02BC]), rng.choice([2, 7, 4]), rng.choice(LIES), rng.choice(LIES))
        for _ in range(2)
    ]
    body = struct.pack("<H", rng.choice([len(entries), 60_000])) + b"".join(
        struct.pack("<HHII", *entry) for entry in entries
    )
    exif = b"Exif\0\0II*\0\x08\0\0\0" + body + struct.pack("<I", rng.choice([0, 8])) + bytes(rng.choice([0, 50_000]))
    from tests.data.sample_files import samples

    if rng.random() < 0.3:
        parts = split_png(samples()["png"])
        chunk = exif[6:]
        return seal_png([*parts[:2], len(chunk).to_bytes(4, "big") + b"eXIf" + chunk + bytes(4), *parts[2:]])
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    parts = split_jpeg(samples()["jpeg"])
    return b"".join([parts[0], *[segment] * rng.choice([1, 1, 2, 120]), *parts[1:]])


def build_png(rng: random.Random) -> bytes:
    """A PNG whose header lies, with chunks of text that inflate, or very many small ones."""
    width, height = rng.choice(
        [(64, 48), (5000, 5000), (1, 20_000_000), (20_000_000, 1), (2**31 - 1, 1), (0, 4), (300, 300)]
    )
    bits, colour = rng.choice([(8, 2), (8, 6), (16, 6), (1, 0), (16, 0), (8, 3), (3, 2), (8, 4)])
    header = struct.pack(">II5B", width, height, bits, colour, 0, 0, rng.choice([0, 0, 1]))
    data = zlib.compress(bytes(rng.choice([100, 48 * 193, 9_000_000])), 9)
    chunks = [(b"IHDR", header)]
    bomb = zlib.compress(bytes(rng.choice([100, 3_000_000])), 9)
    control = struct.pack(">II", rng.choice(LIES), 0)
    extra = [
        *((b"zTXt", b"a\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb), (b"iTXt", b"a\0\1\0\0\0" + bomb), (b"tEXt", b"a\0b")),
        *((b"PLTE", bytes(rng.choice([3, 768, 7]))), (b"acTL", control), (b"IHDR", header), (b"cHRM", b"")),
        *((b"sBIT", bytes(rng.choice([0, 1, 4]))), (b"tRNS", bytes(rng.choice([0, 2, 6, 256])))),
    ]
    chunks += [rng.choice(extra)] * rng.choice([0, 1, 2, 90, 3_000])
    pieces = rng.choice([1, 1, 2, 50_000])
    step = -(-len(data) // pieces)
    chunks += [(b"IDAT", data[index * step : (index + 1) * step]) for index in range(pieces)]
    chunks += [] if rng.random() < 0.1 else [(b"IEND", b"")]
    parts = [len(data).to_bytes(4, "big") + kind + data + bytes(4) for kind, data in chunks]
    return seal_png([b"\x89PNG\r\n\x1a\n", *parts])


def build_polyglot(rng: random.Random) -> bytes:
    """Two files in one: one behind the other, or one in the preamble of the other."""
    first, second = rng.choice(list_samples())[1], rng.choice(list_samples())[1]
    if rng.random() < 0.3:
        return first[:128].ljust(128, b"\0") + b"DICM" + second
    return first + rng.choice([second, b"PK\3\4" + rng.randbytes(500), bytes(100), b"\xff\xda\0\x0c" * 40_000])


BUILDERS: dict[str, Callable[[random.Random], bytes]] = {
    "scans": build_scans, "pages": build_tiff, "dicom fields": build_dicom, "exif": build_exif, "png chunks": build_png,
    "polyglot": build_polyglot,
}  # fmt: skip
"""Files that are built from nothing, by their kind."""


def list_samples() -> list[tuple[str, bytes]]:
    """Return one file of every kind with the name of its format."""
    from tests.data.sample_files import samples

    return [(name.split()[0], content) for name, content in samples().items()]


def build_file(seed: int, number: int) -> tuple[str, str, bytes]:
    """Return the kind of a file, its change and its content."""
    rng = random.Random(f"{seed} {number}")
    if rng.random() < 0.4:
        kind = rng.choice(list(BUILDERS))
        return kind, "built", BUILDERS[kind](rng)
    kind, content = rng.choice(list_samples())
    split, join = FORMATS[kind]
    parts, names = split(content), []
    for _ in range(rng.choice([1, 1, 2, 3])):
        names.append(rng.choice(list(CHANGES)))
        parts = CHANGES[names[-1]](parts, rng)
    content = join(parts) if parts else b""
    if rng.random() < 0.1:
        content, names = content[: rng.randrange(1, len(content) + 1)], [*names, "truncate"]
    return kind, " + ".join(names), content


def judge_file(path: Path, number: int, kind: str, change: str, seconds: float) -> Outcome:
    """Read a file as the commands do, and say what became of it."""
    import resource

    from pylorus.core.errors import UnreadableImageError
    from pylorus.data.decode import read_image
    from pylorus.data.image_facts import compute_facts
    from pylorus.data.input_format import InputFormat

    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdict, reason = "read", ""
    try:
        facts = compute_facts(path.read_bytes())
        try:
            image = read_image(path)
            reason = _compare(path, image.shape, facts)
            verdict = "another size" if reason else "read"
            InputFormat(64, "pad", "bicubic", "auto", "overlays").prepare_image(image)
            if facts.problem:
                verdict, reason = "crash", f"facts say {facts.problem!r}, and it can be read"
        except UnreadableImageError as error:
            reason = str(error).removeprefix(f"{path}: ")
            verdict = "budget" if "the limit (PYLORUS_" in reason or "gave no result" in reason else "refused"
            if "crashed" in reason or not facts.problem:
                verdict = "crash"
    except Exception as error:
        verdict, reason = "crash", f"{type(error).__name__}: {error}"
    used = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if used > seconds or grown > MEMORY:
        verdict, reason = "over budget", f"{used:.1f} s, {grown / 2**20:.0f} MiB: {verdict} {reason}"
    return Outcome(number, kind, change, verdict, reason, used)


def _compare(path: Path, shape: tuple[int, ...], facts: Any) -> str:
    """Say how the decoder's size differs from that of the header as Pillow reads it; empty if it does not."""
    from PIL import Image

    if (facts.width, facts.height) != (shape[1], shape[0]):
        return f"facts {facts.width} × {facts.height}, image {shape[1]} × {shape[0]}"
    if facts.format not in ("JPEG", "PNG", "BMP", "WEBP", "MPO"):
        return ""
    with Image.open(path) as image:
        header = image.size
    return "" if sorted(header) == sorted(shape[:2]) else f"header {header}, image {shape}"


def serve_numbers(pipe: Connection, folder: Path, seed: int, seconds: float) -> None:
    """Judge the files whose numbers are received: all that a process of the fuzzer does."""
    path = folder / f"file-{os.getpid()}"
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff prints what it finds
    while True:
        number = pipe.recv()
        if number is None:
            return
        kind, change, content = build_file(seed, number)
        path.write_bytes(content)
        pipe.send(judge_file(path, number, kind, change, seconds))


def run_files(numbers: Iterator[int], folder: Path, seed: int, seconds: float, processes: int) -> Iterator[Outcome]:
    """Yield the outcome of each file; a process that dies or hangs is replaced."""
    context = multiprocessing.get_context("spawn")
    workers: dict[Any, tuple[Any, int, float]] = {}

    def start_next(worker: tuple[Any, Any] | None) -> None:
        number = next(numbers, None)
        if worker is None and number is not None:
            mine, other = context.Pipe()
            process = context.Process(target=serve_numbers, args=(other, folder, seed, seconds))
            process.start()
            other.close()
            worker = mine, process
        if worker is not None:
            worker[0].send(number)
            if number is not None:
                workers[worker[0]] = (worker[1], number, time.monotonic())

    for _ in range(processes):
        start_next(None)
    while workers:
        for pipe in multiprocessing.connection.wait(list(workers), timeout=1.0) or list(workers):
            process, number, since = workers[pipe]
            try:
                if pipe.poll():
                    del workers[pipe]
                    yield pipe.recv()
                    start_next((pipe, process))
                    continue
                if time.monotonic() - since < WALL_SECONDS:
                    continue
                verdict, reason = "over budget", f"no result for {WALL_SECONDS:g} s"
            except (EOFError, ConnectionError):
                verdict, reason = "crash", f"the process died: {process.exitcode}"
            workers.pop(pipe, None)
            process.kill()
            process.join()
            kind, change, _ = build_file(seed, number)
            yield Outcome(number, kind, change, verdict, reason, time.monotonic() - since)
            start_next(None)


def print_table(outcomes: list[Outcome]) -> None:
    """Print the number of files of each kind by what became of them."""
    verdicts = ["read", "refused", "budget", *BUGS]
    print(f"{len(outcomes)} files")
    print(f"{'kind':14}" + "".join(f"{verdict:>14}" for verdict in verdicts) + f"{'slowest, s':>14}")
    for kind in [*sorted({outcome.kind for outcome in outcomes}), "all"]:
        mine = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        counts = Counter(outcome.verdict for outcome in mine)
        slowest = max(outcome.seconds for outcome in mine)
        print(f"{kind:14}" + "".join(f"{counts[verdict]:14}" for verdict in verdicts) + f"{slowest:14.2f}")


def main() -> None:
    """Run the fuzzer from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the files to read; default: all")
    parser.add_argument("--seconds", type=float, default=10, help="CPU time of one file where there is no limit")
    parser.add_argument("--limit", type=int, default=10, help="PYLORUS_MAX_SECONDS")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the files that show a bug, or for those of --only")
    parser.add_argument("--folder", type=Path, default=Path("fuzz-files"), help="folder for the file being read")
    options = parser.parse_args()
    os.environ["PYLORUS_MAX_SECONDS"] = str(options.limit)
    options.folder.mkdir(parents=True, exist_ok=True)
    numbers = range(options.files) if options.only is None else options.only
    print(f"seed {options.seed}, {len(numbers)} files", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outcomes: list[Outcome] = []
    with suppress(KeyboardInterrupt):  # the table then shows what was read until now
        for outcome in run_files(iter(numbers), options.folder, options.seed, options.seconds, options.processes):
            outcomes.append(outcome)
            if len(outcomes) % 100 == 0:
                print(f"{len(outcomes)} files", file=sys.stderr, flush=True)
            is_bug = outcome.verdict in BUGS
            if is_bug or options.only is not None:
                print(outcome, flush=True)
            if options.keep is not None and (is_bug or options.only is not None):
                options.keep.mkdir(parents=True, exist_ok=True)
                content = build_file(options.seed, outcome.number)[2]
                (options.keep / f"{options.seed}-{outcome.number}").write_bytes(content)
    print_table(outcomes)
    sys.exit(any(outcome.verdict in BUGS for outcome in outcomes))


if __name__ == "__main__":
    main()
