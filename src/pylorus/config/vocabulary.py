"""What people type who know another framework, and what it is called here: unknown keys, misspelt keys, wrong types.

The words are in the tables of `pylorus.config.synonyms`. A key that is missing there but is the last part of one of our
keys (`image_size=224`) is found in the schema itself.
"""

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from pylorus.config.schema import GROUPS, Config, StageConfig, list_group_files
from pylorus.config.synonyms import FALSE, GROUP_VALUES, SYNONYMS, TRUE, VALUES
from pylorus.core.errors import TRAIN_COMMAND, PylorusError, format_suggestion
from pylorus.core.io import iter_fields

STAGES = ("pretrain", "finetune")
"""The stages of conf/config.yaml: `stages.*.KEY` below stands for the key of each that the command trains."""


class UnknownKeyError(PylorusError):
    """A key that does not exist.

    Attributes:
        words: What to type in its place; empty if nothing is close.
    """

    def __init__(self, message: str, words: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.words = list(words)


def check_key(path: str, *, schema: type = Config, value: str | None = None, stages: Sequence[str] = STAGES) -> None:
    """Check that the schema has a dotted key.

    Args:
        path: The key.
        schema: The dataclass at its root.
        value: The value that was typed with it, for the suggestion; None: the key alone.
        stages: The stages that the command trains.

    Raises:
        UnknownKeyError: If it does not; the message names the unknown part, and what is meant by it here.
    """
    kind: Any = schema
    parents: list[str] = []
    for part in path.split("."):
        if dataclasses.is_dataclass(kind):
            known = {field.name: field_kind for field, field_kind in iter_fields(kind)}
            if part not in known:
                raise _build_unknown_key_error(path, parents, part, list(known), value, stages)
            kind = known[part]
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif kind is Any:
            return
        else:
            raise UnknownKeyError(f'{path}: "{".".join(parents)}" is a single value and has no keys of its own.')
        parents.append(part)


def _build_unknown_key_error(
    path: str, parents: list[str], part: str, known: list[str], value: str | None, stages: Sequence[str]
) -> UnknownKeyError:
    problem = f'"{".".join(parents)}" has no key "{part}"' if parents else f'there is no key "{part}"'
    names = known if parents else list(dict.fromkeys([*known, *GROUPS]))
    if part in names:
        problem = f'"{part}" is a group of files, as in {part}=NAME, and has no keys'
    words, note = ([], "") if part in names else translate_key(path, value, stages=stages)
    own, _, last = words[0].partition("=")[0].rpartition(".") if len(words) == 1 else ("", "", "")
    if parents and own == ".".join(parents) and format_suggestion(part, [last], cutoff=0.8):
        return UnknownKeyError(f'{path}: {problem}. Did you mean "{last}"?', words)
    if words or note:
        text = f" Did you mean {' '.join(words)}?" if words else ""
        return UnknownKeyError(f"{path}: {problem}.{text}{f' {note}' if note else ''}", words)
    suggestion = format_suggestion(part, set(names) - {part}, cutoff=0.6)
    if suggestion:
        nearest = suggestion.split('"')[1]
        rest = path.split(".")[len(parents) + 1 :]
        key = ".".join([*parents, nearest, *rest])
        words = [key if value is None else f"{key}={value}"] if key in GROUPS or is_key(key) else []
    return UnknownKeyError(
        f"{path}: {problem}.{suggestion}\n"
        f"Keys at this level: {', '.join(names)}. For all keys, run: {TRAIN_COMMAND} --help",
        words,
    )


def translate_key(path: str, value: str | None, *, stages: Sequence[str] = STAGES) -> tuple[list[str], str]:
    """Translate a key that does not exist into what it is called here.

    Args:
        path: The key as typed, such as trainer.max_epochs.
        value: Its value; None: none was typed.
        stages: The stages that the command trains.

    Returns:
        The words to type in its place, and a sentence about them; both empty if nothing is known.

    Example:
        >>> translate_key("epochs", "5")
        (['stages.pretrain.epochs=5', 'stages.finetune.epochs=5'], '')
        >>> translate_key("trainer.max_epochs", "5", stages=["finetune"])
        (['stages.finetune.epochs=5'], '')
        >>> translate_key("model.pretrained", "False")
        (['model.weights=none'], '')
    """
    *parents, name = path.split(".")
    in_stage = [part for part in parents if part in STAGES]
    named = _normalize(name)
    if "stages" in parents or in_stage or (parents and parents[0] == "stage"):
        own = {_normalize(field.name): field.name for field, _ in iter_fields(StageConfig)}
        aliases = {"learningrate": "lr", "learning_rate": "lr", "baselr": "lr", "initlr": "lr", "trainable": "learn"}
        key = own.get(named) or aliases.get(named)
        if key is not None:
            return _fill(f"stages.*.{key}={{}}", name, value, in_stage or stages)
    template = _find_template(named, value)
    if template is None:
        template = _find_leaf(named, parents)
    if template is None and not parents:
        nearest = difflib.get_close_matches(named, [*_index_synonyms(), *_index_leaves()], n=1, cutoff=0.85)
        if nearest:
            template = _find_template(nearest[0], value) or _find_leaf(nearest[0], parents)
    return ([], "") if template is None else _fill(template, name, value, in_stage or stages)


def check_value(key: str, value: str) -> None:
    """Check the value of a key that takes one of a few words, or true and false.

    Args:
        key: The key.
        value: Its value as typed, one only.

    Raises:
        UnknownKeyError: If it is none of them; suggests the one that is meant.
    """
    metadata = get_key_metadata(key)
    plain = value.strip().strip("'\"")
    generic = re.sub(r"^stages\.\w+\.", "stages.*.", key)
    choices = list(metadata.get("choices") or ())
    if metadata.get("kind") is bool:
        choices = ["true", "false"]
        meant = "true" if re.fullmatch(TRUE, plain, re.IGNORECASE) else ""
        meant = meant or ("false" if re.fullmatch(FALSE, plain, re.IGNORECASE) else "")
        is_wrong = not meant or plain.lower() in ("ja", "oui", "si", "nein", "non")
    else:
        is_limited = bool(choices) and metadata.get("low") is None
        meant = next((word for pattern, word in VALUES.get(generic, {}).items()
                      if re.fullmatch(pattern, plain, re.IGNORECASE)), "")  # fmt: skip
        is_wrong = (is_limited and plain not in choices) or (key == "model.weights" and bool(meant))
        high = metadata.get("high")
        if (
            high is not None
            and high <= 1
            and re.fullmatch(r"\d+(\.\d+)?%?", plain)
            and 1 < float(plain.strip("%")) <= 100
        ):
            raise UnknownKeyError(
                f"{key}: found {plain}, expected {metadata['low']} to {high}. "
                f'Did you mean "{float(plain.strip("%")) / 100:g}"?',
                [f"{key}={float(plain.strip('%')) / 100:g}"],
            )
    if not is_wrong or not plain or (plain == "null" and (metadata.get("is_optional") or not choices)):
        return
    nearest = meant or next(iter(format_suggestion(plain, choices).split('"')[1:]), "")
    suggestion = f' Did you mean "{nearest}"?' if nearest else ""
    expected = f"one of {', '.join(choices)}" if choices else "hub, none, or an existing file"
    if metadata.get("kind") is bool:
        expected = "true or false"
    raise UnknownKeyError(
        f'{key}: found "{plain}", expected {expected}.{suggestion}', [f"{key}={nearest}"] if nearest else []
    )


def translate_group_value(group: str, value: str) -> list[str]:
    """Translate the value of a group of conf/ that has no such file into the words to type; empty if nothing is known.

    Example:
        >>> translate_group_value("augment", "strong"), translate_group_value("model", "efficientnet_b0")
        (['augment=endoscopy'], ['model=timm', 'model.name=efficientnet_b0'])
    """
    for pattern, template in GROUP_VALUES.get(group, {}).items():
        if re.fullmatch(pattern, value, re.IGNORECASE):
            return template.replace("{}", value).split()
    return []


@functools.cache
def _index_synonyms() -> dict[str, str | Mapping[str, str]]:
    return {_normalize(word): meaning for words, meaning in SYNONYMS.items() for word in words.split()}


@functools.cache
def _index_leaves() -> dict[str, list[str]]:
    """Return the keys of the schema by their last part, without separators."""
    leaves: dict[str, list[str]] = {}

    def collect(schema: Any, path: str) -> None:
        for field, kind in iter_fields(schema):
            if dataclasses.is_dataclass(kind):
                collect(kind, f"{path}{field.name}.")
            elif field.name == "stages":
                collect(StageConfig, "stages.*.")
            elif field.name not in ("kind", "args", "_target_"):
                leaves.setdefault(_normalize(field.name), []).append(f"{path}{field.name}")

    collect(Config, "")
    return leaves


def _find_template(named: str, value: str | None) -> str | None:
    meaning = _index_synonyms().get(named)
    if meaning is None or isinstance(meaning, str):
        return meaning
    plain = "" if value is None else value.strip().strip("'\"")
    for pattern, template in meaning.items():
        for group in ("model", "augment", "logger"):
            options = [re.escape(name) for name in list_group_files(group) if name != "timm"]
            pattern = pattern.replace("{models}" if group == "model" else f"{{{group}}}", "|".join(options))
        match = re.fullmatch(f"(?:{pattern})", plain, re.IGNORECASE)
        if match is not None:
            groups = [text for text in match.groups() if text is not None]
            return template.replace("{1}", groups[0] if groups else "").replace(
                "{fraction}", f"{float(groups[0]) / 100:g}" if "{fraction}" in template else ""
            )
    return None


def _find_leaf(named: str, parents: Sequence[str]) -> str | None:
    """Return the template of the key whose last part this is: that of its section, else the only one there is."""
    keys = _index_leaves().get(named, [])
    own = [key for key in keys if parents and key.startswith(f"{parents[0]}.")]
    keys = own or keys
    return f"{keys[0]}={{}}" if len(keys) == 1 else None


def _fill(template: str, name: str, value: str | None, stages: Sequence[str]) -> tuple[list[str], str]:
    """Return the words of a template, with the value in its place, and its sentence."""
    text, _, note = (part.strip() for part in template.partition("#"))
    plain = value if value is not None else "…"
    words = []
    for word in text.split():
        word = word.replace("{name}", name.lower().removeprefix("use_"))
        word = word.replace("{list}", plain if plain.startswith("[") else f"[{plain.strip('()')}]")
        if "{range}" in word:
            word = word.replace("{range}", ",".join(map(str, range(min(int(plain), 20)))))
        word = word.replace("{}", plain)
        words += [word.replace(".*.", f".{stage}.") for stage in stages] if ".*." in word else [word]
    return words, note.replace("{}", plain)


def _normalize(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _iter_steps(path: str) -> Iterator[tuple[Any, "dataclasses.Field[Any] | None"]]:
    """Yield the type at each part of a dotted key, with its field if it has one; end at a part that is unknown."""
    kind: Any = Config
    for part in path.split("."):
        field = None
        if dataclasses.is_dataclass(kind):
            field, kind = {each.name: (each, its_kind) for each, its_kind in iter_fields(kind)}.get(part, (None, None))
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        elif kind is not Any:
            return
        if kind is None:
            return
        yield kind, field


def is_key(path: str) -> bool:
    """Return whether the schema has a dotted key; searches for no similar one.

    Example:
        >>> is_key("optimizer.lr"), is_key("lr")
        (True, False)
    """
    return len(list(_iter_steps(path))) == len(path.split("."))


def is_free_form(path: str) -> bool:
    """Return whether a key is in a part of the schema that accepts any name (model.args, augment.transforms).

    Example:
        >>> is_free_form("model.args.drop_rate"), is_free_form("model.name")
        (True, False)
    """
    return any(kind is Any and field is None for kind, field in _iter_steps(path))


def get_key_metadata(path: str) -> Mapping[str, Any]:
    """Return what the schema says of a key: its choices, range, default and kind; empty if unknown.

    Example:
        >>> get_key_metadata("optimizer.lr")["kind"].__name__, dict(get_key_metadata("lr"))
        ('float', {})
    """
    steps = list(_iter_steps(path))
    if len(steps) < len(path.split(".")):
        return {}
    kind, field = next((kind, field) for kind, field in reversed(steps) if field is not None)
    is_optional = type(None) in typing.get_args(field.type)
    return {**field.metadata, "default": field.default, "kind": kind, "is_optional": is_optional}


def format_error(error: BaseException) -> str:
    """Format an error of Hydra or OmegaConf; for OmegaConf's, with the key and what is wrong with its value."""
    from hydra.errors import HydraException  # late: not every program that reads a configuration uses Hydra

    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: no value given. Add {error.full_key}=… to the command line."
    cause = error.__cause__ if isinstance(error, HydraException) else None
    type_error = cause if cause is not None else error
    wrong = re.match(
        r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+)|"
        r"Cannot convert '(?:\w+)' to (string): '(.*)'",
        str(type_error),
        re.DOTALL,
    )
    if wrong is not None and isinstance(type_error, OmegaConfBaseException):
        found, kind = (wrong[1], wrong[2]) if wrong[2] else (wrong[4], wrong[3])
        if kind in KINDS:
            return _format_wrong_type(str(type_error.full_key), found, kind)
    if isinstance(type_error, ConfigKeyError | ConfigAttributeError) and isinstance(type_error.parent_node, DictConfig):
        key, known = str(type_error.key), [str(name) for name in type_error.parent_node]  # a stage, which has any name
        parent = str(type_error.full_key).removesuffix(f".{key}")
        if type_error.full_key == "hydra.launcher.n_jobs":
            return f"{type_error.full_key}: this launcher runs one job after the other. Add hydra/launcher=local."
        return (
            f'{type_error.full_key}: "{parent}" has no key "{key}".{format_suggestion(key, known)}\n'
            f"Keys at this level: {', '.join(known)}."
        )
    lines = [str(error)] + ([str(cause)] if cause is not None else [])
    return "\n".join(line.strip() for line in lines if line.strip())


KINDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "string": "a single word"}
"""What OmegaConf's names of types mean."""


def _format_wrong_type(key: str, found: str, kind: str) -> str:
    """Say what a key takes, with an example that is as close as possible to what was typed."""
    metadata = get_key_metadata(key)
    if metadata.get("choices") and kind == "string":
        expected = f"one of {', '.join(metadata['choices'])}"
        return f"{key}: found {found}, expected {expected}."
    numbers = re.findall(r"-?\d+(?:[.,]\d+)?(?:e-?\d+)?", found, re.IGNORECASE)
    example = ""
    if kind == "Integer" and numbers:
        example = f", such as {max(round(float(numbers[0].replace(',', '.'))), round(metadata.get('low') or 0))}"
    elif kind == "Float" and numbers:
        example = f", such as {numbers[0].replace(',', '.')}"
    elif kind in ("Integer", "Float") and metadata.get("low") is not None:
        example = f" of at least {metadata['low']:g}"
    return f'{key}: found "{found}", expected {KINDS[kind]}{example}.'
