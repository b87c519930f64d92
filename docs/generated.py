"""Generate the reference from the schema, from conf/, from the parser of the command line and from the modules.

A hook of MkDocs: `on_files` adds the pages to each build, so they are never out of date and never committed. The
functions that render them need only Pylorus, so that a test can check that every key and every command is described.
"""

import argparse
import dataclasses
import re
import typing
from collections.abc import Iterator
from typing import Any

from pylorus.cli import build_parser
from pylorus.config.schema import CONF, GROUPS, PACKAGE, Config
from pylorus.core.io import iter_fields

PACKAGES = ("data", "model", "training", "evaluation", "report", "deploy", "runs", "launch")
"""Packages of `pylorus` that have a page in the Python reference."""


def build_pages() -> dict[str, str]:
    """Return all generated pages in Markdown, by their path in the site."""
    pages = {
        "reference/keys.md": render_keys_page(),
        "reference/groups.md": render_groups_page(),
        "reference/commands.md": render_commands_page(),
    }
    return pages | {f"reference/python/{package}.md": _render_package_page(package) for package in PACKAGES}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages; MkDocs calls it when the files of docs/ are known."""
    from mkdocs.structure.files import File

    for path, text in build_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_post_template(output_content: str, template_name: str, **_: Any) -> str:
    """Leave out 404.html, whose absolute links lead nowhere in a folder; MkDocs calls it for each template."""
    return "" if template_name == "404.html" else output_content


def render_keys_page() -> str:
    """Render the table of every key of the schema: meaning, type, default, allowed values."""
    lines = [
        "# Keys",
        "",
        "The settings of a run, as in `python train.py optimizer.lr=1e-4`. This page is generated from the schema "
        "(`src/pylorus/config/schema.py`), and so is `python train.py --help`. A key that does not exist, and a value "
        "outside its range, are refused before anything starts. The files of `conf/` override some of these defaults: "
        "see [Groups](groups.md).",
        "",
        "## The run",
        "",
        *_render_table(Config, ""),
        *_render_sections(Config, ""),
    ]
    return "\n".join(lines) + "\n"


def iter_schema_keys() -> Iterator[str]:
    """Iterate over the dotted names of all keys that hold a value."""
    yield from (name for name, _, _ in _iter_keys(Config, "", deep=True))


def _render_sections(schema: Any, path: str) -> Iterator[str]:
    for field, kind in iter_fields(schema):
        name = f"{path}{field.name}"
        if field.name == "stages":
            name, kind = f"{name}.<stage>", typing.get_args(kind)[1]
        if dataclasses.is_dataclass(kind):
            yield from ("", f"## {_escape(name)}", "", _get_first_line(kind), "", *_render_table(kind, f"{name}."))
            yield from _render_sections(kind, f"{name}.")


def _render_table(schema: Any, path: str) -> Iterator[str]:
    yield from ('<div class="keys" markdown>', "")
    yield "| key | meaning | type | default | values |"
    yield "| --- | --- | --- | --- | --- |"
    for name, field, kind in _iter_keys(schema, path, deep=False):
        metadata = field.metadata
        cells = (
            f"`{name}`",
            _escape(metadata["description"]),
            _format_type(field, kind),
            _format_default(field),
            _format_range(metadata),
        )
        yield f"| {' | '.join(cells)} |"
    yield from ("", "</div>")


def _iter_keys(schema: Any, path: str, *, deep: bool) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    for field, kind in iter_fields(schema):
        name = f"{path}{field.name}"
        if field.name == "stages":
            name, kind = f"{name}.<stage>", typing.get_args(kind)[1]
        if not dataclasses.is_dataclass(kind):
            yield name, field, kind
        elif deep:
            yield from _iter_keys(kind, f"{name}.", deep=True)


def _format_type(field: dataclasses.Field[Any], kind: Any) -> str:
    plain = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    if typing.get_origin(kind) is list:
        shown = f"list of {plain[typing.get_args(kind)[0]]}s".replace("texts", "names")
    else:
        shown = "names with values" if typing.get_origin(kind) is dict else plain[kind]
    return f"{shown}, or null" if field.default is None else shown


def _format_default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "empty"
    if field.default == "???":
        return "required"
    value = field.default
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{shown}`"


def _format_range(metadata: typing.Mapping[str, Any]) -> str:
    if metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in metadata["choices"])
    if metadata["low"] is None:
        return ""
    return f"{metadata['low']} to {metadata['high']}" if metadata["high"] is not None else f"{metadata['low']} or more"


def render_groups_page() -> str:
    """Render every file of every group of conf/."""
    lines = [
        "# Groups",
        "",
        "A group is a folder of `conf/`; `GROUP=FILE` on the command line selects one of its files, as in "
        "`model=vgg19`. A file sets the values that differ from the defaults of the [keys](keys.md). These files are "
        "selected by default:",
        "",
        "```yaml title='conf/config.yaml'",
        (CONF / "config.yaml").read_text().rstrip(),
        "```",
    ]
    for group in GROUPS:
        lines += ["", f"## {group}"]
        for path in sorted((CONF / group).glob("*.yaml")):
            lines += ["", f"### {group}={path.stem}", "", "```yaml", path.read_text().rstrip(), "```"]
    lines += ["", "## hydra/launcher", "", "Ways to start the jobs of a [sweep](../sweeps.md)."]
    for path in sorted((CONF / "hydra" / "launcher").glob("*.yaml")):
        lines += ["", f"### hydra/launcher={path.stem}", "", "```yaml", path.read_text().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def collect_commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each `pylorus` command, by name."""
    commands: dict[str, argparse.ArgumentParser] = {}
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands |= action.choices
    return commands


