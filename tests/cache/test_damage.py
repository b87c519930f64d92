"""Partial, truncated or changed shards are never read, and no more than the affected shard is lost."""

import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pylorus.cache import shards
from tests.cache.records import SIZE, Computation, fill, process, right, some, store, wait_until


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * SIZE)


def damaged(root, change):
    """Fills a store with 12 records in 3 shards and changes the second."""
    folder = fill(root, some(12))
    path = sorted(folder.glob("*.shard"))[1]
    change(path)
    return path


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path):
    with path.open("ab") as file:
        file.write(b"x")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-2 * SIZE + 17] ^= 4
    path.write_bytes(content)


def flip_name(path):
    path.write_bytes(path.read_bytes().replace(b"image-005", b"image-205"))


def flip_other_names(path):
    content = path.read_bytes()
    for number in (b"004", b"006", b"007"):
        content = content.replace(b"image-" + number, b"image-2" + number[1:])
    path.write_bytes(content)


def swap_names(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b"005", b"xxx").replace(b"006", b"005").replace(b"xxx", b"006"))


def rename(path):
    path.rename(path.with_stem(path.stem[:-8] + "0" * 8))


@pytest.mark.parametrize("memory", [1 << 20, 0])
@pytest.mark.parametrize("change", [cut, lengthen, flip, flip_name, flip_other_names, swap_names])
def test_a_damaged_shard_is_named_and_computed_again(tmp_path, caplog, memory, change):
    path, names = damaged(tmp_path, change), some(12)
    computation = Computation(names)
    records = store(tmp_path).load_or_compute(names, computation, memory_bytes=memory)
    assert computation.asked == names[4:8]
    np.testing.assert_array_equal(records.read_rows(range(12)), right(names))
    assert len(warnings(caplog)) == 1
    assert str(path) in warnings(caplog)[0]
    caplog.clear()
    again = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=memory)
    assert (again.kept, warnings(caplog)) == (12, [])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[]\n",
        b"\xff\xff\n",
        b"[" * 100_000,
        b'{"a": 1}\n' + bytes(SIZE),
        b'["a"]\n' + bytes(7),
        b"[1]\n" + bytes(SIZE),
        bytes(3 * SIZE),
    ],
)
def test_a_file_without_a_shard_header_is_removed_with_a_warning(tmp_path, caplog, content):
    path = damaged(tmp_path, lambda path: path.write_bytes(content))
    names = some(12)
    records = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0)
    assert (records.kept, records.computed) == (8, 4)
    assert len(warnings(caplog)) == 1
    assert str(path) in warnings(caplog)[0]
    assert not path.exists()


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path):
    path, names = damaged(tmp_path, lambda path: None), some(12)
    content = path.read_bytes()
    for place in (*range(60), *range(60, len(content), 97), len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        records = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=1 << 20)
        np.testing.assert_array_equal(records.read_rows(range(12)), right(names))
        assert (records.computed, path.exists()) == (4, False)
        max(path.parent.glob("*.shard")).unlink()  # what was computed anew


def test_a_shard_under_another_name_is_not_read(tmp_path):
    damaged(tmp_path, rename)
    assert store(tmp_path).load_or_compute(some(12), Computation(some(12)), memory_bytes=0).computed == 4


def test_a_store_of_an_older_format_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("pylorus.cache.store.FORMAT", 1)
    old = fill(tmp_path, some(12))
    monkeypatch.undo()
    assert store(tmp_path).folder != old
    assert store(tmp_path).load_or_compute(some(12), Computation(some(12)), memory_bytes=0).computed == 12


def test_deleted_data_are_computed_again(tmp_path):
    damaged(tmp_path, lambda path: path.unlink())
    names = some(12)
    records = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0)
    assert (records.kept, records.computed) == (8, 4)
    np.testing.assert_array_equal(records.read_rows(range(12)), right(names))


@pytest.mark.slow
def test_after_a_killed_run_the_next_continues_from_its_last_complete_shard(tmp_path):
    script = """
import sys, time
from pathlib import Path
from pylorus.cache import shards
from tests.cache.records import SIZE, Computation, some, store
shards.SHARD_BYTES = 4 * SIZE
opened, open_file = [], Path.open
def open_half(path, mode="r", **options):
    if mode == "wb" and path.suffix == shards.SUFFIX:
        if opened:
            with open_file(path, "wb") as file:
                file.write(bytes(2 * SIZE))
            time.sleep(600)
        opened.append(path)
    return open_file(path, mode, **options)
Path.open = open_half
store(Path(sys.argv[1])).load_or_compute(some(12), Computation(some(12)), memory_bytes=0)
"""
    names, folder = some(12), store(tmp_path).folder
    killed = process(script, tmp_path)

    def is_half_written() -> bool:
        with suppress(FileNotFoundError):  # the first one is renamed meanwhile
            return any(path.stat().st_size == 2 * SIZE for path in folder.glob(".*.shard"))
        return False

    wait_until(is_half_written)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (left,) = folder.glob(".*.shard")
    os.utime(left, (time.time() - 3700, time.time() - 3700))
    computation = Computation(names)
    records = store(tmp_path).load_or_compute(names, computation, memory_bytes=0)
    assert computation.asked == names[4:]
    assert (records.kept, records.computed) == (4, 8)
    np.testing.assert_array_equal(records.read_rows(range(12)), right(names))
    assert list(folder.glob(".*")) == []


def test_a_recent_partial_file_is_not_deleted(tmp_path):
    folder = fill(tmp_path, some(4))
    (folder / ".x.shard").touch()
    fill(tmp_path, some(8))
    assert (folder / ".x.shard").exists()


@pytest.mark.parametrize("error", [RuntimeError("no such layer"), KeyboardInterrupt(), OSError(5, "an image is gone")])
@pytest.mark.parametrize("memory", [1 << 20, 0])
def test_an_error_of_the_computation_propagates_and_complete_shards_remain(tmp_path, error, memory):
    def fail(first):
        if first == 6:
            raise error

    names = some(12)
    with pytest.raises(type(error)) as raised:
        store(tmp_path).load_or_compute(names, Computation(names, before=fail), memory_bytes=memory)
    assert raised.value is error
    folder = store(tmp_path).folder
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".json", ".shard"]
    again = Computation(names)
    records = store(tmp_path).load_or_compute(names, again, memory_bytes=memory)
    assert again.asked == names[4:]
    np.testing.assert_array_equal(records.read_rows(range(12)), right(names))


@pytest.mark.parametrize("moment", ["open", "replace"])
@pytest.mark.parametrize("count", range(1, 4))
def test_ctrl_c_at_any_step_of_completing_a_shard_leaves_nothing_half_written(tmp_path, monkeypatch, moment, count):
    real, left = getattr(Path, moment), [count]

    def interrupted(path, *words, **options):
        if path.suffix == shards.SUFFIX and words != ("rb",):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return real(path, *words, **options)

    names = some(12)
    store(tmp_path).load_or_compute(
        names[:1], Computation(names), memory_bytes=0
    )  # so that only shards are still to be written
    with monkeypatch.context() as patch:
        patch.setattr(Path, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0)
    folder = store(tmp_path).folder
    assert list(folder.glob(".*")) == []
    records = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0)
    assert records.kept == 1 + 4 * (count - 1)
    np.testing.assert_array_equal(records.read_rows(range(12)), right(names))


def test_a_slow_computation_loses_at_most_one_interval(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_SECONDS", 0.0)
    assert len(list(fill(tmp_path, some(4)).glob("*.shard"))) == 2  # one a block, not one for all four


def warnings(caplog):
    return [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]
