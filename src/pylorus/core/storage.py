"""Stored files: checksums, by which damage is found, the lock of a folder and the process that has it, disk faults.

A JSON object and a YAML file contain their own checksum, a table has one beside it, and a checkpoint of torch is a zip
archive, which has one for each tensor that torch itself does not check.
"""

import errno
import hashlib
import os
import re
import shlex
import shutil
import socket
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_bytes
from pylorus.core.io import write_text
from pylorus.core.limits import explain_limit

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
UNREACHABLE = {errno.ESTALE, errno.EIO, errno.ENODEV, errno.ENOTCONN, errno.ENXIO}
NOT_A_FOLDER = {errno.EEXIST, errno.ENOTDIR}
NOT_A_FILE = {errno.EISDIR, errno.ELOOP}
OTHER_FOLDER_HINT = "choose another folder: hydra.run.dir=DIR, or hydra.sweep.dir=DIR for a sweep."
LOCK = ".lock"
"""File that is locked while a process writes to its folder."""
HEARTBEAT_SECONDS = 20.0
"""Seconds between two heartbeats of a running run."""
HEARTBEAT_TIMEOUT = timedelta(minutes=3)
"""A process on another machine counts as dead after this time without a heartbeat."""
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
    write_text(path.with_name(path.name + SUFFIX), f"{digest}  {path.name}\n")
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
            f"from a backup, or start a new run. If only {beside.name} was damaged, delete that."
        )


def is_archive_intact(path: Path) -> bool:
    """Return whether a checkpoint exists and all its tensors have their checksums."""
    if not path.is_file():  # opening a named pipe would wait forever
        return False
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


def describe_process() -> dict[str, Any]:
    """Return what identifies this process in the status of a run, with the present time as its heartbeat."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "slurm": _get_slurm_job(), "heartbeat": format_now()}


def _get_slurm_job() -> list[str] | None:
    """Return the SLURM job ID of this process and how often the job was requeued; None outside SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    return [job, os.environ.get("SLURM_RESTART_COUNT", "0")] if job else None


def is_process_alive(status: dict[str, Any]) -> bool:
    """Return whether the process of a run is alive; on another machine only its heartbeat can be checked."""
    heartbeat = datetime.fromisoformat(status.get("heartbeat", status["started"]))
    import psutil

    before, now = status.get("slurm"), _get_slurm_job()
    if before and now and before[0] == now[0] and before[1] != now[1]:
        return False  # the same job before it was requeued: that process may have run on another machine
    if status.get("host", socket.gethostname()) != socket.gethostname():
        return datetime.now(UTC) - heartbeat < HEARTBEAT_TIMEOUT
    try:
        process = psutil.Process(status["pid"])
        # A process that started after the run's last heartbeat only reuses its process ID.
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= heartbeat.timestamp() + 2
    except psutil.NoSuchProcess:
        return False


def format_now() -> str:
    """Return the present time in UTC, to the second, as a status holds it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def explain_lock(folder: Path, activity: str, status: Mapping[str, Any]) -> str:
    """Return the message for a folder that another process has locked.

    Args:
        folder: The folder.
        activity: What is going on in it, as in "process 7 on node1 is training".
        status: The status of the run in it, with `host` and `heartbeat`; empty if unknown.
    """
    message = f"{folder}: {activity} in this folder."
    host, heartbeat = status.get("host", socket.gethostname()), status.get("heartbeat")
    if host == socket.gethostname() or heartbeat is None:
        return f"{message} Wait until it ends, or stop it first."
    silence = datetime.now(UTC) - datetime.fromisoformat(heartbeat)
    if silence < HEARTBEAT_TIMEOUT:
        minutes = f"{HEARTBEAT_TIMEOUT.total_seconds() / 60:.0f} minutes"
        return (
            f"{message} Wait until it ends, or stop it first, on {host}. If that machine is off, try again once it has "
            f"given no sign of life for {minutes} (now: {max(0.0, silence.total_seconds()):.0f} s)."
        )
    return (
        f"{message} It has given no sign of life for {silence.total_seconds() / 60:.0f} minutes, but still holds the "
        f"lock: {host} is off, out of reach, or has suspended it. Make sure there that it does not train any more, "
        f"then remove the lock and start again: rm {shlex.quote(str(folder / LOCK))}"
    )


def explain_disk_error(error: OSError) -> str | None:
    """Return a message on why a run can't start or be summarized; None if it is not an error of the disk."""
    if (limit := explain_limit(error)) is not None:
        return f"{limit}."
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
    if error.errno in NOT_A_FILE:
        return f"{format_not_a_file(path)} Move it away, or {OTHER_FOLDER_HINT}"
    if error.errno == errno.ENAMETOOLONG:
        return f"{path}: the name is too long for this disk. Use a shorter name, or {OTHER_FOLDER_HINT}"
    return None


