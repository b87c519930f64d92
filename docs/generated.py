"""The reference: pages made from the schema, from conf/, from the command line's parser and from the modules.

A hook of MkDocs: `on_files` adds the pages to each build, so that they are never out of date and never committed. The
functions that write them need nothing but Pylorus, so that a test can ask whether every key and command is named.
"""

import argparse
import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pylorus.cli import build_parser
from pylorus.config.checks import iter_fields
from pylorus.config.schema import CONF, GROUPS, PACKAGE, Config

ROOMS = ("data", "model", "evaluation", "report", "deploy")
"""Packages of `pylorus`, each a page of the Python reference; what lies beside them makes the page `training`."""


def pages() -> dict[str, str]:
    """All generated pages in Markdown, by their place in the site."""
    found = {
        "reference/keys.md": keys_page(),
        "reference/groups.md": groups_page(),
        "reference/commands.md": commands_page(),
        "reference/python/training.md": _python_page("Training", PACKAGE, "pylorus"),
    }
    for room in ROOMS:
        found[f"reference/python/{room}.md"] = _python_page(f"pylorus.{room}", PACKAGE / room, f"pylorus.{room}")
    return found


def on_files(files: Any, config: Any) -> Any:
    """MkDocs calls it once the files of docs/ are known."""
    from mkdocs.structure.files import File

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    return files


def keys_page() -> str:
    """Every key of the schema: type, default, allowed values, meaning."""
    lines = [
        "# Keys",
        "",
        "What a run can be told, as in `python train.py optimizer.lr=1e-4`. This page is made from the schema "
        "(`src/pylorus/config/schema.py`), and so is `python train.py --help`. A key that does not exist and a value outside "
        "its range are refused before anything starts. A default may differ where a file of `conf/` says so: see "
        "[Groups](groups.md).",
        "",
        "## The run",
        "",
        *_table_of(Config, ""),
        *_sections(Config, ""),
    ]
    return "\n".join(lines) + "\n"


def schema_keys() -> Iterator[str]:
    """The dotted name of every key that holds a value."""
    yield from (name for name, _, _ in _leaves(Config, "", deep=True))


def _sections(schema: type, path: str) -> Iterator[str]:
    for field, kind in iter_fields(schema):
        name = f"{path}{field.name}"
        if field.name == "stages":
            name, kind = f"{name}.<stage>", typing.get_args(kind)[1]
        if dataclasses.is_dataclass(kind):
            kind = typing.cast(type, kind)
            yield from ("", f"## {_escaped(name)}", "", _first_line(kind), "", *_table_of(kind, f"{name}."))
            yield from _sections(kind, f"{name}.")


def _table_of(schema: type, path: str) -> Iterator[str]:
    yield "| key | meaning | type | default | values |"
    yield "| --- | --- | --- | --- | --- |"
    for name, field, kind in _leaves(schema, path, deep=False):
        says = field.metadata
        cells = (f"`{name}`", _escaped(says["meaning"]), _kind(field, kind), _default(field), _span(says))
        yield f"| {' | '.join(cells)} |"


def _leaves(schema: type, path: str, *, deep: bool) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    for field, kind in iter_fields(schema):
        name = f"{path}{field.name}"
        if field.name == "stages":
            name, kind = f"{name}.<stage>", typing.get_args(kind)[1]
        if not dataclasses.is_dataclass(kind):
            yield name, field, kind
        elif deep:
            yield from _leaves(typing.cast(type, kind), f"{name}.", deep=True)


