"""Folds of a configuration are pooled once each, never mixed with another's, and marked if some are missing."""

import pandas as pd
import pytest

from pylorus.evaluation.index_intervals import wilson
from pylorus.report.evidence import collect_evidence
from pylorus.report.page import write_report
from pylorus.report.results import ReportOptions

OPTIONS = ReportOptions(resamples=20)


@pytest.fixture
def folds(make_run, tmp_path, skip_rendering):
    """Makes runs of folds, each with other test images; gives the report's table of them."""

    def report(chosen, wanted=3, **story):
        story = {"stages": ("finetune",), "curves": False, "network": False} | story
        runs = [
            make_run(
                f"fold{fold}", split_seed=fold, seed=fold, config={"data.fold": fold, "data.folds": wanted}, **story
            )
            for fold in chosen
        ]
        write_report(runs, tmp_path / "report", options=OPTIONS)
        file = tmp_path / "report" / "tables" / "folds.csv"
        return runs, (pd.read_csv(file) if file.is_file() else None)

    return report


def test_pooled_results_use_all_test_images(folds):
    runs, table = folds([0, 1, 2])
    row = table[table["stage"] == "finetune"].iloc[0]
    said = pd.concat([pd.read_parquet(run / "finetune" / "predictions-test.parquet") for run in runs])
    assert row["folds"] == "3 of 3"
    assert row["images"] == len(said) == 180
    right = int((said["true"] == said["predicted"]).sum())
    accuracy = next(name for name in table.columns if name.startswith("accuracy"))
    assert float(row[accuracy]) == pytest.approx(100 * wilson(right, len(said)).value, abs=0.06)


def test_missing_folds_are_stated(folds, tmp_path):
    _, table = folds([0, 2])
    assert set(table["folds"]) == {"2 of 3"}
    assert "INCOMPLETE" in (tmp_path / "report" / "report.html").read_text()


def test_one_fold_alone_is_not_pooled(folds):
    assert folds([1])[1] is None


def test_other_configurations_are_rows_of_their_own(make_run, tmp_path, skip_rendering):
    runs = [
        make_run(
            f"{model}{fold}",
            model=model,
            split_seed=fold,
            config={"data.fold": fold, "data.folds": 2},
            curves=False,
            network=False,
        )
        for model in ("resnet50", "vgg19")
        for fold in (0, 1)
    ]
    write_report(runs, tmp_path / "report", options=OPTIONS)
    table = pd.read_csv(tmp_path / "report" / "tables" / "folds.csv")
    assert table.groupby("stage").size().to_dict() == {"finetune": 2, "pretrain": 2}
    assert set(table["folds"]) == {"2 of 2"}


def test_folds_are_described_once_not_pair_by_pair(folds, tmp_path):
    folds([0, 1, 2])
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("The runs of resnet50 form a cross-validation: each of 3 disjoint folds was tested") == 1
    assert "are not compared in pairs:" not in page


def test_pooled_folds_have_no_auroc_with_a_reason(folds, tmp_path):
    _, table = folds([0, 1, 2], images_per_group=2)
    assert {"Cohen's κ", "MCC", "balanced accuracy, %"} <= set(table.columns)
    tables = tmp_path / "report" / "tables"
    patients = pd.read_csv(tables / "fold-patients.csv")
    assert set(patients["patients"]) == {90}
    training = pd.read_csv(tables / "fold-training.csv")
    assert training["calibrated, pooled Brier"].between(0, 2).all()
    assert "There is no AUROC of the pool" in (tables / "fold-training.md").read_text()


def test_the_mean_over_folds_has_an_interval_that_allows_for_training_sets_that_overlap(folds, tmp_path):
    runs, _ = folds([0, 1, 2], stages=("pretrain", "finetune"))
    tables = tmp_path / "report" / "tables"
    row = pd.read_csv(tables / "fold-training.csv").iloc[0]
    shares = pd.read_csv(tables / "accuracy.csv").query("stage == 'pretrain'")["test, %"]
    assert len(shares) == len(runs)
    name = "accuracy, % mean"
    assert row[name] == pytest.approx(shares.mean(), rel=1e-4)
    error = shares.std() * (1 / 3 + 60 / 90) ** 0.5  # 60 test and 90 training images a fold
    assert row[f"{name}, high"] == pytest.approx(min(100, shares.mean() + 4.302653 * error), rel=1e-4)


def test_folds_by_a_column_are_listed_by_its_values(make_run, tmp_path, skip_rendering):
    runs = []
    for number, site in enumerate(("Basel", "Bern", "Genf")):
        config = {"data.fold": site, "data.fold_column": "site", "data.folds": 3}
        run = make_run(f"site{number}", stages=("s",), split_seed=number, seed=number, config=config)
        runs.append(run)
    write_report(runs, tmp_path / "report", options=OPTIONS)
    tables = tmp_path / "report" / "tables"
    assert pd.read_csv(tables / "fold-each.csv")["site"].tolist() == ["Basel", "Bern", "Genf"]
    assert pd.read_csv(tables / "folds.csv")["folds"].tolist() == ["3 of 3"]


def test_folds_with_two_seeds_are_pooled_seed_by_seed_and_then_averaged(make_run, tmp_path, skip_rendering):
    runs = [
        make_run(
            f"{seed}{fold}",
            stages=("s",),
            split_seed=fold,
            seed=10 * seed + fold,
            config={"data.fold": fold, "data.folds": 2, "seed": seed},
        )
        for seed in (0, 1)
        for fold in (0, 1)
    ]
    write_report(runs, tmp_path / "report", options=OPTIONS)
    table = pd.read_csv(tmp_path / "report" / "tables" / "folds.csv")
    assert table["repeat"].tolist() == ["seed=0", "seed=1", "mean of 2"]
    assert table["images"].tolist() == [120, 120, 120]
    accuracy = table["accuracy, %"]
    assert accuracy.iloc[2] == pytest.approx(accuracy.iloc[:2].mean(), rel=1e-4)


def test_configurations_are_compared_on_common_folds(make_run):
    runs = [
        make_run(f"{model}{fold}", model=model, stages=("s",), split_seed=fold, seed=fold, config=config)
        for model, chosen in (("resnet50", (0, 1, 2)), ("vgg19", (0, 2)))
        for fold in chosen
        for config in ({"data.fold": fold, "data.folds": 3},)
    ]
    (winner,) = collect_evidence(runs, OPTIONS).winners
    assert winner.pool.is_restricted
    assert winner.pool.images == 120
    (comparison,) = winner.comparisons
    assert comparison.images.images == 120
    assert "the 2 folds common to all configurations" in winner.verdict
