"""Files and values: atomic writes, JSON and its schema, arguments, new folders, closed pipes, messages about a disk.

A file is complete or absent, even after a power failure, because it is renamed into place. Nothing here imports torch,
and pydantic is imported only where values are checked.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import secrets
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar

from pylorus.core.errors import PylorusError, format_path, format_suggestion

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

Kind = TypeVar("Kind")
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

BROKEN_PIPE_CODE = 141
"""Exit code that a shell gives a program killed by SIGPIPE: 128 plus the number of the signal."""

CHECKSUM = "checksum"
"""Key of a JSON object's checksum: the SHA-256 of all other keys."""
NO_THREADS = {"use_threads": False}
PARQUET_OPTIONS: Mapping[str, Any] = {"pre_buffer": False, "to_pandas_kwargs": NO_THREADS, **NO_THREADS}
"""Options of `pandas.read_parquet`: pyarrow waits forever for a thread that can't be started (`ulimit -v`, `-u`)."""


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


MAX_NAMED_FILES = 3
"""Number of files that the message about a folder that is not empty names."""


def check_new_folder(
    folder: Path, *, hint: str = "", allow_links: bool = True, own: Sequence[str] = (), outside: Sequence[Path] = ()
) -> None:
    """Check that a folder may be written to: it does not exist yet, is empty, or holds an earlier result.

    Args:
        folder: The folder.
        hint: Sentence at the end of the error message that says what to type.
        allow_links: Whether a symbolic link to an empty folder is accepted.
        own: Names of files or folders that only an earlier result has: a folder that holds one of them is accepted.
        outside: Folders that are read, such as a bundle: the folder must not lie in one of them.

    Raises:
        PylorusError: If it holds other files, is a file, or lies in one of the folders that are read.
    """
    for other in outside:
        if other.is_dir() and folder.resolve().is_relative_to(other.resolve()):
            where = "is" if folder.resolve() == other.resolve() else f"is inside {other}, which is"
            raise PylorusError(f"{folder} {where} only read. Name a folder outside of it to write to.")
    if not (folder.exists() or folder.is_symlink()) or any((folder / name).exists() for name in own):
        return
    expected = f"already exists, expected a new or empty folder. {hint}".rstrip()
    if not folder.is_dir() or (folder.is_symlink() and not allow_links):
        raise PylorusError(f"{folder}: {expected}")
    names = sorted(os.listdir(folder))  # noqa: PTH208 names are enough, and there may be many
    if names:
        shown = ", ".join(map(format_path, names[:MAX_NAMED_FILES]))
        raise PylorusError(f"{folder}: {expected} Found: {shown}{' …' if len(names) > MAX_NAMED_FILES else ''}")


TABLE_FORMATS = (".csv", ".parquet", ".json")
"""Suffixes of tables that a command writes."""


def check_table_name(path: Path, *, argument: str) -> None:
    """Check that the name of a table to be written says its format.

    Raises:
        PylorusError: If it has another suffix than those of `TABLE_FORMATS`.
    """
    if path.suffix.lower() not in TABLE_FORMATS:
        raise PylorusError(f"{argument}: found {path}, expected a file name that ends in {', '.join(TABLE_FORMATS)}.")


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


