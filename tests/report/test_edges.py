"""Unusual content of a run's folder gives a clear error or a stated "undefined", never a wrong number."""

import math
import re

import numpy as np
import pandas as pd
import pytest

from pylorus.core.errors import PylorusError
from pylorus.report.evidence import collect_evidence
from pylorus.report.page import write_report
from pylorus.report.results import ReportOptions

FAST = ReportOptions(resamples=100)


def predictions(run, stage="finetune", part="test"):
    return run / stage / f"predictions-{part}.parquet"


def changed(run, change, **where):
    path = predictions(run, **where)
    table = pd.read_parquet(path)
    change(table).to_parquet(path, index=False)


def test_a_class_without_test_images_leaves_its_indices_and_every_average_undefined(make_run, skip_rendering):
    run = make_run(test_each=(20, 20, 0))
    write_report([run], options=FAST)
    found = pd.read_csv(run / "report" / "tables" / "classes-resnet50.csv", dtype=str).set_index(["stage", "class"])
    absent, average = found.loc[("finetune", "CG")], found.loc[("finetune", "macro average")]
    assert absent["images"] == "0"
    assert absent[["sensitivity, %", "AUROC", "average precision"]].tolist() == ["–", "–", "–"]
    assert average[["sensitivity, %", "AUROC", "average precision"]].tolist() == ["–", "–", "–"]
    assert found.loc[("finetune", "GC"), "sensitivity, %"] != "–"


def test_an_undefined_comparison_stays_in_its_family(make_run):
    evidence = collect_evidence([make_run(test_each=(0, 20, 20))], FAST)
    (comparison,) = evidence.comparisons
    assert math.isnan(comparison.auroc.widest.value)
    assert math.isnan(comparison.corrected["auroc"])
    assert comparison.corrected["accuracy"] == comparison.images.p_value


def test_one_test_image_gives_no_interval_of_an_average(make_run, skip_rendering):
    run = make_run(test_each=(1, 0, 0), stages=("s",))
    write_report([run], options=FAST)
    (row,) = pd.read_csv(run / "report" / "tables" / "overall.csv", dtype=str).to_dict("records")
    assert row["accuracy, %"] in ("0", "100")
    assert row["macro F1, %"] == row["macro AUROC"] == row["MCC"] == "–"


def test_without_validation_images_of_the_class_there_is_no_threshold(make_run, skip_rendering):
    run = make_run(val_each=(0, 15, 15))
    text = write_report([run], options=FAST).read_text()
    assert "none of the validation images is of class GC" in text
    assert "No threshold can be fixed for" in text
    assert not (run / "report" / "tables" / "threshold.csv").exists()


def test_without_validation_predictions_the_report_states_that_nothing_is_calibrated(make_run, skip_rendering):
    run = make_run(stages=("s",))
    predictions(run, "s", "val").unlink()
    text = write_report([run], options=FAST).read_text()
    assert "Not calibrated, because there are no validation predictions: resnet50 s." in text
    assert "No model could be selected by validation accuracy, because there are no validation predictions." in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.assign(**{"logit/GC": np.nan}), "logits of image 0 are NaN"),
        (lambda table: table.assign(**{"probability/GC": np.nan}), "probabilities of image 0 are NaN"),
        (lambda table: table.assign(**{"probability/GC": 0.5}), "probabilities of image"),
        (lambda table: table.assign(group=None), "column group is empty in 60 of 60 rows"),
        (lambda table: table.assign(true="XX"), "column true contains ['XX']"),
        (lambda table: table.drop(columns="group"), "expected also ['group']"),
        (lambda table: table.drop(columns="probability/CG"), "expected also ['probability/CG']"),
        (lambda table: table.assign(sample_id=table["sample_id"].iloc[0]), "samples that occur more than once"),
        (
            lambda table: table.assign(predicted=table["predicted"].iloc[::-1].to_numpy()),
            "not the one with the highest",
        ),
        (lambda table: table.iloc[:0], "shape (0, 3)"),
    ],
)
def test_inconsistent_predictions_are_refused_with_file_and_reason(make_run, change, said):
    run = make_run()
    changed(run, change)
    with pytest.raises(PylorusError, match=re.escape(said)) as error:
        collect_evidence([run], FAST)
    assert "predictions-test.parquet" in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda table: table.iloc[:-1],
            "1 image is either in the predictions or in the test split of split.csv, but not in both",
        ),
        (lambda table: table.assign(true="GC"), "40 images have another class in the predictions than in split.csv"),
    ],
)
def test_predictions_of_other_images_than_the_splits_are_refused(make_run, change, said):
    run = make_run()
    changed(run, change)
    with pytest.raises(PylorusError, match=re.escape(said)):
        collect_evidence([run], FAST)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("finetune/predictions-test.parquet", b"no parquet"),
        ("status.json", b"{"),
        ("config.yaml", b"data: [1"),
        ("config.yaml", b"- 1"),
        ("split.csv", b"a,b\n1,2\n"),
        ("split.csv", b""),
        ("network.json", b"[{}]"),
        ("environment.json", b"{"),
        ("pretrain/metrics.csv", b"epoch,loss\n1,2\n"),
    ],
)
def test_a_damaged_file_is_named(make_run, file, content, skip_rendering):
    run = make_run()
    (run / file).write_bytes(content)
    with pytest.raises(PylorusError, match=re.escape(file.rpartition("/")[2])):
        write_report([run], options=FAST)


