import json
import pickle

import numpy as np
import pytest

from pylorus.cache import shards
from pylorus.cache.store import RecordStore
from tests.cache.records import BUDGET, SIZE, Computation, fill, process, right, some, store

PLACES = [("memory", 1 << 20), ("disk", 0)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 4 * SIZE)


@pytest.mark.parametrize(("place", "memory"), PLACES)
def test_records_are_computed_once_and_found_by_a_second_store(tmp_path, place, memory):
    names = some(10)
    first = Computation(names)
    records = store(tmp_path).load_or_compute(names, first, memory_bytes=memory)
    assert (records.kept, records.computed, records.place, len(records)) == (0, 10, place, 10)
    np.testing.assert_array_equal(records.read_rows(range(10)), right(names))
    second = Computation(names)
    records = store(tmp_path).load_or_compute(names, second, memory_bytes=memory)
    assert (records.kept, records.computed, second.asked) == (10, 0, [])
    np.testing.assert_array_equal(records.read_rows([7, 0, 7]), right([names[7], names[0], names[7]]))


@pytest.mark.slow
def test_another_process_finds_the_records(tmp_path):
    names = some(10)
    fill(tmp_path, names)
    script = """
import sys
from pathlib import Path
from tests.cache.records import Computation, right, some, store
names = some(10)
records = store(Path(sys.argv[1])).load_or_compute(names, Computation(names), memory_bytes=0)
print(records.kept, records.computed, (records.read_rows(range(10)) == right(names)).all())
"""
    assert process(script, tmp_path).communicate(timeout=60)[0].split() == ["10", "0", "True"]


@pytest.mark.parametrize(("place", "memory"), PLACES)
def test_only_what_is_missing_is_computed(tmp_path, place, memory):
    fill(tmp_path, some(10)[::2])
    names = some(10)[::-1]
    computation = Computation(names)
    records = store(tmp_path).load_or_compute(names, computation, memory_bytes=memory)
    assert computation.asked == some(10)[1::2][::-1]
    assert (records.kept, records.computed) == (5, 5)
    np.testing.assert_array_equal(records.read_rows(range(10)), right(names))


@pytest.mark.parametrize(("place", "memory"), PLACES)
def test_a_subset_of_records_can_be_read_in_another_order(tmp_path, monkeypatch, place, memory):
    monkeypatch.setattr(shards, "READ_BYTES", 2 * SIZE)
    fill(tmp_path, some(10))
    names = [some(10)[number] for number in (9, 2, 3, 5, 1)]
    computation = Computation(names)
    records = store(tmp_path).load_or_compute(names, computation, memory_bytes=memory)
    assert (records.kept, computation.asked) == (5, [])
    np.testing.assert_array_equal(records.read_rows(range(5)), right(names))


@pytest.mark.parametrize(("place", "memory"), PLACES)
def test_a_repeated_name_uses_one_record(tmp_path, place, memory):
    names = ["b", "a", "b", "c", "a", "b"]
    computation = Computation(names)
    records = store(tmp_path).load_or_compute(names, computation, memory_bytes=memory)
    assert computation.asked == ["b", "a", "c"]
    assert (records.kept, records.computed, len(records)) == (0, 3, 6)
    np.testing.assert_array_equal(records.read_rows(range(6)), right(names))


def test_records_with_another_key_are_in_another_folder(tmp_path):
    names = some(3)
    folder = fill(tmp_path, names)
    other = Computation(names)
    assert store(tmp_path, key="b").load_or_compute(names, other, memory_bytes=0).kept == 0
    assert other.asked == names
    bigger = RecordStore(tmp_path, kind="features", key={"network": "a"}, record_bytes=SIZE + 1, budget_bytes=BUDGET)
    assert len({folder, store(tmp_path, key="b").folder, bigger.folder, store(tmp_path, kind="images").folder}) == 4


