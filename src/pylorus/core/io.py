"""Files: atomic writes, JSON and its schema, checksums, the lock of a folder and the process that has it.

A file is complete or absent, even after a power failure, because it is renamed into place. A JSON object and a YAML
file contain their own checksum, a table has one beside it, and a checkpoint of torch is a zip archive, which has one
for each tensor that torch itself does not check. Nothing here imports torch, and pydantic is imported only where values
are checked.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import secrets
import shlex
import socket
import threading
import types
import typing
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from pylorus.core.errors import PylorusError, format_path, format_suggestion

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
INCOMPLETE = re.compile(r"\..+-[0-9a-f]{8}(\.[^.]*)?|\.failure-\d+\.json")
"""Names of incomplete files: those of `core.io.write_atomically`, and the errors of the processes of a SLURM step."""
INCOMPLETE_WEIGHTS = re.compile(r"\.tmp[A-Za-z0-9]{6}")
"""Names of incomplete files of safetensors, which are only ours in a folder for weights."""

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

Kind = TypeVar("Kind")

CHECKSUM = "checksum"
"""Key of a JSON object's checksum: the SHA-256 of all other keys."""
NO_THREADS = {"use_threads": False}
PARQUET_OPTIONS: Mapping[str, Any] = {"pre_buffer": False, "to_pandas_kwargs": NO_THREADS, **NO_THREADS}
"""Options of `pandas.read_parquet`: pyarrow waits forever for a thread that can't be started (`ulimit -v`, `-u`)."""


