"""Non-inferiority and equivalence in a report: its numbers, its decisions, and what it says about the margin."""

import numpy as np
import pytest
from scipy.optimize import brentq

import pylorus
from pylorus.cli import main
from pylorus.core.errors import PylorusError
from pylorus.evaluation import auroc, clustered_wilson, delong_test, difference_of_independent, holm, wilson
from pylorus.evaluation import paired_differences as compare_pair
from pylorus.report.evidence import collect_evidence
from pylorus.report.margins import build_margin_section
from pylorus.report.page import write_report
from pylorus.report.results import ReportOptions
from pylorus.report.study_tables import STUDY
from pylorus.runs.predictions import read_predictions

pytestmark = pytest.mark.usefixtures("skip_rendering")
GOOD = {"finetune": [[54, 4, 2], [4, 52, 4], [2, 4, 54]]}
ALIKE = {"finetune": [[53, 5, 2], [4, 52, 4], [2, 4, 54]]}
POOR = {"finetune": [[30, 20, 10], [10, 40, 10], [10, 10, 40]]}
SHARED = {"stages": ("finetune",), "images_per_group": 3, "test_each": (60, 60, 60)}


def make_pair(make_run, one=GOOD, two=ALIKE, **config):
    names = ("vgg19.tv_in1k", "resnet50.tv_in1k")
    return [
        make_run(name.partition(".")[0], model=name, confusions=cells, config=dict(config), **SHARED)
        for name, cells in zip(names, (one, two), strict=True)
    ]


def build(folders, **options):
    """Build the section, and return the rows of its table by column title, and its sentences as one text."""
    section = build_margin_section(collect_evidence(folders, ReportOptions(resamples=50, **options)))
    *texts, table = section.items
    rows = [
        dict(zip([f"{column.heading} {column.title}".strip() for column in table.columns], row.cells, strict=True))
        for row in table.rows
    ]
    return rows, " ".join(text for each in texts for text in each.texts)


def get_difference(row):
    return row["difference"].value, *row["difference"].interval


def find_p(compute_low, bound):
    """Find one-sided p by scanning the confidence, independently of how the report does it."""
    if compute_low(0.0002) < bound:
        return 1.0
    return brentq(lambda p: compute_low(1 - 2 * p) - bound, 1e-10, 0.4999)


@pytest.mark.parametrize("against", ["sensitivity=90", "0.9"])
def test_a_mistyped_figure_is_refused_before_any_run_is_read(tmp_path, against):
    with pytest.raises(PylorusError, match="--against: found"):
        ReportOptions(margin=0.05, against=(against,))
    with pytest.raises(PylorusError, match="against: found"):
        pylorus.report(tmp_path / "no-such-run", margin=0.05, against=[against])


def test_the_numbers_of_two_models_equal_an_independent_recomputation(make_run):
    folders = make_pair(make_run)
    rows, _ = build(folders, margin=0.1, reference="resnet50")
    one, two = (read_predictions(each / "finetune" / "predictions-test.parquet").predictions for each in folders)
    by_index = {row["index"]: row for row in rows}
    assert list(by_index) == ["accuracy", "sensitivity for GC", "specificity for GC", "AUROC of GC"]
    expected = compare_pair(one, two, seed=0, resamples=50).accuracy
    row = by_index["accuracy"]
    assert get_difference(row) == pytest.approx((100 * expected.value, 100 * expected.low, 100 * expected.high))
    p_value = find_p(lambda c: compare_pair(one, two, seed=0, resamples=1, confidence=c).accuracy.low, -0.1)
    assert row["not inferior p (Holm)"].value == pytest.approx(p_value, rel=1e-3)
    calibrated = [each.test.predictions for each in collect_evidence(folders, ReportOptions(resamples=1)).results]
    area = delong_test(*calibrated, class_name="GC")
    assert get_difference(by_index["AUROC of GC"]) == pytest.approx((area.value, area.low, area.high))
    positive = one.true == 0
    value = np.mean(one.predicted[positive] == 0) - np.mean(two.predicted[positive] == 0)
    assert get_difference(by_index["sensitivity for GC"])[0] == pytest.approx(100 * value)


def test_given_figures_are_tested_with_the_interval_of_the_model_and_corrected_together(make_run):
    run = make_run(confusions=GOOD, **SHARED)
    rows, text = build([run], margin=0.05, against=("sensitivity=0.85", "spec=108/120", "auroc=0.6"))
    table = read_predictions(run / "finetune" / "predictions-test.parquet").predictions
    positive, groups = table.true == 0, np.asarray(table.group)
    hit, correct = (table.predicted == 0)[positive], (table.predicted != 0)[~positive]

    def estimate_sensitivity(confidence):
        return clustered_wilson(hit, groups[positive], confidence=confidence)

    def estimate_specificity(confidence):
        own = clustered_wilson(correct, groups[~positive], confidence=confidence)
        return difference_of_independent(own, wilson(108, 120, confidence=confidence))

    def estimate_area(confidence):
        return auroc(positive, table.probabilities[:, 0], groups, confidence=confidence)

    p_values = [
        find_p(lambda c: estimate_sensitivity(c).low, 0.85 - 0.05),
        find_p(lambda c: estimate_specificity(c).low, -0.05),
        find_p(lambda c: estimate_area(c).low, 0.6 - 0.05),
    ]
    got = [row["not inferior p (Holm)"].value for row in rows]
    assert got[:2] == pytest.approx(holm(np.array(p_values))[:2], rel=1e-3)
    expected = [estimate_sensitivity(0.95).low - 0.85, estimate_specificity(0.95).low]
    assert [get_difference(row)[1] / 100 for row in rows[:2]] == pytest.approx(expected)
    assert "after Holm's correction for 3 comparisons" in text
    assert [row["compared with"] for row in rows] == ["the given 0.85", "the given 108/120", "the given 0.6"]


