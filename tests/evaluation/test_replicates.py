"""Seeds and folds: a statement about a configuration allows for variation between runs, not only between patients."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from pylorus.evaluation.comparison import mcnemar, sign_flip_test
from pylorus.evaluation.predictions import Predictions
from pylorus.evaluation.replicates import (
    average_log_probabilities,
    compare_replicates,
    compute_replicate_balance,
    compute_replicate_indices,
    corrected_resampled_t,
    estimate_averaging_gain,
    estimate_replicates,
    summarize_replicates,
)


def test_mean_standard_deviation_and_range_equal_numpys():
    values = np.array([0.81, 0.84, 0.90])
    found = summarize_replicates(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.deviation == pytest.approx(values.std(ddof=1))
    assert (found.lowest, found.highest, found.replicates) == (0.81, 0.90, 3)


def test_an_index_that_one_replicate_leaves_undefined_has_no_mean():
    assert np.isnan(summarize_replicates(np.array([0.8, np.nan])).mean)


def test_the_sign_flip_test_counts_every_pattern_of_signs():
    balance = np.array([3, -1, 2, 2, 0, 5])
    sums = [abs(np.dot(signs, balance)) for signs in product((-1, 1), repeat=len(balance))]
    assert sign_flip_test(balance) == pytest.approx(np.mean(np.array(sums) >= abs(balance.sum())))


def test_with_one_run_each_the_sign_flip_test_is_mcnemars_by_patient():
    generator = np.random.default_rng(0)
    truth, groups = generator.integers(0, 2, 60), np.repeat(np.arange(20), 3).astype(str)
    names = np.array([f"i{number}" for number in range(60)])
    one, two = (np.where(generator.random(60) < 0.75, truth, 1 - truth) for _ in range(2))
    first, second = (Predictions(names, groups, truth, np.eye(2)[each], ("x", "y")) for each in (one, two))
    balance = compute_replicate_balance(one == truth, two == truth, groups)
    assert sign_flip_test(balance) == pytest.approx(mcnemar(first, second).p_value)


def test_many_groups_are_tested_by_the_normal_distribution_and_agree_with_the_exact_test(monkeypatch):
    balance = np.random.default_rng(1).integers(-3, 4, 400)
    exact = sign_flip_test(balance)
    monkeypatch.setattr("pylorus.evaluation.comparison.EXACT_STEPS", 10)
    assert sign_flip_test(balance) == pytest.approx(exact, abs=0.005)


def test_nadeau_and_bengios_interval_is_their_formula():
    values = np.array([0.03, 0.01, 0.06, -0.02, 0.04])
    found = corrected_resampled_t(values, test_to_train=0.25)
    error = np.sqrt((1 / 5 + 0.25) * values.var(ddof=1))
    assert found.standard_error == pytest.approx(error)
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, 4) * error)
    assert found.p_value == pytest.approx(2 * stats.t.sf(values.mean() / error, 4))


def test_the_interval_of_folds_stays_inside_its_scale():
    found = corrected_resampled_t(np.array([1.0, 0.2, 0.9]), test_to_train=0.5, bounds=(0.0, 1.0))
    assert (found.low, found.high) == (0.0, 1.0)


def test_a_single_fold_has_no_interval():
    assert np.isnan(corrected_resampled_t(np.array([0.1]), test_to_train=0.25).low)


def test_identical_seeds_leave_only_the_variance_of_patients():
    covariance = np.full((6, 6), 4e-4)
    covariance[:3, 3:] = covariance[3:, :3] = 1e-4
    found = compare_replicates(np.full(3, 0.9), np.full(3, 0.8), covariance, degrees=40)
    assert found.standard_error == pytest.approx(np.sqrt(6e-4))


def test_varying_seeds_widen_the_interval_only_if_requested():
    covariance = np.full((6, 6), 4e-4)
    covariance[:3, 3:] = covariance[3:, :3] = 1e-4
    ours, theirs = np.array([0.85, 0.90, 0.95]), np.array([0.75, 0.80, 0.85])
    wide = compare_replicates(ours, theirs, covariance, degrees=40)
    narrow = compare_replicates(ours, theirs, covariance, degrees=40, allow_for_seeds=False)
    assert wide.value == pytest.approx(narrow.value) == pytest.approx(0.1)
    assert wide.low < narrow.low
    assert (wide.allows_for_training, narrow.allows_for_training) == (True, False)
    # The same runs after two stages: what they have in common cancels.
    paired = compare_replicates(ours, theirs, covariance, degrees=40, paired=True)
    assert paired.high - paired.low < wide.high - wide.low


def test_with_single_runs_seeds_are_not_allowed_for_and_with_one_single_run_those_of_the_other_are():
    single = compare_replicates(np.array([0.9]), np.array([0.8]), np.diag([4e-4] * 2), degrees=9)
    assert not single.allows_for_training
    found = compare_replicates(np.array([0.9]), np.array([0.95, 0.65]), np.diag([4e-4] * 3), degrees=9)
    assert found.allows_for_training
    assert found.standard_error > np.sqrt(np.var([0.95, 0.65], ddof=1) / 2)


def test_the_mean_of_seeds_is_as_uncertain_as_its_patients_and_seeds_together():
    values = np.array([0.8, 0.9, 0.85])
    found = estimate_replicates(values, np.full((3, 3), 4e-4), degrees=1e6)
    error = np.sqrt(4e-4 + values.var(ddof=1) / 3)
    assert found.high - found.value > stats.norm.ppf(0.975) * error


def test_indices_of_replicates_are_those_of_each_one_alone():
    generator = np.random.default_rng(2)
    truth, groups = generator.integers(0, 3, 90), np.repeat(np.arange(30), 3)
    answers = np.array([np.where(generator.random(90) < 0.7, truth, (truth + 1) % 3) for _ in range(3)])
    together = compute_replicate_indices(truth, answers, groups, classes=3)
    for number, row in enumerate(answers):
        alone = compute_replicate_indices(truth, row, groups, classes=3)
        np.testing.assert_allclose(together.values[number], alone.values[0])
        np.testing.assert_allclose(together.covariance[:, number, number], alone.covariance[:, 0, 0])


def test_equal_configurations_with_varying_seeds_rarely_differ_significantly():
    generator = np.random.default_rng(3)
    groups = np.repeat(np.arange(100), 2)
    truth = (groups % 2).astype(np.int64)
    by_patients, by_both = [], []
    for _ in range(300):
        ease = generator.normal(0, 1, 100)[groups]
        skill = 1.5 + generator.normal(0, 0.4, 6)  # each seed of either configuration
        right = generator.random((6, 200)) < 1 / (1 + np.exp(-(skill[:, None] + ease)))
        by_patients.append(sign_flip_test(compute_replicate_balance(right[:3], right[3:], groups)))
        found = compute_replicate_indices(truth, np.where(right, truth, 1 - truth), groups, classes=2)
        contrast = np.repeat([1 / 3, -1 / 3], 3)
        values, degrees = found.values[:, 0], found.count_freedom(0, contrast)
        by_both.append(compare_replicates(values[:3], values[3:], found.covariance[0], degrees=degrees).p_value)
    assert np.mean(np.array(by_patients) < 0.05) > 0.15
    assert np.mean(np.array(by_both) < 0.05) < 0.09


def draw_models(*, models=3, patients=40, images_each=3, seed=0):
    """Probabilities of some models for images of patients, their true classes and patients."""
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(patients), images_each)
    true = generator.integers(3, size=len(groups))
    logits = 1.2 * np.eye(3)[true] + generator.normal(size=(models, len(groups), 3))
    return np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True), true, groups


def test_the_average_of_votes_is_the_mean_probability_of_those_who_vote():
    tables, _, _ = draw_models()
    votes = np.random.default_rng(1).random(tables.shape[:2]) < 0.5
    votes[0] |= ~votes.any(axis=0)
    mean = (tables * votes[..., None]).sum(axis=0) / votes.sum(axis=0)[:, None]
    np.testing.assert_allclose(np.exp(average_log_probabilities(np.log(tables), votes)), mean)
    tiny = np.full((2, 1, 2), -2000.0)
    assert np.isfinite(average_log_probabilities(tiny, np.ones((2, 1), dtype=bool))).all()
    with pytest.raises(ValueError, match="no votes"):
        average_log_probabilities(tiny, np.zeros((2, 1), dtype=bool))


def test_the_gain_of_averaging_equals_numpys_and_its_interval_keeps_patients_together():
    tables, true, groups = draw_models()
    votes, average, rows = np.ones(tables.shape[:2], dtype=bool), tables.mean(axis=0), np.arange(len(true))
    gain = estimate_averaging_gain(average, tables, votes, true, groups)
    correct = tables.argmax(axis=2) == true
    accuracies = (average.argmax(axis=1) == true) - correct.mean(axis=0)
    assert gain.accuracy.value == pytest.approx(accuracies.mean())
    by_class = [accuracies[true == label].mean() for label in range(3)]
    assert gain.balanced_accuracy.value == pytest.approx(np.mean(by_class))
    brier = [((table - np.eye(3)[true]) ** 2).sum(axis=1).mean() for table in (average, *tables)]
    assert gain.brier.value == pytest.approx(brier[0] - np.mean(brier[1:]))
    losses = [-np.log(table[rows, true]).mean() for table in (average, *tables)]
    assert gain.log_loss.value == pytest.approx(losses[0] - np.mean(losses[1:]))
    assert gain.brier.high < 0, "the mean of probabilities is never worse than the mean of its parts"
    # The same images five times, as further images of the same patients, say nothing new.
    copies = np.tile(np.arange(len(true)), 5)
    repeated = estimate_averaging_gain(
        average[copies], tables[:, copies], votes[:, copies], true[copies], groups[copies]
    )
    assert repeated.accuracy.low == pytest.approx(gain.accuracy.low)
    alone = estimate_averaging_gain(average, tables[[1]], votes[[1]], true, groups)
    assert alone.accuracy.value == pytest.approx((average.argmax(axis=1) == true).mean() - correct[1].mean())


def test_a_gain_that_can_not_vary_has_no_interval():
    tables, true, groups = draw_models(models=1)
    nothing = estimate_averaging_gain(tables[0], tables, np.ones((1, len(true)), dtype=bool), true, groups)
    assert nothing.accuracy.value == 0
    assert not nothing.accuracy.has_interval
    assert nothing.brier.reason == "the two do not differ on any image"
