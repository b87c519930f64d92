"""Disk space: the budget, full disks, folders that can't be written to."""

import contextlib
import errno
import logging
import os
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pylorus.cache import shards
from pylorus.cache import store as store_module
from pylorus.cache.store import DoesNotFitError, sum_file_sizes
from tests.cache.records import SIZE, Computation, fill, process, right, some, store

MEMORY = 1 << 20


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * SIZE)


def last_used(folder, seconds):
    os.utime(folder / "used", (seconds, seconds))


def test_the_least_recently_used_store_is_evicted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    old, older, recent = (fill(tmp_path, some(20), key=key) for key in ("old", "older", "recent"))
    for folder, seconds in ((old, 2000), (older, 1000), (recent, 3000)):
        last_used(folder, seconds)
    limit = sum_file_sizes(tmp_path) + 6 * SIZE
    own = fill(tmp_path, some(20), key="own", budget=limit)
    assert [folder.exists() for folder in (old, older, recent, own)] == [True, False, True, True]
    assert sum_file_sizes(tmp_path) <= limit
    assert str(older) in caplog.text


def test_finding_records_counts_as_use(tmp_path):
    first, second = fill(tmp_path, some(20), key="first"), fill(tmp_path, some(20), key="second")
    last_used(first, 1000)
    last_used(second, 2000)
    store(tmp_path, key="first").load_or_compute(some(20), Computation(some(20)), memory_bytes=MEMORY)
    fill(tmp_path, some(20), key="own", budget=sum_file_sizes(tmp_path) + 6 * SIZE)
    assert (first.exists(), second.exists()) == (True, False)


@pytest.mark.slow
def test_a_store_that_another_process_reads_is_never_removed(tmp_path):
    script = """
import sys
from pathlib import Path
from tests.cache.records import Computation, right, some, store
records = store(Path(sys.argv[1]), key="read").load_or_compute(some(20), Computation(some(20)), memory_bytes=0)
print("ready", flush=True)
input()
print((records.read_rows(range(20)) == right(some(20))).all())
"""
    reader = process(script, tmp_path)
    assert reader.stdout.readline() == "ready\n"
    read, idle = store(tmp_path, key="read").folder, fill(tmp_path, some(20), key="idle")
    last_used(read, 1000)
    limit = sum_file_sizes(tmp_path) + 6 * SIZE
    fill(tmp_path, some(20), key="own", budget=limit)
    assert (read.exists(), idle.exists()) == (True, False)
    last_used(store(tmp_path, key="own").folder, 500)
    assert reader.communicate("\n", timeout=30)[0] == "True\n"
    last_used(read, 100)
    fill(tmp_path, some(20), key="next", budget=limit)
    assert not read.exists()  # its reader has gone


def test_a_store_being_written_is_never_evicted_and_its_space_is_reserved(tmp_path):
    goes_on, begun, written = threading.Event(), threading.Event(), []

    def pause(first):
        begun.set()
        goes_on.wait(20)

    slow = Computation(some(20), before=pause)
    limit = 30 * SIZE
    writer = threading.Thread(
        target=lambda: written.append(
            store(tmp_path, key="slow", budget=limit).load_or_compute(some(20), slow, memory_bytes=0)
        )
    )
    writer.start()
    begun.wait(20)
    with pytest.raises(DoesNotFitError, match="Raise cache.budget_gib"):
        fill(tmp_path, some(20), key="own", budget=limit)
    goes_on.set()
    writer.join()
    np.testing.assert_array_equal(written[0].read_rows(range(20)), right(some(20)))


def test_nothing_is_evicted_if_that_would_not_suffice(tmp_path):
    folder = fill(tmp_path, some(5))
    with pytest.raises(DoesNotFitError):
        fill(tmp_path, some(20), key="own", budget=15 * SIZE)
    assert len(list(folder.glob("*.shard"))) == 2


def test_a_store_never_evicts_itself(tmp_path):
    fill(tmp_path, some(20))
    with pytest.raises(DoesNotFitError):
        fill(tmp_path, some(40), budget=sum_file_sizes(tmp_path) + 6 * SIZE)
    assert store(tmp_path).load_or_compute(some(20), Computation(some(20)), memory_bytes=0).kept == 20


def test_other_folders_are_never_removed(tmp_path):
    for name in ("photos/2024", f"features/{'a' * 24}"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "precious").write_bytes(bytes(20 * SIZE))
    with pytest.raises(DoesNotFitError):
        fill(tmp_path, some(20), budget=50 * SIZE)
    assert len(list(tmp_path.rglob("precious"))) == 2


def test_records_over_the_budget_are_computed_into_memory_and_the_log_says_why(tmp_path, caplog):
    names = some(20)
    computation = Computation(names)
    records = store(tmp_path, budget=10 * SIZE).load_or_compute(names, computation, memory_bytes=MEMORY)
    assert (records.place, records.computed, computation.asked) == ("memory", 20, names)
    np.testing.assert_array_equal(records.read_rows(range(20)), right(names))
    assert "cache.budget_gib" in caplog.text
    assert list(tmp_path.rglob("*.shard")) == []


def test_a_run_that_caches_nothing_does_not_block_others(tmp_path):
    def look_from_another_run(first):
        if first == 0:
            others.append(store(tmp_path).load_or_compute(some(6), Computation(some(6)), memory_bytes=MEMORY))

    others = []
    computation = Computation(some(20), before=look_from_another_run)
    store(tmp_path, budget=10 * SIZE).load_or_compute(some(20), computation, memory_bytes=MEMORY)
    assert others[0].computed == 6


