"""What the pages and the program show to type reaches the program as it is shown, in bash and in zsh (macOS)."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from pylorus.config.checks import USAGE
from pylorus.config.keys import is_key
from pylorus.config.schema import GROUPS
from pylorus.core.formatting import format_command

from .documented import PAGES, Command, commands_of, overrides_of

SHELLS = {"bash": ["bash", "--norc", "--noprofile", "-c"], "zsh": ["zsh", "-f", "-c"]}
PRINT_WORDS = "words() { for word in \"$@\"; do printf '%s\\n' \"$word\"; done; printf -- '--end--\\n'; }\n"
"""A function in place of the program: it prints its words, one a line."""
SYNTAX = re.compile(r"[|;&<>]|\$\(")
"""What makes a command more than words."""

pytestmark = pytest.mark.parametrize("shell", SHELLS)


def expand(shell: str, commands: list[str], folder: Path) -> list[list[str] | str]:
    """Return the words that each command becomes in a shell, in a folder without files; or the shell's error."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    expanded: list[list[str] | str] = []
    # Each in a subshell: an error of expansion ends it.
    script = PRINT_WORDS + "".join(f"( words {command} ) 2>&1 || echo --failed--\n" for command in commands)
    found = subprocess.run([*SHELLS[shell], script], cwd=folder, capture_output=True, text=True, timeout=120)
    block: list[str] = []
    for line in found.stdout.splitlines():
        if line in ("--end--", "--failed--"):
            expanded.append(block if line == "--end--" else "\n".join(block))
            block = []
        else:
            block.append(line)
    assert len(expanded) == len(commands), found.stdout + found.stderr
    return expanded


def check(shell: str, commands: list[str], folder: Path) -> None:
    for command, words in zip(commands, expand(shell, commands, folder), strict=True):
        assert words == shlex.split(command), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_documented_command_is_read_by_a_shell_as_it_is_written(shell, page, tmp_path):
    commands = [command for command in commands_of(page) if not command.text.startswith("#!")]
    simple = [command.text for command in commands if not SYNTAX.search(command.text)]
    check(shell, simple, tmp_path)
    overrides = [span for span in list_override_spans(page) if not SYNTAX.search(span)]
    check(shell, overrides, tmp_path)


def list_override_spans(page: Path) -> list[str]:
    """List the code spans that consist of words KEY=VALUE with keys of ours, as they are written."""
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text(encoding="utf-8"))
    overrides = [span for span in spans if re.fullmatch(r"'?\+?[a-z][\w./<>]*=\S.*", span) and "…" not in span]
    keys = [re.sub(r"<\w+>", "finetune", span.lstrip("'+").partition("=")[0]) for span in overrides]
    return [span for key, span in zip(keys, overrides, strict=True) if key in GROUPS or is_key(key) or "hydra" in key]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_block_of_commands_can_be_pasted_without_its_comments(shell, page):
    """At a prompt, zsh takes `#` for a word, and `!` in double quotes stands for an earlier command in both shells."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for block in [block for block in blocks if not block.startswith("#!")]:
        for line in block.splitlines():
            assert not re.search(r"(^|\s)#(\s|$)", line), line
            assert "!" not in re.sub(r"'[^']*'", "", line), line


def test_the_commands_of_the_help_text_are_read_as_they_are_written(shell, tmp_path):
    lines = [re.split(r"\s{3,}", line.strip())[0] for line in USAGE.splitlines() if line.startswith("  ")]
    assert len(lines) > 4
    check(shell, lines, tmp_path)


NASTY = ["data.classes=[a,b]", "data.root=/x (1)", "a?", "b*", "=c", "~d", "!e", "#f", "g=h#i", "j^k", "{l,m}", "n!o'p",
         "data.root='/im ages'", 'q"r', "$s", "`t`", "u\\v", "data.group=P\\d+", "w&x", "y;z", "ü=胃", "<RUN>", "%1", "a|b"]  # fmt: skip


def test_a_printed_command_survives_the_shell(shell, tmp_path):
    assert expand(shell, [format_command(NASTY)], tmp_path) == [NASTY]
    assert [expand(shell, [format_command([word])], tmp_path) for word in NASTY] == [[[word]] for word in NASTY]


def test_pages_have_overrides_and_commands(shell):
    assert sum(len(list_override_spans(page)) for page in PAGES) > 40
    assert any(overrides_of(page) for page in PAGES)
    assert isinstance(next(iter(commands_of(PAGES[0]))), Command)
