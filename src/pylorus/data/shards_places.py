"""Where shards lie: in a folder, under a pattern of files, or under URLs, which fsspec opens.

Nothing is fetched but what the user names, and nothing is ever sent: shards are opened for reading only.
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
"""What a store may say of a file that changes with its content."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_READ_AHEAD = 2**23


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar file.

    Attributes:
        name: Of the file, for messages.
        url: Its path or URL.
        identity: 32 hexadecimal digits of where it is, its size and its time or tag.
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


def expanded(pattern: str) -> list[str]:
    """All names of a pattern: `{000..127}` counts, `{a,b}` lists.

    Example:
        >>> expanded("{train,test}-{08..10}.tar")[:4]
        ['train-08.tar', 'train-09.tar', 'train-10.tar', 'test-08.tar']
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if counted:
        width = len(counted[1])
        words = [f"{number:0{width}d}" for number in range(int(counted[1]), int(counted[2]) + 1)]
    else:
        words = match[1].split(",")
    return [pattern[: match.start()] + word + rest for word in words for rest in expanded(pattern[match.end() :])]


def find_shards(root: str) -> list[Shard]:
    """The shards of a folder (all `*.tar` in it), of a pattern or of URLs, in the order of their names.

    Raises:
        PylorusError: If there is none, or one can't be reached; names it.
    """
    if not is_remote(root) and Path(root).is_dir():
        urls = sorted(str(path) for path in Path(root).glob("*.tar") if not path.name.startswith("."))
    else:
        urls = sorted(expanded(root))
    if not urls:
        raise PylorusError(f"data.root: found no shard in {root}, expected files that end in .tar.")
    return [_described(url) for url in urls]


def open_shard(shard: Shard) -> BinaryIO:
    """The shard, opened for reading once from front to back.

    Raises:
        OSError: If it can't be opened.
    """
    if not is_remote(shard.url):
        return Path(shard.url).open("rb")
    return cast(BinaryIO, fsspec.open(shard.url, "rb", block_size=_READ_AHEAD, cache_type="readahead").open())


def read_range(shard: Shard, start: int, size: int) -> bytes:
    """Bytes of a shard; fewer where it ends earlier. Each call opens anew, so that threads and forks share nothing.

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
        raise OSError("the server gives whole files only, expected one that serves ranges")
    return content


def _described(url: str) -> Shard:
    name = url.rsplit("/", 1)[-1]
    try:
        if is_remote(url):
            system, path = fsspec.core.url_to_fs(url)
            found = system.info(path)
            state = [f"{key}={found[key]}" for key in STATES if found.get(key) is not None]
        else:
            status = Path(url).stat()
            state = [str(status.st_size), str(status.st_mtime_ns)]
    except ImportError as error:
        raise PylorusError(f"data.root: {url} needs a package that is not installed: {error}") from error
    except Exception as error:  # each of fsspec's stores has errors of its own
        raise PylorusError(f"data.root: shard {url} can't be reached: {error or type(error).__name__}") from error
    return Shard(name, url, hashlib.sha256("\0".join((url, *state)).encode()).hexdigest()[:32])
