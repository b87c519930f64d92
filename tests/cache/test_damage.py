"""What was killed, cut off or changed on disk is never read, and never lost beyond its shard."""

import logging
import os
import signal
import time

import numpy as np
import pytest

from pylorus.cache import shard
from pylorus.cache import store as store_module
from tests.cache.drawn import SIZE, Computation, fill, process, right, some, store, wait_until


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_BYTES", 4 * SIZE)


def damaged(root, change):
    """Fills a store with 12 records in 3 shards and changes the data file of the second."""
    folder = fill(root, some(12))
    path = sorted(folder.glob("*.data"))[1]
    change(path)
    return path


def cut(path):
    os.truncate(path, 4 * SIZE - 1)


def lengthen(path):
    with path.open("ab") as file:
        file.write(b"x")


def flip(path):
    content = bytearray(path.read_bytes())
    content[2 * SIZE + 17] ^= 4
    path.write_bytes(content)


def flip_name(path):
    index = path.with_suffix(".index")
    index.write_text(index.read_text().replace("image-005", "image-205"))


@pytest.mark.parametrize("memory", [1 << 20, 0])
@pytest.mark.parametrize("change", [cut, lengthen, flip, flip_name])
def test_a_damaged_shard_is_named_and_computed_anew(tmp_path, caplog, memory, change):
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
        "",
        "{",
        "[]",
        '{"names": ["a"], "record_bytes": 7, "checksum": 0}',
        '{"names": [1], "record_bytes": 1000, "checksum": 0}',
    ],
)
def test_an_index_that_can_not_be_read_does_not_count(tmp_path, caplog, content):
    path = damaged(tmp_path, lambda path: path.with_suffix(".index").write_text(content))
    names = some(12)
    records = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0)
    assert (records.kept, records.computed) == (8, 4)
    assert len(warnings(caplog)) == 1
    assert str(path.with_suffix(".index")) in warnings(caplog)[0]
    assert not path.with_suffix(".index").exists()


def test_data_that_vanished_are_computed_anew(tmp_path):
    damaged(tmp_path, lambda path: path.unlink())
    names = some(12)
    records = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0)
    assert (records.kept, records.computed) == (8, 4)
    np.testing.assert_array_equal(records.read_rows(range(12)), right(names))


def test_after_a_killed_run_the_next_goes_on_from_its_last_whole_shard(tmp_path):
    script = """
import sys, time
from pathlib import Path
from pylorus.cache import store as store_module
from tests.cache.drawn import SIZE, Computation, some, store
store_module.SHARD_BYTES = 4 * SIZE
hang = lambda first: time.sleep(600) if first == 6 else None
store(Path(sys.argv[1])).load_or_compute(some(12), Computation(some(12), before=hang), memory_bytes=0)
"""
    names, folder = some(12), store(tmp_path).folder
    killed = process(script, tmp_path)
    wait_until(lambda: any(path.stat().st_size == 2 * SIZE for path in folder.glob("*.partial")))
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (left,) = folder.glob("*.partial")
    os.utime(left, (time.time() - 3700, time.time() - 3700))
    computation = Computation(names)
    records = store(tmp_path).load_or_compute(names, computation, memory_bytes=0)
    assert computation.asked == names[4:]
    assert (records.kept, records.computed) == (4, 8)
    np.testing.assert_array_equal(records.read_rows(range(12)), right(names))
    assert list(folder.glob("*.partial")) == []


def test_a_young_partial_file_is_left_to_who_may_be_writing_it(tmp_path):
    folder = fill(tmp_path, some(4))
    (folder / "x.data.partial").touch()
    fill(tmp_path, some(8))
    assert (folder / "x.data.partial").exists()


@pytest.mark.parametrize("error", [RuntimeError("no such layer"), KeyboardInterrupt(), OSError(5, "an image is gone")])
@pytest.mark.parametrize("memory", [1 << 20, 0])
def test_an_error_of_the_computation_passes_and_whole_shards_stay(tmp_path, error, memory):
    def fail(first):
        if first == 6:
            raise error

    names = some(12)
    with pytest.raises(type(error)) as raised:
        store(tmp_path).load_or_compute(names, Computation(names, before=fail), memory_bytes=memory)
    assert raised.value is error
    folder = store(tmp_path).folder
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".data", ".index", ".json"]
    again = Computation(names)
    records = store(tmp_path).load_or_compute(names, again, memory_bytes=memory)
    assert again.asked == names[4:]
    np.testing.assert_array_equal(records.read_rows(range(12)), right(names))


@pytest.mark.parametrize("moment", ["fsync", "replace"])
@pytest.mark.parametrize("count", range(1, 5))
def test_ctrl_c_at_any_step_of_completing_a_shard_leaves_nothing_half_written(tmp_path, monkeypatch, moment, count):
    owner = shard.os if moment == "fsync" else shard.Path
    real, left = getattr(owner, moment), [count]

    def interrupted(*words):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*words)

    names = some(12)
    store(tmp_path).load_or_compute(
        names[:1], Computation(names), memory_bytes=0
    )  # so that only shards are still to be written
    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0)
    folder = store(tmp_path).folder
    data = {path.stem for path in folder.glob("*.data")}
    assert data == {path.stem for path in folder.glob("*.index")}
    assert list(folder.glob("*.partial")) == []
    records = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=0)
    assert records.kept == 1 + 4 * ((count - 1) // 2)
    np.testing.assert_array_equal(records.read_rows(range(12)), right(names))


def test_a_slow_computation_loses_no_more_than_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "SHARD_SECONDS", 0.0)
    assert len(list(fill(tmp_path, some(4)).glob("*.index"))) == 2  # one a block, not one for all four


def warnings(caplog):
    return [entry.getMessage() for entry in caplog.records if entry.levelno >= logging.WARNING]
