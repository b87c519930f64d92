"""The first screen of a report: one winner, its figures for the class of interest, its confusion matrix."""

import re

import pandas as pd
import pytest

from pylorus.report.evidence import collect_evidence
from pylorus.report.headline import build_headline
from pylorus.report.page import write_report
from pylorus.report.results import ReportOptions
from pylorus.report.summary import build_summary

FAST = ReportOptions(resamples=100)
FULL = {"finetune": [[18, 2, 0], [3, 15, 2], [0, 1, 19]], "pretrain": [[10, 10, 0], [5, 10, 5], [0, 5, 15]]}


def read_headline(*runs, **options):
    return build_headline(collect_evidence(list(runs), ReportOptions(resamples=100, **options)))


def test_the_figures_are_those_of_the_tables(make_run, skip_rendering):
    run = make_run(confusions=FULL, images_per_group=2)
    headline = read_headline(run, class_name="GC")
    write_report([run], options=FAST)
    classes = pd.read_csv(run / "report" / "tables" / "classes-resnet50.csv")
    row = classes[(classes["stage"] == "finetune") & (classes["class"] == "GC")].iloc[0]
    by_name = {figure.name: figure for figure in headline.figures}
    assert list(by_name) == ["Sensitivity for GC", "Specificity for GC", "AUROC for GC", "Test accuracy"]
    assert by_name["Sensitivity for GC"].value == "90.0 %"
    assert float(by_name["Specificity for GC"].value.removesuffix(" %")) == round(row["specificity, %"], 1)
    assert float(by_name["AUROC for GC"].value) == round(row["AUROC"], 3)
    assert re.fullmatch(r"95 % CI [\d.]+ to [\d.]+", by_name["Sensitivity for GC"].detail)
    assert [row.counts for row in headline.matrix] == [(18, 2, 0), (3, 15, 2), (0, 1, 19)]
    assert "classified 86.7 % of 60 test images of 30 groups correctly." in headline.verdict


def test_a_model_that_predicts_one_class_is_called_that(make_run):
    confusion = {"s": [[0, 20, 0], [0, 20, 0], [0, 20, 0]]}
    headline = read_headline(make_run(confusions=confusion, stages=("s",)))
    assert "The model predicts GU for every test image." in headline.verdict
    assert "not shown to be above" not in headline.verdict  # the first sentence says it


def test_a_model_that_is_no_better_than_a_constant_answer_is_called_that(make_run):
    confusion = {"s": [[10, 10, 0], [10, 10, 0], [0, 20, 0]]}
    headline = read_headline(make_run(confusions=confusion, stages=("s",)))
    assert "not shown to be above that of always answering GC, 33.3 %." in headline.verdict


def test_a_good_model_is_not_called_worthless(make_run):
    assert "not shown to be above" not in read_headline(make_run(confusions=FULL)).verdict


def test_folds_share_a_matrix_and_seeds_give_their_range(make_run):
    folds = [
        make_run(f"fold{fold}", stages=("s",), split_seed=fold, config={"data.fold": fold, "data.folds": 2})
        for fold in range(2)
    ]
    pooled = read_headline(*folds)
    assert sum(sum(row.counts) for row in pooled.matrix) == 120
    assert [figure.name for figure in pooled.figures] == [
        "Sensitivity for GC",
        "Specificity for GC",
        "Accuracy, folds pooled",
    ]
    assert "each predicted by a model trained without it" in pooled.verdict
    seeds = [make_run(f"seed{seed}", stages=("s",), seed=seed, config={"seed": seed}) for seed in range(2)]
    repeated = read_headline(*seeds)
    assert repeated.matrix == ()
    assert re.fullmatch(r"mean; runs range from [\d.]+ to [\d.]+", repeated.figures[0].detail)


def test_test_sets_that_must_not_be_compared_have_no_common_result(make_run):
    paths = [make_run("a", stages=("s",)), make_run("b", stages=("s",), model="vgg19.tv_in1k", split_seed=1)]
    assert read_headline(*paths) is None
    assert build_summary(collect_evidence(paths, FAST), kind="runs").headline is None


def test_a_second_winner_is_named_only_if_the_criteria_disagree(make_run):
    summary = build_summary(collect_evidence([make_run(confusions=FULL)], FAST), kind="run")
    assert not any("By the study's criterion" in text for text in summary.findings)
    better_on_test = {"pretrain": FULL["finetune"], "finetune": FULL["pretrain"]}
    run = make_run("other", confusions=better_on_test, config={"deploy.stage": "finetune"})
    summary = build_summary(collect_evidence([run], FAST), kind="run")
    assert summary.headline.label == "resnet50 finetune, named by deploy.stage"
    assert any("By the study's criterion" in text for text in summary.findings)


@pytest.mark.parametrize("runs", [1, 4])
def test_the_short_report_comes_first_and_the_rest_is_folded(make_run, skip_rendering, runs):
    models = ["resnet50.tv_in1k", "vgg19.tv_in1k", "inception_v3.tv_in1k", "resnet18.tv_in1k"]
    paths = [make_run(str(index), model=models[index], stages=("s",)) for index in range(runs)]
    text = write_report(paths, paths[0] / "joined", options=FAST).read_text()
    short, appendix = text.split('<section id="appendix">')
    assert "<details" not in short
    assert [name for name in ("results", "summary") if f'<section id="{name}">' in short] == ["results", "summary"]
    assert all(f'<details class="section" id="{name}">' in appendix for name in ("indices", "decisions", "data"))
    assert ('id="table-study-vgg19"' in short) == (1 < runs <= 3)
    assert ('id="table-study-vgg19"' in appendix) == (runs > 3)
