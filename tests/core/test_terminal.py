"""Any terminal shows every message, and words of a command line mean what was typed."""

import io
import shlex
import sys

import pytest

from pylorus.core.formatting import expand_words, format_command, setup_terminal


@pytest.mark.parametrize(
    ("encoding", "shown", "errors"),
    [
        ("ascii", "12 - 3 x ... -> ? ? ?", "? -"),
        ("latin-1", "12 - 3 × ... -> ü ? ?", "ü -"),
        ("utf-8", "12 – 3 × … → ü 胃 ?", "ü –"),
        ("cp437", "12 - 3 x ... -> ü ? ?", "ü -"),
        ("ascii:backslashreplace", "12 \\u2013 3 \\xd7 \\u2026 \\u2192 \\xfc \\u80c3 \\udcfc", "\\xfc \\u2013"),
    ],
)
def test_a_terminal_of_any_encoding_shows_what_it_can(monkeypatch, encoding, shown, errors):
    charset, _, handler = encoding.partition(":")
    for name, usual in (("stdout", "strict"), ("stderr", "backslashreplace")):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=charset, errors=handler or usual))
    setup_terminal()
    print("12 – 3 × … → ü 胃 \udcfc", flush=True)
    print("ü –", file=sys.stderr, flush=True)
    written = [stream.buffer.getvalue().decode(charset).strip() for stream in (sys.stdout, sys.stderr)]
    monkeypatch.undo()
    assert written == [shown, errors]


def test_the_home_folder_is_expanded_in_words_and_options(monkeypatch):
    monkeypatch.setenv("HOME", "/home/für")
    words = ["audit", "~/set", "--output=~/a", "--group", r"(\d+)", "--cache", "c", "~nobody_here/x"]
    assert expand_words(words) == [
        *("audit", "/home/für/set", "--output=/home/für/a", "--group", r"(\d+)", "--cache", "c", "~nobody_here/x")
    ]


@pytest.mark.parametrize("words", [["audit", ""], ["audit", "x", "--output="], ["audit", "x", "--group", " "]])
def test_an_empty_word_ends_a_command(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        expand_words(words)
    assert "found an empty word. Is the variable set" in capsys.readouterr().err


def test_a_command_can_be_typed_as_it_is_shown():
    words = ["data.root='/images/from Köln'", r"data.group=P\d+", 'data.classes=["it\'s",b]', "seed=1", "a=$HOME `x`"]
    shown = format_command(words)
    assert shlex.split(shown) == words
