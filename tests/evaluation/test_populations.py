"""Other prevalences of the classes, calibration in the large, and the type I error of the test for subgroups."""

import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binom, chi2_contingency

from pylorus.evaluation import (
    Estimate,
    adjust_threshold,
    adjust_to_prevalence,
    estimate_prevalence,
    predictive_values,
    wilson,
)
from pylorus.evaluation.populations import calibration_in_the_large, subgroup_difference

EVEN = np.full(3, 1 / 3)
MEANS = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])


def draw_images(prevalence, *, patients, images_each, correlation, seed):
    """Draw images of patients whose true probabilities at even prevalence are known."""
    generator = np.random.default_rng(seed)
    group = np.repeat(np.arange(patients), images_each)
    true = np.repeat(generator.choice(3, patients, p=prevalence), images_each)
    own = np.repeat(generator.normal(size=(patients, 2)), images_each, axis=0)
    noise = math.sqrt(correlation) * own + math.sqrt(1 - correlation) * generator.normal(size=own.shape)
    density = np.exp(-(((MEANS[true] + noise)[:, np.newaxis] - MEANS) ** 2).sum(axis=-1) / 2)
    return true, density / density.sum(axis=1, keepdims=True), group


def test_corrected_probabilities_are_calibrated_at_the_other_site():
    target = np.array([0.05, 0.35, 0.6])
    true, probabilities, _ = draw_images(target, patients=20_000, images_each=1, correlation=0, seed=0)
    corrected = adjust_to_prevalence(probabilities, original=EVEN, target=target)
    assert corrected.sum(axis=1) == pytest.approx(1)
    assert corrected.mean(axis=0) == pytest.approx(np.bincount(true) / len(true), abs=0.01)
    assert abs(probabilities[:, 0].mean() - 0.05) > 0.05  # without correction it is far off


def test_correcting_back_gives_the_original_probabilities():
    _, probabilities, _ = draw_images(EVEN, patients=50, images_each=1, correlation=0, seed=1)
    target = np.array([0.1, 0.2, 0.7])
    there = adjust_to_prevalence(probabilities, original=EVEN, target=target)
    assert adjust_to_prevalence(there, original=target, target=EVEN) == pytest.approx(probabilities)


def test_an_adjusted_threshold_gives_the_same_answers():
    probabilities = np.random.default_rng(2).random(200)
    table = np.stack([probabilities, 1 - probabilities], axis=1)
    corrected = adjust_to_prevalence(table, original=[0.4, 0.6], target=[0.03, 0.97])[:, 0]
    threshold = adjust_threshold(0.37, original=0.4, target=0.03)
    assert np.array_equal(corrected >= threshold, probabilities >= 0.37)


@pytest.mark.parametrize(
    ("sensitivity", "specificity", "positive", "negative", "prevalence"),
    [(0.9, 0.9, 50, 50, 0.1), (0.95, 0.98, 30, 100, 0.02), (0.7, 0.6, 40, 40, 0.5)],
)
def test_intervals_of_predictive_values_cover_the_truth(sensitivity, specificity, positive, negative, prevalence):
    hits = sensitivity * prevalence
    false_alarms = (1 - specificity) * (1 - prevalence)
    misses, rejections = (1 - sensitivity) * prevalence, specificity * (1 - prevalence)
    truth = {"ppv": hits / (hits + false_alarms), "npv": rejections / (rejections + misses)}
    covered = dict.fromkeys(truth, 0.0)
    for detected, weight in enumerate(binom.pmf(np.arange(positive + 1), positive, sensitivity)):
        for rejected, other_weight in enumerate(binom.pmf(np.arange(negative + 1), negative, specificity)):
            if weight * other_weight < 1e-7:
                continue
            values = predictive_values(wilson(detected, positive), wilson(rejected, negative), prevalence=prevalence)
            for name, value in truth.items():
                estimate = getattr(values, name)
                covered[name] += weight * other_weight * (estimate.low <= value <= estimate.high)
    assert all(0.93 <= coverage <= 0.99 for coverage in covered.values()), covered


def test_predictive_values_of_a_perfect_test_keep_an_interval():
    values = predictive_values(wilson(20, 20), wilson(60, 60), prevalence=0.05)
    assert values.ppv.value == values.ppv.high == 1
    assert 0.2 < values.ppv.low < 0.8  # 60 images don't exclude a few false alarms among 95 healthy patients
    assert values.npv.low > 0.98


