"""Runs that request the same records at the same time."""

import logging
import threading
import time

import numpy as np
import pytest
from filelock import FileLock

from pylorus.cache import store as store_module
from tests.cache.records import Computation, process, right, some, store, wait_until


def lock_file(root):
    folder = store(root).folder
    return root / ".locks" / f"features-{folder.name}.lock"


@pytest.mark.slow
def test_two_processes_compute_each_record_once_and_read_the_same(tmp_path):
    script = """
import sys, time
from pathlib import Path
from tests.cache.records import Computation, right, some, store
names = some(30) if sys.argv[2] == "0" else some(30)[::-1]
computation = Computation(names, before=lambda first: time.sleep(0.05))
(Path(sys.argv[1]) / f"ready-{sys.argv[2]}").touch()
while len(list(Path(sys.argv[1]).glob("ready-*"))) < 2:
    time.sleep(0.001)
records = store(Path(sys.argv[1])).load_or_compute(names, computation, memory_bytes=int(sys.argv[3]))
print(len(computation.asked), records.computed, records.kept, (records.read_rows(range(30)) == right(names)).all())
"""
    both = [process(script, tmp_path, 0, 0), process(script, tmp_path, 1, 1 << 20)]
    said = sorted(one.communicate(timeout=60)[0].split() for one in both)
    assert said == [["0", "0", "30", "True"], ["30", "30", "0", "True"]]


def test_a_waiting_run_says_so_and_then_reads_all_records(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(store_module, "POLL_SECONDS", 0.05)
    caplog.set_level(logging.INFO)
    names, told = some(6), threading.Event()
    slow = Computation(names, before=lambda first: told.wait(20))
    first = threading.Thread(target=lambda: store(tmp_path).load_or_compute(names, slow, memory_bytes=0))
    first.start()
    wait_until(lambda: bool(slow.asked))
    quick, found = Computation(names), []
    second = threading.Thread(
        target=lambda: found.append(store(tmp_path).load_or_compute(names, quick, memory_bytes=0))
    )
    second.start()
    wait_until(lambda: "Another run is computing features" in caplog.text)
    told.set()
    first.join()
    second.join()
    assert (quick.asked, found[0].kept) == ([], 6)
    assert caplog.text.count("Another run is computing features") == 1


def test_waiting_for_a_hung_lock_holder_times_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(store_module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(store_module, "PATIENCE_SECONDS", 0.3)
    lock_file(tmp_path).parent.mkdir()
    names = some(6)
    with FileLock(lock_file(tmp_path)):
        records = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0)
    assert records.computed == 6
    assert "no longer waiting for it" in caplog.text
    np.testing.assert_array_equal(records.read_rows(range(6)), right(names))
    assert store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0).kept == 6


def test_waiting_continues_while_the_lock_holder_makes_progress(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(store_module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(store_module, "PATIENCE_SECONDS", 0.5)
    folder, names = store(tmp_path).folder, some(6)
    lock_file(tmp_path).parent.mkdir()
    folder.mkdir(parents=True)

    def write_slowly():
        with FileLock(lock_file(tmp_path)), (folder / ".x.shard").open("wb", buffering=0) as file:
            held.set()
            for _ in range(12):
                file.write(b"x")
                time.sleep(0.1)

    held = threading.Event()
    holder = threading.Thread(target=write_slowly)
    holder.start()
    held.wait()
    records = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0)
    assert not holder.is_alive() or holder.join(1) is None
    assert records.computed == 6
    assert "no longer waiting for it" not in caplog.text


@pytest.mark.parametrize("error", [NotImplementedError("no locks"), OSError(37, "No locks available")])
def test_a_disk_without_locks_still_stores_records(tmp_path, monkeypatch, caplog, error):
    def refuse(*words, **more):
        raise error

    monkeypatch.setattr(store_module.FileLock, "acquire", refuse)
    names = some(6)
    assert store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0).computed == 6
    assert store(tmp_path, key="b").load_or_compute(names, Computation(names), memory_bytes=0).computed == 6
    assert store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0).kept == 6
    assert caplog.text.count("locks don't work in this folder") == 1
