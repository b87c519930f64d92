"""The errors of Pylorus, the parts of their messages (suggestions, lists, printable paths), and how names compare."""

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

INTERRUPTED = 130
"""Exit code of a process that was ended by Ctrl-C."""

TRAIN_COMMAND = "pylorus train" if (Path(__file__).parents[1] / "conf").is_dir() else "python train.py"
"""What a message tells the user to type to train: an installed wheel, which contains conf/, has no train.py."""


class PylorusError(Exception):
    """An error that the user can fix; its message names the file or key, what was found and how to fix it."""


class TimeLimitReached(KeyboardInterrupt):
    """The time limit of a run ended it, as a signal would; its message says which limit."""


@contextmanager
def translate_errors(words: Mapping[str, str]) -> Iterator[None]:
    """Translate the messages of errors that are raised in the body of the `with` statement.

    A Python function that calls the code of a command names its own arguments instead of options and keys.

    Args:
        words: What to write for an option, a key or a phrase, such as {"--group": "group"}.
    """
    try:
        yield
    except PylorusError as error:
        longest_first = sorted(words, key=len, reverse=True)
        # Not inside a longer word: a folder may have the name of a key.
        pattern = rf"(?<![\w./-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])"
        error.args = (re.sub(pattern, lambda match: words[match[0]], str(error)),)
        raise


@contextmanager
def explain_interrupt(hint: str) -> Iterator[None]:
    """Add to a KeyboardInterrupt what the command line says about it, such as how to continue."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(hint)
        raise


def format_suggestion(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Return the sentence of an error message that suggests the known name closest to `name`, or an empty string.

    Args:
        name: What was found.
        known: What would be right.
        cutoff: Least similarity of a name that is suggested, in [0, 1].

    Example:
        >>> format_suggestion("resnet5", ["vgg19", "resnet50"])
        ' Did you mean "resnet50"?'
    """
    names = list(known)
    alike = [each for each in names if fold_name(each) == fold_name(name)]
    nearest = alike or difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f' Did you mean "{nearest[0]}"?' if nearest else ""


def normalize_name(name: str) -> str:
    """Return a name in Unicode's composed form (NFC): a folder copied from a Mac has its accents decomposed.

    Example:
        >>> normalize_name("ulce\u0300re") == "ulc\u00e8re"
        True
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


MAX_CLASSES, MAX_NAME_LENGTH = 1000, 200
"""Number of classes of a model, and length of each one's name."""


def is_valid_name(name: str) -> bool:
    """Return whether a class may have this name: 1 to 200 characters, all of which can be seen.

    Example:
        >>> is_valid_name("gastric ulcer"), is_valid_name("gastric\u00a0ulcer"), is_valid_name("")
        (True, False, False)
    """
    return 0 < len(name) <= MAX_NAME_LENGTH and name.isprintable()


def resolve_unicode_form(path: Path) -> Path:
    """Return the existing path whose name is the same but for its Unicode form, else the path itself.

    A folder that was copied from a Mac has its accents decomposed; what is typed is composed.
    """
    if path.exists() or str(path).isascii():
        return path
    parent = resolve_unicode_form(path.parent)
    with suppress(OSError):
        for name in os.listdir(parent):  # noqa: PTH208
            if normalize_name(name) == normalize_name(path.name):
                return parent / name
    return parent / path.name


def fold_name(name: str) -> str:
    """Return what names have in common that only look alike: capitals, spaces, encodings and zeros do not count.

    Example:
        >>> fold_name("Gastric  Cancer") == fold_name("gastric_cancer"), fold_name("1.0") == fold_name("1")
        (True, True)
        >>> fold_name("HP-") == fold_name("HP")
        False
    """
    plain = unicodedata.normalize("NFKC", name).casefold()
    plain = "".join(letter for letter in plain if unicodedata.category(letter) not in ("Cf", "Cc"))
    plain = " ".join(plain.replace("_", " ").split())
    if re.fullmatch(r"[+-]?\d{1,15}([.,]\d{1,15})?", plain):
        return f"{float(plain.replace(',', '.')):g}"
    return re.sub(r"(?<=\w)[ -]+(?=\w)", " ", plain)


