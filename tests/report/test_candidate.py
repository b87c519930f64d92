"""A winner is a configuration: runs that differ in seed, fold or split alone are its replicates."""

import numpy as np
import pandas as pd
import pytest

from pylorus.report.candidate import FOLDS, SET, SPLITS
from pylorus.report.evidence import collect_evidence
from pylorus.report.page import write_report
from pylorus.report.result_figures import plot_roc_curves
from pylorus.report.results import ReportOptions
from pylorus.report.summary import build_summary

FAST = ReportOptions(resamples=50)
PERFECT = [[20, 0, 0], [0, 20, 0], [0, 0, 20]]
POOR = [[10, 10, 0], [0, 10, 10], [10, 0, 10]]
FAIR = [[17, 3, 0], [0, 17, 3], [3, 0, 17]]


def seeds(make_run, model, confusions, **story):
    return [
        make_run(
            f"{model}{seed}",
            model=model,
            stages=("s",),
            confusions={"s": confusion},
            seed=seed,
            config={"seed": seed, **story.get("config", {})},
            **{key: value for key, value in story.items() if key != "config"},
        )
        for seed, confusion in enumerate(confusions)
    ]


def test_seeds_of_a_configuration_are_one_candidate_without_a_seed_in_its_name(make_run):
    paths = [*seeds(make_run, "resnet50", [FAIR] * 3), *seeds(make_run, "vgg19", [POOR] * 3)]
    (winner,) = collect_evidence(paths, FAST).winners
    assert [(each.label, each.replicates, each.kind) for each in winner.pool.candidates] == [
        ("resnet50 s", 3, SET),
        ("vgg19 s", 3, SET),
    ]
    assert winner.pool.candidates[0].replicate_text == "3 seeds"


def test_a_single_lucky_seed_does_not_win(make_run):
    paths = [*seeds(make_run, "resnet50", [PERFECT, POOR, POOR]), *seeds(make_run, "vgg19", [FAIR] * 3)]
    (winner,) = collect_evidence(paths, FAST).winners
    assert [each.label for each in winner.leaders] == ["vgg19 s"]
    assert winner.rule == (
        "By the study's criterion (highest test accuracy, averaged over several runs), vgg19 s ranks first with 85.0 % (3 "
        "seeds: standard deviation 0.0 percentage points, range 85.0 to 85.0 %)."
    )


def test_variation_between_seeds_makes_a_difference_insignificant(make_run):
    certain = [*seeds(make_run, "resnet50", [FAIR] * 3), *seeds(make_run, "vgg19", [POOR] * 3)]
    (winner,) = collect_evidence(certain, FAST).winners
    assert "is significantly more accurate than" in winner.verdict
    assert "on this test set" in winner.verdict
    assert winner.verdict.endswith("These tests account for variation between patients and between seeds.")
    mixed = [PERFECT, FAIR, [[3, 17, 0], [0, 3, 17], [17, 0, 3]]]
    uncertain = [*seeds(make_run, "densenet121", mixed), *seeds(make_run, "convnext", [POOR] * 3)]
    (winner,) = collect_evidence(uncertain, FAST).winners
    (comparison,) = winner.comparisons
    assert comparison.accuracy.patients.p_value < comparison.accuracy.training.p_value
    assert comparison.corrected["accuracy"] == comparison.accuracy.training.p_value > 0.05


def test_a_single_run_is_not_significantly_better_than_widely_varying_seeds(make_run):
    paths = [make_run("one", stages=("s",), confusions={"s": PERFECT}), *seeds(make_run, "vgg19", [PERFECT, POOR])]
    (comparison,) = collect_evidence(paths, FAST).winners[0].comparisons
    assert comparison.accuracy.patients.p_value < 0.001
    assert not comparison.is_significant
    assert comparison.sentence.endswith(
        "allowing for patients and for the seeds of vgg19 s but not for those of resnet50 s)."
    )


@pytest.mark.parametrize(
    ("key", "value", "candidates"),
    [("trainer.devices", 2, 1), ("data.workers", 3, 1), ("logger.name", "wandb", 1), ("trainer.precision", "bf16", 2)],
)
def test_the_machine_does_not_define_a_configuration_but_precision_does(make_run, key, value, candidates):
    paths = [make_run("a", stages=("s",)), make_run("b", stages=("s",), seed=1, config={"seed": 1, key: value})]
    assert len(collect_evidence(paths, FAST).configurations) == candidates


def test_a_repeated_run_counts_once_and_the_page_states_it(make_run):
    evidence = collect_evidence([make_run("a", stages=("s",)), make_run("b", stages=("s",))], FAST)
    assert evidence.candidates[0].replicates == 1
    assert any("such runs count only once" in sentence for sentence in build_summary(evidence, kind="runs").warnings)


