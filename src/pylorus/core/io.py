"""Files and output: atomic writes, JSON, new folders, closed pipes, and messages about errors of a disk.

A file is complete or absent, even after a power failure, because it is renamed into place. Nothing here imports torch.
"""

import errno
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_bytes

BROKEN_PIPE_CODE = 141
"""Exit code that a shell gives a program killed by SIGPIPE: 128 plus the number of the signal."""
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
UNREACHABLE = {errno.ESTALE, errno.EIO, errno.ENODEV, errno.ENOTCONN, errno.ENXIO}
NOT_A_FOLDER = {errno.EEXIST, errno.ENOTDIR}

OTHER_FOLDER_HINT = "choose another folder: hydra.run.dir=DIR, or hydra.sweep.dir=DIR for a sweep."


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` on success, delete it on any error.

    Raises:
        OSError: If the folder can't be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Keep the suffix: writers such as pandas and matplotlib choose the format by it.
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        _ensure_on_disk(temporary)  # if only the name reached the disk before a power failure, the file would be empty
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _ensure_on_disk(path: Path) -> None:
    """Block until the content of a file has been written to disk."""
    descriptor = os.open(path, os.O_RDWR)  # Windows only syncs files that are open for writing
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_new_folder(folder: Path, *, hint: str = "", allow_links: bool = True) -> None:
    """Check that a folder does not exist yet or is empty.

    Args:
        folder: The folder.
        hint: Sentence at the end of the error message that says what to type.
        allow_links: Whether a symbolic link to an empty folder is accepted.

    Raises:
        PylorusError: If it holds files or is a file.
    """
    is_new = not (folder.exists() or folder.is_symlink())
    is_empty = folder.is_dir() and (allow_links or not folder.is_symlink()) and not any(folder.iterdir())
    if not (is_new or is_empty):
        raise PylorusError(f"{folder}: already exists, expected a new or empty folder. {hint}".rstrip())


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically, in UTF-8."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write plain values atomically, as indented JSON.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON can't represent.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if it does not exist.

    Raises:
        PylorusError: If the file is not valid JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PylorusError(f"{path}: not valid JSON: {error}") from error


@contextmanager
def handle_closed_pipe() -> Iterator[None]:
    """Exit the process silently if the standard output is closed while the body of the `with` statement prints."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # otherwise Python flushes at exit, where the error can't be caught
    except BrokenPipeError:
        # Python flushes the remaining buffer at exit, so it needs somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE_CODE)


def explain_disk_error(error: OSError) -> str | None:
    """Return a message on why a run can't start or be summarized; None if it is not an error of the disk."""
    path = get_error_path(error) or "the output folder"
    folder = _find_existing_folder(Path(path) if get_error_path(error) else Path.cwd())
    if error.errno in DISK_FULL:
        return f"{format_disk_full(path, folder)}\nFree some space, or {OTHER_FOLDER_HINT}"
    if error.errno in NOT_WRITABLE:
        return f"{format_not_writable(error, path, folder)}\nOr {OTHER_FOLDER_HINT}"
    if error.errno in UNREACHABLE:
        return f"{format_drive_lost(error, path)}\nReconnect the drive or the network, or {OTHER_FOLDER_HINT}"
    if error.errno in NOT_A_FOLDER:
        return (
            f"{path}: found a file with this name or with the name of a folder above it, expected a folder. Move the "
            f"file, or {OTHER_FOLDER_HINT}"
        )
    if error.errno == errno.ENAMETOOLONG:
        return f"{path}: the name is too long for this disk. Use a shorter name, or {OTHER_FOLDER_HINT}"
    return None


def get_error_path(error: BaseException) -> str | None:
    """Return the file that an error names, if any."""
    filename = error.filename2 or error.filename if isinstance(error, OSError) else None
    return str(filename) if filename else None


def format_disk_full(path: str, folder: Path) -> str:
    """Return the message for a full disk: what could not be written, and how much space is free at `folder`."""
    return f"the disk is full: {path} could not be written{_format_free_space(folder)}."


def format_not_writable(error: OSError, path: str, folder: Path) -> str:
    """Return the message for a file or folder that is not writable, and how to find out why."""
    return (
        f"{path} can't be written to: {error.strerror}.\n"
        f"Make the folder writable (to see its owner: ls -ld {folder}; to see whether its drive is mounted read-only: "
        f"findmnt -T {folder})."
    )


def format_drive_lost(error: OSError, path: str) -> str:
    """Return the message for a drive that has become unavailable."""
    return f"{path} can't be reached: {error.strerror}."


def _find_existing_folder(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), path)


def _format_free_space(folder: Path) -> str:
    try:
        return f" ({format_bytes(shutil.disk_usage(folder).free)} free)"
    except OSError:
        return ""
