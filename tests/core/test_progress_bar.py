"""A progress bar: one line on a terminal of any width, nothing elsewhere."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from contextlib import suppress

import pytest

from pylorus.core.formatting import open_progress_bar


@pytest.fixture
def open_terminal(monkeypatch):
    """Return a function that makes standard error a terminal of some width, and one that reads what is drawn there."""

    def set_terminal(columns):
        controller, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stderr", os.fdopen(terminal, "w", encoding="utf-8"))
        os.set_blocking(controller, False)
        return lambda: read_all(controller)

    monkeypatch.setenv("TERM", "xterm")
    return set_terminal


def read_all(controller):
    content = b""
    with suppress(BlockingIOError):
        while block := os.read(controller, 4096):
            content += block
    return content.decode()


def draw(label, total):
    with open_progress_bar(label, total) as bar:
        for _ in range(3):
            bar.update()
            bar.refresh()


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_a_bar_stays_in_one_line_and_disappears(open_terminal, columns):
    read = open_terminal(columns)
    draw("predicting validation images", 3)
    frames = read().split("\r")
    assert "\n" not in "".join(frames)
    assert max(map(len, frames)) <= columns
    assert not frames[-2].strip()  # wiped
    if columns >= 40:
        assert any(re.fullmatch(r"predicting.*: 2/3.* (\?|00:00) left", frame.strip()) for frame in frames)
    if columns < 60:
        assert "|" not in "".join(frames)


def test_without_a_known_number_the_rate_is_shown(open_terminal):
    read = open_terminal(80)
    draw("predicting images", None)
    assert re.search(r"predicting images: 3, +[\d.?]+/s", read())


def test_elsewhere_than_on_a_terminal_nothing_is_drawn(open_terminal, monkeypatch, capfd):
    read = open_terminal(80)
    monkeypatch.setenv("TERM", "dumb")
    draw("reading images", 3)
    assert read() == ""
    monkeypatch.undo()
    draw("reading images", 3)
    assert capfd.readouterr().err == ""
