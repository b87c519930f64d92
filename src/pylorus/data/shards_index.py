"""What lies in a shard: its images, where in the file they are, and what stands beside them; found once and kept.

A shard is a tar file in WebDataset's layout. Files that share their name up to its first dot are a sample and lie side
by side: an image, and KEY.json (label, and where known group, split and further columns) or KEY.cls (label).
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
from pylorus.data.unreadable import shown
from pylorus.errors import PylorusError
from pylorus.files import whole

VERSION = 1
"""Counts up when the same shard would give another index."""
KNOWN = ("label", "group", "split")
_BLOCK = tarfile.BLOCKSIZE


@dataclass
class Sample:
    """What a shard holds under one key.

    Attributes:
        image: Member's path, offset in bytes, size in bytes and SHA-256; None until it is found.
        beside: What is said of it, as text.
        kinds: Endings of its members.
    """

    image: tuple[str, int, int, str] | None = None
    beside: dict[str, str] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)


def index_of(shard: Shard, folder: Path) -> pd.DataFrame:
    """The index of a shard, from `folder` where it was kept there, else from the shard, which is read once.

    Returns:
        One row an image: path, offset, size, sha256, label, group, split (empty where not given) and about/….

    Raises:
        PylorusError: If the shard is cut, damaged or not of this layout; names it and the key.
    """
    path = folder / f"{shard.identity}-{VERSION}.parquet"
    if path.exists():
        return pd.read_parquet(path)
    try:
        with open_shard(shard) as file:
            table = _table(shard.name, file)
    except PylorusError:
        raise
    except Exception as error:  # each of fsspec's stores has errors of its own
        raise PylorusError(f"shard {shard.name} can't be read: {error or type(error).__name__}") from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with whole(path) as temporary:
        table.to_parquet(temporary, index=False)
    return table


def key_of(path: str) -> tuple[str, str]:
    """Key and ending of a member: its name is cut at the first dot.

    Example:
        >>> key_of("a.b/0001.seg.png")
        ('a.b/0001', 'seg.png')
    """
    folder, slash, name = path.rpartition("/")
    stem, _, ending = name.partition(".")
    return folder + slash + stem, ending


def _table(shard: str, file: BinaryIO) -> pd.DataFrame:
    rows: list[dict[str, object]] = []
    seen: set[str] = set()
    for key, sample in _samples(shard, file):
        where = f"shard {shard}, key {shown(key)}"
        if key in seen:
            raise PylorusError(f"{where}: stands there twice. Members of a key lie side by side, and only once.")
        seen.add(key)
        if sample.image is None:
            raise PylorusError(
                f"{where}: has no image ({', '.join(SUFFIXES)}), only {', '.join(sorted(sample.kinds))}."
            )
        if not sample.beside.get("label"):
            raise PylorusError(f"{where}: has no label, expected {key}.json with a label, or {key}.cls.")
        path, offset, size, digest = sample.image
        rows.append({"path": path, "offset": offset, "size": size, "sha256": digest, **sample.beside})
    if not rows:
        raise PylorusError(f"shard {shard}: holds no image.")
    table = pd.DataFrame(rows)
    text = [name for name in table.columns if name not in ("offset", "size")]
    table[text] = table[text].fillna("")
    return table


def _samples(shard: str, file: BinaryIO) -> Iterator[tuple[str, Sample]]:
    """Keys with their samples, in the order of the shard, without a look back at what came before."""
    current, sample = "", Sample()
    for member, content in _members(shard, file):
        key, ending = key_of(member.name)
        if key != current:
            if sample.kinds:
                yield current, sample
            current, sample = key, Sample()
        if ending in sample.kinds:
            raise PylorusError(f"shard {shard}, key {shown(key)}: holds {ending} twice.")
        sample.kinds.add(ending)
        if f".{ending.lower()}" in SUFFIXES:
            if sample.image is not None:
                raise PylorusError(f"shard {shard}, key {shown(key)}: holds two images, {', '.join(sample.kinds)}.")
            sample.image = (member.name, member.offset_data, member.size, hashlib.sha256(content).hexdigest())
        elif ending == "json":
            sample.beside = _said(shard, key, content) | sample.beside
        elif ending == "cls":
            sample.beside.setdefault("label", content.decode(errors="replace").strip())
    if sample.kinds:
        yield current, sample


def _members(shard: str, file: BinaryIO) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Files of a tar with their content.

    Python's reader takes a damaged header for the end: what follows the last member must be the end's zeros.
    """
    last = "its start"
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 the caller closes the file beneath it
        for member in tar:
            last = shown(member.name)
            if member.isdir():
                continue
            if not member.isreg() or member.size > MOST_BYTES:
                raise PylorusError(f"shard {shard}: {last} is no file, or has over {MOST_BYTES:,} bytes.")
            file.seek(member.offset_data)
            content = file.read(member.size)
            if len(content) < member.size:
                raise PylorusError(f"shard {shard}: cut within {last}. Copy it again.")
            yield member, content
    except tarfile.TarError as error:
        raise PylorusError(f"shard {shard}: no tar file, compressed, or cut after {last} ({error}).") from error
    file.seek(tar.offset)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise PylorusError(f"shard {shard}: cut or damaged after {last}. Copy it again.")


def _said(shard: str, key: str, content: bytes) -> dict[str, str]:
    """What a KEY.json says of its image: label, group and split as they are, other plain values as about/…."""
    try:
        found = json.loads(content)
    except ValueError as error:
        raise PylorusError(f"shard {shard}, key {shown(key)}: its .json can't be read: {error}") from error
    if not isinstance(found, dict):
        raise PylorusError(f'shard {shard}, key {shown(key)}: its .json holds no object, expected {{"label": …}}.')
    plain = {name: value for name, value in found.items() if isinstance(value, str | int | float)}
    return {name if name in KNOWN else ABOUT + name: str(value).strip() for name, value in plain.items()}