def test_predictive_values_without_an_interval_say_why():
    values = predictive_values(Estimate(0.9, math.nan, math.nan, reason="one patient"), wilson(9, 10), prevalence=0.1)
    assert values.ppv.value == pytest.approx(0.5)
    assert not values.ppv.has_interval
    assert values.ppv.reason == "one patient"
    never = predictive_values(wilson(0, 10), wilson(10, 10), prevalence=0.1)
    assert not never.ppv.defined
    assert "never gives this answer" in never.ppv.reason


@pytest.mark.slow
@pytest.mark.parametrize(("patients", "images_each", "correlation"), [(60, 1, 0), (30, 4, 0.3)])
def test_intervals_of_an_estimated_prevalence_cover_the_truth(patients, images_each, correlation):
    truth, covered = np.array([0.2, 0.5, 0.3]), 0
    for seed in range(50):
        _, probabilities, group = draw_images(
            truth, patients=patients, images_each=images_each, correlation=correlation, seed=seed
        )
        estimate = estimate_prevalence(probabilities, group, original=EVEN)
        assert sum(each.value for each in estimate.prevalence) == pytest.approx(1)
        covered += sum(each.low <= value <= each.high for each, value in zip(estimate.prevalence, truth, strict=True))
    assert 0.92 <= covered / 150 <= 0.985


def test_copies_of_an_image_in_a_patient_do_not_narrow_the_interval():
    _, probabilities, _ = draw_images([0.2, 0.5, 0.3], patients=60, images_each=1, correlation=0, seed=3)
    single = estimate_prevalence(probabilities, original=EVEN).prevalence[0]
    copied = estimate_prevalence(np.repeat(probabilities, 5, axis=0), np.repeat(np.arange(60), 5), original=EVEN)
    assert copied.prevalence[0].low == pytest.approx(single.low, abs=0.02)
    assert copied.prevalence[0].high == pytest.approx(single.high, abs=0.02)
    assert min(copied.design_effect) > 3


def test_a_class_that_does_not_occur_has_an_interval_from_zero():
    _, probabilities, _ = draw_images([0.0, 0.7, 0.3], patients=200, images_each=1, correlation=0, seed=4)
    estimate = estimate_prevalence(probabilities, original=EVEN).prevalence[0]
    assert estimate.low == 0
    assert 0.005 < estimate.high < 0.2


@pytest.mark.parametrize(
    ("probabilities", "groups", "reason"),
    [([[0.6, 0.4]] * 4, [0, 0, 0, 0], "one group"), ([[0.5, 0.5]] * 4, None, "can't be distinguished")],
)
def test_a_prevalence_without_an_interval_says_why(probabilities, groups, reason):
    groups = None if groups is None else np.array(groups)
    estimate = estimate_prevalence(np.array(probabilities), groups, original=[0.5, 0.5]).prevalence[0]
    assert not estimate.has_interval
    assert reason in estimate.reason


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adjust_to_prevalence(np.full((1, 3), 1 / 3), original=[0.5, 0.5], target=EVEN), "one value per class"),
        (lambda: adjust_to_prevalence(np.full((1, 3), 1 / 3), original=[0, 0.5, 0.5], target=EVEN), "above 0"),
        (lambda: adjust_to_prevalence(np.full((1, 3), 1 / 3), original=EVEN, target=[5, 15, 80]), "sum 1"),
        (lambda: adjust_to_prevalence(np.array([[1.0, 0.0]]), original=[0.5, 0.5], target=[0, 1]), "every class"),
        (lambda: adjust_threshold(0.5, original=0.5, target=1), r"in \(0, 1\)"),
        (lambda: adjust_threshold(50, original=0.5, target=0.1), r"in \[0, 1\]"),
        (lambda: predictive_values(wilson(9, 10), wilson(9, 10), prevalence=10), "a proportion"),
        (lambda: estimate_prevalence(np.full((1, 3), 1 / 3), original=EVEN, confidence=95), "0.95"),
    ],
)
def test_values_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_calibration_in_the_large_is_the_observed_share_less_the_mean_probability():
    found = calibration_in_the_large(np.array([True, True, False, False]), np.array([0.9, 0.7, 0.5, 0.3]))
    assert found.value == pytest.approx(0.5 - 0.6)
    assert -1 <= found.low < 0 < found.high <= 1


def test_images_of_one_patient_give_a_wider_interval_than_images_of_many():
    generator = np.random.default_rng(0)
    positive, probability = generator.random(60) < 0.4, np.full(60, 0.4)
    alone = calibration_in_the_large(positive, probability)
    grouped = calibration_in_the_large(np.repeat(positive[:10], 6), probability, np.repeat(np.arange(10), 6))
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)


