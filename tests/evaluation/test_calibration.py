"""Calibration: temperature, Brier score, calibration line and reliability curve."""

import math

import numpy as np
import pytest
from scipy import special
from sklearn.metrics import brier_score_loss, log_loss

from pylorus.evaluation.calibration import (
    calibration_line,
    calibration_scores,
    estimate_calibration,
    fit_temperature,
    probabilities_of_logits,
    reliability_curve,
)


def simulate(*, images=20_000, temperature=1.0, seed=0):
    """Simulate logits and true classes with a known temperature."""
    generator = np.random.default_rng(seed)
    logits = 3 * generator.standard_normal((images, 3))
    chance = special.softmax(logits / temperature, axis=1)
    true = (chance.cumsum(axis=1) < generator.random((images, 1))).sum(axis=1)
    return logits, np.minimum(true, 2)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_true_temperature_is_recovered(temperature):
    fit = fit_temperature(*simulate(temperature=temperature))
    assert fit.identified
    assert fit.temperature == pytest.approx(temperature, rel=0.05)
    assert fit.nll_after <= fit.nll_before
    assert fit.images == 20_000


def test_the_fit_is_the_best_on_a_fine_grid():
    logits, true = simulate(images=300, temperature=2.0)
    fit = fit_temperature(logits, true)
    grid = np.geomspace(0.5, 8, 200)
    losses = [log_loss(true, probabilities_of_logits(logits, temperature=t)) for t in grid]
    assert fit.temperature == pytest.approx(grid[np.argmin(losses)], rel=0.02)
    assert fit.nll_after == pytest.approx(min(losses), abs=1e-4)
    assert fit.nll_after <= min(losses)
    assert fit.nll_before == pytest.approx(log_loss(true, probabilities_of_logits(logits)))


def test_the_temperature_improves_calibration_of_other_images():
    fit = fit_temperature(*simulate(images=1000, temperature=2.5, seed=1))
    logits, true = simulate(images=5000, temperature=2.5, seed=2)
    before = calibration_scores(probabilities_of_logits(logits), true)
    after = calibration_scores(probabilities_of_logits(logits, temperature=fit.temperature), true)
    assert after.ece < before.ece / 3
    assert after.brier < before.brier
    assert after.nll < before.nll


@pytest.mark.parametrize(
    ("logits", "true"),
    [
        (np.eye(3)[[0, 1, 2, 0]] * 5, np.array([0, 1, 2, 0])),  # never mistaken: ever surer looks ever better
        (np.eye(2)[[0, 1]], np.array([1, 0])),  # always mistaken: ever less sure looks ever better
        (np.zeros((4, 3)), np.array([0, 1, 2, 0])),  # says nothing at any temperature
        (np.array([[900.0, 0.0]]), np.array([0])),  # so sure that the loss is exactly 0
    ],
)
def test_without_an_optimal_temperature_logits_stay_unchanged_with_a_note(logits, true):
    fit = fit_temperature(logits, true)
    assert (fit.identified, fit.temperature) == (False, 1.0)
    assert fit.nll_after == fit.nll_before


def test_a_temperature_never_changes_the_predicted_class():
    logits, _ = simulate(images=500)
    for temperature in (0.1, 1.0, 10.0):
        chance = probabilities_of_logits(logits, temperature=temperature)
        assert (chance.argmax(axis=1) == logits.argmax(axis=1)).all()


def test_scores_are_those_of_scikit_learn():
    logits, true = simulate(images=400)
    chance = probabilities_of_logits(logits)
    found = calibration_scores(chance, true)
    assert found.nll == pytest.approx(log_loss(true, chance))
    classwise = [brier_score_loss(true == each, chance[:, each]) for each in range(3)]
    assert found.brier == pytest.approx(sum(classwise))


def test_confident_correct_predictions_score_zero_and_confident_errors_worst():
    chance = np.eye(3)[[0, 1]]
    right = calibration_scores(chance, np.array([0, 1]))
    wrong = calibration_scores(chance, np.array([1, 0]))
    assert (right.ece, right.brier, right.nll) == (0.0, 0.0, 0.0)
    assert (wrong.ece, wrong.brier, wrong.nll) == (1.0, 2.0, math.inf)


def test_arguments_of_different_lengths_or_invalid_values_are_refused():
    with pytest.raises(ValueError, match="1 true labels and 2 rows"):
        fit_temperature(np.zeros((2, 2)), np.array([0]))
    with pytest.raises(ValueError, match="nan"):
        fit_temperature(np.array([[np.nan, 0.0]]), np.array([0]))
    with pytest.raises(ValueError, match="temperature is 0"):
        probabilities_of_logits(np.zeros((1, 2)), temperature=0)
    with pytest.raises(ValueError, match="sum to"):
        calibration_scores(np.array([[2.0, 1.0]]) / 2, np.array([0]))