def test_an_unfinished_run_is_not_a_replicate(make_run):
    paths = [make_run(f"r{seed}", seed=seed, config={"seed": seed}) for seed in (0, 1)]
    paths.append(make_run("r2", seed=2, config={"seed": 2}, finished=1, state="failed"))
    evidence = collect_evidence(paths, FAST)
    (configuration,) = evidence.configurations
    assert (configuration.shipped.stage, configuration.shipped.replicates) == ("finetune", 2)
    assert [stage.replicates for stage in configuration.stages] == [3, 2]
    assert any(
        "not counted as a replicate of resnet50 finetune" in text
        for text in build_summary(evidence, kind="runs").warnings
    )


def test_the_table_of_replicates_gives_mean_deviation_and_range_of_the_runs(make_run, tmp_path, skip_rendering):
    paths = seeds(make_run, "resnet50", [FAIR, POOR, PERFECT])
    write_report(paths, tmp_path / "report", options=FAST)
    tables = tmp_path / "report" / "tables"
    runs = pd.read_csv(tables / "accuracy.csv")["test, %"]
    found = pd.read_csv(tables / "replicates.csv", na_values="–").set_index("index").loc["accuracy, %"]
    assert found["mean"] == pytest.approx(runs.mean())
    assert found["SD"] == pytest.approx(runs.std(), rel=1e-4)
    assert (found["lowest"], found["highest"]) == (runs.min(), runs.max())
    assert float(found["mean, low"]) < found["mean"] < float(found["mean, high"])


def test_the_mean_of_perfect_seeds_has_an_interval(make_run):
    (winner,) = collect_evidence(seeds(make_run, "resnet50", [PERFECT] * 3), FAST).winners
    accuracy = winner.leaders[0].accuracy
    assert accuracy.value == 1.0
    assert 0.9 < accuracy.low < 1.0


def test_the_run_of_median_validation_accuracy_is_named(make_run):
    paths = [
        make_run(f"r{seed}", stages=("s",), seed=seed, skill=skill, config={"seed": seed})
        for seed, skill in enumerate((0.2, 6.0, 2.0))
    ]
    evidence = collect_evidence(paths, FAST)
    (winner,) = evidence.winners
    assert winner.headline_result.run is evidence.runs[2]
    assert winner.choice.endswith(
        "Each of its 3 runs ships its own model; the run with the median validation accuracy is resnet50 (seed=2)."
    )


def test_a_figure_of_two_models_and_three_seeds_has_a_legend_of_two(make_run):
    paths = [*seeds(make_run, "resnet50", [FAIR] * 3), *seeds(make_run, "vgg19", [POOR] * 3)]
    drawing = plot_roc_curves(collect_evidence(paths, FAST).candidates)
    assert [text.get_text() for text in drawing.figure.legends[0].get_texts()] == ["resnet50 s", "vgg19 s"]
    lines = drawing.figure.axes[0].get_lines()
    assert len(lines) == 1 + 2 * (3 + 1)  # chance; of each model three runs and their mean
    assert len({line.get_color() for line in lines[1:5]}) == 1


def test_repeated_splits_of_the_same_images_are_compared_split_by_split(make_run):
    paths = [
        make_run(
            f"{model}{split}",
            model=model,
            stages=("s",),
            confusions={"s": confusion},
            split_seed=split,
            seed=split,
            config={"data.split_file": f"split{split}.csv"},
        )
        for model, confusion in (("resnet50", FAIR), ("vgg19", POOR))
        for split in range(3)
    ]
    tables = [pd.read_csv(path / "split.csv") for path in paths]
    for path, own in zip(paths, tables, strict=True):  # what one tests, the others train on
        others = [table.assign(split="train") for table in tables]
        pd.concat([own, *others]).drop_duplicates("sample_id").to_csv(path / "split.csv", index=False)
    (winner,) = collect_evidence(paths, FAST).winners
    assert [(each.label, each.replicate_text) for each in winner.pool.candidates] == [
        ("resnet50 s", "3 splits"),
        ("vgg19 s", "3 splits"),
    ]
    assert winner.pool.kind == SPLITS
    (comparison,) = winner.comparisons
    assert comparison.accuracy.training.value == pytest.approx(0.35)
    assert comparison.macro_f1.patients is None
    assert comparison.sentence.startswith("resnet50 s is ")


def test_pooled_folds_are_compared_by_patient_and_over_folds(make_run):
    paths = [
        make_run(
            f"{model}{fold}",
            model=model,
            stages=("s",),
            confusions={"s": confusion},
            split_seed=fold,
            images_per_group=2,
            config={"data.fold": fold, "data.folds": 3},
        )
        for model, confusion in (("resnet50", FAIR), ("vgg19", POOR))
        for fold in range(3)
    ]
    (winner,) = collect_evidence(paths, FAST).winners
    assert winner.pool.kind == FOLDS
    (comparison,) = winner.comparisons
    assert comparison.images.images == 180
    assert comparison.images.groups == 90
    assert comparison.accuracy.patients.p_value == comparison.images.p_value
    assert comparison.accuracy.training.value == pytest.approx(0.35)
    assert "overlapping training sets" in winner.verdict
    assert np.isclose(float(winner.leaders[0].exact_accuracy), 0.85)
