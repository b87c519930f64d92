"""Find, open and index shards, and read single images in them, like files.

A shard is a tar file in WebDataset's layout. Files that share their name up to its first dot form a sample and are
adjacent: an image, and KEY.json (label, and optionally group, split and further columns) or KEY.cls (label). Shards lie
in a folder or at URLs, which fsspec opens; only what the user names is read, and nothing is written to them. An index
holds each image's position and metadata; it is built once and stored.
"""

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import fsspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.core.errors import PylorusError, UnreadableImageError, format_path
from pylorus.core.io import PARQUET_OPTIONS, write_atomically
from pylorus.core.privacy import MANIFEST_PREFIX
from pylorus.data.files import MAX_BYTES, SUFFIXES, ImageLocation, Member, is_utf8, open_local_file
from pylorus.data.walk import is_left_by_system

STATE_KEYS = (
    "size",
    "mtime",
    "created",
    "ETag",
    "Last-Modified",
    "LastModified",
    "Content-MD5",
    "generation",
    "version_id",
)
"""Metadata from a storage backend that change with a file's content."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_READ_AHEAD = 2**23


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar file.

    Attributes:
        name: File name, for messages.
        url: Its path or URL.
        identity: 32 hexadecimal digits: a hash of its location, size, and modification time or tag.
    """

    name: str
    url: str
    identity: str


MAX_SHARDS = 100_000
"""Shards that a range of numbers may stand for."""


def is_remote(root: str) -> bool:
    """Whether a root is a URL.

    Example:
        >>> is_remote("s3://bucket/shard-{000..127}.tar"), is_remote("/data/shards")
        (True, False)
    """
    return "://" in root


def resolve_pattern(pattern: str) -> list[str]:
    """Expand a pattern to all names: `{000..127}` is a range, `{a,b}` a list.

    Example:
        >>> resolve_pattern("{train,test}-{08..10}.tar")[:4]
        ['train-08.tar', 'train-09.tar', 'train-10.tar', 'test-08.tar']
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    numeric_range = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numeric_range:
        width = len(numeric_range[1])
        if int(numeric_range[2]) - int(numeric_range[1]) >= MAX_SHARDS:
            raise PylorusError(f"data.root: found {{{match[1]}}}, expected {MAX_SHARDS:,} shards at most.")
        alternatives = [f"{number:0{width}d}" for number in range(int(numeric_range[1]), int(numeric_range[2]) + 1)]
    else:
        alternatives = match[1].split(",")
    return [
        pattern[: match.start()] + alternative + suffix
        for alternative in alternatives
        for suffix in resolve_pattern(pattern[match.end() :])
    ]


def find_shards(root: str) -> list[Shard]:
    """Find the shards of a folder (all `*.tar` in it), of a pattern or of URLs, sorted by name.

    Raises:
        PylorusError: If there is none, or one can't be accessed; names it.
    """
    if not is_remote(root) and Path(root).is_dir():
        urls = sorted(str(path) for path in Path(root).glob("*.tar") if not path.name.startswith("."))
    else:
        urls = sorted(resolve_pattern(root))
    if not urls:
        raise PylorusError(f"data.root: found no shards in {root}, expected files that end in .tar.")
    return [_build_shard(url) for url in urls]


def open_shard(shard: Shard) -> BinaryIO:
    """Open a shard for reading once from start to end.

    Raises:
        OSError: If it can't be opened.
    """
    if not is_remote(shard.url):
        return open_local_file(shard.url)
    return cast(BinaryIO, fsspec.open(shard.url, "rb", block_size=_READ_AHEAD, cache_type="readahead").open())


def read_range(shard: Shard, start: int, size: int) -> bytes:
    """Read bytes of a shard; fewer if it ends earlier.

    Each call opens the shard anew, so that threads and forked processes share nothing.

    Raises:
        OSError: If it can't be read.
    """
    if size > MAX_BYTES:
        raise OSError(f"has {size:,} bytes, over the limit of {MAX_BYTES:,}")
    if not is_remote(shard.url):
        with open_local_file(shard.url) as file:
            file.seek(start)
            return file.read(size)
    system, path = fsspec.core.url_to_fs(shard.url)
    content: bytes = system.cat_file(path, start=start, end=start + size)
    if len(content) > size:
        raise OSError("the server returns whole files, expected one that supports range requests")
    return content


def _build_shard(url: str) -> Shard:
    name = url.rsplit("/", 1)[-1]
    try:
        if is_remote(url):
            system, path = fsspec.core.url_to_fs(url)
            info = system.info(path)
            state = [f"{key}={info[key]}" for key in STATE_KEYS if info.get(key) is not None]
        else:
            status = Path(url).stat()
            state = [str(status.st_size), str(status.st_mtime_ns)]
    except Exception as error:  # each storage backend of fsspec raises its own errors
        raise PylorusError(f"data.root: {_explain_storage_error(url, error)}") from error
    return Shard(name, url, hashlib.sha256("\0".join((url, *state)).encode()).hexdigest()[:32])


def _explain_storage_error(shard: str, error: Exception) -> str:
    """Explain why a shard, given by its name or URL, can't be read."""
    if isinstance(error, ImportError):
        return f"shard {shard} needs a package that is not installed: {error}"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"can't read shard {shard}: {reason}"


