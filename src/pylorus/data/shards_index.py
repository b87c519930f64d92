"""Index the images of a shard, their position in the file and their metadata; an index is built once and stored.

A shard is a tar file in WebDataset's layout. Files that share their name up to its first dot form a sample and are
adjacent: an image, and KEY.json (label, and optionally group, split and further columns) or KEY.cls (label).
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pandas as pd

from pylorus.columns import ABOUT
from pylorus.data.content import MOST_BYTES
from pylorus.data.image import SUFFIXES
from pylorus.data.shards_places import Shard, open_shard
from pylorus.data.unreadable import format_path
from pylorus.errors import PylorusError
from pylorus.files import write_atomically

VERSION = 1
"""Increase it when the same shard would give a different index."""
KNOWN = ("label", "group", "split")
_BLOCK = tarfile.BLOCKSIZE


@dataclass
class Sample:
    """What a shard holds under one key.

    Attributes:
        image: Path of the member, offset in bytes, size in bytes and SHA-256; None until it is found.
        metadata: Its metadata, as text.
        extensions: File extensions of its members.
    """

    image: tuple[str, int, int, str] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    extensions: set[str] = field(default_factory=set)


def load_shard_index(shard: Shard, folder: Path) -> pd.DataFrame:
    """Load the index of a shard from `folder`; if it is not stored there, read the shard once and store the index.

    Returns:
        One row per image: path, offset, size, sha256, label, group, split (empty if not given) and about/….

    Raises:
        PylorusError: If the shard is truncated, damaged or not in this layout; names it and the key.
    """
    path = folder / f"{shard.identity}-{VERSION}.parquet"
    if path.exists():
        return pd.read_parquet(path)
    try:
        with open_shard(shard) as file:
            table = _build_table(shard.name, file)
    except PylorusError:
        raise
    except Exception as error:  # each storage backend of fsspec raises its own errors
        raise PylorusError(f"can't read shard {shard.name}: {error or type(error).__name__}") from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        table.to_parquet(temporary, index=False)
    return table


def split_member_path(path: str) -> tuple[str, str]:
    """Split a member's path into key and extension at the first dot of its name.

    Example:
        >>> split_member_path("a.b/0001.seg.png")
        ('a.b/0001', 'seg.png')
    """
    folder, slash, name = path.rpartition("/")
    stem, _, ending = name.partition(".")
    return folder + slash + stem, ending


def _build_table(shard: str, file: BinaryIO) -> pd.DataFrame:
    rows: list[dict[str, object]] = []
    seen_keys: set[str] = set()
    for key, sample in _iter_samples(shard, file):
        location = f"shard {shard}, key {format_path(key)}"
        if key in seen_keys:
            raise PylorusError(f"{location}: occurs twice. All members of a key must be adjacent.")
        seen_keys.add(key)
        if sample.image is None:
            raise PylorusError(
                f"{location}: has no image ({', '.join(SUFFIXES)}), only {', '.join(sorted(sample.extensions))}."
            )
        if not sample.metadata.get("label"):
            raise PylorusError(f"{location}: has no label, expected {key}.json with a label, or {key}.cls.")
        path, offset, size, digest = sample.image
        rows.append({"path": path, "offset": offset, "size": size, "sha256": digest, **sample.metadata})
    if not rows:
        raise PylorusError(f"shard {shard}: contains no images.")
    table = pd.DataFrame(rows)
    text_columns = [name for name in table.columns if name not in ("offset", "size")]
    table[text_columns] = table[text_columns].fillna("")
    return table


def _iter_samples(shard: str, file: BinaryIO) -> Iterator[tuple[str, Sample]]:
    """Yield keys with their samples in the order of the shard, holding one sample at a time."""
    current, sample = "", Sample()
    for member, content in _iter_members(shard, file):
        key, ending = split_member_path(member.name)
        if key != current:
            if sample.extensions:
                yield current, sample
            current, sample = key, Sample()
        if ending in sample.extensions:
            raise PylorusError(f"shard {shard}, key {format_path(key)}: has two {ending} files.")
        sample.extensions.add(ending)
        if f".{ending.lower()}" in SUFFIXES:
            if sample.image is not None:
                raise PylorusError(
                    f"shard {shard}, key {format_path(key)}: has two images: {', '.join(sample.extensions)}."
                )
            sample.image = (member.name, member.offset_data, member.size, hashlib.sha256(content).hexdigest())
        elif ending == "json":
            sample.metadata = _parse_metadata(shard, key, content) | sample.metadata
        elif ending == "cls":
            sample.metadata.setdefault("label", content.decode(errors="replace").strip())
    if sample.extensions:
        yield current, sample


def _iter_members(shard: str, file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Yield the files of a tar with their content.

    Python's reader takes a damaged header for the end of the archive, so the last member must be followed by a block of
    zeros.
    """
    last_member = "the start"
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 the caller closes the underlying file
        for member in tar:
            last_member = format_path(member.name)
            if member.isdir():
                continue
            if not member.isreg() or member.size > MOST_BYTES:
                raise PylorusError(f"shard {shard}: {last_member} is not a file, or has over {MOST_BYTES:,} bytes.")
            file.seek(member.offset_data)
            content = file.read(member.size)
            if len(content) < member.size:
                raise PylorusError(f"shard {shard}: truncated within {last_member}. Copy it again.")
            yield member, content
    except tarfile.TarError as error:
        problem = f"not a tar file, compressed, or truncated after {last_member} ({error})"
        raise PylorusError(f"shard {shard}: {problem}.") from error
    file.seek(tar.offset)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise PylorusError(f"shard {shard}: truncated or damaged after {last_member}. Copy it again.")


def _parse_metadata(shard: str, key: str, content: bytes) -> dict[str, str]:
    """Parse KEY.json: label, group and split as they are, other plain values as about/…."""
    try:
        metadata = json.loads(content)
    except ValueError as error:
        raise PylorusError(f"shard {shard}, key {format_path(key)}: can't read its .json: {error}") from error
    if not isinstance(metadata, dict):
        raise PylorusError(
            f'shard {shard}, key {format_path(key)}: its .json is not an object, expected {{"label": …}}.'
        )
    plain = {name: value for name, value in metadata.items() if isinstance(value, str | int | float)}
    return {name if name in KNOWN else ABOUT + name: str(value).strip() for name, value in plain.items()}
