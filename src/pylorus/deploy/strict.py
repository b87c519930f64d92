"""Plain values from a JSON file as dataclasses: a missing, unknown or mistyped entry is refused by its name."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from pylorus.errors import PylorusError, did_you_mean

Kind = TypeVar("Kind")

WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


def parsed(content: bytes, *, where: str) -> object:
    """The plain values of a JSON text.

    Raises:
        PylorusError: If it is no JSON in UTF-8, has one key twice, a number that is none, or is nested too deep.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse)
    except RecursionError:
        raise PylorusError(f"{where}: nested too deep to be read.") from None
    except ValueError as error:  # of UTF-8, of JSON, of numbers with thousands of digits, and ours
        raise PylorusError(f"{where}: can't be read as JSON: {error}.") from error


def built(kind: type[Kind], values: object, *, where: str) -> Kind:
    """The dataclass that plain values describe.

    Args:
        kind: A dataclass whose fields are text, numbers, truth values, tuples, dictionaries, dataclasses or `Any`; a
            field's metadata may hold the `name` that it has in the file.
        values: What the file says.
        where: What errors call it, as in "model.json".

    Raises:
        PylorusError: Names the entry, what was found and what is expected.
    """
    return cast(Kind, _built(kind, values, where))


def plain(value: object) -> Any:
    """The plain values of a dataclass, fit for JSON: the opposite of `built`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {_name(field): plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _built(kind: Any, value: object, where: str) -> object:
    if kind is Any:
        return value
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _built(next(one for one in inner if one is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(cast(type, kind), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise PylorusError(f"{where}: found {_shown(value)}, expected a list.")
        return tuple(_built(inner[0], one, f"{where}[{place}]") for place, one in enumerate(value))
    if origin is dict:
        return {key: _built(inner[1], one, f"{where}.{key}") for key, one in _mapping(value, where).items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**53 else math.nan
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise PylorusError(f"{where}: found {_shown(value)}, expected {WORDS[kind]}.")
    return value


def _dataclass(kind: type, value: object, where: str) -> object:
    given = dict(_mapping(value, where))
    hints = typing.get_type_hints(kind)
    found = {}
    for field in dataclasses.fields(kind):
        name = _name(field)
        if name not in given:
            raise PylorusError(f'{where}: has no "{name}", which is expected.')
        found[field.name] = _built(
            hints[field.name], given.pop(name), f"{where}: {name}" if ":" not in where else f"{where}.{name}"
        )
    if given:
        first = next(iter(given))
        known = [_name(field) for field in dataclasses.fields(kind)]
        raise PylorusError(f'{where}: has an unknown entry "{first[:100]}".{did_you_mean(first[:100], known)}')
    return kind(**found)


def _mapping(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise PylorusError(f"{where}: found {_shown(value)}, expected names with values.")
    return value


def _name(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("name", field.name))


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, str) else f'"{value}"'
    return text if len(text) <= 80 else f"{text[:77]}…"


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _refuse(word: str) -> object:
    raise ValueError(f"{word} is no number")
