"""Recognize the forms in which people type words that Hydra does not know, and write the command that they meant.

Each form is refused with the corrected command: `--lr 0.1`, `key = value`, `key:value`, several keys in one quote, a
list or a name that a space has torn apart, a bracket that is not closed.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pylorus.config.keys import format_error, get_key_metadata, is_key
from pylorus.config.schema import CONF, GROUPS, Config
from pylorus.config.vocabulary import STAGES, UnknownKeyError, check_key, translate_key
from pylorus.core.errors import TRAIN_COMMAND, PylorusError, fold_name
from pylorus.core.formatting import format_command
from pylorus.core.io import iter_fields

OPTIONS_WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--experimental-rerun", "--info", "-i", "-sc", "--shell-completion"),
)
"""Options of Hydra whose value is the next word."""
OPTIONS = (
    *OPTIONS_WITH_VALUE,
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
)
"""Options of Hydra."""
HELP_WORDS = ("help", "-help", "-?", "/?", "--usage", "-usage", "?")
SWITCHES = ("-m", "--multirun")
LISTS = ("data.classes", "data.short_names", "data.exclude", "data.test_values", "model.mean", "model.std", "run")
"""Keys that take a list."""
_KEY = r"[+~]{0,2}[A-Za-z_][\w.@/-]*"
_SECTIONS = (*(field.name for field, _ in iter_fields(Config)), *GROUPS, "hydra", "resume")


def format_line(words: Sequence[str]) -> str:
    """Return the command with these words, as it has to be typed in bash or zsh."""
    options = [word for word in words if word in SWITCHES]
    rest = [word for word in words if word not in SWITCHES]
    return f"{TRAIN_COMMAND} {format_command([*options[:1], *rest])}"


def format_advice(words: Sequence[str]) -> str:
    """Return the last lines of an error message: the command to type."""
    return f"\nType:\n  {format_line(words)}"


def check_forms(words: Sequence[str]) -> None:
    """Check that each word of a command line has the form of an option or of KEY=VALUE.

    Args:
        words: The words as the shell passed them on.

    Raises:
        PylorusError: If not; says what is wrong with the first such word, and shows the corrected command.
    """
    corrected, problems = list(words), []
    for correct in _CORRECTIONS:
        changed, problem = correct(corrected)
        if problem and changed != corrected:
            problems.append(problem)
            corrected = changed
    if problems:
        raise PylorusError(f"{' '.join(problems)}{format_advice(replace_unknown_keys(corrected))}")


def replace_unknown_keys(words: Sequence[str]) -> list[str]:
    """Return the words with each key that does not exist replaced by what it is called here, where that is known."""
    replaced = list(words)
    for word in words:
        key, equals, value = word.partition("=")
        plain = key.lstrip("+~")
        is_other = word.startswith("-") or not equals or plain.startswith(("hydra", "resume")) or plain in GROUPS
        if is_other or is_key(plain):
            continue
        try:
            check_key(plain, value=value, stages=list_stages(words))
        except UnknownKeyError as error:
            replaced = replace_word(replaced, word, error.words or [word])
    return replaced


def replace_word(words: Sequence[str], word: str, replacement: Sequence[str]) -> list[str]:
    """Return the words with others in the place of one, and without the words whose keys these have too.

    Example:
        >>> replace_word(["seed=1", "sede=2", "-m"], "sede=2", ["seed=2"])
        ['seed=2', '-m']
    """
    keys = {each.partition("=")[0] for each in replacement}
    replaced: list[str] = []
    for each in words:
        if each == word:
            replaced += replacement
        elif each.partition("=")[0] not in keys:
            replaced.append(each)
    return replaced


def list_stages(words: Sequence[str]) -> tuple[str, ...]:
    """List the stages that a command line trains, as far as `stage=` says."""
    asked = [word.partition("=")[2] for word in words if word.startswith("stage=")]
    return (asked[-1],) if asked and asked[-1] in STAGES else STAGES


def _correct_help(words: list[str]) -> tuple[list[str], str]:
    for word in words:
        if word.lower() in HELP_WORDS:
            return ["--help"], f'found "{word}", expected --help.'
    return words, ""


def _correct_single_quote(words: list[str]) -> tuple[list[str], str]:
    """Take apart a word that holds several: all keys in one pair of quotes."""
    corrected, found = [], ""
    for word in words:
        try:
            parts = shlex.split(word) if re.search(r"\s", word) else [word]
        except ValueError:
            parts = [word]
        if len(parts) > 1 and all(_is_word(part) for part in parts):
            found = word
            corrected += parts
        else:
            corrected.append(word)
    if not found:
        return words, ""
    shown = found if len(found) <= 60 else f"{found[:57]}…"
    return corrected, f'found several keys in one pair of quotes, "{shown}", expected each key by itself.'


def _is_word(text: str) -> bool:
    if text in OPTIONS:
        return True
    match = re.match(rf"({_KEY})=", text)
    return match is not None and re.split(r"[./]", match[1].lstrip("+~"))[0] in _SECTIONS


def _correct_dashes(words: list[str]) -> tuple[list[str], str]:
    """Turn `--lr 0.1`, `--lr=0.1` and `--no-report` into KEY=VALUE."""
    corrected, found, index = [], "", 0
    while index < len(words):
        word = words[index]
        match = re.fullmatch(r"--?([A-Za-z][\w.@/-]*)(?:=(.*))?", word, re.DOTALL)
        is_own = word.partition("=")[0] in OPTIONS or (
            word.startswith("--") and any(each.startswith(word) for each in OPTIONS)
        )
        if word in OPTIONS_WITH_VALUE and index + 1 < len(words):
            corrected += [word, words[index + 1]]
            index += 2
            continue
        if match is None or is_own or (not word.startswith("--") and re.match(r"-(sc|cn|cd|cp|c|p|i)=?", word)):
            corrected.append(word)
            index += 1
            continue
        found = found or word
        name, value = match[1].replace("-", "_"), match[2]
        index += 1
        if value is None:
            value = ""
            while index < len(words) and not words[index].startswith("-") and not _is_word(words[index]):
                value = f"{value},{words[index]}" if value else words[index]
                index += 1
            if not value and name.startswith("no_"):
                name, value = name.removeprefix("no_"), "false"
        corrected += _name_source(name, value or "true")
    if not found:
        return words, ""
    example = next(word for word in corrected if word not in words)
    return corrected, f'found the option "{found}", expected KEY=VALUE without dashes, as in {example}.'


def _name_source(name: str, value: str) -> list[str]:
    """Return the words for `name=value`, where a group may have been given a path or a name of timm."""
    if name == "data" and not (CONF / "data" / f"{value}.yaml").is_file():
        return [f"data.root={value}"] if not is_table(value) else [f"data.manifest={value}"]
    if name == "model" and not (CONF / "model" / f"{value}.yaml").is_file():
        return translate_key("arch", value)[0]
    return [f"{name}={value}"]


def is_table(value: str) -> bool:
    """Return whether a path is named like a table."""
    return value.lower().endswith((".csv", ".tsv", ".parquet", ".txt", ".xlsx"))


def _correct_spaces_around_equals(words: list[str]) -> tuple[list[str], str]:
    corrected, problem, index = [], "", 0
    while index < len(words):
        word, following = words[index], words[index + 1 : index + 3]
        is_key_word = re.fullmatch(_KEY, word) is not None
        if is_key_word and following[:1] == ["="] and len(following) == 2:
            joined, used = f"{word}={following[1]}", 3
        elif following and (
            (is_key_word and re.match(r"=.", following[0]))
            or (re.fullmatch(rf"{_KEY}=", word) and "=" not in following[0] and not following[0].startswith("-"))
        ):
            joined, used = f"{word}{following[0]}", 2
        else:
            corrected.append(word)
            index += 1
            continue
        problem = problem or f'found "{" ".join(words[index : index + used])}": leave out the space: {joined}'
        corrected.append(joined)
        index += used
    return (corrected, f"{problem}.") if problem else (words, "")


def _correct_colons(words: list[str]) -> tuple[list[str], str]:
    """Turn `key:value`, `key: value` and, without any sign, `key value` into KEY=VALUE."""
    corrected, found, index = [], "", 0
    while index < len(words):
        word = words[index]
        match = re.fullmatch(rf"({_KEY}):\s*(.*)", word)
        if match is None or "=" in match[1] or not _is_known(match[1]) or (index and words[index - 1].startswith("-")):
            corrected.append(word)
            index += 1
            continue
        value = match[2]
        index += 1
        if not value and index < len(words) and "=" not in words[index]:
            value = words[index]
            index += 1
        found = found or word
        corrected.append(f"{match[1]}={value}")
    return (corrected, f'found "{found}", expected = between key and value.') if found else (words, "")


def _is_known(key: str) -> bool:
    plain = key.lstrip("+~")
    return is_key(plain) or plain in GROUPS or any(translate_key(plain, "x")[0])


def _correct_brackets(words: list[str]) -> tuple[list[str], str]:
    """Join a list that a space has torn into several words, and close one that is not closed."""
    corrected, problem, index = [], "", 0
    while index < len(words):
        word = words[index]
        index += 1
        match = re.fullmatch(rf"({_KEY})=(.*)", word, re.DOTALL)
        if match is None or match[1] not in LISTS:
            corrected.append(word)
            continue
        value = match[2]
        while value.count("[") > value.count("]") and index < len(words) and not _is_word(words[index]):
            value = f"{value} {words[index]}"
            index += 1
        while "[" not in value and "]" not in value and index < len(words) and _continues_list(value, words[index]):
            value = f"{value} {words[index]}"
            index += 1
        inner = value.strip().removeprefix("[").removesuffix("]").strip().strip(",")
        is_whole = value.strip().startswith("[") == value.strip().endswith("]") and value.count("[") == value.count("]")
        if value == match[2] and is_whole:
            corrected.append(word)
            continue
        names = re.sub(r",\s+", ",", inner)
        joined = f"{match[1]}=[{names}]"
        problem = problem or (
            f'{match[1]}: found "{value}", whose brackets do not match, expected [NAME,NAME].'
            if value == match[2]
            else f"{match[1]}: found a list with spaces, expected it in quotes."
        )
        corrected.append(joined)
    return (corrected, problem) if problem else (words, "")


def _continues_list(value: str, word: str) -> bool:
    return "=" not in word and not word.startswith("-") and (value.rstrip().endswith(",") or word.startswith(","))


def _correct_torn_values(words: list[str]) -> tuple[list[str], str]:
    """Join words without `=` to the text before them: a name with spaces that was not quoted."""
    corrected, problem = list[str](), ""
    for index, word in enumerate(words):
        before = corrected[-1] if corrected else ""
        takes_value = index > 0 and words[index - 1].startswith("-")
        if "=" in word or word.startswith(("-", "~")) or takes_value or "=" not in before or before.startswith("-"):
            corrected.append(word)
            continue
        if any((CONF / group / f"{word}.yaml").is_file() for group in GROUPS):
            corrected.append(word)
            continue
        corrected[-1] = f"{before} {word}"
        problem = f'found "{word}". If it belongs to the word before it, write both in quotes: "{corrected[-1]}"'
    return (corrected, f"{problem}.") if problem else (words, "")


def _correct_bare_words(words: list[str]) -> tuple[list[str], str]:
    """Turn the bare name of a file of conf/ (`resnet50`), a path or a switch into KEY=VALUE."""
    corrected, problem = list[str](), ""
    for index, word in enumerate(words):
        if "=" in word or word.startswith(("-", "~")) or (index and words[index - 1].startswith("-")):
            corrected.append(word)
            continue
        meant = next(_list_meanings(word), None)
        if meant is None:
            corrected.append(word)
            continue
        corrected += meant
        hint = f"expected KEY=VALUE. Did you mean {' '.join(meant)}?" if meant else "leave it out."
        problem = problem or f'found "{word}", {hint}'
    return (corrected, problem) if problem else (words, "")


def _list_meanings(word: str) -> Iterator[list[str]]:
    for group in GROUPS:
        for path in sorted((CONF / group).glob("*.yaml")):
            if fold_name(path.stem) == fold_name(word):
                yield [f"{group}={path.stem}"]
    if (Path(word).expanduser() / "status.json").is_file():
        yield [f"resume={word}"]
    if Path(word).expanduser().is_dir():
        yield [f"data.root={word}"]
    if is_table(word) and Path(word).expanduser().is_file():
        yield [f"data.manifest={word}"]
    if word in ("train", "fit", "run"):
        yield []


_CORRECTIONS: tuple[Callable[[list[str]], tuple[list[str], str]], ...] = (
    _correct_help,
    _correct_single_quote,
    _correct_dashes,
    _correct_spaces_around_equals,
    _correct_colons,
    _correct_brackets,
    _correct_bare_words,
    _correct_torn_values,
)


def correct_value(message: str, words: Sequence[str]) -> list[str] | None:
    """Return the words with the value that an error message suggests, in place of the one that it refuses.

    Args:
        message: Of an error that names a key first and suggests a name, or an example, as all of ours do.
        words: The command line.

    Returns:
        The corrected words; None if the message suggests nothing for a key that was typed.

    Example:
        >>> correct_value('data.fit: found "padd", expected one of pad. Did you mean "pad"?', ["data.fit=padd", "-m"])
        ['data.fit=pad', '-m']
    """
    if re.match(r"data\.group: .* finds no patient", message):
        corrected = [
            re.sub(r"(?<![\\A-Za-z])([dws])([+*{])", r"\\\1\2", word) if word.startswith("data.group=") else word
            for word in words
        ]
        return corrected if corrected != list(words) else None  # the shell took the backslash
    named = re.match(r"(?:\w*: )?([\w./<>@]+)(?:=([^:\n]*))?: ", message)
    suggested = re.search(r'Did you mean "([^"]+)"\?|, such as (\S+)\.(?:\n|$)', message)
    if named is None or suggested is None or " has no key " in message:
        return None
    value = suggested[1] or suggested[2]
    key, wrong = named[1], named[2]
    typed = [index for index, word in enumerate(words) if re.match(rf"[+]*([\w.]+\.)?{re.escape(key)}=", word)]
    if not typed:
        return None
    index = typed[-1]
    name, _, old = words[index].partition("=")
    found = wrong or (re.search(r'found "?([^",]+)"?,', message) or ["", ""])[1]
    if key in LISTS:
        return None
    if "," in old and found and found in old.split(","):
        value = ",".join(value if each == found else each for each in old.split(","))
    elif "," in old:
        return None
    return [*words[:index], f"{name}={value}", *words[index + 1 :]]


def explain_error(error: Exception, words: Sequence[str]) -> str:
    """Return the message of an error of Hydra, OmegaConf or our own, with the corrected command if one is known.

    Args:
        error: The error.
        words: The command line, as typed.
    """
    several = re.match(r"Ambiguous value for argument '(.*?)=(.*)'\n", str(error))
    if several is not None:
        key = several[1]
        typed = [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]
        return describe_sweep_values(key, typed[-1] if typed else several[2], words)
    message = format_error(error)
    corrected = None if "\nType:\n" in message else correct_value(message, words)
    return message if corrected is None else f"{message}{format_advice(corrected)}"


def describe_sweep_values(key: str, values: str, words: Sequence[str]) -> str:
    """Return the message for a comma in a run that is no sweep, with the command for each thing that may be meant.

    Args:
        key: The key.
        values: Its value, with a comma.
        words: The command line.
    """
    others = [word for word in words if not word.startswith(f"{key}=")]
    ways = {"To sweep over them": format_line(["-m", *others, f"{key}={values}"])}
    if key == "stage":
        ways = {"For one after the other in one run": format_line([*others, "stage=both"]), **ways}
    elif key in LISTS:
        ways = {"If they are a list": format_line([*others, f"{key}=[{values}]"])}
    elif re.fullmatch(r"\d+,\d+", values) and get_key_metadata(key).get("kind") in (float, float | None):
        ways["If it is a decimal number"] = format_line([*others, f"{key}={values.replace(',', '.')}"])
    elif get_key_metadata(key).get("kind") in (str, str | None) and not get_key_metadata(key).get("choices"):
        ways["If they are one text"] = format_line([*others, f"{key}='{values}'"])
    lines = [f"{way}:\n  {line}" for way, line in ways.items()]
    return f"{key}: found several values, {values}. " + "\n".join(lines)
