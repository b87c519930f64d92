"""Checksums, by which damage to stored files is found before they are used, and the lock of a folder.

A JSON object and a YAML file contain their own checksum, a table has one beside it, and a checkpoint of torch is a zip
archive, which has one for each tensor that torch itself does not check.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pylorus.core.errors import PylorusError

LOCK = ".lock"
"""File that is locked while a process writes to its folder."""
FIRST_LINE = "# The last line holds the SHA-256 of the others.\n"
LAST_LINE = "# SHA-256: "
"""Start of a text's last line."""
SUFFIX = ".sha256"
"""What the name of the file beside a table ends in; `sha256sum --check` reads it, too."""


def seal_text(text: str) -> str:
    """Return a text of YAML with its checksum in a comment at the end."""
    content = FIRST_LINE + text
    return f"{content}{LAST_LINE}{hashlib.sha256(content.encode()).hexdigest()}\n"


def verify_text(text: str) -> bool:
    """Return whether a text is intact; one without a checksum is."""
    content, separator, digest = text.rpartition(LAST_LINE)
    if not separator:
        return not text.startswith(FIRST_LINE)
    return digest.strip() == hashlib.sha256(content.encode()).hexdigest()


def compute_digest(path: Path) -> str:
    """Return the SHA-256 of a file; empty if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digest(path: Path) -> str:
    """Write the SHA-256 of a file into a file beside it, and return it."""
    digest = compute_digest(path)
    path.with_name(path.name + SUFFIX).write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    return digest


def check_digest(path: Path) -> None:
    """Check a file against the SHA-256 beside it, if there is one.

    Raises:
        PylorusError: If they differ.
    """
    beside = path.with_name(path.name + SUFFIX)
    if beside.is_file() and beside.read_text(encoding="utf-8", errors="replace").split()[:1] != [compute_digest(path)]:
        raise PylorusError(
            f"{path}: damaged, or changed since it was written: its SHA-256 is not that in {beside.name}. Restore it "
            "from a backup, or start a new run."
        )


def is_archive_intact(path: Path) -> bool:
    """Return whether a checkpoint exists and all its tensors have their checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError, EOFError):
        return False


@contextmanager
def lock_folder(folder: Path, explain: Callable[[], str]) -> Iterator[None]:
    """Let no other process write to an existing folder; the lock is gone when this process is, however it ends.

    A file system without locks grants it to everyone.

    Args:
        folder: The folder.
        explain: Returns the message of the error.

    Raises:
        PylorusError: If another process has locked it.
    """
    lock = FileLock(folder / LOCK)
    if folder.is_dir():
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise PylorusError(explain()) from None
        except (OSError, NotImplementedError):  # if the folder can't be written to, whoever writes reports it
            pass
    try:
        yield
    finally:
        lock.release()
