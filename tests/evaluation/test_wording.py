import math
from dataclasses import replace

import pytest

from pylorus.core.formatting import format_p_value, format_threshold
from pylorus.deploy.augmented import explain_gain
from pylorus.evaluation.comparison import Difference, McNemar
from pylorus.evaluation.decisions import SensitivityThreshold
from pylorus.evaluation.intervals import Estimate, decide_noninferiority
from pylorus.evaluation.wording import (
    format_better_sentence,
    format_gain_sentence,
    format_guarantee_sentence,
    format_paired_sentence,
    format_unpaired_sentence,
)

TEST = McNemar(images=450, groups=450, right_first=401, right_second=409, only_first=22, only_second=30, p_value=0.3317)
APART = Difference(value=-0.031, low=-0.05, high=-0.012, standard_error=0.01, p_value=0.0021)


def test_an_insignificant_difference_is_stated_with_the_better_model_first():
    assert format_better_sentence("VGG19", "ResNet50", TEST) == (
        "ResNet50 is not shown to be better than VGG19 on these 450 images (90.9 % vs. 89.1 %, p = 0.33)."
    )


def test_a_significant_difference_is_stated():
    assert format_better_sentence("VGG19", "ResNet50", replace(TEST, p_value=0.0004)) == (
        "ResNet50 is shown to be better than VGG19 on these 450 images (90.9 % vs. 89.1 %, p < 0.001)."
    )


def test_the_corrected_p_decides_and_names_its_family():
    sentence = format_better_sentence("VGG19", "ResNet50", replace(TEST, p_value=0.02), corrected_p=0.12, family=6)
    assert "is not shown to be better" in sentence
    assert "p = 0.12 after Holm's correction for 6 comparisons" in sentence
    with pytest.raises(ValueError, match="family is 1"):
        format_better_sentence("VGG19", "ResNet50", TEST, corrected_p=0.12)


def test_patients_are_named_where_they_have_several_images():
    assert "on these 1,200 images of 450 patients (" in format_better_sentence("A", "B", replace(TEST, images=1200))
    assert "of 450 lesions (" in format_better_sentence("A", "B", replace(TEST, images=1200), group_word="lesions")


def test_equal_accuracy_is_stated_without_a_winner():
    sentence = format_better_sentence("A", "B", replace(TEST, right_first=409, p_value=1.0))
    assert sentence == "A and B are correct equally often on these 450 images (90.9 % each, p = 1)."


def test_a_paired_index_is_reported_with_its_p_value():
    assert format_paired_sentence("A", "B", APART, index="macro F1", images=450) == (
        "A and B differ in macro F1 on these 450 images (−0.031, p = 0.0021)."
    )
    assert "are not shown to differ" in format_paired_sentence("A", "B", APART, index="MCC", images=450, level=0.001)


def test_an_unpaired_index_is_reported_with_its_interval():
    apart, overlapping = Estimate(0.05, 0.01, 0.09), Estimate(0.018, -0.022, 0.057)
    assert format_unpaired_sentence("A", "B", apart, index="accuracy", images=(200, 450)) == (
        "A and B differ in accuracy, on 200 and 450 different images (+0.050, 95 % interval +0.010 to +0.090)."
    )
    assert "not shown" in format_unpaired_sentence("A", "B", overlapping, index="accuracy", images=(200, 450))


def test_an_undefined_comparison_is_stated():
    nothing = Difference(math.nan, math.nan, math.nan, math.nan, math.nan)
    assert "can't be determined" in format_paired_sentence("A", "B", nothing, index="AUROC of GC", images=3)
    assert "can't be determined" in format_unpaired_sentence("A", "B", nothing, index="accuracy", images=(3, 450))


@pytest.mark.parametrize(
    ("p_value", "text"),
    [(0.5, "p = 0.50"), (0.049, "p = 0.049"), (0.0012, "p = 0.0012"), (0.0009, "p < 0.001"), (0.999, "p = 1")],
)
def test_p_is_printed_with_two_figures_and_never_as_zero(p_value, text):
    assert format_p_value(p_value) == text


