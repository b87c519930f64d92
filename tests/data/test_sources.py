"""Manifests: required columns, optional columns, and error messages."""

import dataclasses

import pandas as pd
import pytest

from pylorus.config.schema import DataConfig
from pylorus.core.errors import PylorusError
from pylorus.data.sources import read_manifest
from pylorus.data.split import split_catalog as cut
from pylorus.data.split import write_split


def split(catalog, data, *, seed=0):
    return cut(catalog, dataclasses.replace(data, split_seed=seed)).table


@pytest.fixture
def rows(class_folders):
    """A root of 24 images of two classes, two a patient, and what a manifest may say of them."""
    root = class_folders({f"{name}/p{n}": 2 for name, first in (("a", 0), ("b", 6)) for n in range(first, first + 6)})
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    table = pd.DataFrame({"path": paths})
    table["label"] = [path.split("/")[0] for path in paths]
    table["group"] = [path.split("/")[1] for path in paths]
    table["site"] = ["A" if int(group[1:]) % 3 else "B" for group in table["group"]]
    table["date"] = [f"20{10 + int(group[1:]):02d}-05-01" for group in table["group"]]
    table["age"] = [40 + int(group[1:]) for group in table["group"]]
    return root, table


@pytest.fixture
def write_manifest(rows):
    """Writes a changed manifest beside the images."""
    root, table = rows

    def write(change=None, *, name="manifest.csv"):
        changed = table if change is None else change(table.copy())
        path = root / name
        changed.to_parquet(path) if name.endswith("parquet") else changed.to_csv(path, index=False)
        return path

    return write


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.parquet"])
def test_a_manifest_gives_labels_patients_and_further_columns(write_manifest, name):
    catalog = read_manifest(write_manifest(name=name))
    assert catalog.classes == ("a", "b")
    assert catalog.grouped
    first = catalog.table.iloc[0]
    assert first["path"].startswith("a/p0/")
    assert (first["group"], first["about/site"], first["about/age"], first["split"]) == ("p0", "B", "40", "")
    assert len(first["sha256"]) == 64


def test_manifest_paths_may_be_relative_to_a_root(write_manifest, rows, tmp_path):
    root, _ = rows
    moved = tmp_path / "tables" / "list.csv"
    moved.parent.mkdir()
    write_manifest().rename(moved)
    assert len(read_manifest(moved, root=root).table) == 24
    with pytest.raises(PylorusError, match=r"24 of 24 files do not exist below (?s:.*)Set data.root"):
        read_manifest(moved)


def test_without_groups_every_image_is_its_own_group(write_manifest):
    catalog = read_manifest(write_manifest(lambda table: table.drop(columns="group")))
    assert not catalog.grouped
    assert catalog.table["group"].nunique() == 24


def test_a_regular_expression_finds_patients(write_manifest):
    catalog = read_manifest(write_manifest(), group=r"^(a|b)/")
    assert set(catalog.table["group"]) == {"a", "b"}


def test_the_split_of_a_manifest_is_used(write_manifest):
    said = lambda table: table.assign(split=["Train" if n % 4 else "TEST" for n in range(len(table))])  # noqa: E731
    table = split(read_manifest(write_manifest(said)), DataConfig(accept_leaks=True, validation="test"))
    assert table["split"].value_counts().to_dict() == {"train": 18, "test": 6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.rename(columns={"label": "lable"}), r'there is no column "label". Did you mean "lable"\?'),
        (lambda t: t.iloc[:0], "the table is empty"),
        (lambda t: t.assign(label=""), r'column "label" is empty in 24 rows, first in row 2\. Fill it in'),
        (lambda t: t.assign(label="a"), 'found 1 class in column "label", expected at least two'),
        (lambda t: pd.concat([t, t.iloc[:1]]), "1 path occurs in several rows"),
        (lambda t: t.assign(path="gone.png") if len(t) == 1 else t.replace(t["path"][3], "a/gone.png"), "1 of 24 files"),
        (lambda t: t.assign(split=["train"] * 23 + ["hold-out"]), 'column "split" contains "hold-out" in row 25'),
        (lambda t: t.assign(split=["train"] * 23 + [""]), 'column "split" contains "" in row 25'),
        (lambda t: t.assign(split="train"), 'column "split" has no image in test'),
        (lambda t: t.assign(group=""), 'column "group" is empty'),
    ],
)  # fmt: skip
def test_errors_in_a_manifest_are_named(write_manifest, change, message):
    with pytest.raises(PylorusError, match=message):
        read_manifest(write_manifest(change))


