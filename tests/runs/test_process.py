"""A signal ends the run, but does not interrupt an import that is used again afterwards; a timeline leaves no gap."""

import atexit
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from pylorus.core.errors import INTERRUPTED
from pylorus.runs.process import (
    IN_SWEEP,
    OTHER,
    STOP_SIGNALS,
    ForkedProcess,
    Timeline,
    compute_process_start,
    ensure_uninterrupted,
    handle_signals,
)

SWEEP = """
import os, signal, sys
from pathlib import Path
import pylorus.launch.main
from pylorus.runs.process import handle_signals

class Interrupted:  # as pandas' C code is made, a Ctrl-C comes
    def find_spec(self, name, path=None, target=None):
        if name == "pandas._libs.parsers" and not self.done:
            self.done = True
            os.kill(os.getpid(), signal.SIGINT)
    done = False

sys.meta_path.insert(0, Interrupted())
pylorus.launch.main._start_or_resume = lambda *_, **__: None
context = type("Context", (), {"runtime": type("R", (), {"output_dir": "."}), "mode": pylorus.launch.main.RunMode.MULTIRUN})
try:
    with handle_signals():
        pylorus.launch.main.run_job(None, context)
except KeyboardInterrupt:
    import pandas
    print("interrupted; pandas reads", len(pandas.read_csv(sys.argv[1])), "rows")
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_waits_for_protected_code(number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background of a shell ignores Ctrl-C
    done = False
    with handle_signals(), pytest.raises(KeyboardInterrupt, match=signal.Signals(number).name), ensure_uninterrupted():
        os.kill(os.getpid(), number)
        done = True
    assert done


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_that_arrives_in_a_destructor_is_not_lost(number):
    class Interrupted:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0)  # the handler runs here

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt, match=signal.Signals(number).name), handle_signals() as stop:
        Interrupted()
        assert stop.asked
        for _ in range(200):
            time.sleep(0.01)


def test_a_signal_that_arrives_in_a_destructor_is_not_lost_on_a_busy_machine(monkeypatch):
    class Interrupted:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)

    class SlowThread(threading.Thread):
        def start(self):
            super().start()
            time.sleep(0.05)  # the thread has run meanwhile

    monkeypatch.setattr(threading, "Thread", SlowThread)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), handle_signals():
        Interrupted()
        for _ in range(200):
            time.sleep(0.01)


@pytest.mark.slow
def test_ctrl_c_during_imports_still_writes_the_table_of_a_sweep(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    found = subprocess.run(
        [sys.executable, "-c", SWEEP, str(tmp_path / "table.csv")], cwd=tmp_path, capture_output=True, text=True
    )
    assert found.stdout == "interrupted; pandas reads 1 rows\n", found.stderr


TWICE = """
import os, signal, sys
from pylorus.runs.process import handle_signals
first, second = (getattr(signal, name) for name in sys.argv[1:])
try:
    with handle_signals() as stop:
        stop.wait_for_step()
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), second)
        print("the step is done", flush=True)
        stop.stop_waiting()
except KeyboardInterrupt:
    print("its state is kept", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "in_sweep", "ends_at_once"),
    [
        ("SIGINT", "SIGTERM", True, False),  # a terminal's Ctrl-C, and what the sweep hands on
        ("SIGUSR2", "SIGTERM", True, False),  # SLURM's warning to all, and what the sweep hands on
        ("SIGTERM", "SIGTERM", True, False),
        ("SIGINT", "SIGINT", True, True),
        ("SIGTERM", "SIGINT", True, True),
        ("SIGINT", "SIGTERM", False, True),
        ("SIGHUP", "SIGHUP", False, False),  # a terminal that closes: from the kernel and from the shell
    ],
)
def test_a_second_signal_ends_a_run_immediately_unless_its_sweep_sent_the_first(first, second, in_sweep, ends_at_once):
    environment = {name: value for name, value in os.environ.items() if name != IN_SWEEP}
    environment |= {IN_SWEEP: "1"} if in_sweep else {}
    command = [sys.executable, "-c", TWICE, first, second]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == (130 if ends_at_once else 0)
    assert found.stdout == ("" if ends_at_once else "the step is done\nits state is kept\n")


