import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import ConfigDict, with_config

from pylorus.core.errors import PylorusError
from pylorus.core.io import check_new_folder, convert_to_plain, validate, write_atomically, write_json


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), write_atomically(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_nan_and_infinity_are_refused_in_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Weights:
    source: str = field(metadata={"alias": "from"})
    sizes: dict[str, tuple[int, ...]]
    accuracy: float | None = None


@with_config(ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
@dataclass(frozen=True)
class Content:
    weights: Weights
    stages: tuple[Weights, ...] = ()


VALID = {"weights": {"from": "hub", "sizes": {"a": [1, 2]}}}


def test_values_of_a_file_become_a_dataclass_and_the_same_values_again():
    content = validate(Content, json.dumps(VALID))
    assert content == Content(Weights("hub", {"a": (1, 2)}))
    assert convert_to_plain(content) == {"weights": VALID["weights"] | {"accuracy": None}, "stages": []}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, 'a.json: the entry "weights" is missing.'),
        ({"weights": {"sizes": {}}}, 'a.json: weights: the entry "from" is missing.'),
        ({"weights": 3}, "a.json: weights: found 3, expected an object with names and values."),
        ({"weights": {"from": 3, "sizes": {}}}, "a.json: weights.from: found 3, expected text."),
        ({"weights": {"from": "a", "sizes": {"b": [1, "2"]}}}, 'a.json: weights.sizes.b[1]: found "2", expected a whole number.'),
        ({"weights": {"from": "a", "sizes": {"b": "12"}}}, 'a.json: weights.sizes.b: found "12", expected a list.'),
        ({"weights": {"from": "a", "sizes": {}, "accuracy": True}}, "a.json: weights.accuracy: found True, expected a number."),
        ({"weights": {"from": "a", "sizes": {}, "accuracy": float("inf")}}, "a.json: weights.accuracy: found inf, expected a number."),
        (VALID | {"stages": [{"from": "a", "sizes": {}, "accurcy": 1}]},
         'a.json: stages[0]: found an unknown entry "accurcy". Did you mean "accuracy"?'),
        (VALID | {"weights": {"source": "a", "from": "a", "sizes": {}}}, 'a.json: weights: found an unknown entry "source".'),
        ([], "a.json: found [], expected an object with names and values."),
        ({"weights": {"from": "\ud800", "sizes": {}}}, "a.json: can't be read as JSON: "),
    ],
)  # fmt: skip
def test_a_value_that_the_schema_does_not_allow_is_refused_by_the_name_of_its_entry(values, message):
    with pytest.raises(PylorusError) as refusal:
        validate(Content, json.dumps(values), where="a.json: ")
    assert str(refusal.value).startswith(message)


def test_a_folder_to_write_to_is_new_empty_or_holds_an_earlier_result_and_is_not_one_that_is_read(tmp_path):
    (tmp_path / "images").mkdir()
    for accepted in (tmp_path / "new", tmp_path / "images"):
        check_new_folder(accepted)
    (tmp_path / "images" / "a.jpg").write_bytes(b"1")
    with pytest.raises(PylorusError, match=r"images: already exists, expected a new or empty folder\. Found: a\.jpg$"):
        check_new_folder(tmp_path / "images")
    check_new_folder(tmp_path / "images", own=("a.jpg",))
    with pytest.raises(PylorusError, match=r"a\.jpg: already exists, expected a new or empty folder\. Type another\.$"):
        check_new_folder(tmp_path / "images" / "a.jpg", hint="Type another.", own=("a.jpg",))
    for inside, words in ((tmp_path / "images" / "out", "is inside"), (tmp_path / "images", "images is only read")):
        with pytest.raises(PylorusError, match=words):
            check_new_folder(inside, own=("a.jpg",), outside=(tmp_path / "images",))


def test_a_folder_that_cannot_be_created_is_found_out_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PylorusError, match=r"file: found a file, expected a folder to write to\. Type another\.$"):
        check_new_folder(tmp_path / "file" / "new", hint="Type another.")
    with pytest.raises(PylorusError, match=r"new: can't write to this folder: .+\. Type another\.$"):
        check_new_folder(Path("/proc/pylorus/new"), hint="Type another.")
    check_new_folder(tmp_path / "one" / "two")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