def test_a_manifest_that_is_not_a_table_is_named(tmp_path):
    with pytest.raises(PylorusError, match="expected an existing file"):
        read_manifest(tmp_path / "none.csv")
    (tmp_path / "list.xlsx").write_bytes(b"PK")
    with pytest.raises(PylorusError, match=r"expected a name that ends in .csv or .parquet"):
        read_manifest(tmp_path / "list.xlsx")
    (tmp_path / "list.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(PylorusError, match="can't be read as a table"):
        read_manifest(tmp_path / "list.parquet")


def test_classes_must_be_those_that_the_user_names(write_manifest):
    with pytest.raises(PylorusError, match=r'label "b" is not among data.classes \(a, c\)'):
        read_manifest(write_manifest(), classes=["a", "c"])
    with pytest.raises(PylorusError, match='no row has label "c"'):
        read_manifest(write_manifest(), classes=["a", "b", "c"])


def test_a_site_can_be_the_test_set(write_manifest):
    table = split(read_manifest(write_manifest()), DataConfig(test_column="site", test_values=["B"], val_fraction=0.3))
    assert set(table.loc[table["split"] == "test", "about/site"]) == {"B"}
    assert set(table.loc[table["split"] != "test", "about/site"]) == {"A"}


@pytest.mark.parametrize(("column", "first"), [("date", "2014"), ("age", "44")])
def test_later_images_can_be_the_test_set(write_manifest, column, first):
    both = lambda t: t.assign(**{column: [str(v) for v in t[column]], "label": ["a", "b"] * 12})  # noqa: E731
    table = split(
        read_manifest(write_manifest(both)), DataConfig(test_column=column, test_from=first, val_fraction=0.3)
    )
    late = {f"p{n}" for n in range(4, 12)}
    assert set(table.loc[table["split"] == "test", "group"]) == late


def test_numbers_are_ordered_as_numbers(write_manifest):
    def young_and_old(table):
        return table.assign(age=["9", "9", "10", "10"] * 6, label=["a", "b"] * 12, group=table["path"])

    table = split(
        read_manifest(write_manifest(young_and_old)), DataConfig(test_column="age", test_from="10", val_fraction=0.3)
    )
    assert set(table.loc[table["split"] == "test", "about/age"]) == {"10"}
    assert set(table.loc[table["split"] != "test", "about/age"]) == {"9"}


def test_an_unknown_column_or_value_is_named(write_manifest):
    catalog = read_manifest(write_manifest())
    with pytest.raises(PylorusError, match=r'no additional column "sit". Did you mean "site"\?'):
        split(catalog, DataConfig(test_column="sit", test_values=["B"]))
    with pytest.raises(PylorusError, match='no image has "C" in column site'):
        split(catalog, DataConfig(test_column="site", test_values=["C"]))


def by_site(data):
    """Sites of six patients each, of both classes."""
    return data.assign(site=[f"{int(group[1:]) % 2 + 1}" for group in data["group"]])


@pytest.mark.parametrize("value", ["1", "01", "1.0"])
def test_each_site_is_left_out_in_turn_and_its_patients_are_tested_once(write_manifest, value):
    catalog = read_manifest(write_manifest(by_site))
    first = split(catalog, DataConfig(fold=value, fold_column="site", val_fraction=0.3))
    assert set(first.loc[first["split"] == "test", "about/site"]) == {"1"}
    other = split(catalog, DataConfig(fold="2", fold_column="site", val_fraction=0.3))
    assert ((first["split"] == "test") ^ (other["split"] == "test")).all()
    for table in (first, other):
        assert set(table["split"]) == {"train", "val", "test"}
        assert (table.groupby("group")["split"].nunique() == 1).all()


def test_an_unknown_site_is_refused_with_a_list_of_sites(write_manifest):
    catalog = read_manifest(
        write_manifest(lambda t: t.assign(site=by_site(t)["site"].map({"1": "Hanoi", "2": "Bonn"})))
    )
    with pytest.raises(PylorusError, match='no image has "Hanoy" in column site. Did you mean "Hanoi"') as refused:
        split(catalog, DataConfig(fold="Hanoy", fold_column="site"))
    assert "-m data.fold=Bonn,Hanoi data.fold_column=site" in str(refused.value)
    spaced = read_manifest(write_manifest(lambda t: t.assign(site="site " + by_site(t)["site"])))
    with pytest.raises(PylorusError, match="""-m 'data.fold="site 1","site 2"' data.fold_column=site"""):
        split(spaced, DataConfig(fold="3", fold_column="site"))
    with pytest.raises(PylorusError, match=r'data.fold_column: .* no additional column "sites". Did you mean "site"'):
        split(catalog, DataConfig(fold="Bonn", fold_column="sites"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(site=["", *by_site(t)["site"][1:]]), "no value in column site for 1 image:\n  a/p0/"),
        (lambda t: t.assign(site="A"), 'all images have "A" in column site'),
        (lambda t: by_site(t).assign(site=by_site(t)["site"].where(t["label"] == "a", "1")),
         'class "b" has no image in test. Remove this value from data.fold'),
        (lambda t: by_site(t).assign(site=by_site(t)["site"].where(t["label"] == "a", "2")),
         'class "b" has no image in train. All of its 12 images have site=2'),
    ],
)  # fmt: skip
def test_a_column_unsuitable_for_folds_is_refused(write_manifest, change, message):
    with pytest.raises(PylorusError, match=message):
        split(read_manifest(write_manifest(change)), DataConfig(fold="2", fold_column="site", val_fraction=0.3))


