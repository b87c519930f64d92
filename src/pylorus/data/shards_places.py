"""Find and open shards: in a folder, by a pattern of files, or by URLs, which fsspec opens.

Only what the user names is read, and nothing is ever written: shards are opened for reading only.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import fsspec

from pylorus.data.content import MOST_BYTES
from pylorus.errors import PylorusError

STATES = (
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
        return Path(shard.url).open("rb")
    return cast(BinaryIO, fsspec.open(shard.url, "rb", block_size=_READ_AHEAD, cache_type="readahead").open())


def read_range(shard: Shard, start: int, size: int) -> bytes:
    """Read bytes of a shard; fewer if it ends earlier.

    Each call opens the shard anew, so that threads and forked processes share nothing.

    Raises:
        OSError: If it can't be read.
    """
    if size > MOST_BYTES:
        raise OSError(f"has {size:,} bytes, over the limit of {MOST_BYTES:,}")
    if not is_remote(shard.url):
        with Path(shard.url).open("rb") as file:
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
            state = [f"{key}={info[key]}" for key in STATES if info.get(key) is not None]
        else:
            status = Path(url).stat()
            state = [str(status.st_size), str(status.st_mtime_ns)]
    except ImportError as error:
        raise PylorusError(f"data.root: {url} needs a package that is not installed: {error}") from error
    except Exception as error:  # each storage backend of fsspec raises its own errors
        raise PylorusError(f"data.root: can't access shard {url}: {error or type(error).__name__}") from error
    return Shard(name, url, hashlib.sha256("\0".join((url, *state)).encode()).hexdigest()[:32])
