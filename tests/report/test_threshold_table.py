"""The threshold table: the guaranteed sensitivity for new patients, or why there is no guarantee."""

import pandas as pd
import pytest

from pylorus.report.page import write_report
from pylorus.report.results import ReportOptions

FAST = {"resamples": 50}


@pytest.fixture
def thresholds(make_run, skip_rendering):
    """The table of a run as text and as CSV, of images and of patients."""

    def made(level="", options=None, **story):
        run = make_run(stages=("pretrain",), **story)
        write_report([run], options=ReportOptions(**FAST, **(options or {})))
        path = run / "report" / "tables" / f"threshold{level}"
        (row,) = pd.read_csv(path.with_suffix(".csv")).to_dict("records")
        return path.with_suffix(".md").read_text(), row

    return made


def test_45_patients_with_the_class_let_the_threshold_guarantee_95_percent(thresholds):
    text, row = thresholds(val_each=(100, 15, 15), images_per_group=2)
    assert (row["validation positives"], row["validation positive groups"]) == (100, 50)
    assert row["validation guaranteed sensitivity, 90 % confidence, %"] >= 95
    assert "the true sensitivity for GC is at least 95 % with 90 % confidence" in text
    assert "for patients like the 50 validation patients with GC." in text
    assert "too small" not in text


def test_fewer_patients_are_reported_with_what_they_guarantee(thresholds):
    text, row = thresholds(val_each=(80, 15, 15), images_per_group=2)
    assert row["validation positive groups"] == 40
    assert row["validation guaranteed sensitivity, 90 % confidence, %"] == pytest.approx(100 * 0.1 ** (1 / 40))
    assert "there are 40 validation patients with GC, and 45 are needed" in text
    assert "and at least 95 % with 87.1 % confidence" in text
    assert "; not guaranteed, see below" in text
    assert "the true sensitivity for GC is at least 95 %" not in text


def test_at_patient_level_each_patient_is_one_value(thresholds):
    text, row = thresholds("-patients", val_each=(100, 15, 15), images_per_group=2)
    assert row["validation positives"] == 50
    assert "validation positive groups" not in row
    assert "for patients like the 50 validation patients with GC." in text


def test_class_sensitivity_and_confidence_are_those_of_the_runs_bundle_unless_others_are_asked_for(thresholds):
    own = {"deploy.class_name": "gastric_ulcer", "deploy.sensitivity": 0.8, "deploy.confidence": 0.7}
    text, _ = thresholds(config=own)
    assert (
        "Threshold for GU, fixed on the validation images for a true sensitivity of at least 80 % with 70 % conf"
        in text
    )
    text, _ = thresholds(config=own, options={"class_name": "CG", "sensitivity": 0.9, "guarantee": 0.95})
    assert (
        "Threshold for CG, fixed on the validation images for a true sensitivity of at least 90 % with 95 % conf"
        in text
    )


def test_guaranteed_and_unguaranteed_results_are_both_named(make_run, tmp_path, skip_rendering):
    runs = [make_run("many", stages=("pretrain",), val_each=(50, 15, 15), model="a")]
    runs += [make_run("few", stages=("pretrain",), val_each=(20, 15, 15), model="b", split_seed=1)]
    write_report(runs, tmp_path / "out", options=ReportOptions(**FAST))
    text = (tmp_path / "out" / "tables" / "threshold.md").read_text()
    assert "95 % with 90 % confidence is guaranteed for a pretrain." in text
    assert "with GC to guarantee 95 % with 90 % confidence (45 are needed)" in text
    assert "among them: b pretrain (20 images; 64.1 % confidence of 95 %)." in text
    assert "Patients are not known" in text