def check_arguments(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Check the arguments of each call of a function against its annotations, without converting text to numbers.

    An array, Series or tensor of values is passed as a list where a list is expected, and a number of NumPy as Python's
    own. NaN and infinity are no numbers here, and True is no whole number. An annotation that can't be resolved at run
    time, since its import would be heavy, is not checked.

    Args:
        function: A function, method or constructor of the Python interface. Words are annotated with `Literal`, ranges
            as in `Annotated[int, Ge(1)]`, a dataclass with `pydantic.InstanceOf`.

    Raises:
        PylorusError: At a call; names the argument, the value found and the value expected.

    Example:
        >>> @check_arguments
        ... def train(*, seed: int = 0) -> int:
        ...     return seed
        >>> train(seed="x")
        Traceback (most recent call last):
        pylorus.core.errors.PylorusError: train: seed: found 'x', expected a whole number.
    """
    signature = inspect.signature(function)
    *_, owner, name = ("", *function.__qualname__.split("."))
    caller = owner if name == "__init__" else name

    @functools.wraps(function)
    def check_and_call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python says which argument is missing or unknown
        for argument, annotation in _get_annotations(function).items():
            if argument in bound.arguments:
                value, where = bound.arguments[argument], f"{caller}: {argument}"
                bound.arguments[argument] = _check_argument(value, annotation, where=where)
        return function(*bound.args, **bound.kwargs)

    return check_and_call


@functools.cache
def _get_annotations(function: Callable[..., object]) -> dict[str, Any]:
    """Return the annotation of each parameter of a function that can be resolved."""
    resolved: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if is_variadic or parameter.annotation is parameter.empty:
            continue
        holder = types.SimpleNamespace(__annotations__={name: parameter.annotation})
        try:
            resolved |= typing.get_type_hints(holder, getattr(function, "__globals__", {}), include_extras=True)
        except NameError:  # imported for type checkers only
            continue
    return resolved


def _check_argument(value: Any, annotation: Any, *, where: str) -> Any:
    from pydantic import ValidationError

    adapter = _get_argument_adapter(annotation)
    if getattr(value, "shape", None) == ():
        value = value.tolist()
    candidates = [value, value.tolist()] if hasattr(value, "tolist") else [value]
    for candidate in candidates:
        try:
            adapter.validate_python(candidate)
        except ValidationError:
            continue
        return candidate
    words = [word for word in _list_words(annotation) if isinstance(value, str)]
    raise PylorusError(
        f"{where}: found {describe_value(value)}, expected {describe_type(annotation)}."
        f"{format_suggestion(value, words) if words else ''}"
    )


@functools.cache
def _get_argument_adapter(annotation: Any) -> "TypeAdapter[Any]":
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False))


def describe_value(value: Any) -> str:
    """Say what a message found: a plain value as Python writes it, of anything else its type.

    Example:
        >>> describe_value("x"), describe_value(dict), describe_value(Path("a"))
        ("'x'", 'the class dict', "'a'")
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Path):
        return repr(str(value))
    if hasattr(value, "shape"):
        return f"{_add_article(type(value).__name__.removeprefix('nd'))} of shape {tuple(value.shape)}"
    if value is None or isinstance(value, str | bytes | int | float | list | tuple | set | dict):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}…"
    return f"the function {value.__name__}" if inspect.isroutine(value) else _add_article(type(value).__name__)


PLAIN_TYPES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    Path: "a path",
    type(None): "None",
    Any: "any value",
}


def describe_type(annotation: Any) -> str:
    """Say in words what values an annotation accepts.

    Example:
        >>> describe_type(Sequence[str] | None), describe_type(str | Path), describe_type(Literal["pad", "crop"])
        ('a list of text, or None', 'a path', "'pad' or 'crop'")
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        members = list(dict.fromkeys(member for member in arguments if not (member is str and Path in arguments)))
        texts = [describe_type(member) for member in members]
        return f"{', '.join(texts[:-1])}, or {texts[-1]}" if len(texts) > 1 else texts[0]
    if origin is Literal:
        words = [repr(word) for word in arguments]
        return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
    if origin is Annotated:
        return f"{describe_type(arguments[0])}{_describe_range(arguments[1:])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a dictionary"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        plural = {"a path": "paths", "a whole number": "whole numbers", "a number": "numbers"}
        entry = describe_type(arguments[0])
        for singular, word in plural.items():
            entry = entry.replace(singular, word)
        return f"a list of {entry}"
    if origin is Callable:
        return "a function"
    return PLAIN_TYPES.get(annotation) or _add_article(getattr(annotation, "__name__", str(annotation)))


def _describe_range(metadata: Sequence[Any]) -> str:
    """Return the part of a message that states the range in the metadata of `Annotated`; empty if it has none."""
    phrases = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    bounds = [
        f"{phrase} {getattr(item, name):g}"
        for item in metadata
        for name, phrase in phrases.items()
        if getattr(item, name, None) is not None
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _list_words(annotation: Any) -> list[str]:
    """List the words that an annotation accepts by `Literal`, for a suggestion."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return [word for word in arguments if isinstance(word, str)]
    return [word for member in arguments for word in _list_words(member)]


def _add_article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


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