def test_scores_of_an_errorless_model_have_wide_upper_limits():
    sure = np.tile([0.999, 0.001], (60, 1))
    found = estimate_calibration(sure, np.zeros(60, dtype=int))
    mistakes = 0.06  # what 60 of 60 right leave open
    assert found.brier.high > 1.9 * mistakes
    assert found.nll.high > 0.95 * mistakes * -np.log(0.001)


def test_equal_losses_have_an_interval_independent_of_rounding():
    for images in (10, 20, 50, 100):
        found = estimate_calibration(np.tile([0.8, 0.2], (images, 1)), np.zeros(images, dtype=int)).brier
        assert found.low < 0.5 * found.value
        assert found.high > 1.5 * found.value


@pytest.mark.parametrize(
    "probability",
    [
        np.repeat([0.9, 0.1], [15, 85]),  # two values, of which one holds all of the class
        np.concatenate([np.linspace(0.6, 0.99, 10), [0.6], np.linspace(0.01, 0.5, 89)]),
        np.concatenate([np.linspace(0.01, 0.4, 10), np.linspace(0.5, 0.99, 90)]),
    ],
)
def test_a_probability_that_separates_the_class_has_no_slope_and_says_why(probability):
    line = calibration_line(np.arange(100) < 10, probability)
    assert not line.slope.defined
    assert "separates" in line.slope.reason
    assert line.intercept.has_interval


@pytest.mark.parametrize(("spread", "is_flat"), [(0.0, True), (0.02, True), (0.3, False)])
def test_a_slope_is_not_interpreted_if_all_images_have_nearly_the_same_probability(spread, is_flat):
    probability = 0.33 + spread * np.linspace(-1, 1, 100)
    assert calibration_line(np.arange(100) % 3 == 0, probability).is_flat == is_flat


def test_probabilities_of_0_and_1_have_no_calibration_intercept():
    probability = np.concatenate([np.ones(9), [0.0, 1.0], np.zeros(89)])
    assert "too close to 0 and 1" in calibration_line(np.arange(100) < 10, probability).intercept.reason


def sure_of(certainty):
    return np.column_stack([certainty, 1 - np.asarray(certainty)])


def test_bins_contain_equal_numbers_of_images(simulate_predictions):
    model = simulate_predictions(images=100)
    curve = reliability_curve(model.probabilities, model.true, bins=10)
    assert curve.images.tolist() == [10] * 10
    assert (np.diff(curve.certainty) > 0).all()
    assert sum(share.successes for share in curve.accuracy) == model.correct.sum()


def test_ece_is_the_mean_distance_of_accuracy_and_confidence(simulate_predictions):
    model = simulate_predictions(images=97)
    curve = reliability_curve(model.probabilities, model.true, bins=7)
    accuracy = np.array([share.value for share in curve.accuracy])
    assert curve.ece == pytest.approx((np.abs(accuracy - curve.certainty) * curve.images).sum() / 97)


def test_equal_confidences_share_a_bin_so_image_order_does_not_matter():
    generator = np.random.default_rng(0)
    chance = sure_of(generator.choice([0.6, 0.9, 1.0], 60))
    true = generator.integers(0, 2, 60)
    order = generator.permutation(60)
    plain, shuffled = reliability_curve(chance, true), reliability_curve(chance[order], true[order])
    assert len(plain.images) <= 3
    assert plain.ece == pytest.approx(shuffled.ece)
    assert plain.accuracy == shuffled.accuracy


def test_calibrated_probabilities_have_a_small_error():
    generator = np.random.default_rng(0)
    certainty = generator.uniform(0.5, 1, 50_000)
    true = (generator.random(50_000) > certainty).astype(int)
    assert reliability_curve(sure_of(certainty), true).ece < 0.01


def test_fewer_images_than_bins_give_a_bin_an_image():
    curve = reliability_curve(sure_of([0.6, 0.8]), np.array([0, 1]), bins=10)
    assert curve.images.tolist() == [1, 1]
    assert curve.ece == pytest.approx((0.4 + 0.8) / 2)


def test_a_patient_with_many_images_widens_the_intervals():
    chance, true = sure_of(np.full(40, 0.8)), np.arange(40) % 5 // 4
    alone = reliability_curve(chance, true).accuracy[0]
    grouped = reliability_curve(chance, np.sort(true), np.repeat(np.arange(8), 5)).accuracy[0]
    assert grouped.value == alone.value
    assert grouped.high - grouped.low > alone.high - alone.low


@pytest.mark.parametrize(("true", "bins", "message"), [([0], 10, "1 true labels"), ([0, 1], 0, "bins is 0")])
def test_a_reliability_curve_refuses_invalid_arguments(true, bins, message):
    with pytest.raises(ValueError, match=message):
        reliability_curve(sure_of([0.6, 0.8]), np.array(true), bins=bins)