@contextmanager
def write_atomically(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` on success, delete it on any error.

    Args:
        path: The file.
        durable: Whether to wait until the content is on disk. Where readers verify a checksum and can do without the
            file, as in a cache, nobody needs to wait for the disk.

    Raises:
        OSError: If the folder can't be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Keep the suffix: writers such as pandas and matplotlib choose the format by it.
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        if durable:  # if only the name reached the disk before a power failure, the file would be empty
            _ensure_on_disk(temporary)
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


def check_new_folder(
    folder: Path, *, hint: str = "", allow_links: bool = True, own: Sequence[str] = (), outside: Sequence[Path] = ()
) -> None:
    """Check that a folder does not exist yet, is empty, or holds an earlier result.

    Args:
        folder: The folder.
        hint: Sentence in the error message that says what to type.
        allow_links: Whether a symbolic link to an empty folder is accepted.
        own: Names of which a folder with an earlier result holds at least one.
        outside: Folders that are only read: it must not be one of them, or lie in one.

    Raises:
        PylorusError: If it holds other files, lies in one of the folders that are read, or can't be written to.
    """
    for other in outside:
        if other.is_dir() and folder.resolve().is_relative_to(other.resolve()):
            where = "is" if folder.resolve() == other.resolve() else f"is inside {other}, which is"
            raise PylorusError(f"{folder} {where} only read. Name a folder outside of it to write to.")
    if os.path.lexists(folder) and not any((folder / name).exists() for name in own):
        is_accepted = folder.is_dir() and (allow_links or not folder.is_symlink())
        names = sorted(os.listdir(folder)) if is_accepted else []  # noqa: PTH208
        if names or not is_accepted:
            found = f"Found: {', '.join(map(format_path, names[:3]))}{' …' if names[3:] else ''}" if names else ""
            message = f"{folder}: already exists, expected a new or empty folder. {hint}".rstrip()
            raise PylorusError(f"{message} {found}".rstrip())
    check_writable_folder(folder, hint=hint)


def check_writable_folder(folder: Path, *, hint: str = "") -> None:
    """Check that files can be written to a folder, before time is spent on their content; none is left behind.

    Raises:
        PylorusError: If it, or a folder above it, is a file, or can't be written to; `hint` ends the message.
    """
    places = (folder, *folder.absolute().parents)
    missing = list(takewhile(lambda each: not os.path.lexists(each), places))
    if not (existing := places[len(missing)]).is_dir():
        raise PylorusError(f"{existing}: found a file, expected a folder to write to. {hint}".rstrip())
    try:
        for each in reversed(missing):
            each.mkdir(exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PylorusError(f"{folder}: can't write to this folder: {error.strerror}. {hint}".rstrip()) from error
    finally:
        for each in missing:
            with suppress(OSError):  # it was not created, or another process uses it by now
                each.rmdir()


def create_private_folder(folder: Path, *, levels: int) -> None:
    """Create a folder, and those above it, where they are missing; OSError if that fails.

    Args:
        folder: The folder.
        levels: How many folders, from this one upwards, are created with access for their owner only.
    """
    for each in (*reversed(folder.parents[: levels - 1]), folder):
        each.mkdir(mode=0o700, parents=True, exist_ok=True)


def resolve_path(path: str | os.PathLike[str], *, argument: str) -> Path:
    """Return a path that was passed to a Python function, with `~` expanded.

    Args:
        path: The path.
        argument: Name of the argument, for the error message.

    Raises:
        PylorusError: If the path is empty, which would mean the current folder.
    """
    if os.fspath(path) == "":
        raise PylorusError(f'{argument}: found an empty path. For the current folder, write ".".')
    return Path(os.path.expanduser(path))  # noqa: PTH111 keeps ~NAME of nobody, where Path raises an error


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically, in UTF-8."""
    with write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object, *, indent: int | None = 2, sealed: bool = False) -> None:
    """Write plain values atomically as JSON.

    Args:
        path: Path of the file.
        content: Plain values.
        indent: Spaces per level; None: one long line, which is written ten times as fast.
        sealed: Whether the object gets a checksum, which `read_json` checks and leaves out.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON can't represent.
    """
    if sealed:
        assert isinstance(content, Mapping)
        content = seal_object(content)
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if it does not exist.

    Raises:
        PylorusError: If the file is not valid JSON, or does not match its checksum.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PylorusError(f"{path}: damaged: not valid JSON: {error}. Restore it from a backup.") from error
    if isinstance(content, dict):
        content, is_intact = verify_object(content)
        if not is_intact:
            raise PylorusError(
                f"{path}: damaged, or changed by hand: its content does not match its checksum. Restore it from a "
                "backup."
            )
    return content


def seal_object(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its checksum.

    Example:
        >>> verify_object(seal_object({"epochs": 3}))
        ({'epochs': 3}, True)
        >>> verify_object(seal_object({"epochs": 3}) | {"epochs": 2})
        ({'epochs': 2}, False)
    """
    return {**content, CHECKSUM: _compute_object_digest(content)}


def verify_object(content: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return a JSON object without its checksum, and whether it is intact; one without a checksum is."""
    rest = {name: value for name, value in content.items() if name != CHECKSUM}
    return rest, content.get(CHECKSUM, "") in ("", _compute_object_digest(rest))


def _compute_object_digest(content: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(content))  # as it will be read: names are texts, and tuples lists
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


EXPECTED = {
    "string": "text",
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "an object with names and values",
    "dataclass": "an object with names and values",
}
"""What a value should have been, by the first word of the type of pydantic's error."""


def validate(kind: type[Kind], values: object, *, where: str = "") -> Kind:
    """Build a dataclass from plain values, and check them.

    Args:
        kind: A dataclass. The metadata of its fields may hold `alias`, `ge`, `le` and `pattern`, as `pydantic.Field`
            takes them, and the words of the pattern as `choices`; its `pydantic.with_config` applies to the dataclasses
            inside it as well.
        values: Names and values; or JSON text, in which pydantic's strict mode takes lists for tuples.
        where: What stands before the entry in error messages, such as "model.json: " or "data.".

    Raises:
        PylorusError: If an entry is missing, unknown, of another type or out of its range; names the entry, the value
            found and the value expected.
    """
    from pydantic import ValidationError

    adapter: TypeAdapter[Kind] = _get_adapter(typing.cast(Any, kind))
    try:
        return adapter.validate_json(values) if isinstance(values, str) else adapter.validate_python(values)
    except ValidationError as error:
        raise PylorusError(f"{where}{_explain_mismatch(kind, error.errors(include_url=False)[0])}") from None


def convert_to_plain(value: object) -> Any:
    """Convert a dataclass to plain values for JSON: the inverse of `validate`.

    An entry that is null by default is left out, so that an older Pylorus, which does not know it, can read the file.
    """
    plain = _get_adapter(typing.cast(Any, type(value))).dump_python(value, mode="json", by_alias=True)
    for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        if field.default is None and getattr(value, field.name) is None:
            del plain[_get_entry_name(field)]
    return plain


@functools.cache
def _get_adapter(kind: Any) -> "TypeAdapter[Any]":
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _explain_mismatch(kind: type, error: "ErrorDetails") -> str:
    """Return the message for an error of pydantic about the values of a dataclass."""
    problem, location, value = error["type"], error["loc"], error["input"]
    if problem == "json_invalid":
        return f"can't be read as JSON: {error['ctx']['error'].partition(' at line ')[0]}."
    if problem in ("missing", "unexpected_keyword_argument"):
        path, parent, _ = _find_entry(kind, location[:-1])
        name = str(location[-1])[:100]
        if problem == "missing":
            return f'{path}the entry "{name}" is missing.'
        known = [_get_entry_name(field) for field in dataclasses.fields(parent)]
        return f'{path}found an unknown entry "{name}".{format_suggestion(name, known)}'
    path, entry, metadata = _find_entry(kind, location)
    choices, low, high = (metadata.get(name) for name in ("choices", "ge", "le"))
    if problem in ("greater_than_equal", "less_than_equal"):
        [(side, bound)] = error["ctx"].items()
        allowed = f"{'at least' if side == 'ge' else 'at most'} {bound:g}" if high is None else f"{low} to {high}"
        return f"{path}found {entry(value)!r}, expected {allowed}."
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}…"
    if choices:
        return f"{path}found {text}, expected one of {', '.join(choices)}.{format_suggestion(str(value), choices)}"
    return f"{path}found {text}, expected {EXPECTED.get(problem.split('_')[0], error['msg'])}."


def _find_entry(kind: Any, location: Sequence[int | str]) -> tuple[str, Any, Mapping[str, Any]]:
    """Find the entry of a dataclass in which pydantic found an error.

    Returns:
        What a message about it begins with, its type and the metadata of its field.
    """
    path, metadata = "", typing.cast(Mapping[str, Any], {})
    for part in location:
        if dataclasses.is_dataclass(kind):
            field, kind = next(each for each in iter_fields(kind) if _get_entry_name(each[0]) == part)
            metadata = field.metadata
        elif typing.get_origin(kind) in (dict, list, tuple):
            kind = resolve_optional_type(typing.get_args(kind)[isinstance(part, str)])
        else:  # a member of a union
            break
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return f"{path}: " if path else "", kind, metadata


def _get_entry_name(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("alias", field.name))


def resolve_optional_type(annotation: Any) -> Any:
    """Return the type of an annotation without None: `int` for `int | None`."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return next(member for member in typing.get_args(annotation) if member is not type(None))
    return annotation


def iter_fields(schema: Any) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Yield each field of a dataclass with its type, without None."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield field, resolve_optional_type(hints[field.name])


def iter_leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over all keys with their values; lists and free-form groups are single values."""
    if dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            yield from iter_leaves(getattr(config, field.name), f"{path}.{field.name}" if path else field.name)
    elif isinstance(config, Mapping) and any(dataclasses.is_dataclass(value) for value in config.values()):
        for name, value in config.items():
            yield from iter_leaves(value, f"{path}.{name}")
    else:
        yield path, config


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
