"""Subgroup tables: results of the images of each subgroup; no column is dropped silently."""

import math

import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from pylorus.evaluation.index_intervals import wilson
from pylorus.report.evidence import collect_evidence
from pylorus.report.page import write_report
from pylorus.report.results import ReportOptions
from pylorus.report.subgroup_columns import get_subgroup_columns
from pylorus.report.subgroup_tables import build_subgroup_section, compute_subgroup_tests, format_subgroup_sentences

FAST = ReportOptions(resamples=20)


@pytest.fixture
def make_run_with_columns(make_run):
    """Makes a run whose manifest says something of the test images: columns are functions of their number."""

    def make(name="run", *, columns, **story):
        story = {"stages": ("finetune",), "curves": False, "network": False} | story
        folder = make_run(name, config={"data.kind": "manifest"}, **story)
        for path in folder.rglob("predictions-test.parquet"):
            table = pd.read_parquet(path)
            for column, value in columns.items():
                table[f"about/{column}"] = [value(number) for number in range(len(table))]
            table.to_parquet(path)
        return folder

    return make


def site(number):
    return "A" if number % 3 else "B"


def written_table(folder, name):
    (path,) = (folder / "report" / "tables").glob(f"{name}*.csv")
    return pd.read_csv(path)


def test_the_report_has_the_results_of_each_subgroup(make_run_with_columns, skip_rendering):
    folder = make_run_with_columns(columns={"site_id": site})
    write_report([folder], options=FAST)
    final = pd.read_parquet(folder / "finetune" / "predictions-test.parquet")
    own = final[final["about/site_id"] == "B"]
    row = written_table(folder, "subgroups-").set_index("subgroup").loc["B"]
    right = int((own["true"] == own["predicted"]).sum())
    assert row["images"] == len(own)
    assert row["accuracy, %"] == pytest.approx(100 * wilson(right, len(own)).value, abs=0.01)
    row = written_table(folder, "class-subgroups-").set_index("subgroup").loc["B"]
    positive = own["true"] == "GC"
    assert row["images of GC"] == positive.sum()
    assert row["AUROC"] == pytest.approx(roc_auc_score(positive, own["probability/GC"]), abs=1e-5)
    called = own["predicted"] == "GC"
    assert row["specificity, %"] == pytest.approx(100 * (~called & ~positive).sum() / (~positive).sum(), abs=0.01)


def test_calibration_in_the_large_uses_calibrated_probabilities(make_run_with_columns, skip_rendering):
    folder = make_run_with_columns(columns={"site_id": site})
    write_report([folder], options=FAST)
    result = collect_evidence([folder], FAST).results[-1]
    chosen = result.test.about["site_id"] == "A"
    said = result.calibration.test
    difference = (said.true[chosen] == 0).mean() - said.probabilities[chosen, 0].mean()
    row = written_table(folder, "class-subgroups-").set_index("subgroup").loc["A"]
    assert row["calibration in the large, points"] == pytest.approx(100 * difference, abs=1e-3)


def test_without_validation_there_is_no_calibration(make_run_with_columns, skip_rendering):
    folder = make_run_with_columns(columns={"site_id": site})
    for path in folder.rglob("predictions-val.parquet"):
        path.unlink()
    write_report([folder], options=FAST)
    assert not [name for name in written_table(folder, "class-subgroups-").columns if "calibration" in name]


def test_every_column_is_in_a_subgroup_table_or_listed_as_left_out(make_run_with_columns, skip_rendering):
    columns = {
        "site_id": site,
        "device": lambda number: f"GIF-{number % 15:02d}",
        "kürzel": lambda number: f"case {number}",
        "sex": lambda number: "mf"[number % 2],
        "age": lambda number: str(20 + number),
        "patient_name": lambda number: f"Erika Mustermann{'e' * (number % 3)}",
        "empty": lambda number: "",
        "examined": lambda number: f"202{number % 3}-05-0{1 + number % 7}",
    }
    folder = make_run_with_columns(columns=columns)
    page = write_report([folder], options=FAST).read_text()
    shown = set(written_table(folder, "subgroups-")["column"])
    left_out = written_table(folder, "subgroup-columns-left-out").set_index("column")["why"]
    assert shown | set(left_out.index) == set(columns)
    assert shown == {"site_id", "device", "sex", "age", "examined"}
    assert "personal names" in left_out["patient_name"]
    assert left_out["empty"] == "no test image has a value"
    assert "Mustermann" not in page
    assert "case 7" not in page


def test_a_report_without_a_manifest_has_no_section_of_subgroups(make_run):
    assert build_subgroup_section(collect_evidence([make_run()], FAST)).items == ()


def test_only_a_site_where_the_model_fails_is_significant(make_run_with_columns):
    confusion = [[20, 0, 0], [0, 20, 0], [0, 12, 8]]
    folder = make_run_with_columns(
        columns={
            "site": lambda number: "C" if number < 12 else "AB"[number % 2],
            "sex": lambda number: "mf"[number % 2],
        },
        confusions={"finetune": confusion},
    )
    evidence = collect_evidence([folder], FAST)
    result = evidence.results[-1]
    tests = compute_subgroup_tests(result, get_subgroup_columns(result), class_name="CG", options=FAST)
    by_site, by_sex = (test for test in tests if test.index == "accuracy")
    assert by_site.is_shown
    assert not by_sex.is_shown
    assert by_site.corrected == pytest.approx(2 * by_site.p_value)
    said = format_subgroup_sentences(result, tests)
    assert said[0].startswith("The accuracy of resnet50 finetune differs between the subgroups of site (p")
    assert "is not shown to differ between the subgroups of sex after Holm's correction for 2 columns" in said[1]


def test_without_errors_no_subgroup_difference_can_be_tested(make_run_with_columns):
    confusion = [[20, 0, 0], [0, 20, 0], [0, 0, 20]]
    folder = make_run_with_columns(columns={"site": site}, stages=("s",), confusions={"s": confusion})
    (result,) = collect_evidence([folder], FAST).results
    tests = compute_subgroup_tests(result, get_subgroup_columns(result), class_name=None, options=FAST)
    assert math.isnan(tests[0].corrected)
    (sentence,) = format_subgroup_sentences(result, tests)
    assert sentence.startswith(
        "Whether the accuracy of resnet50 s differs between the subgroups of site cannot be tested"
    )


def test_groups_of_a_manifest_are_named_as_such(make_run, skip_rendering):
    config = {"data.group": None, "data.kind": "manifest"}
    folder = make_run(images_per_group=2, stages=("finetune",), curves=False, network=False, config=config)
    page = write_report([folder], options=ReportOptions(resamples=20)).read_text()
    assert "data.group does not identify patients" not in page
    assert (
        "Results are image-level, with confidence intervals that allow for the clustering of images within groups"
        in page
    )