@pytest.fixture
def clock(monkeypatch):
    """A clock of which a test says how far it moves."""

    class Clock:
        now = 100.0

        def wait(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_the_parts_of_a_timeline_add_up_and_an_inner_part_counts_once(clock):
    timeline = Timeline(clock.now - 4)
    timeline.begin(OTHER)
    with timeline.measure("bundle"):
        clock.wait(1)
        with timeline.measure("evaluation"):
            clock.wait(2)
        clock.wait(0.5)
    clock.wait(0.25)
    assert timeline.compute_seconds() == {"imports": 4.0, "bundle": 1.5, "evaluation": 2.0, OTHER: 0.25}
    expected = "time     imports 4.0 s, bundle 1.5 s, evaluation 2.0 s, other 0.2 s; total 7.8 s"
    assert timeline.format_line() == expected


def test_a_timeline_includes_the_parts_of_a_process_that_it_waited_for(clock):
    timeline = Timeline(clock.now - 1)
    timeline.begin(OTHER)
    clock.wait(10)
    timeline.include({"imports": 3.0, "finetune": 6.5})
    assert timeline.compute_seconds() == {"imports": 4.0, "finetune": 6.5, OTHER: 0.5}


LEAVING = """
import sys, time
from pathlib import Path
from pylorus.runs.process import Timeline
timeline = Timeline.from_process_start()
time.sleep(0.2)
timeline.write(Path(sys.argv[1]))
timeline.begin("exit")
time.sleep(0.3)
"""


@pytest.mark.slow
def test_a_timeline_begins_with_the_process_and_ends_with_it(tmp_path):
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", LEAVING, str(tmp_path / "speed.json")], check=True)
    seconds = time.monotonic() - start
    speed = json.loads((tmp_path / "speed.json").read_text())
    assert speed["timeline"]["exit"] >= 0.3
    assert speed["timeline"]["imports"] >= 0.2
    assert speed["seconds"] == pytest.approx(sum(speed["timeline"].values()), abs=0.001)
    assert speed["seconds"] <= seconds + 0.02  # the start of a process is known to a hundredth of a second


def test_the_start_of_this_process_is_known():
    assert compute_process_start() < time.monotonic()
    assert compute_process_start() == pytest.approx(compute_process_start(), abs=0.1)


@pytest.mark.slow
def test_a_process_that_ends_early_still_flushes_its_output_and_calls_what_was_registered():
    script = (
        "import atexit, sys; from pylorus.runs.process import exit_process\n"
        "atexit.register(print, 'registered'); sys.stdout.write('no newline '); exit_process(3)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (3, "no newline registered\n")


@pytest.fixture
def start_fork():
    started = []

    def start(function, **options) -> ForkedProcess:
        started.append(ForkedProcess(function, **{"environment": dict(os.environ), **options}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_forked_process_has_its_own_environment_log_and_functions_at_exit(start_fork, tmp_path, monkeypatch):
    monkeypatch.setenv("INHERITED", "1")
    handler = logging.FileHandler(tmp_path / "log")
    logging.root.addHandler(handler)
    atexit.register((tmp_path / "of the parent").touch)

    def leave_traces():
        (tmp_path / "environment").write_text(f"{os.environ.get('INHERITED')} {os.environ['OWN']}")
        logging.getLogger("anybody").error("logged")
        atexit.register((tmp_path / "of the fork").touch)

    try:
        assert start_fork(leave_traces, environment={"OWN": "2"}).wait() == 0
    finally:
        logging.root.removeHandler(handler)
    assert (tmp_path / "environment").read_text() == "None 2"
    assert (tmp_path / "log").read_text() == ""
    assert (tmp_path / "of the fork").exists()
    assert not (tmp_path / "of the parent").exists()


@pytest.mark.slow
def test_a_forked_process_that_ctrl_c_ends_early_prints_no_traceback(start_fork, capfd, monkeypatch):
    parent, set_mask = os.getpid(), signal.pthread_sigmask

    def set_mask_after_ctrl_c(how, mask):
        if os.getpid() != parent:
            signal.raise_signal(signal.SIGINT)  # blocked until the mask is set
        return set_mask(how, mask)

    monkeypatch.setattr(signal, "pthread_sigmask", set_mask_after_ctrl_c)
    assert start_fork(lambda: None).wait() == 130
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_forked_process_holds_only_the_files_that_it_is_given(start_fork):
    (read, write), (other_read, other_write) = os.pipe(), os.pipe()
    process = start_fork(lambda: (os.write(write, b"given"), time.sleep(60)), pass_fds=[write])
    os.close(write)
    os.close(other_write)
    assert os.read(read, 5) == b"given"
    assert os.read(other_read, 1) == b""  # nobody else has its other end open
    assert select.select([read], [], [], 0.1)[0] == []
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert os.read(read, 1) == b""


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_forked_process_does_not_handle_signals_as_its_parent_does(start_fork, number):
    with handle_signals():
        process = start_fork(lambda: time.sleep(60))
        process.send_signal(number)
        assert process.wait(timeout=30) == (INTERRUPTED if number == signal.SIGINT else -number)


@pytest.mark.slow
def test_a_forked_process_has_an_exit_code(start_fork):
    assert start_fork(lambda: sys.exit(7)).wait() == 7
    running = start_fork(lambda: time.sleep(60))
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(timeout=0.1)