def test_no_event_among_few_images_leaves_a_wide_calibration_interval():
    found = calibration_in_the_large(np.zeros(12, dtype=bool), np.full(12, 0.05))
    assert found.low < -0.05 < 0.05 < found.high


def test_one_patient_alone_gives_a_value_and_no_interval():
    found = calibration_in_the_large(np.array([True, False]), np.array([0.5, 0.5]), np.array(["p", "p"]))
    assert found.value == 0
    assert not found.has_interval


def test_probabilities_out_of_range_are_refused():
    with pytest.raises(ValueError, match="out of range"):
        calibration_in_the_large(np.array([True]), np.array([1.2]))


@pytest.mark.parametrize(("groups", "images", "shift"), [(20, 1, 0.0), (40, 5, 0.0), (30, 12, -2.0)])
def test_the_calibration_interval_covers_zero_for_calibrated_probabilities(groups, images, shift):
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        codes = np.repeat(np.arange(groups), generator.integers(1, images + 1, groups))
        latent = generator.normal(size=groups)[codes] + generator.normal(size=len(codes))
        probability = expit(shift + latent)
        found = calibration_in_the_large(generator.random(len(codes)) < probability, probability, codes)
        covered += found.low <= 0 <= found.high
    assert covered >= 0.93 * 300


def test_the_statistic_without_groups_is_that_of_the_chi_square_test_of_a_table():
    generator = np.random.default_rng(2)
    success, subgroup = generator.random(200) < 0.7, generator.integers(0, 3, 200)
    table = [[(success & (subgroup == part)).sum(), (~success & (subgroup == part)).sum()] for part in range(3)]
    expected = chi2_contingency(table, correction=False)
    found = subgroup_difference(success, subgroup)
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["one image", "patients of several images", "rare and uneven", "within patients"])
def test_the_type_1_error_is_five_percent(condition):
    generator = np.random.default_rng(3)
    sets, below = 600, 0
    for _ in range(sets):
        sizes = np.ones(40, dtype=int) if condition == "one image" else generator.integers(1, 7, 30)
        codes = np.repeat(np.arange(len(sizes)), sizes)
        skill = generator.normal(0, 0 if condition == "one image" else 1, len(sizes))
        success = generator.random(len(codes)) < expit(1 + skill[codes])
        share = [0.8, 0.15, 0.05] if condition == "rare and uneven" else [0.4, 0.3, 0.3]
        of_patient = generator.choice(3, size=len(sizes), p=share)
        subgroup = generator.choice(3, size=len(codes)) if condition == "within patients" else of_patient[codes]
        found = subgroup_difference(success, subgroup, codes, permutations=99)
        below += bool(found.p_value <= 0.05)
    assert 0.03 <= below / sets <= 0.07


def test_unequal_images_per_patient_keep_the_type_1_error():
    generator = np.random.default_rng(4)
    sets, below = 400, 0
    for _ in range(sets):
        site = np.repeat([0, 1], [30, 15])
        codes = np.repeat(np.arange(45), np.where(site == 0, 1, 8))
        success = generator.random(len(codes)) < expit(1 + generator.normal(size=45)[codes])
        below += bool(subgroup_difference(success, site[codes], codes, permutations=99).p_value <= 0.05)
    assert below / sets <= 0.08


def test_a_site_where_the_model_fails_is_significant():
    generator = np.random.default_rng(5)
    site = np.repeat(["A", "B", "C"], 40)
    success = generator.random(120) < np.where(site == "C", 0.5, 0.95)
    assert subgroup_difference(success, site, np.repeat(np.arange(60), 2)).p_value < 0.01


def test_a_failing_view_is_significant_although_each_patient_has_both_views():
    view = np.tile(["near", "far"], 30)
    success = view == "near"
    success[::10] = False
    assert subgroup_difference(success, view, np.repeat(np.arange(30), 2)).p_value < 0.01


def test_the_same_seed_gives_the_same_p():
    success, subgroup = np.arange(60) % 3 > 0, np.arange(60) % 4
    first, second = (subgroup_difference(success, subgroup, seed=7, permutations=199) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("success", "subgroup"), [([True] * 4, [0, 0, 1, 1]), ([False] * 4, [0, 0, 1, 1]), ([True, False], [0, 0])]
)
def test_p_is_undefined_if_nothing_can_differ(success, subgroup):
    assert math.isnan(subgroup_difference(np.array(success), np.array(subgroup)).p_value)