def find_look_alikes(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two different names that only look alike; None if there are none.

    Example:
        >>> find_look_alikes(["ulcer", "cancer", "Ulcer"])
        ('Ulcer', 'ulcer')
    """
    spellings: dict[str, str] = {}
    for name in sorted(set(names)):
        other = spellings.setdefault(fold_name(name), name)
        if other != name:
            return other, name
    return None


def resolve_short_name(name: str, *, classes: Sequence[str], short_names: Sequence[str], where: str) -> str:
    """Return the short name of a class that a user named by its short or its full name.

    Args:
        name: The name.
        classes: Full names of the classes.
        short_names: Their short names, in the same order.
        where: Key or option with the name, for the error.

    Raises:
        PylorusError: If it is the name of no class.

    Example:
        >>> resolve_short_name("gastric_cancer", classes=["gastric_cancer"], short_names=["GC"], where="--class")
        'GC'
    """
    if name in short_names:
        return name
    if name in classes:
        return short_names[list(classes).index(name)]
    raise PylorusError(
        f'{where}: found "{name}", expected one of {", ".join(dict.fromkeys(short_names)) or "no class"}.'
        f"{format_suggestion(name, [*short_names, *classes])}"
    )


def check_fraction(value: float | None, option: str, *, example: float) -> None:
    """Check that a number that a user typed is between 0 and 1; guess what a percentage or a wrong sign meant.

    Raises:
        PylorusError: If it is not; None is accepted.

    Example:
        >>> try:
        ...     check_fraction(5, "--margin", example=0.05)
        ... except PylorusError as error:
        ...     print(error)
        --margin: found 5, expected a number between 0 and 1, such as 0.05. Did you mean 0.05?
    """
    if value is None or 0 < value < 1:
        return
    meant = f" Did you mean {value / 100:g}?" if 1 < value < 100 else ""
    meant = f" Did you mean {-value:g}?" if -1 < value < 0 else meant
    raise PylorusError(f"{option}: found {value:g}, expected a number between 0 and 1, such as {example:g}.{meant}")


def format_name_list(names: Iterable[object], *, most: int = 10) -> str:
    """Format `names` as indented lines, at most `most` of them; the rest is only counted.

    Example:
        >>> print(format_name_list(["a", "b", "c"], most=2))
          a
          b
          … and 1 more
    """
    texts = [str(name) for name in names]
    lines = [f"  {text}" for text in texts[:most]]
    if len(texts) > most:
        lines.append(f"  … and {len(texts) - most} more")
    return "\n".join(lines)


class UnreadableImageError(ValueError):
    """A file that can't be decoded under the policy; the message says why, without the file's name."""


def format_path(path: object) -> str:
    r"""Return a path on one line, in characters that every terminal and text file accepts.

    Line breaks, control characters and bytes that are not UTF-8 are written as escapes.

    Example:
        >>> print(format_path("a\nb"))
        a\nb
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in str(path)
    )


MAX_ENTRIES = 10_000
"""Entries of a folder among which a similar name is searched."""


def suggest_path(path: str) -> str:
    r"""Return a sentence about a path that does not exist: the existing one that is meant; empty if none is near.

    Example:
        >>> suggest_path("/home/eva/C:\\Users\\Eva")
        ' It is a path of Windows; in WSL it is /mnt/c/Users/Eva.'
    """
    windows = re.search(r"(?:^|/)([A-Za-z]):[\\/](.*)", path)
    if windows is not None:
        rest = re.sub(r"[\\/]+", "/", windows[2]).lstrip("/")
        return f" It is a path of Windows; in WSL it is /mnt/{windows[1].lower()}/{rest}."
    forward = Path(re.sub(r"\\+", "/", path))
    if "\\" in path and forward.exists():
        return f' Did you mean "{forward}"?'
    stripped = Path(path).with_name(Path(path).name.strip() or "_")
    if stripped != Path(path) and stripped.exists():
        return f' Did you mean "{stripped}", without the space?'
    parent = Path(path).parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    missing = Path(path).relative_to(parent).parts[0]
    with suppress(OSError):
        names = [entry.name for entry in islice(parent.iterdir(), MAX_ENTRIES)]
        suggestion = format_suggestion(missing, names, cutoff=0.7)
        if suggestion:
            nearest = parent / suggestion.split('"')[1] / Path(*Path(path).relative_to(parent).parts[1:])
            if nearest.exists():
                return f' Did you mean "{nearest}"?'
    return "" if parent == Path(path).parent else f" {parent} exists, but it contains no {missing}."


def format_empty_value(key: str) -> str:
    """Return the message for an empty path or pattern: `Path("")` would be the current folder, a pattern match all."""
    known = "For no pattern: data.group=null" if key == "data.group" else f"For the current folder: {key}=."
    return f"{key}: found an empty value. Is the variable set, if you wrote {key}=$NAME? {known}"


TABLE_FORMATS = (".csv", ".parquet", ".json")
"""Suffixes of tables that a command writes."""


def check_table_name(path: Path, *, argument: str) -> None:
    """Check that the name of a table to be written says its format.

    Raises:
        PylorusError: If it has another suffix than those of `TABLE_FORMATS`.
    """
    if path.suffix.lower() not in TABLE_FORMATS:
        raise PylorusError(f"{argument}: found {path}, expected a file name that ends in {', '.join(TABLE_FORMATS)}.")
