r"""Read the words of a command line as the user typed them, and check them against the schema and the files of conf/.

Hydra has a grammar of its own for values, in which a path with an umlaut, `=`, `(` or a space is an error, `\(` loses
its backslash and `1_000` is a number. Here a value that is a path, a pattern or a text is quoted before Hydra's parser
sees it, where the parser would read something else than what was typed:

==============================  ====================================================================================
value                           meaning
==============================  ====================================================================================
path, pattern, text             as typed; `~` at its beginning is the home folder
in quotes                       what is between them, as in "data.root='a,b'"
`${key}`, `${oc.env:NAME}`      the value of the key or variable
null                            no value
[a,b]                           a list, where the key takes one; elements as above
a comma, with -m                separates the values of the sweep, unless it is in brackets or quotes, or follows `\`
a comma, without -m             part of the text; an error where several values are more likely meant
choice(…), interval(…), …       a function of Hydra, unless the key takes a pattern
empty                           refused where a path is expected
==============================  ====================================================================================
"""

import re
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal

from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException

from pylorus.config.keys import is_free_form
from pylorus.config.schema import CONF, EXTENSIBLE, GROUPS, Config
from pylorus.config.vocabulary import UnknownKeyError, check_key, check_value, translate_group_value
from pylorus.core.errors import PylorusError, fold_name, format_empty_value, format_path, format_suggestion
from pylorus.core.io import iter_fields
from pylorus.launch.corrections import (
    OPTIONS_WITH_VALUE,
    check_forms,
    correct_value,
    format_advice,
    is_table,
    list_stages,
    replace_word,
)
from pylorus.launch.sweep import check_installed

