"""`pylorus plan`: the numbers on the terminal and in its files, and what it says to input that it can't use."""

import csv
import json
from collections.abc import Callable

import pytest

from pylorus.cli import main
from pylorus.evaluation import plan_auroc, plan_auroc_test, plan_paired_auroc, plan_proportion

Plan = Callable[..., str]
TYPED = ("--sensitivity", "0.9", "--prevalence", "0.2")


@pytest.fixture
def plan(capsys) -> Plan:
    """Run `pylorus plan` and return what it prints, on one line."""

    def run(*words: object) -> str:
        main(["plan", *map(str, words)])
        text = capsys.readouterr().out
        assert max(len(line) for line in text.splitlines() if not line.startswith("plan: ")) <= 80
        return " ".join(text.split())

    return run


@pytest.fixture
def refuse(capsys) -> Plan:
    """Run `pylorus plan` on input that it refuses, and return the error."""

    def run(*words: object) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["plan", *map(str, words)])
        assert caught.value.code not in (None, 0)
        return " ".join(f"{caught.value.code} {capsys.readouterr().err}".split())

    return run


def read_rows(folder):
    with (folder / "plan.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sensitivity_needs_images_of_the_class_and_so_many_more_at_the_prevalence(plan):
    text = plan(*TYPED)
    assert "of the class of others images patients" in text
    assert f"139 556 {139 * 5} {139 * 5}" in text
    assert "Buderer" in text
    assert "20 % of the images are of the class" in text


def test_images_of_one_patient_multiply_the_images_by_the_design_effect(plan, tmp_path):
    plan(*TYPED, "--icc", 0.25, "--images-per-patient", 5, "--output", tmp_path / "new")
    (row,) = read_rows(tmp_path / "new")
    assert (row["independent_images"], row["design_effect"], row["class_images"]) == ("139", "2.0", "277")
    assert int(row["images"]) == 277 * 5
    assert int(row["patients"]) == 277


def test_several_figures_are_planned_together(plan, tmp_path):
    text = plan(*TYPED, "--specificity", 0.8, "--auroc", 0.9, "--output", tmp_path)
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert [size["images"] for size in saved["sizes"]] == [695, 308, plan_auroc(0.9, prevalence=0.2, width=0.1)]
    assert saved["images"] == saved["patients"] == 695
    assert "139 images of the class (139 patients) and 246 images of others (246 patients)" in text


def test_two_models_are_planned_without_a_prevalence(plan):
    assert "587 587" in plan("--disagreement", 0.08, 0.04)
    text = plan("--disagreement", 0.05, 0.05, "--margin", 0.05)
    assert "314 314" in text
    assert "one-sided at the level of 0.025" in text


def test_a_figure_is_compared_with_a_published_one(plan):
    assert "108 432 540" in plan(*TYPED, "--against", 0.8)
    assert "363 1,452 1,815" in plan(*TYPED, "--against", 0.9, "--margin", 0.05)


def test_an_auroc_is_compared_with_a_figure_and_with_that_of_another_model(plan, tmp_path):
    plan("--auroc", 0.9, "--prevalence", 0.3, "--against", 0.8, "--output", tmp_path)
    assert read_rows(tmp_path)[0]["images"] == str(plan_auroc_test(0.9, reference=0.8, prevalence=0.3))
    plan("--aurocs", 0.92, 0.88, "--correlation", 0.4, "--prevalence", 0.3, "--margin", 0.01, "--output", tmp_path)
    expected = plan_paired_auroc(0.92, 0.88, correlation=0.4, prevalence=0.3, margin=0.01)
    assert read_rows(tmp_path)[0]["images"] == str(expected)
    plan("--aurocs", 0.7, 0.5, "--correlation", 0, "--prevalence", 0.3, "--output", tmp_path)  # against a guess
    assert read_rows(tmp_path)[0]["images"] == str(plan_paired_auroc(0.7, 0.5, correlation=0, prevalence=0.3))


def test_calibration_adds_the_sizes_for_observed_expected_and_slope(plan, tmp_path):
    plan("--auroc", 0.8, "--prevalence", 0.3, "--calibration", "--output", tmp_path)
    assert [row["images"] for row in read_rows(tmp_path)] == ["359", "900", "2176"]


def test_the_plan_says_what_the_upper_limit_of_the_correlation_would_cost(plan, make_run, tmp_path):
    text = plan(make_run(images_per_group=3, test_each=(60, 60, 60), skill=1.0), *TYPED, "--output", tmp_path)
    (row,) = read_rows(tmp_path)
    assert float(row["icc_low"]) <= float(row["icc"]) < float(row["icc_high"])
    effect = 1 + 2 * float(row["icc_high"])
    assert int(row["images_at_high"]) == 5 * plan_proportion(0.9, width=0.1, effect=effect)
    assert f"recruit {int(row['images_at_high']):,} images of {int(row['patients_at_high']):,} patients" in text


def test_a_figure_near_1_is_not_rounded_to_it(plan):
    text = plan("--sensitivity", 0.9999, "--prevalence", 0.0001, "--auroc", 0.9999)
    assert "sensitivity 99.99 %" in text
    assert "AUROC 0.9999" in text
    assert "0.01 % of the images" in text


def test_the_folder_of_a_sweep_or_of_a_bundle_leads_to_its_run(refuse, make_run):
    run = make_run("sweep/0", images_per_group=2)
    assert f"Did you mean {run}?" in refuse(run.parent)
    assert f"Did you mean {run}?" in refuse(run / "model")


def test_a_pilot_gives_figures_prevalence_and_correlation(plan, make_run, tmp_path):
    pilot = make_run(images_per_group=2, test_each=(60, 60, 80), skill=1.0)
    text = plan(pilot, "--output", tmp_path / "new")
    assert "30 % of the images are of GC" in text
    assert "200 test images of 100 patients" in text
    rows = read_rows(tmp_path / "new")
    assert [row["aim"].split()[0] for row in rows] == ["sensitivity", "specificity", "AUROC"]
    for row in rows:
        expected = 1 + float(row["icc"])
        assert float(row["images_per_patient"]) == 2
        assert float(row["design_effect"]) == pytest.approx(expected)


def test_typed_options_replace_what_the_pilot_says(plan, make_run, tmp_path):
    pilot = make_run(images_per_group=2)
    plan(pilot, *TYPED, "--icc", 0, "--class", "gastric_ulcer", "--output", tmp_path / "new")
    (row,) = read_rows(tmp_path / "new")
    assert int(row["class_images"]) == plan_proportion(0.9, width=0.1)
    assert int(row["images"]) == 695


def test_two_runs_show_on_how_many_images_they_disagree(plan, make_run):
    better = [[55, 3, 2], [4, 50, 6], [1, 3, 56]]
    worse = [[45, 10, 5], [10, 40, 10], [5, 10, 45]]
    one, two = (
        make_run(name, images_per_group=2, confusions={"finetune": cells}, test_each=(60, 60, 60))
        for name, cells in (("one", better), ("two", worse))
    )
    text = plan(one, "--compare", two, "--output", one.parent / "new")
    assert read_rows(one.parent / "new")[0]["aim"] == "accuracy of two models, the pilot 17.2 points better, power 80 %"
    assert "The pilot is the only one that is correct on" in text


def test_a_pilot_of_one_image_a_patient_plans_for_one_image_a_patient(plan, refuse, make_run):
    pilot = make_run(config={"data.group": "x"})
    assert "139 556 695 695" in plan(pilot, *TYPED)
    assert "One image per patient" in plan(pilot, *TYPED)
    assert "each patient has one test image" in refuse(pilot, *TYPED, "--images-per-patient", 3)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("nothing to plan", "pylorus plan --sensitivity 0.9 --prevalence 0.2")),
        (("--sensitivity", 0.9), ("--prevalence: not given", "--prevalence 0.2")),
        (("--sensitivity", 90, "--prevalence", 0.2), ("--sensitivity: found 90", "between 0 and 1", "0.9?")),
        (("--sensitivity", 0.9, "--prevalence", 1.2), ("--prevalence: found 1.2", "between 0 and 1")),
        (("--sensitivity", 0.9, "--prevalence", -0.2), ("--prevalence: found -0.2",)),
        ((*TYPED, "--width", 1), ("--width: found 1", "between 0 and 1")),
        ((*TYPED, "--width", "nan"), ("--width: found nan",)),
        ((*TYPED, "--icc", 1.5, "--images-per-patient", 2), ("--icc: found 1.5",)),
        ((*TYPED, "--images-per-patient", 3), ("without --icc",)),
        ((*TYPED, "--icc", 0.3), ("--images-per-patient",)),
        ((*TYPED, "--images-per-patient", 0.5), ("expected at least 1",)),
        ((*TYPED, "--against", 0.8, "--margin", -0.05), ("--margin: found -0.05", "Did you mean 0.05?")),
        ((*TYPED, "--margin", 0.05), ("--margin: nothing to compare", "--against")),
        ((*TYPED, "--against", 0.8, "--auroc", 0.9), ("--against: expected one figure",)),
        ((*TYPED, "--power", 0.9), ("--power: nothing to compare", "--against")),
        (("--disagreement", 0.1, 0.05, "--width", 0.2), ("--width: nothing to measure with an interval",)),
        (("--disagreement", 8, 4), ("--disagreement: found 8 4", "Did you mean 0.08 0.04?")),
        ((*TYPED, "--correlation", 0.5), ("--correlation: nothing to compare by AUROC", "--aurocs")),
        (("--aurocs", 0.92, 0.88, "--prevalence", 0.2), ("Add --correlation",)),
        (("--aurocs", 0.92, "--prevalence", 0.2, "--correlation", 0.5), ("--aurocs: found 1 number, expected two",)),
        ((*TYPED, "--calibration"), ("--calibration:", "--auroc 0.9")),
        ((*TYPED, "--sensitivity", 1), ("--sensitivity: found 1", "such as 0.9")),
        ((*TYPED, "--against", 0.9), ("two figures that differ",)),
        ((*TYPED, "--against", 0.97, "--margin", 0.05), ("worse than 0.97",)),
        (("--disagreement", 0.1, 0.1), ("two fractions that differ",)),
        (("--disagreement", 0.8, 0.4), ("a sum in",)),
        (("--auroc", 0.4, "--prevalence", 0.2), ("--auroc: found 0.4", "between 0.5 and 1")),
        (("--aurocs", 0.5, 0.8, "--prevalence", 0.2), ("--aurocs: found 0.5", "between 0.5 and 1")),
        (("--compare", "x", *TYPED), ("needs a pilot run",)),
        (("nowhere",), ("nowhere: found no status.json", "finished run")),
    ],
)
def test_what_cannot_be_planned_is_refused_in_words(refuse, words, parts):
    error = refuse(*words)
    assert all(part in error for part in parts), error