@pytest.mark.parametrize(
    ("p_value", "text"),
    [
        (0.0496, "p = 0.0496"),
        (0.04996, "p = 0.04996"),
        (0.04999999, "p < 0.05"),
        (0.05, "p = 0.050"),
        (0.0504, "p = 0.050"),
    ],
)
def test_a_printed_p_value_is_consistent_with_the_significance_level(p_value, text):
    assert format_p_value(p_value) == text
    assert f"({p_value:+.3f}, {text})" in format_paired_sentence(
        "A", "B", Difference(p_value, 0, 0, 0, p_value), index="accuracy", images=9
    )


def test_p_values_near_another_level_get_more_digits():
    assert format_p_value(0.00996, level=0.01) == "p = 0.00996"
    assert format_p_value(0.00996) == "p = 0.0100"


@pytest.mark.parametrize("level", [0, 1, 5])
def test_a_level_outside_0_and_1_is_refused(level):
    with pytest.raises(ValueError, match="level"):
        format_better_sentence("A", "B", TEST, level=level)


KEPT = SensitivityThreshold(0.12349, 0.95, 0.9, 0.9539, 0.9621, images=80, patients=60, patients_needed=45)
FEW = SensitivityThreshold(0.03, 0.95, 0.9, 0.5819, 0.8736, images=34, patients=17, patients_needed=45)


def test_a_guarantee_states_its_patients_and_rounds_the_threshold_down():
    assert format_guarantee_sentence(KEPT, class_name="GC") == (
        "At the threshold of 0.1234 the true sensitivity for GC is at least 95 % with 90 % confidence, for patients like "
        "the 60 validation patients with GC."
    )
    assert format_guarantee_sentence(KEPT, class_name="GC", grouped=False).endswith(
        "for images like the 60 validation images with GC. The patients are unknown, so each image counts as one."
    )


def test_too_few_patients_are_stated_with_required_and_reached_values():
    sentence = format_guarantee_sentence(FEW, class_name="GC")
    assert "too small to guarantee a sensitivity of 95 % for GC with 90 % confidence" in sentence
    assert "there are 17 validation patients with GC, and 45 are needed" in sentence
    assert sentence.endswith("at least 87.3 % with 90 % confidence, and at least 95 % with 58.1 % confidence.")


def test_a_sensitivity_of_100_percent_is_never_guaranteed():
    sentence = format_guarantee_sentence(
        replace(FEW, sensitivity=1.0, confidence_reached=0.0, patients_needed=None, patients=1), class_name="GC"
    )
    assert "there is 1 validation patient with GC, and no number can guarantee that" in sentence
    assert sentence.endswith("at least 87.3 % with 90 % confidence.")


@pytest.mark.parametrize("threshold", [1.0, 0.99999, 0.5, 0.12345678, 1e-4, 3.0001e-7, 1e-300])
def test_the_printed_threshold_gives_the_same_positives(threshold):
    assert 0.999 * threshold <= float(format_threshold(threshold)) <= threshold


@pytest.mark.parametrize("rounding", [2e-18, -2e-18, 1e-13])
def test_an_end_of_an_interval_that_is_zero_but_for_rounding_shows_no_gain(rounding):
    unclear, better = Estimate(0.02, rounding, 0.04), Estimate(-0.02, -0.03, -0.01)
    sentence = format_gain_sentence(unclear, unclear, better, better, against="one model", images=120)
    assert sentence.endswith("Averaging is shown to improve the Brier score and the log loss.")
    assert not decide_noninferiority(unclear, margin=0.05).superior
    gain = {
        name: {"difference": {"value": 0.02, "low": rounding, "high": 0.04}}
        for name in ("accuracy", "brier", "log_loss")
    }
    assert explain_gain({"figures": gain}).startswith("No gain is shown")