INPUT_PATHS = ("data.root", "data.manifest", "data.split_file", "model.weights")
OUTPUT_PATHS = ("cache.folder", "hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
PATTERNS = ("data.group",)

_OVERRIDE = re.compile(r"(?P<prefix>\+{0,2})(?P<key>[^=~+]+)=(?P<value>.*)", re.DOTALL)
_FUNCTION = re.compile(r"(choice|range|interval|tag|sort|shuffle|glob|int|float|str|bool)\(.*\)", re.DOTALL)
_OPENING, _CLOSING = "([{", ")]}"


def check_overrides(arguments: list[str], *, resuming: bool = False, typed: Sequence[str] | None = None) -> list[str]:
    """Check a command line for unknown keys and files, and return it as Hydra has to see it.

    Values are quoted where Hydra's parser would misread them; new keys of free-form parts (model.args) get their `+`;
    the kind of images follows from data.root and data.manifest unless `data=` names it. Groups and files are looked up
    where Hydra will find them: in conf/, `--config-dir`, `hydra.searchpath` and plugins.

    Args:
        arguments: The words, without those that Hydra does not know (`resume=`).
        resuming: Whether they change a run that exists, whose kind of images is known.
        typed: All words as they were typed, for the command that a message shows; None: `arguments`.

    Raises:
        PylorusError: Names every unknown key or file and value that can't be read, and shows the corrected command.
    """
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser

    typed = arguments if typed is None else typed
    for argument in arguments:
        _check_encoding(argument)
    if not {"-sc", "--shell-completion"} & set(arguments):  # install=bash, or an unfinished command line
        check_forms(typed)
    arguments = _move_options_first([_expand_option(argument) for argument in arguments])
    parsed = get_args_parser().parse_args(arguments)
    if parsed.shell_completion:
        return arguments
    parser = OverridesParser.create()
    in_sweep = parsed.multirun or "hydra.mode=MULTIRUN" in parsed.overrides
    quoted, overrides, problems = dict[str, str](), dict[str, Any](), _Problems(typed)
    for index, word in enumerate(parsed.overrides):
        with problems.collect(word):
            quoted[word] = quote_override(parser, word, in_sweep=in_sweep)
            overrides[word] = _parse_override(parser, quoted[word], before=parsed.overrides[index - 1] if index else "")
    files = _create_config_repository(parsed.config_path, parsed.config_dir, list(overrides.values()))
    extended = {
        name for name in EXTENSIBLE if any(each.key_or_group == f"{name}._target_" for each in overrides.values())
    }
    if len(files.get_sources()) > len(_create_config_repository(None, None, []).get_sources()):
        extended = set(EXTENSIBLE)  # the user's own files may name a `_target_`
    checked = dict[str, str]()
    for word, override in overrides.items():
        with problems.collect(word):
            checked[word] = _check_override(word, quoted[word], override, files, extended, typed)
    problems.raise_all()
    words = [checked.get(argument, argument) for argument in arguments]
    if resuming or parsed.config_name not in (None, "config"):
        return words
    return _infer_source(words, list(overrides.values()), files)


class _Problems:
    """The errors in the words of a command line: all of them are shown at once, with the corrected command."""

    def __init__(self, typed: Sequence[str]) -> None:
        self._typed = list(typed)
        self._errors: list[PylorusError] = []
        self._corrected = list(typed)

    @contextmanager
    def collect(self, word: str) -> Iterator[None]:
        """Keep an error that is raised for a word, and correct the word in the command."""
        try:
            yield
        except PylorusError as error:
            self._errors.append(error)
            if isinstance(error, UnknownKeyError) and error.words:
                self._corrected = replace_word(self._corrected, word, error.words)
            elif (corrected := correct_value(str(error), self._corrected)) is not None:
                self._corrected = corrected

    def raise_all(self) -> None:
        """Raise one error with all messages, if there are any."""
        if not self._errors:
            return
        text = "\n".join(dict.fromkeys(map(str, self._errors)))
        advice = format_advice(self._corrected) if self._corrected != self._typed else ""
        raise PylorusError(f"{text}{advice}") from self._errors[0]


def _infer_source(words: list[str], overrides: Sequence[Any], files: Any) -> list[str]:
    """Add the `data=` that data.root and data.manifest call for, unless the command line or an experiment has one."""
    keys = {override.key_or_group for override in overrides}
    if keys & {"data", "data.kind", "data._target_"} or not keys & {"data.root", "data.manifest"}:
        return words
    for override in overrides:
        if override.key_or_group == "experiment" and _sets_source(files, str(override.value())):
            return words
    values = {
        key: [str(value) for value in _list_values(override) if value is not None]
        for override in overrides
        if (key := override.key_or_group) in ("data.root", "data.manifest")
    }
    if values.get("data.manifest"):
        return [*words, "data=manifest"] if all(map(_exists, values["data.manifest"])) else words
    kinds = {guess_source(value) for value in values.get("data.root", [])}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind == "manifest":
        words = [re.sub(r"^(\+*)data\.root=", r"\1data.manifest=", word) for word in words]
    return words if kind is None else [*words, f"data={kind}"]


def _sets_source(files: Any, experiment: str) -> bool:
    """Return whether an experiment chooses a source of images other than the default."""
    found = files.load_config(f"experiment/{experiment}")
    return found is not None and any(
        getattr(entry, "group", "").strip("/") == "data" and entry.value not in (None, "synthetic")
        for entry in found.defaults_list
    )


def _list_values(override: Any) -> list[Any]:
    value = override.value()
    return list(value.list) if isinstance(value, ChoiceSweep) else [value]


def guess_source(root: str) -> str | None:
    """Return the `data=` for a data.root: its name or content says whether it is a folder, a table or shards.

    Returns:
        folders, manifest or shards; None if there is nothing with this name.
    """
    if "://" in root or (re.search(r"\{.*\}", root) and not _exists(root)):
        return "shards"
    if not _exists(root):
        return None
    path = Path(root).expanduser()
    if path.is_file():
        return "shards" if path.suffix == ".tar" else "manifest" if is_table(root) else None
    has_shards = any(path.glob("*.tar")) and not any(child.is_dir() for child in path.iterdir())
    return "shards" if has_shards else "folders"


def _check_encoding(argument: str) -> None:
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise PylorusError(
            f"{format_path(argument)}: the name is not UTF-8, and settings are saved in UTF-8. Rename the file or "
            "folder, or make a link to it: ln -s OLD NEW"
        ) from None


def _expand_option(argument: str) -> str:
    """Expand `~` in `--config-dir=~/conf`, where the shell leaves it."""
    option, equals, value = argument.partition("=")
    is_path_option = option in ("--config-dir", "-cd", "--config-path", "-cp") and equals
    return f"{option}={Path(value).expanduser()}" if is_path_option and value.startswith("~") else argument


def _move_options_first(arguments: list[str]) -> list[str]:
    """Return the words with options before overrides: Hydra's parser reads `A=1 B=2 -m`, but not `A=1 -m B=2`."""
    options: list[str] = []
    overrides: list[str] = []
    for index, argument in enumerate(arguments):
        is_value = index > 0 and arguments[index - 1] in OPTIONS_WITH_VALUE
        (options if argument.startswith("-") or is_value else overrides).append(argument)
    return [*options, *overrides]


def quote_override(parser: Any, argument: str, *, in_sweep: bool) -> str:
    """Return an override with its value quoted for Hydra, where Hydra would not read it as it was typed.

    Args:
        parser: Hydra's parser of overrides.
        argument: A word of the command line.
        in_sweep: Whether a comma separates the values of a sweep.

    Raises:
        PylorusError: If the value is empty, but the key takes a path.

    Example:
        >>> from hydra.core.override_parser.overrides_parser import OverridesParser
        >>> quote_override(OverridesParser.create(), "data.root=/images/a=b (1)", in_sweep=False)
        "data.root='/images/a=b (1)'"
    """
    match = _OVERRIDE.fullmatch(argument)
    if match is None:
        return argument
    key, value = match["key"], match["value"]
    kind = _get_value_kind(key)
    if kind in ("input", "output", "pattern") and value.strip() in ("", "''", '""'):
        raise PylorusError(format_empty_value(key))
    if kind == "any" and (not value or _parse_value(parser, value) is not None):
        return argument
    is_text = kind in ("output", "pattern") or (kind == "input" and _exists(value))
    is_text = is_text and (not in_sweep or key.startswith("hydra."))
    parts = [value] if is_text or not value else split_at_commas(value)
    return f"{match['prefix']}{key}={','.join(_quote_value(parser, part, kind, in_sweep=in_sweep) for part in parts)}"


Kind = Literal["input", "output", "pattern", "text", "list", "any"]


def _get_value_kind(key: str) -> Kind:
    """Return what a key takes: a path that exists or is written, a pattern, a text, a list of texts, or anything."""
    if key in INPUT_PATHS:
        return "input"
    if key in OUTPUT_PATHS:
        return "output"
    if key in PATTERNS:
        return "pattern"
    if key == "hydra.searchpath":
        return "list"
    kind: Any = Config
    metadata: Any = {}
    for part in key.split("."):
        if typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
            continue
        fields = {field.name: (field, each) for field, each in iter_fields(kind)} if is_dataclass(kind) else {}
        if part not in fields:
            return "any"
        metadata, kind = fields[part][0].metadata, fields[part][1]
    if kind == list[str]:
        return "list"
    return "text" if kind is str and not metadata["choices"] else "any"


def _exists(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, no such home, a null byte
        return False


def split_at_commas(text: str) -> list[str]:
    r"""Split a text at its commas, except those in quotes or brackets and those after a backslash.

    Example:
        >>> split_at_commas(r"a (1,2),'b,c',\d{1,3},d\,e")
        ['a (1,2)', "'b,c'", '\\d{1,3}', 'd\\,e']
    """
    parts, depth, index, start = [], 0, 0, 0
    while index < len(text):
        letter = text[index]
        is_first = not text[start:index].strip() or text[index - 1] in "[{("
        if letter in "'\"" and is_first and (end := _find_end_of_quote(text, index)) > 0:
            index = end
        elif letter == "\\":
            index += 1
        elif letter in _OPENING:
            depth += 1
        elif letter in _CLOSING:
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
        index += 1
    if depth != 0:  # brackets that are part of a name
        return re.split(r"(?<!\\),", text)
    return [*parts, text[start:]]


def _find_end_of_quote(text: str, start: int) -> int:
    """Return the index of the quote that closes the one at `start`, or -1: a quote in a name has no second one."""
    quote = text[start]
    for match in re.finditer(rf"(?<!\\)(\\\\)*{quote}\s*(?=[,\])}}]|$)", text[start + 1 :]):
        return start + 1 + match.start() + match[0].rindex(quote)
    return -1


def _quote_value(parser: Any, value: str, kind: Kind, *, in_sweep: bool) -> str:
    """Return one value as Hydra has to see it; a list element by element."""
    stripped = value.strip()
    if kind == "any" and _parse_value(parser, stripped) is not None:
        return stripped
    if kind in ("list", "any") and stripped.startswith("[") and stripped.endswith("]"):
        elements = [each.strip() for each in split_at_commas(stripped[1:-1])] if stripped[1:-1].strip() else []
        quote = _quote_value if kind == "any" else _quote_text
        return f"[{','.join(quote(parser, each, kind, in_sweep=True) for each in elements)}]"
    if kind == "any" and (stripped.startswith(("{", "[")) or re.match(r"\w+\(", stripped)):
        return value  # a mapping, list or function with an error inside, which Hydra's parser points at
    return _quote_text(parser, value if kind in ("input", "output", "pattern") else stripped, kind, in_sweep=in_sweep)


def _quote_text(parser: Any, text: str, kind: Kind, *, in_sweep: bool) -> str:
    r"""Return a text in quotes unless Hydra reads it as it is; `in_sweep`: whether `\,` stands for a comma."""
    is_null = text == "null" and kind != "list"
    if not text or is_null or (kind != "pattern" and _FUNCTION.fullmatch(text)):
        return text
    parsed = _parse_value(parser, text)
    if isinstance(parsed, QuotedString):
        return text
    literal = _expand_home(text.replace("\\,", ",") if in_sweep else text)
    is_plain = isinstance(parsed, str | int | float) and not isinstance(parsed, bool)
    if is_plain and str(parsed) == literal == text:
        return literal
    quote = Quote.double if "'" in literal and '"' not in literal else Quote.single
    return str(QuotedString(literal, quote).with_quotes())


def _expand_home(text: str) -> str:
    """Expand `~` at the beginning of a value: in `data.root=~/images` the shell leaves it."""
    if text != "~" and not re.match(r"~[\w.-]*/", text):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        raise PylorusError(
            f"{text}: there is no user {text[1:].partition('/')[0]}, whose folder ~ stands for."
        ) from None


def _parse_value(parser: Any, text: str) -> Any:
    """Return what Hydra reads in a value; None if it can't read it, or if it reads null."""
    try:
        return parser.parse_override(f"_={text}")._value
    except HydraException:
        return None


def _parse_override(parser: Any, argument: str, *, before: str) -> Any:
    """Parse an override.

    Args:
        parser: Hydra's parser of overrides.
        argument: The override, quoted.
        before: The override before it on the command line.

    Raises:
        PylorusError: If it is not KEY=VALUE as Hydra reads it; shows the word, and how to write it.
    """
    try:
        return parser.parse_override(argument)
    except HydraException as error:
        key, equals, value = argument.lstrip("+~").partition("=")
        if not equals and not argument.startswith("~"):
            hint = _suggest_word(argument, before)
            raise PylorusError(f'found "{argument}", expected KEY=VALUE, such as seed=3.{hint}') from error
        check_key(key)
        raise PylorusError(
            f"{key}: can't read the value {value}{_describe_place(argument, error.__cause__)}. Write a text with "
            f"spaces or special characters in two kinds of quotes: \"{key}='…'\". Inside brackets, quote each "
            "such text."
        ) from error


def _suggest_word(argument: str, before: str) -> str:
    """Return the sentence that says what to type in place of a word without `=`."""
    groups = [name for name in GROUPS if (CONF / name / f"{argument}.yaml").is_file()]
    if groups:
        return f" Did you mean {groups[0]}={argument}?"
    if before.endswith("="):
        return f" If it is the value of the word before it, leave out the space: {before}{argument}"
    if "=" in before:
        return f' If it belongs to the word before it, write both in quotes: "{before} {argument}"'
    return ""


def _describe_place(argument: str, cause: Any) -> str:
    """Return what Hydra's parser did not expect in an override, and where; empty if it does not say."""
    place = getattr(cause, "startIndex", None)
    place = getattr(getattr(cause, "offendingToken", None), "start", None) if place is None else place
    if not isinstance(place, int) or not 0 <= place < len(argument):
        return ""
    return f': unexpected "{argument[place]}" after {argument[:place]}'


def _create_config_repository(config_path: str | None, config_dir: str | None, overrides: list[Any]) -> Any:
    """Return Hydra's repository of configuration files for these options of the command line.

    Raises:
        PylorusError: If the search path names a folder that does not exist.
    """
    from hydra._internal.config_repository import ConfigRepository
    from hydra._internal.utils import create_automatic_config_search_path

    path = create_automatic_config_search_path(None, None, config_path or str(CONF))
    own = [("--config-dir", f"file://{Path(config_dir).absolute()}")] if config_dir is not None else []
    for override in overrides:
        if override.key_or_group == "hydra.searchpath" and isinstance(override.value(), list):
            own += [("hydra.searchpath", str(source)) for source in override.value()]
    for option, location in own:
        path.append(option, location)
    files = ConfigRepository(path)
    for source in files.get_sources():
        if source.provider in ("--config-dir", "hydra.searchpath") and not source.available():
            raise PylorusError(
                f"{source.provider}: {source.path} is not a folder, expected one with your configuration."
            )
    return files


def _check_override(
    word: str, argument: str, override: Any, files: Any, extended: set[str], typed: Sequence[str]
) -> str:
    key = override.key_or_group
    check_installed(argument)
    if key.startswith("hydra") and not files.group_exists(key):
        return argument
    if key in GROUPS or files.group_exists(key):
        _check_group(key, override, files, typed)
        return argument
    section, _, name = key.partition(".")
    is_argument = section in extended and bool(name)
    value = word.partition("=")[2] if "=" in word else None
    try:
        check_key(key, value=value, stages=list_stages(typed))
        is_argument = False
    except PylorusError:
        if not is_argument:
            raise
    if value is not None and not override.is_sweep_override() and not is_argument and "${" not in value:
        check_value(key, value)
    if override.is_add() and re.match(r"stages\.", key):
        raise PylorusError(f"{argument}: stages are added in a file of conf/stage, not here. Remove the +.")
    is_free_key = (is_argument or is_free_form(key)) and not (
        override.is_add() or override.is_force_add() or override.is_delete()
    )
    return f"++{argument}" if is_free_key else argument


def _check_group(group: str, override: Any, files: Any, typed: Sequence[str]) -> None:
    """Check that the files that an override selects from a group exist.

    Raises:
        UnknownKeyError: If not; suggests the nearest one, or the words for what is meant.
    """
    value = override.value()
    if isinstance(value, list) and group in GROUPS and group not in ("callbacks", "experiment"):
        text = ",".join(map(str, value))
        words = [f"{group}={text}", *([] if "-m" in typed else ["-m"])]
        raise UnknownKeyError(
            f"{group}: found a list, expected one name; to sweep over them, leave out the brackets.", words
        )
    choices = value.list if isinstance(value, ChoiceSweep) else value if isinstance(value, list) else [value]
    for option in [str(choice) for choice in choices if choice is not None]:
        if files.config_exists(f"{group}/{option}"):
            continue
        options = sorted(set(files.get_group_options(group)))
        suggestion, words = format_suggestion(option, options), list[str]()
        if group == "data" and guess_source(option) is not None:
            suggestion, words = f" Did you mean data.root={option}?", [f"data.root={option}"]
        elif len(choices) == 1 and (not suggestion or group in GROUPS):
            meant = translate_group_value(group, option)
            nearest = suggestion.split('"')[1] if suggestion else ""
            is_alike = suggestion and fold_name(nearest) == fold_name(option)
            # efficientnet_b0 is not a misspelt efficientnet_b3, but another network; vgg91 is a misspelt vgg19.
            is_relative = (
                group == "model"
                and re.sub(r"\d", "0", nearest) == re.sub(r"\d", "0", option)
                and sorted(nearest) != sorted(option)
            )
            if meant and not is_alike and (not suggestion or is_relative or group not in ("model", "optimizer")):
                words, suggestion = meant, f" Did you mean {' '.join(meant)}?"
        message = (
            f"{group}={option[:100]}: there is no {group}/{option[:100]}.yaml.{suggestion}\n"
            f"Available: {', '.join(options)}. Your own files: --config-dir DIR, with DIR/{group}/{option[:100]}.yaml."
        )
        raise UnknownKeyError(message, words)
