"""What a run prints neither ends nor delays it when nobody takes it, and a sweep says an error once."""

import json
import os
import pty
import sys
import time

import pytest

from pylorus.runs.console import detach_streams, find_earlier_failure
from pylorus.runs.folder import RunFolder


def open_closed_terminal() -> int:
    controller, terminal = pty.openpty()
    os.close(controller)
    return terminal


def open_closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("open_stream", [open_closed_terminal, open_closed_pipe])
def test_printing_to_what_is_closed_is_not_an_error(monkeypatch, open_stream):
    with os.fdopen(open_stream(), "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with detach_streams():
            for _ in range(100):
                print("a line", flush=True)
        assert sys.stdout is stream
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what remains in its buffer


def test_a_pipe_that_nobody_reads_does_not_delay_a_run(monkeypatch):
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    start = time.monotonic()
    with detach_streams():
        for _ in range(20_000):
            print("a line of forty characters, or about that", flush=True)
    print("and after it")
    assert time.monotonic() - start < 30
    assert sys.stdout is not stream  # the next one who prints would wait
    monkeypatch.undo()
    assert os.read(reader, 100).startswith(b"a line of forty characters")
    os.close(reader)  # the thread that writes ends


def test_texts_arrive_in_order_before_the_end(capsys):
    with detach_streams():
        for number in range(500):
            print(number)
        assert not sys.stdout.isatty()
    assert capsys.readouterr().out.split() == [str(number) for number in range(500)]


def test_an_error_is_the_same_only_if_an_earlier_job_has_failed_with_it(tmp_path):
    statuses = [("finished", None), ("failed", "no weights"), ("failed", "no weights"), ("failed", "no memory")]
    for number, (state, error) in enumerate(statuses):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "status.json").write_text(json.dumps({"state": state, "error": error}))
    folders = [RunFolder(tmp_path / str(number)) for number in range(4)]
    assert [find_earlier_failure(folder, "no weights") for folder in folders] == [None, None, "1", "1"]
    assert find_earlier_failure(folders[3], "no memory") is None