@dataclass(frozen=True, slots=True)
class ShardMember(Member):
    """An image in a shard.

    Attributes:
        shard: The tar file.
        path: Path of the member inside it.
        offset: Position of its first byte.
        size: Number of bytes.
        digest: SHA-256 of its bytes, 32 bytes long.
    """

    shard: Shard
    path: str
    offset: int
    size: int
    digest: bytes

    def read_content(self) -> bytes:
        """Read its bytes and verify them against the index.

        Raises:
            UnreadableImageError: If the shard can't be read, or has been changed or truncated since it was indexed.
        """
        try:
            content = read_range(self.shard, self.offset, self.size)
        except Exception as error:  # each storage backend of fsspec raises its own errors
            raise UnreadableImageError(_explain_storage_error(self.shard.name, error)) from error
        if hashlib.sha256(content).digest() != self.digest:
            mismatch = f"ends within {self.path}" if len(content) < self.size else f"contains a different {self.path}"
            raise UnreadableImageError(f"shard {self.shard.name} has changed since it was indexed: it {mismatch}")
        return content

    def __str__(self) -> str:
        return f"{self.shard.name}: {self.path}"


class Shards:
    """The root of the paths in a catalog of shards; held as arrays, which worker processes share.

    Args:
        root: The root as the user specified it.
        shards: The tar files.
        members: One row per image: path, index of its shard in `shards`, offset, size and sha256.
    """

    def __init__(self, root: str, shards: list[Shard], members: pd.DataFrame) -> None:
        self.root, self.shards = root, shards
        names = np.array([path.encode() for path in members["path"]], dtype=np.bytes_)
        order = np.argsort(names)
        self._names: NDArray[np.bytes_] = names[order]
        self._shard: NDArray[np.int32] = members["shard"].to_numpy(dtype=np.int32)[order]
        self._offset: NDArray[np.int64] = members["offset"].to_numpy(dtype=np.int64)[order]
        self._size: NDArray[np.int64] = members["size"].to_numpy(dtype=np.int64)[order]
        digests = np.frombuffer(bytes.fromhex("".join(members["sha256"])), dtype=np.uint8)
        self._digest: NDArray[np.uint8] = digests.reshape(-1, 32)[order]

    @property
    def remote(self) -> bool:
        """Whether the shards are read over a network."""
        return is_remote(self.root)

    def __truediv__(self, path: str, /) -> ImageLocation:
        """Return the image at a path.

        Raises:
            KeyError: If no shard holds it.
        """
        index = int(self._find_indices([path])[0])
        return ShardMember(
            self.shards[self._shard[index]],
            path,
            int(self._offset[index]),
            int(self._size[index]),
            self._digest[index].tobytes(),
        )

    def __str__(self) -> str:
        return self.root

    def get_shard_numbers(self, paths: list[str]) -> NDArray[np.int32]:
        """Return the index of the shard that holds each path, of shape (paths,)."""
        return self._shard[self._find_indices(paths)]

    def _find_indices(self, paths: list[str]) -> NDArray[np.intp]:
        names = np.array([path.encode() for path in paths], dtype=np.bytes_)
        indices = np.minimum(np.searchsorted(self._names, names), len(self._names) - 1)
        missing = np.flatnonzero(self._names[indices] != names)
        if len(missing):
            raise KeyError(f"{self.root}: no shard contains {paths[int(missing[0])]}")
        return indices


VERSION = 1
"""Increase it when the same shard would give a different index."""
KNOWN_KEYS = ("label", "group", "split")
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
        with suppress(OSError, ValueError):  # damaged: it is built again
            return pd.read_parquet(path, **PARQUET_OPTIONS)
    try:
        with open_shard(shard) as file:
            table = _build_table(shard.name, file)
    except PylorusError:
        raise
    except Exception as error:  # each storage backend of fsspec raises its own errors
        raise PylorusError(_explain_storage_error(shard.name, error)) from error
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
    names: set[str] = set()
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
        names.update(sample.metadata)
        if len(names) > MAX_VALUES:
            raise PylorusError(f"{location}: the .json files have over {MAX_VALUES:,} different names of values.")
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
        if is_left_by_system(member.name):
            continue
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


METADATA_ENDINGS, MAX_METADATA_BYTES, MAX_VALUES = (".json", ".cls"), 1_000_000, 1_000
"""Files that describe an image, their size in bytes, and the number of different names in those of a shard."""


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
            if not member.isreg() or member.size > MAX_BYTES:
                raise PylorusError(f"shard {shard}: {last_member} is not a file, or has over {MAX_BYTES:,} bytes.")
            if member.issparse():
                raise PylorusError(
                    f"shard {shard}: {last_member} is stored as a sparse file, without its zeros. Pack it again "
                    "without --sparse (-S)."
                )
            if not is_utf8(member.name):
                raise PylorusError(
                    f"shard {shard}: the name {last_member} is not UTF-8. Rename the file, and pack it again."
                )
            if member.name.endswith(METADATA_ENDINGS) and member.size > MAX_METADATA_BYTES:
                raise PylorusError(
                    f"shard {shard}: {last_member} has {member.size:,} bytes, expected {MAX_METADATA_BYTES:,} at most: "
                    "label, group, split and a few other values."
                )
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
    except (ValueError, RecursionError) as error:
        raise PylorusError(f"shard {shard}, key {format_path(key)}: can't read its .json: {error}") from error
    if not isinstance(metadata, dict):
        raise PylorusError(
            f'shard {shard}, key {format_path(key)}: its .json is not an object, expected {{"label": …}}.'
        )
    plain = {name: value for name, value in metadata.items() if isinstance(value, str | int | float)}
    values = {name: str(value).strip() for name, value in plain.items()}
    if not all(map(is_utf8, (*values, *values.values()))):
        raise PylorusError(f"shard {shard}, key {format_path(key)}: its .json has half a character (a lone surrogate).")
    return {name if name in KNOWN_KEYS else MANIFEST_PREFIX + name: value for name, value in values.items()}
