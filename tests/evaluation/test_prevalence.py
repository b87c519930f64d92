"""Probabilities, thresholds and predictive values at another prevalence."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from pylorus.evaluation import (
    Estimate,
    adjust_threshold,
    adjust_to_prevalence,
    estimate_prevalence,
    predictive_values,
    wilson,
)

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
    for seed in range(100):
        _, probabilities, group = draw_images(
            truth, patients=patients, images_each=images_each, correlation=correlation, seed=seed
        )
        estimate = estimate_prevalence(probabilities, group, original=EVEN)
        assert sum(each.value for each in estimate.prevalence) == pytest.approx(1)
        covered += sum(each.low <= value <= each.high for each, value in zip(estimate.prevalence, truth, strict=True))
    assert 0.92 <= covered / 300 <= 0.985


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