@pytest.mark.parametrize("fold", ["1", "2", "3"])
def test_a_patient_in_two_sites_is_refused_in_every_fold_unless_accepted(write_manifest, fold):
    def moved(table):
        table = by_site(table)
        table.loc[table["path"].str.contains("p11/"), "site"] = "3"
        table.loc[table["path"].str.contains("p4/"), "site"] = "3"
        table.loc[table["group"].eq("p4").idxmax(), "site"] = "1"
        return table

    catalog = read_manifest(write_manifest(moved))
    data = DataConfig(fold=fold, fold_column="site", val_fraction=0.3)
    with pytest.raises(
        PylorusError, match=r"found under more than one value of column site: 1 patient\.\n.*\(1\) and .*: patient p4"
    ):
        split(catalog, data)
    accepted = cut(catalog, dataclasses.replace(data, accept_leaks=True))
    assert len(accepted.leaks) == (fold != "2")


def test_a_split_file_can_be_used_by_other_runs(write_manifest, tmp_path):
    catalog = read_manifest(write_manifest())
    first = split(catalog, DataConfig(val_fraction=0.3, test_fraction=0.3), seed=3)
    file = tmp_path / "split.csv"
    write_split(first, catalog.classes, file)
    again = split(catalog, DataConfig(split_file=str(file)), seed=99)
    assert again["split"].tolist() == first["split"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [("content", "the content of 1 image differs from the file"), ("class", "the class of 1 image differs from the file"), ("group", "the group of 1 image differs from the file"),
     ("gone", "1 image in the file but missing from the image set"), ("new", "1 image missing from the file")],
)  # fmt: skip
def test_a_split_of_other_images_is_refused_and_the_image_named(write_manifest, rows, tmp_path, change, message):
    root, table = rows
    catalog = read_manifest(write_manifest())
    file = tmp_path / "split.csv"
    made = split(catalog, DataConfig(val_fraction=0.3, test_fraction=0.3))
    write_split(made if change != "new" else made.iloc[1:], catalog.classes, file)
    path = table["path"][0]
    if change == "content":
        (root / path).write_bytes((root / table["path"][5]).read_bytes())
    other = {
        "class": lambda t: t.assign(label=["b", *t["label"][1:]]),
        "group": lambda t: t.assign(group=["p99", *t["group"][1:]]),
        "gone": lambda t: t.iloc[1:],
    }.get(change)
    with pytest.raises(PylorusError, match=message) as refused:
        split(read_manifest(write_manifest(other)), DataConfig(split_file=str(file)))
    assert path in str(refused.value)


def test_an_invalid_split_file_is_named(write_manifest, tmp_path):
    (tmp_path / "split.csv").write_text("path,part\na,b\n")
    with pytest.raises(PylorusError, match=r"data.split_file: can't read .* as a split.csv of Pylorus"):
        split(read_manifest(write_manifest()), DataConfig(split_file=str(tmp_path / "split.csv")))