def test_readers_leave_no_files(tmp_path):
    records = store(tmp_path).load_or_compute(some(6), Computation(some(6)), memory_bytes=0)
    assert len(list(tmp_path.rglob("*.reader.lock"))) == 1
    del records
    assert list(tmp_path.rglob("*.reader.lock")) == []


def test_records_that_fit_neither_disk_nor_memory_are_an_error_with_the_key(tmp_path):
    names = some(20)
    computation = Computation(names)
    with pytest.raises(DoesNotFitError, match=r"cache\.budget_gib is 9\.8 KiB(.|\n)*take 19\.5 KiB, and 4\.9 KiB"):
        store(tmp_path, budget=10 * SIZE).load_or_compute(names, computation, memory_bytes=5 * SIZE)
    assert computation.asked == []


def test_a_full_disk_is_not_written_to(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda root: SimpleNamespace(total=0, free=15 * SIZE))
    names = some(20)
    assert store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=MEMORY).computed == 20
    assert "has only 14.6 KiB available" in caplog.text
    assert list(tmp_path.rglob("*.shard")) == []
    with pytest.raises(DoesNotFitError, match="Free"):
        store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("steps", range(7))
def test_a_write_error_loses_no_computation(tmp_path, monkeypatch, caplog, code, steps):
    with contextlib.suppress(DoesNotFitError):
        fill(tmp_path, some(1), budget=1)  # so that only shards are still to be written
    break_after(monkeypatch, steps, code)
    names = some(12)
    computation = Computation(names)
    records = store(tmp_path).load_or_compute(names, computation, memory_bytes=MEMORY)
    assert (records.place, computation.asked) == ("memory", names)
    np.testing.assert_array_equal(records.read_rows(range(12)), right(names))
    monkeypatch.undo()
    assert not list(store(tmp_path).folder.glob(".*"))
    failed = os.strerror(code) in caplog.text
    assert failed == (steps < 6)  # two steps for each of the three shards
    again = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0)
    assert failed == (again.computed > 0)
    assert again.kept == 4 * (steps // 2)
    np.testing.assert_array_equal(again.read_rows(range(12)), right(names))


def test_a_write_error_is_raised_if_memory_is_too_small(tmp_path, monkeypatch):
    fill(tmp_path, some(4))
    break_after(monkeypatch, 0, errno.ENOSPC)
    with pytest.raises(DoesNotFitError, match="No space left on device"):
        store(tmp_path).load_or_compute(some(12), Computation(some(12)), memory_bytes=0)
    monkeypatch.undo()
    assert store(tmp_path).load_or_compute(some(12), Computation(some(12)), memory_bytes=0).kept == 4


def test_without_a_cache_folder_records_are_held_in_memory(tmp_path, caplog):
    (tmp_path / "file").touch()
    names = some(6)
    records = store(tmp_path / "file" / "cache").load_or_compute(names, Computation(names), memory_bytes=MEMORY)
    np.testing.assert_array_equal(records.read_rows(range(6)), right(names))
    assert "can't be written to" in caplog.text
    with pytest.raises(DoesNotFitError, match="can't be written to"):
        store(tmp_path / "file" / "cache").load_or_compute(names, Computation(names), memory_bytes=0)


def break_after(monkeypatch, steps, code):
    """Lets so many steps of writing shards pass: a write, a rename; the next fails, a write before its end."""
    passed = [0]

    def break_step(name, fail):
        real = getattr(Path, name)

        def step(path, *words, **options):
            if path.suffix != shards.SUFFIX or words == ("rb",):
                return real(path, *words, **options)
            passed[0] += 1
            if passed[0] > steps:
                fail(path)
                raise OSError(code, os.strerror(code))
            return real(path, *words, **options)

        monkeypatch.setattr(Path, name, step)

    break_step("open", lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY)))
    break_step("replace", lambda path: None)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB, of which 4 KiB are its smallest piece."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "pylorus-test", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no disk can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_a_disk_filled_by_another_program_loses_no_computation(small_disk, caplog):
    def fill_up(first):
        if first == 6:
            (small_disk / "other").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize))

    names = some(60)
    computation = Computation(names, before=fill_up)
    records = store(small_disk).load_or_compute(names, computation, memory_bytes=MEMORY)
    assert computation.asked == names
    assert "No space left on device" in caplog.text
    np.testing.assert_array_equal(records.read_rows(range(60)), right(names))
    (small_disk / "other").unlink()
    again = store(small_disk).load_or_compute(names, Computation(names), memory_bytes=0)
    assert 0 < again.kept < 60
    np.testing.assert_array_equal(again.read_rows(range(60)), right(names))


@pytest.mark.slow
def test_a_read_only_cache_is_read(small_disk, caplog):
    names = some(12)
    fill(small_disk, names[:8])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    kept = store(small_disk).load_or_compute(names[:8], Computation(names), memory_bytes=0)
    assert (kept.kept, kept.place) == (8, "disk")
    np.testing.assert_array_equal(kept.read_rows(range(8)), right(names[:8]))
    computation = Computation(names)
    more = store(small_disk).load_or_compute(names, computation, memory_bytes=MEMORY)
    assert computation.asked == names[8:]
    np.testing.assert_array_equal(more.read_rows(range(12)), right(names))
    assert "Read-only file system" in caplog.text
