"""A function that takes too much time or memory, or crashes its process, is an error; others go on."""

import multiprocessing
import os
import signal
import time
import zlib

import numpy as np
import pytest

from pylorus.core import distributed, limited_process
from pylorus.core.distributed import map_items
from pylorus.core.errors import PylorusError, UnreadableImageError
from pylorus.core.limited_process import (
    Budget,
    call_limited,
    call_within_limits,
    iterate_limited,
    read_budget,
    require_limits,
    restart_clock,
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small_budget(monkeypatch):
    """One second of CPU time, and 1 GiB of memory and a little more."""
    monkeypatch.setenv("PYLORUS_MAX_SECONDS", "1")
    monkeypatch.setenv("PYLORUS_MAX_PIXELS", "1000")
    yield
    limited_process.end_limited_processes()


def compute(_=None):
    """Compute for long, in a library that never lets Python handle a signal."""
    data = bytes(500_000_000)
    for _ in range(100):
        zlib.crc32(data)


def allocate(size):
    return len(np.ones(size, np.uint8))


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def identify():
    require_limits()
    return os.getpid()


def fail():
    raise ValueError("a reason")


def count_slowly(steps):
    for step in range(steps):
        end = time.process_time() + 0.4
        while time.process_time() < end:
            pass
        restart_clock()
        yield step


def test_a_call_that_takes_too_much_cpu_time_ends_with_its_process():
    start = time.monotonic()
    with pytest.raises(UnreadableImageError, match=r"over 1 s of CPU time, the limit \(PYLORUS_MAX_SECONDS\)"):
        call_limited(compute)
    assert time.monotonic() - start < 60
    assert call_within_limits(identify) != os.getpid()  # another process does the next


def test_a_call_that_takes_too_much_memory_is_an_error():
    with pytest.raises(UnreadableImageError, match=r"over 1\.0 GiB of memory, the limit \(PYLORUS_MAX_PIXELS"):
        call_limited(allocate, 1_300_000_000)
    assert call_limited(allocate, 100_000_000) == 100_000_000


def test_a_crash_is_an_error():
    with pytest.raises(UnreadableImageError, match=r"its decoder crashed \(SIGSEGV\)"):
        call_limited(crash)


def test_an_error_reaches_the_caller_and_the_process_is_used_again():
    process = call_within_limits(identify)
    with pytest.raises(ValueError, match="a reason"):
        call_limited(fail)
    assert call_within_limits(identify) == process


def test_only_a_call_that_requires_limits_leaves_this_process():
    assert call_within_limits(os.getpid) == os.getpid()
    assert call_within_limits(identify) != os.getpid()


def test_arrays_are_passed_in_both_directions():
    array = np.arange(3_000_000, dtype=np.uint8).reshape(1000, 1000, 3)
    assert np.array_equal(call_limited(np.negative, array), np.negative(array))


def test_limits_hold_from_one_item_of_a_stream_to_the_next():
    assert list(iterate_limited(count_slowly, 5)) == list(range(5))  # two seconds in all


def test_a_stream_that_is_left_ends_its_process():
    stream = iterate_limited(count_slowly, 5)
    assert next(stream) == 0
    stream.close()
    assert call_limited(allocate, 10) == 10


def test_a_forked_process_does_not_use_the_process_of_its_parent():
    mine = call_within_limits(identify)
    queue = multiprocessing.get_context("fork").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(target=lambda: queue.put(call_within_limits(identify)))
    process.start()
    process.join()
    assert queue.get() != mine
    assert call_within_limits(identify) == mine


@pytest.mark.parametrize("value", ["0", "many", "-3", "1.5"])
def test_a_wrong_budget_is_named(value, monkeypatch):
    monkeypatch.setenv("PYLORUS_MAX_PIXELS", value)
    with pytest.raises(PylorusError, match=f"PYLORUS_MAX_PIXELS: found '{value}' in the environment, expected a whole"):
        read_budget()


def test_the_default_budget_suits_endoscopes(monkeypatch):
    monkeypatch.delenv("PYLORUS_MAX_PIXELS")
    monkeypatch.delenv("PYLORUS_MAX_SECONDS")
    assert read_budget() == Budget(25_000_000, 60)


@pytest.fixture
def two_processes(monkeypatch):
    """Processes are started after the first item, and two of them."""
    for key, value in {"PROBE": 1, "LEAST_SECONDS": 0.0, "count_free_cores": lambda: 2}.items():
        monkeypatch.setattr(distributed, key, value)


def test_files_whose_readers_are_ended_are_named_and_the_others_read(two_processes):
    def read(item):
        if item in (20, 61):
            compute()
        if item == 50:
            os.kill(os.getpid(), signal.SIGSEGV)
        return item

    results = list(map_items(read, list(range(100)), on_failure=lambda item, reason: f"{item}: {reason}"))
    assert results[20].startswith("20: decoding it takes over 1 s of CPU time")
    assert results[61].startswith("61: decoding it takes over 1 s of CPU time")
    assert results[50] == "50: damaged: its decoder crashed (SIGSEGV)"
    assert [result for result in results if isinstance(result, int)] == [i for i in range(100) if i not in (20, 50, 61)]


def test_a_reader_that_the_system_kills_is_an_error_that_names_the_file(two_processes):
    def read(item):
        if item == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(PylorusError, match=r"was killed, at 50\. Most often the machine ran out of memory"):
        list(map_items(read, list(range(100)), on_failure=lambda item, reason: reason))
