import pytest

from pylorus.evaluation.comparison import difference_of_independent
from pylorus.evaluation.index_intervals import wilson
from pylorus.report.evidence import collect_evidence
from pylorus.report.page import write_report
from pylorus.report.results import ReportOptions
from pylorus.report.study_tables import STUDY, build_published_comparison_table, compare_with_published

FAST = ReportOptions(published=True, resamples=100)


def test_a_result_is_compared_with_the_published_one_of_its_model_and_stage(make_run):
    evidence = collect_evidence([make_run(model="inception_v3.tf_in1k")], FAST)
    found = compare_with_published(evidence.results)
    assert [(each.theirs.model, each.theirs.stage) for each in found] == [
        ("Inception-V3", "pretrain"),
        ("Inception-V3", "finetune"),
    ]


def test_a_model_not_in_the_study_is_compared_with_its_winner(make_run):
    evidence = collect_evidence([make_run(model="convnext_tiny.fb_in1k", stages=("finetune",))], FAST)
    (found,) = compare_with_published(evidence.results)
    assert (found.theirs.model, found.theirs.stage) == ("ResNet50", "finetune")


def test_the_difference_is_unpaired_with_newcombes_interval(make_run):
    evidence = collect_evidence(
        [make_run(stages=("finetune",), confusions={"finetune": STUDY.get_result("VGG19", "finetune").counts})], FAST
    )
    found = compare_with_published(evidence.results)
    row = build_published_comparison_table(found).rows[0]
    expected = difference_of_independent(wilson(401, 450), wilson(409, 450))
    assert row.cells[2] == "accuracy"
    assert (row.cells[5].value, *row.cells[5].interval) == pytest.approx(
        (100 * expected.value, 100 * expected.low, 100 * expected.high)
    )
    assert found[0].sentence.startswith(
        "resnet50 finetune and the published ResNet50 finetune are not shown to differ in accuracy, on 450 and 450 "
    )


def test_classes_are_matched_by_name_in_whatever_order(make_run):
    evidence = collect_evidence([make_run(names=("CG", "GC", "GU"), stages=("finetune",))], FAST)
    (found,) = compare_with_published(evidence.results)
    ours = {name: ours for name, ours, _ in found.indices}
    shares = evidence.results[0].images.shares
    assert ours["sensitivity of CG"] == shares.sensitivity[0]
    assert ours["sensitivity of GC"] == shares.sensitivity[1]


def test_classes_that_differ_from_the_study_are_not_compared(make_run, skip_rendering):
    run = make_run(names=("polyp", "normal"), test_each=(9, 9), val_each=(9, 9))
    text = write_report([run], options=FAST).read_text()
    assert "differ from those of the study, so the results cannot be compared" in text
    assert not (run / "report" / "tables" / "published-comparison.csv").exists()
    assert (run / "report" / "tables" / "published-resnet50.csv").exists()