def test_the_published_study_is_a_reference_too(make_run):
    counts = STUDY.get_result("VGG19", "finetune").counts
    rows, _ = build(
        [make_run(stages=("finetune",), confusions={"finetune": counts})], margin=0.05, against=("published",)
    )
    assert [row["index"] for row in rows][:2] == ["accuracy", "sensitivity for GC"]
    expected = difference_of_independent(wilson(401, 450), wilson(409, 450))
    assert get_difference(rows[0])[1] == pytest.approx(100 * expected.low)


def test_decisions_say_what_is_shown_and_what_is_not(make_run):
    rows, text = build(make_pair(make_run, GOOD, POOR), margin=0.05, reference="vgg19")
    assert rows[0]["decision"] == "inferior"
    assert "is inferior to vgg19 finetune by more than 5 percentage points" in text
    rows, text = build(make_pair(make_run), margin=0.02, reference="vgg19")
    assert rows[0]["decision"] == "not shown"
    assert "it does not show that the model is inferior" in text
    rows, text = build(make_pair(make_run), margin=0.3, reference="vgg19")
    assert rows[0]["decision"] == "equivalent"
    assert "differ by less than 30 percentage points" in text


def test_a_margin_of_the_configuration_was_stated_before_and_a_typed_one_was_not(make_run, tmp_path):
    typed = build(make_pair(make_run), margin=0.05)[1]
    assert "CAVEAT: it was given when this report was written" in typed
    stated = build(make_pair(make_run, **{"deploy.margin": 0.05}))[1]
    assert "in the configuration of all these runs (deploy.margin), so it was stated before" in stated
    assert "CAVEAT" not in stated
    other = build(make_pair(make_run, **{"deploy.margin": 0.05}), margin=0.1)[1]
    assert "The configuration states 5 percentage points" in other


def test_the_page_and_its_tables_have_the_section_only_with_a_margin(make_run, tmp_path):
    folders = make_pair(make_run)
    page = write_report(folders, tmp_path / "out", options=ReportOptions(resamples=50, margin=0.1))
    assert 'id="margins"' in page.read_text()
    assert "not inferior" in (tmp_path / "out" / "tables" / "margins.csv").read_text()
    assert not build_margin_section(collect_evidence(folders, ReportOptions(resamples=50))).items


def test_seeds_are_compared_by_the_interval_of_their_mean(make_run):
    folders = [
        make_run(f"{model}-{seed}", model=f"{model}.tv_in1k", seed=seed, config={"seed": seed}, skill=2.0, **SHARED)
        for model in ("vgg19", "resnet50")
        for seed in (0, 1)
    ]
    rows, _ = build(folders, margin=0.3, reference="resnet50")
    (comparison,) = collect_evidence(folders, ReportOptions(resamples=50)).winners[0].comparisons
    assert [row["index"] for row in rows] == ["accuracy", "AUROC of GC"]
    sign = 100 if comparison.second.label == "resnet50 finetune" else -100
    expected = comparison.accuracy.widest
    ends = sorted((sign * expected.low, sign * expected.high))
    assert get_difference(rows[0]) == pytest.approx((sign * expected.value, *ends))
    assert 0 <= rows[0]["not inferior p (Holm)"].value <= 1


def test_a_figure_is_compared_with_the_pooled_folds(make_run):
    folders = [
        make_run(
            f"fold{fold}",
            stages=("finetune",),
            test_each=(6, 6, 6),
            images_per_group=2,
            skill=0.8,
            seed=fold,
            split_seed=fold,
            config={"data.fold": fold, "data.folds": 3},
        )
        for fold in range(3)
    ]
    accuracy, area = build(folders, margin=0.05, against=("accuracy=0.6", "auroc=0.8"))[0]
    tables = [read_predictions(folder / "finetune" / "predictions-test.parquet").predictions for folder in folders]
    pooled = [np.concatenate([getattr(table, name) for table in tables]) for name in ("correct", "group")]
    expected = clustered_wilson(*pooled)
    assert len(pooled[0]) == 54
    assert get_difference(accuracy) == pytest.approx(
        [100 * (end - 0.6) for end in (expected.value, expected.low, expected.high)]
    )
    assert accuracy["model"] == "resnet50 finetune (pooled folds)"
    assert (area["decision"], area["difference"].reason) == (
        "can't be decided",
        "the probabilities of the models of different folds are not on one scale",
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--margin", "5"), ("--margin: found 5", "Did you mean 0.05?")),
        (("--margin", "0.05"), ("--margin: found a single model", "--against sensitivity=0.9")),
        (("--against", "sensitivity=0.9"), ("--against: has no effect without a margin", "--margin 0.05")),
        (("--margin", "0.05", "--against", "sensitivity=90"), ("Did you mean sensitivity=0.9?",)),
        (("--margin", "0.05", "--against", "sensitivty=0.9"), ('Did you mean "sensitivity"?',)),
        (("--margin", "0.05", "--against", "0.9"), ("expected NAME=VALUE", "sensitivity=135/150")),
        (("--margin", "0.05", "--against", "auroc=9/10"), ("an AUROC is no proportion",)),
        (("--margin", "0.05", "--against", "sensitivity=1/0"), ("expected NAME=VALUE",)),
        (("--margin", "0.05", "--reference", "nope"), ('--reference: found "nope", expected one of resnet50',)),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(make_run, words, parts):
    run = make_run(stages=("finetune",))
    with pytest.raises((PylorusError, SystemExit)) as caught:
        main(["report", str(run), *words])
    assert all(part in str(caught.value) for part in parts), caught.value
