"""Warnings of a report about its split: fractions that were not reached, and splits with few patients."""

import pandas as pd
import pytest

from pylorus.report.evidence import collect_evidence
from pylorus.report.page import build_sections
from pylorus.report.results import ReportOptions
from pylorus.report.summary import build_summary

QUICK = ReportOptions(resamples=20)


def warnings_of(*folders):
    return " ".join(build_summary(collect_evidence(list(folders), QUICK), kind="runs").warnings)


def data_section(folder):
    return str(next(section for section in build_sections(collect_evidence([folder], QUICK)) if section.key == "data"))


@pytest.fixture
def make_split(make_run):
    """Makes a run whose folders or manifest put the images in these parts; without any, Pylorus drew the split.

    Of each class 30 images are for training, 15 for validation and 20 tested: a third where 15 % are asked.
    """

    def make(*parts, name="run", **story):
        folder = make_run(name, **{"stages": ("finetune",)} | story)
        rows = pd.read_csv(folder / "split.csv")
        given = rows["split"].where(rows["split"].isin(parts), "") if parts else ""
        pd.DataFrame({"split": given}, index=rows.index).to_parquet(folder / "catalog.parquet")
        return folder

    return make


def test_a_fraction_that_was_not_reached_is_a_warning(make_split):
    folder = make_split()
    said = "The test set should contain 15 % of the images of each class but contains 30.8 % of "
    assert said in warnings_of(folder)
    assert said in data_section(folder)


@pytest.mark.parametrize(
    ("parts", "config"),
    [
        (("train", "val", "test"), {}),
        (("train", "test"), {"data.validation": "test"}),
        ((), {"data.split_file": "other/split.csv"}),
        ((), {"data.fold": 1, "data.val_fraction": 0.33}),
    ],
)
def test_a_given_split_states_no_requested_fraction(make_split, parts, config):
    assert "set should contain" not in warnings_of(make_split(*parts, config=config))


def test_with_given_train_and_test_folders_only_validation_was_drawn(make_split):
    said = warnings_of(make_split("train", "test"))
    assert "The validation set should contain 15 %" in said
    assert "The test set should contain" not in said


def test_a_run_without_its_catalog_states_no_requested_fraction(make_run):
    assert "set should contain" not in warnings_of(make_run(stages=("finetune",)))


def test_few_patients_in_a_split_are_reported_for_every_run(make_split):
    said = warnings_of(make_split("train", "val", "test", test_each=(20, 3, 20)))
    assert 'Fewer than 5 images of a class in a split: "gastric_ulcer" 3 in test.' in said


def test_each_split_is_warned_of_once_and_many_are_counted(make_split):
    one = [make_split(name=f"a{n}", model=f"m{n}") for n in range(2)]
    assert warnings_of(*one).count("The test set should contain") == 1
    many = [make_split(name=f"b{n}", split_seed=n) for n in range(6)]
    said = warnings_of(*many)
    assert "6 of 6 splits have a class whose proportion in train, val or test differs from" in said
    assert "set should contain" not in said


def test_a_fold_by_a_column_is_called_by_its_value_unless_that_is_a_single_patients(make_run):
    several, single = (
        make_run(
            name,
            split_seed=seed,
            images_per_group=2,
            stages=("finetune",),
            config={"data.fold_column": "column", "data.fold": name},
        )
        for seed, name in enumerate(("Bonn", "Erika"))
    )
    table = pd.read_csv(single / "split.csv")
    table.loc[table["split"] == "test", "group"] = "the only one"
    table.to_csv(single / "split.csv", index=False)
    runs = collect_evidence([several, single], QUICK).runs
    assert [run.label for run in runs] == ["resnet50 (fold=Bonn)", "resnet50 (fold=(not shown))"]
