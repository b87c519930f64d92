"""Parts of the test images: what makes one, and that its figures are those of its images alone."""

import numpy as np
import pandas as pd
import pytest

from pylorus.evaluation.proportion import wilson
from pylorus.report.options import ReportOptions
from pylorus.report.subgroup_tables import IDENTIFYING, SINGLE, subgroups, without_single_patients
from pylorus.report.write import write_report


def counts(values):
    return {name: int(chosen.sum()) for name, chosen in subgroups(np.array(values, dtype=str))}


def test_words_make_a_subgroup_each_and_what_is_not_stated_is_one_too():
    assert counts(["B", "A", "B", ""]) == {"A": 1, "B": 2, "not stated": 1}


def test_few_numbers_make_a_subgroup_each():
    assert counts(["1", "2", "1"]) == {"1": 2, "2": 1}


def test_many_numbers_are_cut_at_their_quartiles_and_each_image_lies_in_one():
    found = counts([str(number) for number in range(20, 120)])
    assert list(found) == ["20 to below 44.75", "44.75 to below 69.5", "69.5 to below 94.25", "94.25 to 119"]
    assert sum(found.values()) == 100


@pytest.mark.parametrize("values", [["A"] * 5, [f"name {number}" for number in range(40)], [""] * 3])
def test_one_value_or_names_make_none(values):
    assert counts(values) == {}


def test_words_that_only_one_patient_has_are_not_shown():
    values = np.array(["Miller", "Miller", "A", "A", "Meyer", ""])
    group = np.array(["1", "1", "2", "3", "4", "5"])
    assert without_single_patients(values, group).tolist() == [SINGLE, SINGLE, "A", "A", SINGLE, ""]


@pytest.mark.parametrize(
    ("column", "tells"),
    [("patient_name", True), ("Patient", True), ("image-id", True), ("birthdate", True)]
    + [(name, False) for name in ("site", "device", "patient_sex", "age", "video", "case_mix")],
)
def test_columns_that_tell_who_someone_is_are_told_by_their_names(column, tells):
    assert bool(IDENTIFYING.search(column)) is tells


def test_the_reports_table_holds_the_figures_of_each_subgroup(make_run, undrawn):
    folder = make_run()
    for path in folder.rglob("predictions-test.parquet"):
        table = pd.read_parquet(path)
        table["about/site"] = ["A" if number % 3 else "B" for number in range(len(table))]
        table.to_parquet(path)
    write_report([folder], options=ReportOptions(resamples=20))
    written = [pd.read_csv(path) for path in (folder / "report" / "tables").glob("subgroups-*.csv")]
    assert len(written) == 1  # of the last stage
    final = pd.read_parquet(folder / "finetune" / "predictions-test.parquet")
    own = final[final["about/site"] == "B"]
    right = int((own["true"] == own["predicted"]).sum())
    row = written[0][written[0]["subgroup"] == "B"].iloc[0]
    assert row["images"] == len(own)
    share = wilson(right, len(own))
    accuracy = next(name for name in written[0].columns if name.startswith("accuracy"))
    assert float(row[accuracy]) == pytest.approx(100 * share.value, abs=0.06)


def test_groups_of_a_manifest_are_told_as_such(make_run, undrawn):
    folder = make_run(images_per_group=2, config={"data.group": None, "data.kind": "manifest"})
    page = write_report([folder], options=ReportOptions(resamples=20)).read_text()
    assert "data.group names no patients" not in page
    assert "Figures are image-level, with intervals that keep the images of a group" in page