def _kind(field: dataclasses.Field[Any], kind: Any) -> str:
    plain = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    if typing.get_origin(kind) is list:
        shown = f"list of {plain[typing.get_args(kind)[0]]}s".replace("texts", "names")
    else:
        shown = "names with values" if typing.get_origin(kind) is dict else plain[kind]
    return f"{shown}, or null" if field.default is None else shown


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "empty"
    if field.default == "???":
        return "to be given"
    value = field.default
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{shown}`"


def _span(says: typing.Mapping[str, Any]) -> str:
    if says["choices"]:
        return ", ".join(f"`{choice}`" for choice in says["choices"])
    if says["low"] is None:
        return ""
    return f"{says['low']} to {says['high']}" if says["high"] is not None else f"{says['low']} or more"


def groups_page() -> str:
    """Every file of every group of conf/, as it stands there."""
    lines = [
        "# Groups",
        "",
        "A group is a folder of `conf/`; `GROUP=FILE` on the command line chooses one of its files, as in "
        "`model=vgg19`. A file says what differs from the [keys'](keys.md) defaults. What is chosen where you choose "
        "nothing:",
        "",
        "```yaml title='conf/config.yaml'",
        (CONF / "config.yaml").read_text().rstrip(),
        "```",
    ]
    for group in GROUPS:
        lines += ["", f"## {group}"]
        for path in sorted((CONF / group).glob("*.yaml")):
            lines += ["", f"### {group}={path.stem}", "", "```yaml", path.read_text().rstrip(), "```"]
    lines += ["", "## hydra/launcher", "", "Engines of a [sweep](../sweeps.md)."]
    for path in sorted((CONF / "hydra" / "launcher").glob("*.yaml")):
        lines += ["", f"### hydra/launcher={path.stem}", "", "```yaml", path.read_text().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each `pylorus` command, by name."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def commands_page() -> str:
    """Every `pylorus` command with its arguments, as `--help` has them."""
    whole = build_parser()
    helps = {
        choice.dest: choice.help or ""
        for action in whole._actions
        if isinstance(action, argparse._SubParsersAction)
        for choice in action._choices_actions
    }
    lines = [
        "# Commands",
        "",
        "Training is `python train.py` with [keys](keys.md) and [groups](groups.md). All else is `pylorus COMMAND`; "
        "`pylorus COMMAND --help` says what stands here.",
    ]
    for name, command in commands().items():
        summary = command.description or helps.get(name, "")
        lines += ["", f"## pylorus {name}", "", _sentence(summary), "", "```text", _usage(command), "```", ""]
        lines += ["| argument | meaning | default |", "| --- | --- | --- |"]
        lines += [_argument(action) for action in command._actions if action.dest != "help"]
    return "\n".join(lines) + "\n"


def _usage(command: argparse.ArgumentParser) -> str:
    return re.sub(r"\s+", " ", command.format_usage().removeprefix("usage: ")).strip()


def _argument(action: argparse.Action) -> str:
    shown = action.metavar or (None if action.option_strings else action.dest)
    if action.option_strings and action.nargs != 0:
        shown = shown or (" | ".join(map(str, action.choices)) if action.choices else action.dest.upper())
    value = " ".join(shown) if isinstance(shown, tuple) else shown
    head = ", ".join(action.option_strings)
    head = " ".join(part for part in (head, value if action.nargs != 0 else None) if part)
    untold = any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS))
    default = "" if untold or not action.option_strings else f"`{action.default}`"
    meaning = re.sub(r" ?\(default: [^)]*\)$", "", action.help or "") % {"prog": "pylorus", "default": action.default}
    return f"| `{_escaped(head)}` | {_escaped(meaning)} | {default} |"


def _python_page(title: str, folder: Path, package: str) -> str:
    lines = [f"# {title}", "", f"::: {package}", "    options: {show_root_heading: false, members: false}", ""]
    paths = sorted(folder.glob("*.py") if package == "pylorus" else folder.rglob("*.py"))
    for path in paths:
        if path.stem.startswith("__"):
            continue
        name = ".".join([package, *path.relative_to(folder).with_suffix("").parts])
        lines += [f"::: {name}", ""]
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _first_line(kind: type) -> str:
    return str(kind.__doc__).splitlines()[0]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