def format_system_error(error: Exception) -> str:
    """Return an error as a message of a command; of an error of the system, with the file and what to do.

    Example:
        >>> format_system_error(OSError(errno.ENOSPC, "No space left on device", "/data/predictions.csv"))
        'the disk is full: /data/predictions.csv could not be written. Free some space, or write to another folder.'
        >>> format_system_error(PermissionError(errno.EACCES, "Permission denied", "model"))
        'model: Permission denied'
    """
    if (limit := explain_limit(error)) is not None:
        return f"{limit}."
    if not isinstance(error, OSError):
        return str(error)
    path = get_error_path(error)
    if error.errno in DISK_FULL:
        return (
            f"the disk is full: {path or 'a file'} could not be written. Free some space, or write to another folder."
        )
    if error.errno in NOT_A_FILE and path:
        return f"{format_not_a_file(path)} Move it away, or write to another folder."
    if error.errno == errno.EROFS:
        return f"{path or 'the disk'} can't be written to: {error.strerror}. Write to another folder."
    return f"{path}: {error.strerror}" if path and error.strerror else str(error)


def get_error_path(error: BaseException) -> str | None:
    """Return the file that an error names, if any."""
    filename = error.filename2 or error.filename if isinstance(error, OSError) else None
    return str(filename) if filename else None


INCOMPLETE = re.compile(r"\..+-[0-9a-f]{8}(\.[^.]*)?|\.failure-\d+\.json")
"""Names of incomplete files: those of `core.io.write_atomically`, and the errors of the processes of a SLURM step."""
INCOMPLETE_WEIGHTS = re.compile(r"\.tmp[A-Za-z0-9]{6}")
"""Names of incomplete files of safetensors, which are only ours in a folder for weights."""


def is_incomplete(path: Path) -> bool:
    """Return whether a file has the name of an incomplete one; others that are hidden are not ours."""
    has_weights = path.parent.name in ("checkpoints", "model")
    is_ours = INCOMPLETE.fullmatch(path.name) or (has_weights and INCOMPLETE_WEIGHTS.fullmatch(path.name))
    return bool(is_ours) and path.is_file()


def remove_incomplete_files(folder: Path) -> None:
    """Remove what a killed process left incomplete in the folder of a run, and named pipes, which block who opens them.

    Other hidden files are not ours: the folder of a run may be a clone, or somebody's home.
    """
    patterns = ("*", "*/*", "*/checkpoints/*", "report/*/*")
    for path in [path for pattern in patterns for path in folder.glob(pattern) if path != folder / LOCK]:
        with suppress(OSError):
            if path.is_fifo() or path.is_socket() or is_incomplete(path):
                path.unlink()


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


def format_not_a_file(path: str) -> str:
    """Return the message for a folder, or for links that lead in a circle, in the place of a file."""
    return f"{path}: found {'a folder' if Path(path).is_dir() else 'links that lead in a circle'}, expected a file."


def _find_existing_folder(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), path)


def _format_free_space(folder: Path) -> str:
    try:
        return f" ({format_bytes(shutil.disk_usage(folder).free)} free)"
    except OSError:
        return ""


@contextmanager
def send_heartbeats(write: Callable[..., None]) -> Iterator[None]:
    """Write a heartbeat at regular intervals while the code inside the context runs."""
    ended = threading.Event()

    def send_heartbeat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # the run itself will report a full disk
                write(heartbeat=format_now())

    thread = threading.Thread(target=send_heartbeat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
