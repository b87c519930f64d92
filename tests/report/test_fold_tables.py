"""Folds of one configuration: pooled once each, never mixed with another, and marked where some are missing."""

import pandas as pd
import pytest

from pylorus.evaluation.proportion import wilson
from pylorus.report.options import ReportOptions
from pylorus.report.write import write_report

OPTIONS = ReportOptions(resamples=20)


@pytest.fixture
def folds(make_run, tmp_path, undrawn):
    """Makes runs of folds, each with other test images; gives the report's table of them."""

    def report(chosen, wanted=3, **story):
        runs = [
            make_run(
                f"fold{fold}", split_seed=fold, seed=fold, config={"data.fold": fold, "data.folds": wanted}, **story
            )
            for fold in chosen
        ]
        write_report(runs, tmp_path / "report", options=OPTIONS)
        files = list((tmp_path / "report" / "tables").glob("folds*.csv"))
        return runs, (pd.read_csv(files[0]) if files else None)

    return report


def test_the_pooled_figures_are_those_of_all_test_images_together(folds):
    runs, table = folds([0, 1, 2])
    row = table[table["stage"] == "finetune"].iloc[0]
    said = pd.concat([pd.read_parquet(run / "finetune" / "predictions-test.parquet") for run in runs])
    assert row["folds"] == "3 of 3"
    assert row["images"] == len(said) == 180
    right = int((said["true"] == said["predicted"]).sum())
    accuracy = next(name for name in table.columns if name.startswith("accuracy"))
    assert float(row[accuracy]) == pytest.approx(100 * wilson(right, len(said)).value, abs=0.06)


def test_missing_folds_are_said(folds, tmp_path):
    _, table = folds([0, 2])
    assert set(table["folds"]) == {"2 of 3"}
    assert "INCOMPLETE" in (tmp_path / "report" / "report.html").read_text()


def test_one_fold_alone_is_not_pooled(folds):
    assert folds([1])[1] is None


def test_other_configurations_are_rows_of_their_own(make_run, tmp_path, undrawn):
    runs = [
        make_run(f"{model}{fold}", model=model, split_seed=fold, config={"data.fold": fold, "data.folds": 2})
        for model in ("resnet50", "vgg19")
        for fold in (0, 1)
    ]
    write_report(runs, tmp_path / "report", options=OPTIONS)
    table = pd.read_csv(tmp_path / "report" / "tables" / "folds.csv")
    assert table.groupby("stage").size().to_dict() == {"finetune": 2, "pretrain": 2}
    assert set(table["folds"]) == {"2 of 2"}


def test_folds_are_told_once_not_pair_by_pair(folds, tmp_path):
    folds([0, 1, 2])
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("The runs are folds: they test 3 different parts of the images") == 1
    assert "are not compared pair by pair:" not in page
