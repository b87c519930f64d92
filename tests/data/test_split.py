"""No patient is in two splits, every class is in each, and the same split seed gives the same split."""

import shutil

import pandas as pd
import pytest

from pylorus.config.schema import DataConfig
from pylorus.core.errors import PylorusError
from pylorus.data.catalog import read_folders
from pylorus.data.split import split_catalog as cut
from pylorus.data.split import write_split


def split(catalog, *, seed=0, **data):
    return cut(catalog, DataConfig(**{"val_fraction": 0.2, "test_fraction": 0.2, "split_seed": seed, **data})).table


@pytest.fixture
def catalog(class_folders):
    """Two classes of 40 and 20 images, four images a patient."""
    root = class_folders({f"a/p{n}": 4 for n in range(10)} | {f"b/p{n}": 4 for n in range(20, 25)})
    return read_folders(root, group=r"p\d+(?=/)")


def test_a_patient_is_in_one_split_only(catalog):
    table = split(catalog, seed=0)
    assert (table.groupby("group")["split"].nunique() == 1).all()


def test_every_class_is_in_every_split_with_about_its_fraction(catalog):
    table = split(catalog, seed=0)
    counts = pd.crosstab(table["split"], table["label"])
    assert counts.loc["test"].tolist() == [8, 4]
    assert (counts > 0).all(axis=None)
    assert len(table) == 60


def test_the_same_split_seed_gives_the_same_split_and_another_another(catalog):
    first, again, other = (split(catalog, seed=seed)["split"] for seed in (1, 1, 2))
    assert first.equals(again)
    assert not first.equals(other)


def test_given_test_folders_are_used_and_validation_is_drawn_by_patient(class_folders):
    counts = {f"train/{name}/{name}p{n}": 2 for name in "ab" for n in range(10)} | {"test/a/ap90": 3, "test/b/bp90": 3}
    table = split(read_folders(class_folders(counts), group=r"[ab]p\d+(?=/)"), seed=0)
    assert (table["path"].str.startswith("test/") == (table["split"] == "test")).all()
    assert table["split"].value_counts().to_dict() == {"train": 32, "val": 8, "test": 6}
    assert (table.groupby("group")["split"].nunique() == 1).all()


def test_given_validation_folders_are_used(class_folders):
    root = class_folders({f"{part}/{name}": 3 for part in ("train", "val", "test") for name in "ab"})
    table = split(read_folders(root), seed=0)
    assert (table["path"].str.split("/").str[0] == table["split"]).all()


def test_validation_on_test_images_leaves_all_others_for_training(class_folders):
    root = class_folders({f"{part}/{name}": 3 for part in ("train", "test") for name in "ab"})
    table = split(read_folders(root), validation="test", seed=0)
    assert table["split"].value_counts().to_dict() == {"train": 6, "test": 6}


def test_validating_on_the_test_images_is_refused_where_validation_images_are_given(class_folders):
    root = class_folders({f"{part}/{name}": 3 for part in ("train", "val", "test") for name in "ab"})
    with pytest.raises(PylorusError, match="data.validation: found test, but .* has a val folder"):
        split(read_folders(root), validation="test", seed=0)


def test_a_patient_in_two_splits_stops_the_run_unless_accepted(class_folders):
    root = class_folders(
        {"train/a/p1": 2, "train/b/p2": 2, "val/a/p3": 1, "val/b/p4": 1, "test/a/p1": 1, "test/b/p5": 1}
    )
    catalog = read_folders(root, group=r"p\d+(?=/)")
    with pytest.raises(PylorusError, match=r"Found in more than one split: 1 patient.*\n  test/a/p1/"):
        split(catalog, seed=0)
    assert len(split(catalog, accept_leaks=True, seed=0)) == 8


def test_the_same_image_in_two_splits_stops_the_run(class_folders):
    root = class_folders({f"{part}/{name}": 3 for part in ("train", "val", "test") for name in "ab"})
    shutil.copy(next((root / "test/a").iterdir()), root / "train/a/renamed.png")
    with pytest.raises(PylorusError, match=r"1 pair of identical files.*(\n.*)*renamed\.png"):
        split(read_folders(root), seed=0)