def test_predictions_without_a_split_are_refused(make_run):
    run = make_run()
    (run / "split.csv").unlink()
    with pytest.raises(PylorusError, match=r"split\.csv is missing"):
        collect_evidence([run], FAST)


def test_an_empty_metrics_file_is_a_stage_without_curves(make_run, skip_rendering):
    run = make_run()
    (run / "pretrain" / "metrics.csv").write_text("\n")
    assert (
        "No training curves, because metrics.csv is missing: resnet50 pretrain."
        in write_report([run], options=FAST).read_text()
    )


def test_runs_with_the_classes_in_another_order_are_put_in_the_order_of_the_first(make_run):
    confusions = {"s": [[18, 2, 0], [1, 17, 2], [0, 3, 17]]}
    order = [2, 0, 1]
    turned = {"s": [[confusions["s"][row][column] for column in order] for row in order]}
    paths = [
        make_run("a", stages=("s",), confusions=confusions),
        make_run("b", stages=("s",), names=("CG", "GC", "GU"), confusions=turned, model="vgg19.tv_in1k"),
    ]
    evidence = collect_evidence(paths, FAST)
    first, second = evidence.results
    assert first.images.confusion.tolist() == second.images.confusion.tolist() == confusions["s"]
    assert len(evidence.tests) == 1
    assert len(evidence.comparisons) == 1


def test_runs_of_other_classes_have_tables_of_their_own(make_run, skip_rendering, tmp_path):
    paths = [make_run("a"), make_run("b", names=("polyp", "normal"), test_each=(9, 9), val_each=(9, 9), split_seed=1)]
    page = write_report(paths, tmp_path / "out", options=FAST)
    tables = page.parent / "tables"
    assert list(pd.read_csv(tables / "confusion-matrices.csv").columns[3:6]) == [
        "predicted GC",
        "predicted GU",
        "predicted CG",
    ]
    assert list(pd.read_csv(tables / "confusion-matrices-2.csv").columns[3:5]) == [
        "predicted polyp",
        "predicted normal",
    ]


def test_a_group_of_several_true_classes_is_left_out_at_patient_level_and_counted(make_run):
    run = make_run(images_per_group=2)
    for part in ("pretrain", "finetune"):
        for kind in ("val", "test"):
            changed(
                run,
                lambda table: table.assign(group=table["group"].where(table.index % 20 > 1, "mixed")),
                stage=part,
                part=kind,
            )
    result = collect_evidence([run], FAST).results[-1]
    assert result.patients is not None
    assert result.patients.left_out == 1
    assert len(result.patients.predictions.true) == 27


def test_a_probability_of_exactly_zero_for_the_truth_is_an_infinite_loss_and_not_an_error(make_run, skip_rendering):
    def sure(table):
        wrong = table["true"].iloc[0] != "GC"
        table.loc[0, ["logit/GC", "logit/GU", "logit/CG"]] = [2000.0, 0, 0] if wrong else [0, 2000.0, 0]
        table.loc[0, ["probability/GC", "probability/GU", "probability/CG"]] = [1.0, 0, 0] if wrong else [0, 1.0, 0]
        table.loc[0, "predicted"] = "GC" if wrong else "GU"
        return table

    run = make_run(stages=("s",))
    changed(run, sure, stage="s")
    write_report([run], options=FAST)
    text = (run / "report" / "tables" / "calibration.md").read_text()
    assert "∞" in text


def test_a_job_without_a_configuration_is_named_and_the_others_are_reported(make_run, tmp_path, skip_rendering):
    (tmp_path / "sweep" / "0").mkdir(parents=True)
    (tmp_path / "sweep" / "0" / "status.json").write_text(
        '{"state": "failed", "pid": 1, "started": "2026-01-31T12:00:00+00:00", "overrides": [], "sweep": "s"}'
    )
    make_run("sweep/1", stages=("s",))
    text = write_report([tmp_path / "sweep"], options=FAST).read_text()
    assert "unknown model failed (state: failed): no stage was tested." in text
    assert (tmp_path / "sweep" / "report" / "tables" / "study-resnet50.csv").is_file()


def test_a_slope_of_nearly_equal_probabilities_is_not_interpreted(make_run, skip_rendering):
    for name, scale in (("flat", 0.01), ("spread", 1.0)):
        run = make_run(name, stages=("s",), scale=scale)
        write_report([run], options=FAST)
        text = (run / "report" / "tables" / "calibration.md").read_text()
        assert ("The slope can't be interpreted " in text) == (scale < 1)