def test_a_pilot_without_patients_is_refused_unless_their_images_are_described(refuse, plan, make_run):
    pilot = make_run()
    assert "not assigned to patients" in refuse(pilot)
    assert "--icc 0.3 --images-per-patient 3" in refuse(pilot)
    assert "ICC 0.30" in plan(pilot, *TYPED, "--icc", 0.3, "--images-per-patient", 3)


def test_a_pilot_that_has_not_finished_is_refused(refuse, make_run):
    error = refuse(make_run(state="interrupted", finished=1, images_per_group=2))
    assert "the run is interrupted, expected a finished one" in error
    assert "resume=" in error


def test_a_pilot_with_one_patient_of_the_class_is_refused_unless_patients_are_described(refuse, plan, make_run):
    pilot = make_run(images_per_group=2, test_each=(2, 20, 20))
    assert "only one patient has test images that count for sensitivity" in refuse(pilot, *TYPED)
    assert "ICC 0.30" in plan(pilot, *TYPED, "--icc", 0.3, "--images-per-patient", 3)


def test_an_unknown_class_is_refused(refuse, make_run):
    error = refuse(make_run(images_per_group=2), "--class", "gastric_cancr")
    assert 'found "gastric_cancr", expected one of GC, GU, CG' in error
    assert 'Did you mean "gastric_cancer"?' in error


def test_a_perfect_pilot_asks_for_the_figure_that_is_expected(refuse, make_run):
    cells = [[20, 0, 0], [0, 20, 0], [0, 0, 20]]
    error = refuse(make_run(images_per_group=2, confusions={"pretrain": cells, "finetune": cells}))
    assert "sensitivity: the pilot's is 1" in error
    assert "--sensitivity 0.95" in error


def test_a_second_run_on_other_images_is_refused(refuse, make_run):
    one, two = make_run("one", images_per_group=2), make_run("two", images_per_group=2, split_seed=1)
    assert "not for the same images" in refuse(one, "--compare", two)


def test_too_few_patients_and_errors_are_pointed_out(plan, make_run):
    text = plan("--sensitivity", 0.99, "--prevalence", 0.2, "--width", 0.2)
    assert "fewer than 10 independent ones are of the rarer outcome" in text
    assert "fewer than 30" in text.lower()
    assert "The pilot has only" in plan(make_run(images_per_group=5, test_each=(20, 20, 20)), *TYPED)