def render_commands_page() -> str:
    """Render every `pylorus` command with its arguments, as in `--help`."""
    helps = {
        choice.dest: choice.help or ""
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
        for choice in action._choices_actions
    }
    lines = [
        "# Commands",
        "",
        "`pylorus train`, which is `python train.py` in a clone, takes [keys](keys.md) and [groups](groups.md). "
        "`pylorus COMMAND --help` prints what this page shows of the other commands.",
    ]
    for name, command in collect_commands().items():
        summary = command.description or helps.get(name, "")
        lines += [
            "",
            f"## pylorus {name}",
            "",
            _format_sentence(summary),
            "",
            "```text",
            _format_usage(command),
            "```",
            "",
        ]
        lines += ["| argument | meaning | default |", "| --- | --- | --- |"]
        lines += [_render_argument(action) for action in command._actions if action.dest != "help"]
    return "\n".join(lines) + "\n"


def _format_usage(command: argparse.ArgumentParser) -> str:
    return re.sub(r"\s+", " ", command.format_usage().removeprefix("usage: ")).strip()


def _render_argument(action: argparse.Action) -> str:
    shown = action.metavar or (None if action.option_strings else action.dest)
    if action.option_strings and action.nargs != 0:
        shown = shown or (" | ".join(map(str, action.choices)) if action.choices else action.dest.upper())
    value = " ".join(shown) if isinstance(shown, tuple) else shown
    head = ", ".join(action.option_strings)
    head = " ".join(part for part in (head, value if action.nargs != 0 else None) if part)
    has_default = all(action.default is not nothing for nothing in (None, False, argparse.SUPPRESS))
    default = f"`{action.default}`" if has_default and action.option_strings else ""
    meaning = re.sub(r" ?\(default: [^)]*\)$", "", action.help or "") % {"prog": "pylorus", "default": action.default}
    return f"| `{_escape(head)}` | {_escape(meaning)} | {default} |"


def _render_package_page(package: str) -> str:
    name = f"pylorus.{package}"
    lines = [f"# {name}", "", f"::: {name}", "    options: {show_root_heading: false, members: false}", ""]
    for path in sorted((PACKAGE / package).rglob("*.py")):
        if not path.stem.startswith("__"):
            module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            lines += [f"::: pylorus.{module}", ""]
    return "\n".join(lines)


def _format_sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _get_first_line(kind: type) -> str:
    return str(kind.__doc__).splitlines()[0]


def _escape(text: str) -> str:
    """Escape what Markdown would interpret; underscores only outside of code."""
    parts = text.replace("|", "\\|").replace("<", "&lt;").split("`")
    return "`".join(part if index % 2 else part.replace("_", "\\_") for index, part in enumerate(parts))
