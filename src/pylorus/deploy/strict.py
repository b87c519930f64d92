"""Convert plain values from a JSON file to dataclasses; missing, unknown or mistyped entries are errors that name them.

The schema of a file is its dataclass.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from pylorus.errors import PylorusError, format_suggestion

Kind = TypeVar("Kind")

TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def parse_json(content: bytes, *, where: str) -> object:
    """Parse JSON in UTF-8.

    Args:
        content: All bytes of the file.
        where: Name of the file in error messages.

    Raises:
        PylorusError: If the content is not JSON in UTF-8, has duplicate keys, NaN or infinity, or is nested too deeply.
    """
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_check_unique_names, parse_constant=_raise_not_finite
        )
    except RecursionError:
        raise PylorusError(f"{where}: the JSON is nested too deeply to be read.") from None
    except ValueError as error:  # from UTF-8, JSON, numbers with thousands of digits, and the two functions below
        raise PylorusError(f"{where}: can't be read as JSON: {error}.") from error


def build_dataclass(kind: type[Kind], values: object, *, where: str) -> Kind:
    """Build a dataclass from plain values.

    Args:
        kind: A dataclass whose fields are text, numbers, booleans, tuples, dictionaries, dataclasses or `Any`; a
            field's metadata may contain the `name` that it has in the file.
        values: The content of the file.
        where: Name of the file in error messages, such as "model.json".

    Raises:
        PylorusError: If an entry is missing, unknown or of another type; names the entry, the value found and the
            value expected.
    """
    return cast(Kind, _build_value(kind, values, where))


def convert_to_plain(value: object) -> Any:
    """Convert a dataclass to plain values for JSON: the inverse of `build_dataclass`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            _get_field_name(field): convert_to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): convert_to_plain(inner) for key, inner in value.items()}
    return [convert_to_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _build_value(kind: Any, value: object, where: str) -> object:
    if kind is Any:
        return value
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return (
            None
            if value is None
            else _build_value(next(each for each in inner if each is not type(None)), value, where)
        )
    if dataclasses.is_dataclass(kind):
        return _build_fields(cast(type, kind), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise PylorusError(f"{where}: found {_format_value(value)}, expected a list.")
        return tuple(_build_value(inner[0], element, f"{where}[{index}]") for index, element in enumerate(value))
    if origin is dict:
        return {
            key: _build_value(inner[1], element, f"{where}.{key}")
            for key, element in _check_mapping(value, where).items()
        }
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**53 else math.nan
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise PylorusError(f"{where}: found {_format_value(value)}, expected {TYPE_NAMES[kind]}.")
    return value


def _build_fields(kind: type, value: object, where: str) -> object:
    remaining = dict(_check_mapping(value, where))
    hints = typing.get_type_hints(kind)
    arguments = {}
    for field in dataclasses.fields(kind):
        name = _get_field_name(field)
        if name not in remaining:
            raise PylorusError(f'{where}: the entry "{name}" is missing.')
        arguments[field.name] = _build_value(
            hints[field.name], remaining.pop(name), f"{where}: {name}" if ":" not in where else f"{where}.{name}"
        )
    if remaining:
        first = next(iter(remaining))
        known = [_get_field_name(field) for field in dataclasses.fields(kind)]
        raise PylorusError(f'{where}: found an unknown entry "{first[:100]}".{format_suggestion(first[:100], known)}')
    return kind(**arguments)


def _check_mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise PylorusError(f"{where}: found {_format_value(value)}, expected an object with names and values.")
    return value


def _get_field_name(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("name", field.name))


def _format_value(value: object) -> str:
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    return text if len(text) <= 80 else f"{text[:77]}…"


def _check_unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("it contains the same name twice")
    return values


def _raise_not_finite(constant: str) -> object:
    raise ValueError(f"{constant} is not a finite number")
