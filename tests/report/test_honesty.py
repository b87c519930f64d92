"""Caveats that a report states without being asked."""

import pandas as pd
import pytest

from pylorus.report.captions import LEAKING, OPTIMISTIC, SYNTHETIC, collect_caveats, format_caveats
from pylorus.report.evidence import collect_evidence
from pylorus.report.page import build_sections, write_report
from pylorus.report.results import ReportOptions
from pylorus.report.summary import build_summary
from pylorus.runs.reading import read_run

FAST = ReportOptions(resamples=100)


@pytest.mark.parametrize(
    ("config", "mark"), [({"data.validation": "test"}, OPTIMISTIC), ({"data.kind": "synthetic"}, SYNTHETIC)]
)
def test_a_caveat_is_on_the_page_and_in_every_caption_of_results(make_run, config, mark, skip_rendering):
    run = make_run(config=config, stages=("s",))
    page = write_report([run], options=FAST)
    assert mark.meaning.replace("'", "&#39;") in page.read_text()
    tables = run / "report" / "tables"
    for path in tables.glob("*.md"):
        if path.stem not in ("environment", "checklist", "network-resnet50"):
            assert mark.word in path.read_text(), path.name
    results = pd.read_csv(tables / "accuracy.csv")
    assert results["basis"].str.contains(mark.word, regex=False).all()


def test_a_run_without_problems_has_no_caveat(make_run, skip_rendering):
    run = make_run()
    assert collect_caveats(read_run(run)) == ()
    text = write_report([run], options=FAST).read_text()
    assert OPTIMISTIC.word not in text
    assert SYNTHETIC.word not in text


def test_a_split_with_a_shared_image_is_marked_whatever_the_configuration(make_run):
    run = make_run()
    split = pd.read_csv(run / "split.csv")
    split.loc[split["split"] == "train", "sha256"] = split.loc[split["split"] == "test", "sha256"].iloc[0]
    split.to_csv(run / "split.csv", index=False)
    assert collect_caveats(read_run(run)) == (LEAKING,)


def test_in_a_mixed_report_a_caveat_names_its_runs(make_run):
    paths = [make_run("a"), make_run("b", model="vgg19.tv_in1k", config={"data.kind": "synthetic"})]
    runs = collect_evidence(paths, FAST).runs
    assert format_caveats(runs) == "SYNTHETIC IMAGES: no clinical meaning (vgg19)."


def test_each_stage_that_predicted_the_test_set_counts_as_an_evaluation(make_run):
    evidence = collect_evidence([make_run("a"), make_run("b", model="vgg19.tv_in1k", stages=("pretrain",))], FAST)
    (count,) = evidence.evaluation_counts
    assert (count.stages, count.epochs, count.other_stages) == (3, 0, 0)
    assert "was evaluated at least 3 times" in count.sentence


def test_epochs_validated_on_the_test_set_count_as_evaluations(make_run):
    (count,) = collect_evidence([make_run(config={"data.validation": "test"})], FAST).evaluation_counts
    assert (count.stages, count.epochs) == (2, 8)


def test_other_runs_in_the_folder_count_even_with_another_validation_split(make_run):
    run = make_run("outputs/2026-01-31/a")
    make_run("outputs/2026-01-30/b", seed=3, val_each=(5, 5, 5))
    make_run("multirun/2026-01-29/sweep/0", seed=4, finished=1)
    make_run("multirun/2026-01-29/sweep/1", seed=4, split_seed=9)
    (count,) = collect_evidence([run], FAST).evaluation_counts
    assert (count.stages, count.other_stages, count.other_runs) == (2, 3, 2)


def test_a_damaged_run_in_the_same_folder_does_not_stop_the_report(make_run):
    run = make_run("outputs/2026-01-31/a")
    other = make_run("outputs/2026-01-30/b")
    (other / "split.csv").write_bytes(b"\xff\xfe")
    (count,) = collect_evidence([run], FAST).evaluation_counts
    assert count.other_stages == 0


def test_different_test_sets_are_not_compared_and_the_page_explains(make_run, skip_rendering):
    paths = [make_run("a", stages=("s",)), make_run("b", stages=("s",), model="vgg19.tv_in1k", split_seed=1)]
    evidence = collect_evidence(paths, FAST)
    assert evidence.comparisons == ()
    assert len(evidence.tests) == 2
    said = " ".join(build_summary(evidence, kind="runs").warnings)
    assert "vgg19 and resnet50 are not compared in pairs: the two predictions are not for the same images" in said
    assert "2 different test sets, not to be compared" in str(build_sections(evidence))


def test_other_groups_on_the_same_images_are_not_compared_either(make_run):
    paths = [make_run("a", stages=("s",)), make_run("b", stages=("s",), images_per_group=2)]
    evidence = collect_evidence(paths, FAST)
    assert evidence.comparisons == ()
    assert "disagree on the groups" in " ".join(build_summary(evidence, kind="runs").warnings)


def test_without_groups_the_page_states_that_patients_are_unknown(make_run):
    found = build_summary(collect_evidence([make_run()], FAST), kind="run").findings
    assert any("data.group does not identify patients" in sentence for sentence in found)


def test_an_unfinished_run_is_named_with_its_state(make_run):
    evidence = collect_evidence([make_run(state="interrupted", finished=1)], FAST)
    warnings = build_summary(evidence, kind="run").warnings
    assert "resnet50 was interrupted (state: interrupted): 1 of 2 stages were tested." in warnings
