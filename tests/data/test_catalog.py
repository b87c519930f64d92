"""Class folders as a table: what is read, what is ignored, what is refused by name."""

import re
import shutil

import pytest

from pylorus.core.errors import PylorusError
from pylorus.data.catalog import read_folders


def test_class_folders_give_a_row_an_image(synthetic_root):
    catalog = read_folders(synthetic_root, group=r"patient_\d+")
    assert catalog.classes == ("chronic_gastritis", "gastric_cancer", "gastric_ulcer")
    assert len(catalog.table) == 30
    assert catalog.table["group"].nunique() == 15
    assert (catalog.table[["width", "height"]] == 48).all(axis=None)
    assert catalog.table["sample_id"].str.fullmatch("[0-9a-f]{16}").all()
    assert catalog.table["sample_id"].is_unique
    assert set(catalog.table["split"]) == {""}


def test_named_classes_fix_the_order_of_the_labels(synthetic_root):
    names = ["gastric_ulcer", "chronic_gastritis", "gastric_cancer"]
    catalog = read_folders(synthetic_root, classes=names, short_names=["GU", "CG", "GC"])
    assert catalog.classes == tuple(names)
    assert catalog.short_names == ("GU", "CG", "GC")
    first = catalog.table[catalog.table["label"] == 0]
    assert first["path"].str.startswith("gastric_ulcer/").all()


@pytest.mark.parametrize(("train", "val", "test"), [("train", "val", "test"), ("Training", "valid", "TEST")])
def test_split_folders_are_used(class_folders, train, val, test):
    root = class_folders({f"{part}/{name}": 2 for part in (train, val, test) for name in "ab"})
    table = read_folders(root).table
    assert table["split"].value_counts().to_dict() == {"train": 4, "val": 4, "test": 4}


def test_hidden_folders_and_files_are_ignored(class_folders):
    root = class_folders({"a": 2, "b": 2, ".ipynb_checkpoints": 1, "a/.thumbnails": 1})
    (root / "b" / "._patient.png").write_bytes(b"a shadow of another system")
    (root / "b" / "Thumbs.db").write_bytes(b"no image")
    catalog = read_folders(root)
    assert catalog.classes == ("a", "b")
    assert len(catalog.table) == 4


def test_images_may_be_in_patient_folders(class_folders):
    root = class_folders({"a/p1": 2, "a/p2": 1, "b/p3": 2})
    catalog = read_folders(root, group=r"/(p\d)/")
    assert sorted(catalog.table["group"]) == ["p1", "p1", "p2", "p3", "p3"]


def test_without_a_pattern_every_image_is_its_own_group(class_folders):
    catalog = read_folders(class_folders({"a": 2, "b": 2}))
    assert catalog.table["group"].is_unique
    assert not catalog.grouped


def test_sample_ids_do_not_depend_on_the_location_of_the_set(synthetic_root, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(synthetic_root, moved)
    assert read_folders(moved).table["sample_id"].equals(read_folders(synthetic_root).table["sample_id"])


def test_a_class_without_images_is_named(class_folders):
    root = class_folders({"a": 2, "b": 2})
    (root / "empty").mkdir()
    with pytest.raises(PylorusError, match=re.escape(f"{root / 'empty'}: there is no image in this class folder")):
        read_folders(root)


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ({"a": 1, "b": 1}, {"classes": ["a", "c"]}, 'no folder for class "c"'),
        ({"cancer": 1, "ulcer": 1}, {"classes": ["cancer", "ulcers"]}, 'Did you mean "ulcer"'),
        ({"a": 1, "b": 1, "c": 1}, {"classes": ["a", "b"]}, '"c" is not among data.classes'),
        ({"train/a": 1, "train/b": 1, "test/a": 1}, {}, 'test: there is no folder for class "b"'),
        ({"train/a": 1, "train/b": 1}, {}, "there is no folder test next to train"),
        ({"train/a": 1, "test/a": 1, "other/a": 1}, {}, "contains both split folders .* and other folders:\n  other"),
        ({"val/a": 1, "valid/a": 1, "train/a": 1, "test/a": 1}, {}, "several folders for the same split"),
        ({"a": 1}, {}, "found 1 class folder, expected at least two"),
        ({"a": 1, "b": 1}, {"group": "smear_(\\d+)"}, "finds no patient in 2 of 2 paths:\n  a/patient_001"),
        ({"a": 1, "b": 1}, {"group": "(unclosed"}, "is not a regular expression"),
    ],
)
def test_inconsistent_folders_or_options_are_named(class_folders, counts, options, message):
    with pytest.raises(PylorusError, match=message):
        read_folders(class_folders(counts), **options)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(
        PylorusError, match=re.escape(f"data.root: found {tmp_path / 'no'}, expected an existing folder")
    ):
        read_folders(tmp_path / "no")


def test_an_empty_folder_has_no_classes(tmp_path):
    with pytest.raises(PylorusError, match="found 0 class folders, expected at least two"):
        read_folders(tmp_path)


def test_images_outside_the_class_folders_are_named(class_folders):
    root = class_folders({"a": 1, "b": 1})
    shutil.copy(next((root / "a").iterdir()), root / "stray.png")
    with pytest.raises(PylorusError, match=r"1 image is outside the class folders:\n  .*stray\.png"):
        read_folders(root)


def test_all_unreadable_images_are_named_at_once_with_their_reasons(class_folders):
    root = class_folders({"a": 3, "b": 3})
    broken = sorted((root / "a").iterdir())
    broken[0].write_bytes(b"")
    broken[1].write_bytes(broken[1].read_bytes()[:100])
    with pytest.raises(PylorusError) as caught:
        read_folders(root)
    assert "2 of 6 images can't be read" in str(caught.value)
    assert f"a/{broken[0].name}: the file is empty" in str(caught.value)
    assert f"a/{broken[1].name}: damaged" in str(caught.value)