def test_the_order_of_the_key_does_not_matter(tmp_path):
    def folder(key):
        return RecordStore(tmp_path, kind="images", key=key, record_bytes=1, budget_bytes=1).folder

    assert folder({"a": 1, "b": [2, 3]}) == folder({"b": (2, 3), "a": 1})


def test_a_person_can_see_what_a_store_is_for(tmp_path):
    content = json.loads((fill(tmp_path, some(1)) / "key.json").read_text())
    assert (content["kind"], content["key"], content["record_bytes"]) == ("features", {"network": "a"}, SIZE)


def test_only_the_owner_can_look_into_the_stores(tmp_path):
    folder = fill(tmp_path / "cache", some(1))
    for place in (tmp_path / "cache", folder.parent, folder):
        assert place.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("place", "memory"), PLACES)
def test_changing_a_returned_array_does_not_change_the_records(tmp_path, place, memory):
    names = some(6)
    records = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=memory)
    records.read_rows(range(6))[:] = 0
    records.read_rows([2])[:] = 0
    np.testing.assert_array_equal(records.read_rows(np.arange(6)), right(names))
    assert records.read_rows([]).shape == (0, SIZE)


def test_memory_and_disk_give_the_same_bytes(tmp_path):
    names, rows = some(20), np.random.default_rng(0).integers(-20, 20, 100)
    mapped = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=20 * SIZE - 1)
    loaded = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=20 * SIZE)
    assert (mapped.place, loaded.place) == ("disk", "memory")
    np.testing.assert_array_equal(mapped.read_rows(rows), loaded.read_rows(rows))


@pytest.mark.parametrize(("place", "memory"), PLACES)
@pytest.mark.parametrize("rows", [[6], [-7], [0.5], [True], [[0]]])
def test_an_index_out_of_range_is_refused(tmp_path, place, memory, rows):
    names = some(6)
    records = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=memory)
    with pytest.raises(IndexError):
        records.read_rows(rows)


@pytest.mark.parametrize(("place", "memory"), PLACES)
def test_records_can_be_sent_to_a_worker_process(tmp_path, place, memory):
    names = some(200)
    records = store(tmp_path).load_or_compute(names, Computation(names), memory_bytes=memory)
    sent = pickle.dumps(records)
    np.testing.assert_array_equal(pickle.loads(sent).read_rows(range(200)), right(names))
    assert (len(sent) < 100 * SIZE) == (place == "disk")


def test_no_names_need_no_computation(tmp_path):
    computation = Computation([])
    records = store(tmp_path).load_or_compute([], computation, memory_bytes=0)
    assert (len(records), records.kept, records.computed, computation.asked) == (0, 0, 0, [])


@pytest.mark.parametrize(
    "blocks",
    [
        [np.zeros((2, SIZE), np.uint8)],
        [np.zeros((4, SIZE), np.uint8)],
        [np.zeros((3, SIZE - 1), np.uint8)],
        [np.zeros((3, SIZE), np.int8)],
    ],
)
def test_a_computation_with_a_wrong_result_shape_is_an_error(tmp_path, blocks):
    with pytest.raises(ValueError, match="compute: found"):
        store(tmp_path).load_or_compute(some(3), lambda places: iter(blocks), memory_bytes=0)
    assert [path for path in store(tmp_path).folder.iterdir() if "shard" in path.name] == []


def test_blocks_may_have_any_size_and_layout(tmp_path):
    names = some(9)

    def compute(places):
        yield np.empty((0, SIZE), np.uint8)
        yield np.asfortranarray(right(names[:7]))
        yield right(names[7:])

    records = store(tmp_path).load_or_compute(names, compute, memory_bytes=0)
    np.testing.assert_array_equal(records.read_rows(range(9)), right(names))


@pytest.mark.parametrize("kind", ["", "../x", "A", ".locks"])
def test_a_kind_that_is_not_a_plain_folder_name_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match="kind"):
        store(tmp_path, kind=kind)
