"""Arguments: of the command `pylorus`, parsed, and of the functions of `import pylorus`, checked.

An error says what was found and expected, and for a command what was meant and what to type. Nothing here knows what
the commands do; their arguments are declared in `pylorus.cli`.
"""

import argparse
import difflib
import functools
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, ParamSpec, TypeVar

from pylorus.core.errors import PylorusError, format_suggestion
from pylorus.core.formatting import format_command

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
PLAIN_TYPES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    Path: "a path",
    type(None): "None",
    Any: "any value",
}

COMMAND_SYNONYMS: Mapping[str, str] = {
    "train": "fit run start learn sweep resume finetune",
    "draw": "generate synth synthetic create make demo images",
    "audit": "check validate-data inspect verify lint leaks clean dataset",
    "pack": "shard shards tar wds webdataset convert-data",
    "report": "summary results table tables figures compare plot metrics",
    "plan": "power sample-size samplesize size-of-sample sizes",
    "doctor": "info env environment health diagnose diagnostics system status",
    "predict": "evaluate eval test infer inference classify score prediction validate",
    "explain": "gradcam grad-cam cam heatmap heatmaps saliency interpret attention",
    "export": "convert onnx quantize compile deploy save",
    "serve": "server app web gui ui webapp gradio host page",
}
"""Commands, and what others call them."""
OPTION_SYNONYMS: Mapping[str, str] = {
    "--output": "o out output-dir outdir output-file outfile save save-dir dest to results",
    "--batch": "batch-size bs b batchsize",
    "--device": "gpu cuda accelerator",
    "--class": "class-name positive positive-class target label",
    "--group": "patient patients groups group-by",
    "--frames-every": "fps every video seconds interval frame-rate",
    "--manifest": "csv table labels annotations",
    "--images": "data dataset folder n num count",
    "--data": "images root dataset",
    "--host": "address ip bind listen",
    "--port": "p",
    "--password-file": "password auth",
    "--no-names": "anonymous anonymize private hide-names",
    "--names": "show-names",
    "--sensitivity": "threshold recall",
    "--guarantee": "confidence",
    "--thumbnails": "pictures images",
    "--evaluate": "eval test metrics",
    "--size": "image-size img-size imgsz",
    "--int8": "quantize quantized",
    "--speed": "benchmark time",
    "--json": "as-json",
    "--version": "v V",
    "--help": "h ? usage",
}
"""Options, and what others call them; each holds for the commands that have the option."""
VALUE_SYNONYMS = {"gpu": "cuda", "true": "auto", "0": "cuda", "cuda:0": "cuda", "metal": "mps"}
TABLE_SUFFIXES = (".csv", ".parquet", ".json")


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors suggest what was meant, in the exit code of argparse (2)."""

    words: Sequence[str] = ()
    """The words of the command line, for the command that an error shows."""

    def parse_command(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse a command line, and check the order of its paths and that each option has an effect.

        Raises:
            PylorusError: If paths are in the wrong order, or an option would be ignored.
        """
        CommandParser.words = words
        if list(words[:1]) in (["help"], ["-help"], ["-?"]):
            words = ["--help"] if len(words) == 1 else [words[1], "--help"]
        if words and re.match(r"[a-z][\w.]*=", words[0]):
            self._fail("found a key without a command, expected a command first.", ["train", *words])
        options = self.parse_args(words)
        parser, name = self._find_command(words)
        if name != "train" and (corrected := parser._correct_options(words, name)) != list(words):
            wrong = next(a for a, b in zip(words, [*corrected, *words], strict=False) if a != b)
            self._fail(f'{name}: found "{wrong}", expected no KEY=VALUE, which is for pylorus train.', corrected)
        try:
            _check_order(options, words)
        except PylorusError as error:
            if name != "audit":
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)  # its exit code 1 means that the images have faults
        _check_unused(options)
        return options

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and the command to type where it is known, and exit."""
        words = list(CommandParser.words)
        choice = re.match(r"argument ([^:]*): invalid choice: '(.*?)' \(choose from (.*)\)", message, re.DOTALL)
        value = re.match(r"argument ([^:]*): invalid (\w+) value: '(.*)'", message, re.DOTALL)
        missing = re.match(r"the following arguments are required: (.*)", message)
        unknown = re.match(r"unrecognized arguments: (.*)", message, re.DOTALL)
        alone = re.match(r"argument ([^:]*): expected (?:one|at least one) argument", message)
        if choice is not None:
            self._explain_choice(choice[1], choice[2], re.findall(r"'?([\w-]+)'?", choice[3]), words)
        if value is not None:
            expected = {"int": "a whole number", "float": "a number"}.get(value[2], value[2])
            pattern = r"\d+(?:[.,]\d+)?" if value[2] == "float" else r"\d+"
            numbers = [number.replace(",", ".") for number in re.findall(pattern, value[3])]
            if numbers and value[3].rstrip().endswith("%"):  # every proportion is a number from 0 to 1
                numbers = [f"{float(numbers[0]) / 100:g}"]
            example = f", such as {numbers[0]}" if numbers else ""
            corrected = (
                [re.sub(rf"(^|=){re.escape(value[3])}$", rf"\g<1>{numbers[0]}", w) for w in words] if numbers else []
            )
            self._fail(f'{value[1]}: found "{value[3]}", expected {expected}{example}.', corrected)
        parser, name = self._find_command(words)
        corrected = parser._correct_options(words, name)
        if corrected != words and (missing or unknown):
            wrong = next(a for a, b in zip(words, [*corrected, *words], strict=False) if a != b)
            self._fail(f'{name or "pylorus"}: found "{wrong}", which it does not have.', corrected)
        if missing is not None:
            self._explain_missing(parser, name, missing[1], words)
        if unknown is not None:
            known = ", ".join(option for option in parser._option_string_actions if option.startswith("--"))
            self._fail(
                f"{name}: can't use {unknown[1]}. Options: {known}. Help: pylorus {name} --help".replace("  ", " ")
            )
        if alone is not None:
            self._fail(f"{alone[1]}: no value given. Help: pylorus {name} --help")
        self._fail(message)

    def _fail(self, message: str, words: Sequence[str] = ()) -> NoReturn:
        advice = f"\nType:\n  pylorus {format_command(words)}" if words and list(words) != list(self.words) else ""
        print(f"error: {message}{advice}", file=sys.stderr)
        sys.exit(2)

    def _find_command(self, words: Sequence[str]) -> tuple["CommandParser", str]:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and words and words[0] in action.choices:
                return action.choices[words[0]], words[0]
        return self, self.prog.removeprefix("pylorus").strip()

    def _explain_choice(self, argument: str, found: str, known: Sequence[str], words: list[str]) -> NoReturn:
        is_command = argument == "COMMAND"
        meant = _translate(found.lower(), COMMAND_SYNONYMS) if is_command else VALUE_SYNONYMS.get(found.lower(), "")
        nearest = difflib.get_close_matches(found.lower(), known, n=1, cutoff=0.6)
        meant = meant if meant in known else nearest[0] if nearest else ""
        suggestion = f' Did you mean "{meant}"?' if meant else ""
        corrected = []
        if meant:
            index = next(i for i, word in enumerate(words) if word == found or word.endswith(f"={found}"))
            corrected = [*words[:index], words[index].removesuffix(found) + meant, *words[index + 1 :]]
        if is_command:
            self._fail(f'there is no command "{found}".{suggestion} Commands: {", ".join(known)}.', corrected)
        self._fail(f'{argument}: found "{found}", expected one of {", ".join(known)}.{suggestion}', corrected)

    def _correct_options(self, words: Sequence[str], name: str) -> list[str]:
        """Return the words with unknown options replaced by those of this command that are meant."""
        options = [option for option in self._option_string_actions if option.startswith("--")]
        corrected: list[str] = []
        takes_pairs = False
        for index, word in enumerate(words):
            option, _, value = word.partition("=")
            before = self._option_string_actions.get(words[index - 1]) if index else None
            if before is not None and before.nargs is None and not word.startswith("-"):
                corrected.append(word)  # its value, such as a regular expression
                continue
            if word.startswith("-"):  # the values of an option such as --against NAME=VALUE are no keys
                takes_pairs = any(
                    "=" in str(self._option_string_actions[known].metavar or "")
                    for known in options
                    if known.startswith(option)
                )
            elif takes_pairs:
                corrected.append(word)
                continue
            is_known = any(known.startswith(option) for known in options) if option.startswith("--") else option == "-h"
            as_key = re.fullmatch(r"([a-z][\w.]*)=(.+)", word) if not Path(word).exists() else None
            if (index == 0 and word == name) or (is_known and option != "--") or not (word.startswith("-") or as_key):
                corrected.append(word)
                continue
            if as_key is not None:
                option, value = f"--{as_key[1].rpartition('.')[2].replace('_', '-')}", as_key[2]
            bare = option.lstrip("-").replace("_", "-")
            meant = f"--{bare}" if f"--{bare}" in options else ""
            for known in () if meant else options:
                if bare in OPTION_SYNONYMS.get(known, "").split():
                    meant = known
                    break
            meant = meant or next(iter(difflib.get_close_matches(f"--{bare}", options, n=1, cutoff=0.7)), "")
            if meant:
                takes_value = self._option_string_actions[meant].nargs != 0
                corrected += [meant, value] if value and takes_value else [meant]
            elif as_key is not None and bare in ("root", "data", "path", "bundle", "model", "input", "output"):
                corrected.append(str(as_key[2]))
            else:
                corrected.append(word)
        return corrected

    def _explain_missing(self, parser: "CommandParser", name: str, missing: str, words: list[str]) -> NoReturn:
        if missing == "COMMAND":
            print(self.format_help(), file=sys.stderr)
            self._fail("no command given.")
        wanted = [each.strip() for each in missing.split(",")]
        actions = {
            (action.option_strings or [str(action.metavar or action.dest)])[0]: action for action in parser._actions
        }
        described = "; ".join(f"{each}, {actions[each].help}" if each in actions else each for each in wanted)
        corrected = list(words)
        if wanted == ["--output"]:
            tables = [word for word in words[2:] if word.endswith(TABLE_SUFFIXES) and not Path(word).exists()]
            output = tables[-1] if tables else "predictions.csv"
            corrected = [word for word in words if word != output] + ["--output", output]
        elif wanted[0] == "BUNDLE" and (bundle := find_newest_bundle()) is not None:
            corrected += [bundle, *(["IMAGES", "--output", "predictions.csv"] if "INPUT" in wanted else [])]
        else:
            corrected += [each for each in wanted if not each.startswith("-")]
        self._fail(f"{name}: no value given for {described}.", corrected)


def complete_words(parser: CommandParser, options: Sequence[str], *, run_train: Callable[[], object]) -> None:
    """Install tab completion, or answer a shell's query: groups and keys after `pylorus train`, else commands.

    Args:
        parser: The parser of all commands.
        options: The words after `pylorus`, such as -sc query=bash.
        run_train: Hands them over to Hydra.
    """
    program, _, rest = os.environ.get("COMP_LINE", "").partition(" ")
    command, space, words = rest.lstrip().partition(" ")
    if command == "train" and space:
        os.environ["COMP_LINE"] = f"{program} {words}"
    if (command == "train" and space) or not options[-1].startswith("query="):
        run_train()
    elif not space:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                print("\n".join(action.choices))


def _translate(word: str, synonyms: Mapping[str, str]) -> str:
    return next((name for name, words in synonyms.items() if word in words.split()), "")


def find_newest_bundle() -> str | None:
    """Return the bundle of the last run below ./outputs; None if there is none."""
    bundles = sorted(Path("outputs").glob("*/*/model/model.json"), key=str)
    return str(bundles[-1].parent) if bundles else None


def _is_bundle(path: str | Path) -> bool:
    return (Path(path) / "model.json").is_file() and (Path(path) / "SHA256SUMS").is_file()


def _check_order(options: argparse.Namespace, words: Sequence[str]) -> None:
    """Check that paths have the kinds that their places want: a bundle first, a folder of class folders, a run.

    Raises:
        PylorusError: If another order, or a neighbour, is meant.
    """
    values: dict[str, Any] = vars(options)
    if "bundle" in values and isinstance(values["bundle"], Path) and "json" not in values:
        _check_bundle(str(values["bundle"]), [str(each) for each in values.get("inputs", [])], words)
    if options.act.__name__ == "_run_audit":
        root = Path(options.root)
        if root.is_file() and root.suffix.lower() in (".csv", ".tsv", ".parquet") and options.manifest is None:
            corrected = [*_replace(words, str(root), str(root.parent)), "--manifest", str(root)]
            raise PylorusError(f"ROOT: found {root}, a table, expected a folder.{_advise(corrected)}")
    if options.act.__name__ == "_run_pack":
        root, output = Path(options.root), Path(options.output)
        if output.is_dir() and any(output.iterdir()) and not root.exists():
            corrected = _swap(words, str(root), str(output))
            raise PylorusError(f"ROOT: found {root}, which does not exist, and OUT {output} does.{_advise(corrected)}")
    if options.act.__name__ == "_run_report":
        for path in options.paths:
            if _is_bundle(path) and (Path(path).resolve().parent / "status.json").is_file():
                corrected = _replace(words, str(path), str(Path(path).parent))
                raise PylorusError(f"PATH: {path} is a bundle, expected the run that it is in.{_advise(corrected)}")


def _check_bundle(bundle: str, inputs: Sequence[str], words: Sequence[str]) -> None:
    if _is_bundle(bundle):
        return
    swapped = next((each for each in inputs if _is_bundle(each)), None)
    if swapped is not None:
        corrected = _swap(words, bundle, swapped)
        raise PylorusError(f"BUNDLE: found {bundle}, expected the bundle {swapped} first.{_advise(corrected)}")
    inner, outer = Path(bundle) / "model", Path(bundle).parent
    if _is_bundle(inner):
        advice = _advise(_replace(words, bundle, str(inner)))
        kind = "an ensemble" if (Path(bundle) / "ensemble.json").is_file() else "a run"
        raise PylorusError(f"{bundle}: is {kind}; its bundle is {inner}.{advice}")
    if Path(bundle).is_file() and _is_bundle(outer):
        advice = _advise(_replace(words, bundle, str(outer)))
        raise PylorusError(f"{bundle}: is a file of the bundle {outer}, expected the folder.{advice}")


def _check_unused(options: argparse.Namespace) -> None:
    """Refuse options that another option, or its absence, makes void.

    Raises:
        PylorusError: Names the option, and what to add.
    """
    values = vars(options)
    command = options.act.__name__
    if command == "_run_export" and values["group"] is not None and values["images"] is None:
        raise PylorusError("--group: finds the patients among --images, which is not given. Add --images DIR.")
    if command == "_run_explain" and not values["inputs"] and values["frames_every"] is not None:
        raise PylorusError(
            "--frames-every: reads videos among INPUT, which is not given. Add a video, or leave it out."
        )


def _advise(words: Sequence[str]) -> str:
    return f"\nType:\n  pylorus {format_command(words)}"


def _replace(words: Sequence[str], old: str, new: str) -> list[str]:
    return [new if word.rstrip("/") == old else word for word in words]


def _swap(words: Sequence[str], first: str, second: str) -> list[str]:
    pair = {first: second, second: first}
    return [pair.get(word.rstrip("/"), word) for word in words]


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
