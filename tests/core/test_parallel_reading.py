"""A function is mapped over files on all cores, in processes if that is worthwhile, and nothing is left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import islice

import pytest

from pylorus.core import distributed
from pylorus.core.distributed import compute_in_processes, count_free_cores, map_items
from pylorus.core.errors import PylorusError
from pylorus.runs.process import BackgroundTask

pytestmark = pytest.mark.slow


@pytest.fixture
def two_processes(monkeypatch):
    """Processes are started after the first item, and two of them."""
    monkeypatch.setattr(distributed, "PROBE", 1)
    monkeypatch.setattr(distributed, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(distributed, "count_free_cores", lambda: 2)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_results_come_in_order_from_several_processes(two_processes):
    results = list(map_items(lambda item: (item, os.getpid()), list(range(100))))
    assert [item for item, _ in results] == list(range(100))
    assert {pid for _, pid in results[:1]} == {os.getpid()}
    assert os.getpid() not in {pid for _, pid in results[1:]}
    assert wait_until(lambda: not any(is_alive(pid) for _, pid in results[1:]))


def test_few_items_stay_in_this_process():
    assert set(map_items(lambda _: os.getpid(), list(range(100)))) == {os.getpid()}


def test_a_stream_is_read_in_processes_without_taking_more_than_needed(two_processes):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield taken

    with closing(map_items(lambda item: (item, os.getpid()), endless(), ahead=64)) as results:
        for number in range(1, 200):
            item, _ = next(results)
            assert item == number
            assert taken <= number + 64 + distributed.CHUNK
        readers = {pid for _, pid in islice(results, 50)}
    assert os.getpid() not in readers
    assert wait_until(lambda: not any(is_alive(pid) for pid in readers))


def test_a_stream_that_takes_long_continues_in_processes(monkeypatch):
    monkeypatch.setattr(distributed, "count_free_cores", lambda: 2)

    def wait_and_identify(_):
        time.sleep(0.02)
        return os.getpid()

    pids = list(map_items(wait_and_identify, iter(range(100))))
    assert pids[0] == os.getpid()
    assert os.getpid() not in pids[-30:]
    monkeypatch.setattr(distributed, "LEAST_SECONDS", 1000.0)
    assert set(map_items(lambda _: os.getpid(), iter(range(100)))) == {os.getpid()}


def test_items_that_are_too_large_for_processes_stay_in_threads(two_processes):
    assert set(map_items(lambda _: os.getpid(), range(100), in_threads=True)) == {os.getpid()}


def test_a_process_that_may_not_start_others_reads_in_threads(two_processes):
    def read(queue):
        queue.put({pid == os.getpid() for pid in map_items(lambda _: os.getpid(), range(100))})

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=read, args=(queue,), daemon=True)
    process.start()
    process.join()
    assert queue.get() == {True}


def test_an_error_in_a_process_reaches_the_caller(two_processes):
    def fail_at_50(item):
        if item == 50:
            raise ValueError("item 50")
        return item

    with pytest.raises(ValueError, match="item 50"):
        list(map_items(fail_at_50, list(range(100))))


def test_a_killed_process_is_an_error_that_names_a_file(two_processes):
    def end_at_50(item):
        if item == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(PylorusError, match=r"was killed, at image \d+ or one of the next \d+"):
        list(map_items(end_at_50, list(range(100)), name=lambda item: f"image {item}"))


@pytest.fixture
def short_ticks(monkeypatch):
    """Looks at the readers every 50 ms; a warning after the fourth, an error after the twentieth."""
    for key, value in {"TICK": 0.05, "TICKS_TO_WARNING": 4, "TICKS_TO_ERROR": 20}.items():
        monkeypatch.setattr(distributed, key, value)


def test_a_file_whose_reader_hangs_is_named_and_the_reader_ended(two_processes, short_ticks, caplog, tmp_path):
    def hang_at_50(item):
        if item == 50:
            (tmp_path / "pid").write_text(str(os.getpid()))
            time.sleep(600)
        return item

    results = map_items(hang_at_50, list(range(100)), name=lambda item: f"image {item}.jpg")
    with pytest.raises(PylorusError, match=r"image 50\.jpg: reading it gave no result for .* Does the disk"):
        list(results)
    assert "image 50.jpg: reading it has given no result" in caplog.text
    assert wait_until(lambda: not is_alive(int((tmp_path / "pid").read_text())))


def test_slow_files_are_no_error_as_long_as_one_after_the_other_is_read(two_processes, short_ticks, caplog):
    def read_slowly(item):
        time.sleep(0.1)
        return item

    assert list(map_items(read_slowly, range(40))) == list(range(40))  # a chunk takes longer than the limit of a file
    assert "no result" not in caplog.text


def test_a_file_that_a_thread_does_not_get_on_with_is_named(short_ticks, caplog):
    assert list(map_items(time.sleep, [0.0, 0.5], in_threads=True)) == [None, None]
    assert "0.5: reading it has given no result" in caplog.text


def test_jobs_of_a_sweep_share_the_cores(monkeypatch):
    alone = count_free_cores()
    monkeypatch.setenv(distributed.PARALLEL_JOBS, str(2 * alone))
    assert count_free_cores() == 1


def test_the_processes_end_with_a_parent_that_is_killed(tmp_path):
    program = (
        "import os, sys, time\nfrom pathlib import Path\nfrom pylorus.core import distributed\n"
        "distributed.PROBE, distributed.LEAST_SECONDS, distributed.count_free_cores = 1, 0.0, lambda: 2\n"
        "def note(item):\n    Path(sys.argv[1], str(os.getpid())).touch()\n    time.sleep(0.1)\n"
        "list(distributed.map_items(note, list(range(10000))))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 3)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not any(is_alive(int(path.name)) for path in tmp_path.iterdir()))


def test_a_task_in_the_background_is_waited_for(tmp_path):
    task = BackgroundTask(lambda: (time.sleep(0.2), (tmp_path / "done").touch()))
    task.wait()
    task.stop()
    assert (tmp_path / "done").exists()


def test_a_task_in_the_background_is_asked_to_end(tmp_path):
    def work():
        try:
            (tmp_path / "started").touch()
            time.sleep(60)
        finally:
            (tmp_path / "saved").touch()

    task = BackgroundTask(work)
    assert wait_until((tmp_path / "started").exists)
    start = time.monotonic()
    task.stop()
    assert time.monotonic() - start < 10
    assert (tmp_path / "saved").exists()


def test_an_error_in_the_background_is_left_to_who_needs_the_result(capfd):
    def fail():
        raise ValueError("an error")

    BackgroundTask(fail).wait()
    assert capfd.readouterr() == ("", "")


def test_single_items_are_computed_in_processes_and_returned_in_order(monkeypatch):
    monkeypatch.setattr(distributed, "count_free_cores", lambda: 2)
    results = compute_in_processes(lambda item: (item, os.getpid()), range(5))
    assert [item for item, _ in results] == list(range(5))
    assert os.getpid() not in {pid for _, pid in results}


def test_items_whose_process_was_killed_are_computed_in_this_one(monkeypatch):
    monkeypatch.setattr(distributed, "count_free_cores", lambda: 2)
    here = os.getpid()

    def end_elsewhere(item):
        if os.getpid() != here:
            os._exit(1)
        return item

    assert compute_in_processes(end_elsewhere, range(5)) == list(range(5))


def test_where_no_process_can_be_started_this_one_computes(two_processes, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")  # of the semaphores in /dev/shm

    monkeypatch.setattr(distributed, "ProcessPoolExecutor", refuse)
    assert compute_in_processes(lambda item: (item, os.getpid()), range(3)) == [
        (item, os.getpid()) for item in range(3)
    ]
