import pytest

from pylorus.report.evidence import collect_evidence
from pylorus.report.results import ReportOptions
from pylorus.report.study_tables import STUDY

MODELS = {"VGG19": "vgg19.tv_in1k", "ResNet50": "resnet50.tv_in1k", "Inception-V3": "inception_v3.tv_in1k"}


@pytest.fixture(scope="module")
def study(make_shared_run):
    def made(published):
        confusions = {stage: STUDY.get_result(published, stage).counts for stage in ("pretrain", "finetune")}
        skill = 2.0 if published == "ResNet50" else 1.5
        return make_shared_run(published, model=MODELS[published], confusions=confusions, skill=skill)

    return collect_evidence([made(name) for name in MODELS], ReportOptions(resamples=200))


def test_by_the_studys_rule_resnet50_wins_without_significance(study):
    (winner,) = study.winners
    assert winner.rule == "By the study's criterion (highest test accuracy), resnet50 finetune ranks first with 90.9 %."
    assert winner.verdict == (
        "No significant difference in accuracy between resnet50 finetune and vgg19 finetune or inception_v3 finetune was "
        "found on this test set. These tests compare the models as trained, one run each; they do not account for "
        "variation between seeds."
    )


def test_a_clearly_better_winner_is_significant(make_run):
    good = make_run("good", confusions={"finetune": [[40, 0, 0], [0, 40, 0], [0, 0, 40]]}, stages=("finetune",))
    bad = make_run(
        "bad",
        model="vgg19.tv_in1k",
        confusions={"finetune": [[20, 20, 0], [0, 20, 20], [20, 0, 20]]},
        stages=("finetune",),
    )
    (winner,) = collect_evidence([good, bad], ReportOptions(resamples=200)).winners
    assert winner.verdict.startswith(
        "resnet50 finetune is significantly more accurate than vgg19 finetune on this test set."
    )


def test_the_winner_is_chosen_by_validation_even_if_test_prefers_another(make_run):
    lucky = make_run("lucky", skill=0.2, stages=("s",), confusions={"s": [[20, 0, 0], [0, 20, 0], [0, 0, 20]]})
    able = make_run(
        "able", model="vgg19.tv_in1k", skill=6.0, stages=("s",), confusions={"s": [[15, 5, 0], [0, 20, 0], [0, 0, 20]]}
    )
    (winner,) = collect_evidence([lucky, able], ReportOptions(resamples=200)).winners
    assert winner.best[0].label == "resnet50 s"
    assert winner.headline_result.label == "vgg19 s"
    assert "validation accuracy" in winner.choice


def test_tied_runs_are_both_named(make_run):
    same = {"s": [[18, 2, 0], [0, 18, 2], [2, 0, 18]]}
    paths = [
        make_run("a", stages=("s",), confusions=same),
        make_run("b", stages=("s",), confusions=same, model="vgg19.tv_in1k", seed=1),
    ]
    (winner,) = collect_evidence(paths, ReportOptions(resamples=200)).winners
    assert winner.rule == "By the study's criterion (highest test accuracy), resnet50 s and vgg19 s tie at 90.0 %."


def test_holm_corrects_within_a_question_and_no_pair_is_tested_twice(study):
    (winner,) = study.winners
    assert [comparison.family for comparison in winner.comparisons] == [2, 2]
    raw = sorted(comparison.images.p_value for comparison in winner.comparisons)
    corrected = sorted(comparison.corrected["accuracy"] for comparison in winner.comparisons)
    assert corrected[0] == pytest.approx(min(1.0, 2 * raw[0]))
    assert [comparison.family for comparison in winner.stages] == [1, 1, 1]
    # The other two models after finetune, and all three after pretrain.
    assert len(winner.others) == 4
    pairs = [frozenset((each.first, each.second)) for each in (*study.comparisons, *winner.others)]
    assert len(set(pairs)) == len(pairs) == 9


def test_a_winner_chosen_on_test_images_is_corrected_for_all_pairs(make_run):
    names = ("resnet50", "vgg19", "inception_v3")
    paths = [
        make_run(name, model=name, stages=("s",), config={"data.validation": "test"}, skill=1.0 + number / 4)
        for number, name in enumerate(names)
    ]
    (winner,) = collect_evidence(paths, ReportOptions(resamples=100)).winners
    assert [comparison.family for comparison in winner.comparisons] == [3, 3]
    assert "not selected independently" in winner.comparisons[0].question


def test_pairs_of_the_appendix_are_unadjusted_and_never_called_significant(make_run):
    perfect, poor = [[40, 0, 0], [0, 40, 0], [0, 0, 40]], [[20, 20, 0], [0, 20, 20], [20, 0, 20]]
    paths = [
        make_run("a", stages=("s",), confusions={"s": poor}, model="resnet50", skill=6.0),
        make_run("b", stages=("s",), confusions={"s": perfect}, model="vgg19"),
        make_run("c", stages=("s",), confusions={"s": poor}, model="inception_v3"),
    ]
    (winner,) = collect_evidence(paths, ReportOptions(resamples=100)).winners
    (other,) = winner.others
    assert {other.first.label, other.second.label} == {"vgg19 s", "inception_v3 s"}
    assert other.corrected["accuracy"] == other.images.p_value < 0.05
    assert not other.is_significant
    assert winner.verdict.startswith("vgg19 s is significantly more accurate than resnet50 s on this test set.")


def test_a_choice_validated_on_test_images_is_not_presented_as_validation(make_run):
    (winner,) = collect_evidence([make_run(config={"data.validation": "test"})], ReportOptions(resamples=100)).winners
    assert winner.choice.endswith("so this selection, too, was made on the test set.")
