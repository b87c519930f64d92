"""Unreadable files give an error with a remedy or are left out and listed, never dropped silently."""

import logging

import pandas as pd
import pytest

from pylorus.core.errors import PylorusError
from pylorus.data.catalog import ReadOptions, count_unreadable, log_unreadable, read_folders, write_quarantine
from pylorus.data.sources import read_manifest

QUARANTINE = ReadOptions(on_error="quarantine")


@pytest.fixture
def damaged_folders(class_folders):
    """Twelve images in given parts, two of which are broken."""
    root = class_folders({f"{part}/{name}": 2 for part in ("train", "val", "test") for name in "ab"})
    for folder in ("train/a", "test/b"):
        sorted((root / folder).iterdir())[0].write_bytes(b"")
    return root


def test_by_default_a_broken_file_is_an_error_that_names_the_key(damaged_folders):
    with pytest.raises(PylorusError, match=r"2 of 12 images can't be read(?s:.*)data\.on_error=quarantine"):
        read_folders(damaged_folders)


def test_broken_files_are_left_out_and_listed_with_their_reasons(damaged_folders, tmp_path, caplog):
    catalog = read_folders(damaged_folders, reading=QUARANTINE)
    assert len(catalog.table) == 10
    assert len(catalog.facts) == 12
    assert [catalog.facts[place].sha256 for place in catalog.fact_indices] == list(catalog.table["sha256"])
    write_quarantine(catalog.unreadable, tmp_path)
    listed = pd.read_csv(tmp_path / "quarantine.csv")
    assert list(listed["reason"]) == ["the file is empty"] * 2
    assert list(listed["path"].str.rsplit("/", n=1).str[0]) == ["test/b", "train/a"]
    with caplog.at_level(logging.WARNING, logger="pylorus"):
        logging.getLogger("pylorus").propagate = True
        log_unreadable(catalog)
    assert "2 of 12 files can't be read and are not used" in caplog.text
    assert listed["path"][0] in caplog.text


def test_left_out_files_are_counted_by_class_and_split_without_names(damaged_folders):
    found = count_unreadable(read_folders(damaged_folders, reading=QUARANTINE).unreadable)
    assert found == [
        {"class": "a", "split": "train", "files": 1},
        {"class": "b", "split": "test", "files": 1},
    ]


def test_without_broken_files_no_quarantine_file_is_written(class_folders, tmp_path):
    write_quarantine(read_folders(class_folders({"a": 1, "b": 1}), reading=QUARANTINE).unreadable, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_class_without_readable_files_is_an_error(class_folders):
    root = class_folders({"a": 2, "b": 2})
    for path in (root / "b").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(PylorusError, match='none of the images of class "b" can be read'):
        read_folders(root, reading=QUARANTINE)


def test_a_missing_file_of_a_manifest_is_left_out(class_folders):
    root = class_folders({"a": 2, "b": 2})
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    table = pd.DataFrame({"path": [*paths, "a/gone.png"], "label": ["a", "a", "b", "b", "a"]})
    table.to_csv(root / "list.csv", index=False)
    with pytest.raises(PylorusError, match=r"1 of 5 files do not exist below (?s:.*)correct these paths"):
        read_manifest(root / "list.csv")
    catalog = read_manifest(root / "list.csv", reading=QUARANTINE)
    assert list(catalog.unreadable["path"]) == ["a/gone.png"]
    assert "No such file" in catalog.unreadable["reason"][0]