def test_the_order_in_which_a_user_names_the_classes_does_not_change_the_split(class_folders):
    root = class_folders(dict.fromkeys("abc", 30))
    first, other = (split(read_folders(root, classes=list(order))) for order in ("abc", "cab"))
    assert first["split"].tolist() == other["split"].tolist()


def test_two_patients_of_a_class_suffice_with_validation_on_test_images(class_folders):
    root = class_folders({f"{name}/p{number}{name}": 4 for name in "ab" for number in range(2)})
    table = split(read_folders(root, group=r"p\d\w"), validation="test")
    assert pd.crosstab(table["split"], table["label"]).to_numpy().tolist() == [[4, 4], [4, 4]]


def test_a_split_records_requested_fractions_and_linked_groups(class_folders):
    root = class_folders({f"a/p{n}": 2 for n in range(40)} | {f"b/q{n}": 2 for n in range(20)} | {"b/q99": 200})
    catalog = read_folders(root, group=r"[pq]\d+")
    found = cut(catalog, DataConfig(test_fraction=0.2, val_fraction=0.1))
    assert found.asked == {"test": 0.2, "val": 0.1}
    said = " ".join(found.explain_deviations(catalog.classes, grouped=True))
    assert 'of "b" (one patient has 83.3 % of them, too many to be drawn)' in said
    assert '"b" 1 in training' in said
    shutil.copy(next((root / "a/p0").iterdir()), root / "a/p1/again.png")
    assert cut(read_folders(root, group=r"[pq]\d+"), DataConfig()).joined == 2


def test_a_class_of_too_few_patients_is_named(class_folders):
    root = class_folders({"a": 9, "rare/p1": 20, "rare/p2": 1})
    with pytest.raises(PylorusError, match='class "rare" has 2 patients to draw test from, expected at least 3'):
        split(read_folders(root, group=r"p\d+(?=/)|patient_\d+"), seed=0)


def test_the_split_file_lists_each_image_and_has_a_hash(catalog, tmp_path):
    table = split(catalog, seed=0)
    first = write_split(table, catalog.classes, tmp_path / "split.csv")
    written = pd.read_csv(tmp_path / "split.csv")
    assert list(written.columns) == ["sample_id", "path", "class", "group", "split", "sha256"]
    assert len(written) == 60
    assert set(written["class"]) == {"a", "b"}
    assert write_split(table.sample(frac=1, random_state=0), catalog.classes, tmp_path / "again.csv") == first
    changed = table.assign(split=["train", *table["split"][1:]])
    assert write_split(changed.assign(split="train"), catalog.classes, tmp_path / "other.csv") != first


def test_folds_test_each_image_once_and_keep_patients_whole(catalog):
    tested = [split(catalog, fold=fold, folds=5, seed=4) for fold in range(5)]
    for table in tested:
        assert (table.groupby("group")["split"].nunique() == 1).all()
        assert set(table["split"]) == {"train", "val", "test"}
    times = sum((table["split"] == "test").astype(int) for table in tested)
    assert (times == 1).all()


def test_another_split_seed_gives_other_folds(catalog):
    first, other = (split(catalog, fold=0, folds=5, seed=seed)["split"] == "test" for seed in (1, 2))
    assert not first.equals(other)


def test_more_folds_than_patients_of_a_class_are_refused(catalog):
    with pytest.raises(PylorusError, match='data.folds: found 6, but class "b" has only 5 patients'):
        split(catalog, fold=0, folds=6)


def test_folds_beside_given_test_folders_are_refused(class_folders):
    root = class_folders({f"{part}/{name}": 3 for part in ("train", "test") for name in "ab"})
    with pytest.raises(PylorusError, match="data.fold: found 1, but .* has its own train and test split"):
        split(read_folders(root), fold=1)
