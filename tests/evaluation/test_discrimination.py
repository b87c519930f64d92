"""Discrimination: areas under the ROC curve, their covariance, and average precision."""

import math
import tracemalloc
from dataclasses import astuple

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from pylorus.evaluation.discrimination import (
    auroc,
    average_precision,
    compute_area_covariance,
    compute_mean_share_above,
    compute_structural_components,
    ranking_of_predictions,
)
from pylorus.evaluation.intervals import compute_satterthwaite_freedom


def brute_force(positive, scores, groups):
    """Obuchowski's estimate, pair by pair and group by group, as her paper writes it."""
    above = [
        np.array([[1.0 if p > n else 0.5 if p == n else 0.0 for n in score[~positive]] for p in score[positive]])
        for score in scores
    ]
    areas = [matrix.mean() for matrix in above]
    m, n = above[0].shape
    names = sorted(set(groups))
    hold_positive, hold_negative = set(groups[positive]), set(groups[~positive])
    sums = []
    for matrix, area in zip(above, areas, strict=True):
        up = {g: (matrix.mean(axis=1) - area)[groups[positive] == g].sum() for g in names}
        down = {g: (matrix.mean(axis=0) - area)[groups[~positive] == g].sum() for g in names}
        sums.append((up, down))
    result = np.zeros((len(scores), len(scores)))
    for r, (up_r, down_r) in enumerate(sums):
        for s, (up_s, down_s) in enumerate(sums):
            k, j, i = len(hold_positive), len(hold_negative), len(names)
            s10 = k / ((k - 1) * m) * sum(up_r[g] * up_s[g] for g in hold_positive)
            s01 = j / ((j - 1) * n) * sum(down_r[g] * down_s[g] for g in hold_negative)
            s11 = i / (i - 1) * sum(up_r[g] * down_s[g] for g in names)
            s11_turned = i / (i - 1) * sum(up_s[g] * down_r[g] for g in names)
            result[r, s] = s10 / m + s01 / n + (s11 + s11_turned) / (m * n)
    return np.array(areas), result


@pytest.mark.parametrize(
    ("score", "area", "error"),
    [("albumin", 0.7366, 0.0927), ("K-G score", 0.7258, 0.1028), ("protein", 0.6478, 0.1000)],
)
def test_areas_and_standard_errors_of_the_published_example_are_found(delong_1988, score, area, error):
    found = auroc(delong_1988["helped"], delong_1988[score])
    assert found.value == pytest.approx(area, abs=5e-5)
    assert found.standard_error == pytest.approx(error, abs=5e-5)
    assert (found.positives, found.negatives) == (31, 12)


def test_the_joint_test_of_the_published_example_is_found(delong_1988):
    """Chi-square 2.5340 with 2 degrees of freedom, p = 0.2817: it needs every covariance."""
    scores = [delong_1988[name] for name in ("albumin", "K-G score", "protein")]
    parts = compute_structural_components(delong_1988["helped"], scores, None)
    contrasts = np.array([[1, -1, 0], [0, -1, 1]])
    apart = contrasts @ parts.areas
    statistic = apart @ np.linalg.solve(contrasts @ compute_area_covariance(parts) @ contrasts.T, apart)
    assert statistic == pytest.approx(2.5340, abs=5e-5)
    assert stats.chi2.sf(statistic, 2) == pytest.approx(0.2817, abs=5e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("clustered", [False, True])
def test_variance_and_covariance_agree_with_pair_by_pair_counting(seed, clustered):
    generator = np.random.default_rng(seed)
    positive = generator.random(40) < 0.4
    scores = [generator.integers(0, 8, 40) + 3.0 * positive for _ in range(2)]
    groups = generator.integers(0, 15, 40) if clustered else np.arange(40)
    parts = compute_structural_components(positive, scores, groups)
    areas, expected = brute_force(positive, scores, groups)
    np.testing.assert_allclose(parts.areas, areas)
    np.testing.assert_allclose(compute_area_covariance(parts), expected)


@pytest.mark.parametrize("seed", range(4))
def test_the_area_is_that_of_scikit_learn_with_ties(seed):
    generator = np.random.default_rng(seed)
    positive = generator.random(60) < 0.3
    scores = generator.integers(0, 6, 60) + 2.0 * positive
    assert auroc(positive, scores).value == pytest.approx(roc_auc_score(positive, scores))


def test_negating_the_score_mirrors_auroc_and_interval(delong_1988):
    helped, albumin = delong_1988["helped"], delong_1988["albumin"]
    found, turned = auroc(helped, albumin), auroc(helped, -albumin)
    assert turned.value == pytest.approx(1 - found.value)
    assert (turned.low, turned.high) == pytest.approx((1 - found.high, 1 - found.low))


def test_a_monotonic_transform_of_the_score_changes_nothing(delong_1988):
    helped, albumin = delong_1988["helped"], delong_1988["albumin"]
    assert auroc(helped, np.exp(albumin)) == auroc(helped, albumin)


def test_copies_of_images_do_not_narrow_the_interval(delong_1988):
    helped, albumin = delong_1988["helped"], delong_1988["albumin"]
    alone = auroc(helped, albumin, np.arange(43))
    copied = auroc(np.repeat(helped, 5), np.repeat(albumin, 5), np.repeat(np.arange(43), 5))
    assert copied.standard_error == pytest.approx(alone.standard_error)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))


@pytest.mark.parametrize("positive", [np.ones(5, dtype=bool), np.zeros(5, dtype=bool)])
def test_without_positives_or_negatives_the_area_is_undefined(positive):
    found = auroc(positive, np.arange(5.0))
    assert math.isnan(found.value)
    assert not found.has_interval


def test_perfect_ranking_has_an_interval_that_narrows_with_the_number_of_groups():
    few = auroc(np.repeat([True, False], 10), np.arange(20.0)[::-1])
    many = auroc(np.repeat([True, False], 100), np.arange(200.0)[::-1])
    grouped = auroc(np.repeat([True, False], 100), np.arange(200.0)[::-1], np.repeat(np.arange(20), 10))
    assert few.value == few.high == 1.0
    assert few.low < many.low < 1.0
    assert grouped.low == pytest.approx(few.low)
    wrong = auroc(np.repeat([True, False], 10), np.arange(20.0))
    assert (wrong.low, wrong.high) == pytest.approx((0.0, 1 - few.low))


def test_one_positive_and_one_negative_give_an_uninformative_interval():
    found = auroc(np.array([True, False]), np.array([0.9, 0.1]))
    quantile = stats.norm.isf(0.025)
    assert found.low == pytest.approx(1 / (1 + quantile**2), abs=1e-6)


def test_the_same_score_for_all_images_has_a_wide_interval():
    found = auroc(np.array([True, True, False, False]), np.full(4, 0.3))
    assert found.value == 0.5
    assert found.low < 0.2
    assert found.high > 0.8


def test_one_patient_with_all_positives_counts_as_one_positive():
    scores = np.array([4.0, 3.5, 2, 3, 1, 0.5, 0.2, 0.1])
    positive, patients = np.arange(8) < 3, np.array([0, 0, 0, 1, 2, 3, 4, 5])
    found = auroc(positive, scores, patients)
    alone = auroc(positive, scores)
    assert found.value == alone.value
    assert found.low < alone.low < found.value
    assert found.has_interval


def test_few_positive_patients_give_a_wider_interval_than_many():
    generator = np.random.default_rng(0)
    patients = np.repeat(np.arange(100), 5)
    ease = 0.7 * generator.standard_normal(100)[patients] + 0.7 * generator.standard_normal(500)
    widths = []
    for positives in (4, 50):
        positive = patients < positives
        found = auroc(positive, ease + 1.5 * positive, patients)
        widths.append(found.high - found.low)
    assert widths[0] > 2 * widths[1]


def test_variance_from_few_groups_has_few_degrees_of_freedom():
    assert compute_satterthwaite_freedom(np.array([1.0, 1.0, *np.zeros(500)])) == pytest.approx(4, rel=0.01)
    normal = np.random.default_rng(0).standard_normal(20_000)
    assert compute_satterthwaite_freedom(normal) == pytest.approx(20_000, rel=0.1)
    assert compute_satterthwaite_freedom(np.ones(10)) == 9


def test_scores_with_nan_are_refused():
    with pytest.raises(ValueError, match="score of image 1 is nan"):
        auroc(np.array([True, False]), np.array([0.5, np.nan]))


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_scikit_learn_with_ties(seed):
    generator = np.random.default_rng(seed)
    positive = generator.random(80) < 0.3
    scores = np.round(generator.random(80) + 0.4 * positive, 1)
    assert average_precision(positive, scores).value == pytest.approx(average_precision_score(positive, scores))


@pytest.mark.parametrize("seed", range(3))
def test_contributions_are_the_slopes_of_scikit_learns_weighted_precision(seed):
    generator = np.random.default_rng(seed)
    positive = generator.random(40) < 0.4
    scores = np.round(generator.random(40) + 0.4 * positive, 1)
    found = compute_mean_share_above(positive, positive, scores)
    for image in range(40):
        more, less = np.ones(40), np.ones(40)
        more[image], less[image] = 1 + 1e-5, 1 - 1e-5
        slope = average_precision_score(positive, scores, sample_weight=more)
        slope -= average_precision_score(positive, scores, sample_weight=less)
        assert found.contributions[image] == pytest.approx(slope / 2e-5, abs=1e-7)
    assert found.contributions.sum() == pytest.approx(0, abs=1e-12)


def test_each_class_is_ranked_against_the_rest(simulate_predictions):
    model = simulate_predictions(images=150)
    found = ranking_of_predictions(model.true, model.probabilities, model.group)
    for each in range(3):
        hit, score = model.true == each, model.probabilities[:, each]
        assert found.auroc[each].value == pytest.approx(roc_auc_score(hit, score))
        assert found.average_precision[each].value == pytest.approx(average_precision_score(hit, score))
        assert found.average_precision[each].low < found.average_precision[each].value
    expected = roc_auc_score(model.true, model.probabilities, multi_class="ovr")
    assert found.macro_auroc.value == pytest.approx(expected)
    assert found.macro_auroc.low < expected < found.macro_auroc.high


def test_the_mean_area_of_two_classes_has_the_interval_of_either():
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(150), 3)
    true = generator.integers(0, 2, 150)[group]
    chance = 1 / (1 + np.exp(-(1.2 * true + 0.5 * generator.standard_normal(150)[group] + generator.normal(size=450))))
    found = ranking_of_predictions(true, np.column_stack([1 - chance, chance]), group)
    assert astuple(found.macro_auroc)[:3] == pytest.approx(astuple(found.auroc[1])[:3], abs=1e-6)


def test_a_perfect_ranking_has_an_interval(simulate_predictions):
    true = np.arange(60) % 3
    found = ranking_of_predictions(true, np.eye(3)[true], None)
    for estimate in (found.macro_auroc, found.macro_average_precision, found.average_precision[0]):
        assert estimate.value == estimate.high == 1.0
        assert 0.5 < estimate.low < 1.0


def test_one_positive_patient_counts_as_one_however_many_images_it_has():
    scores = np.linspace(1, 0, 60)
    positive = np.isin(np.arange(60), [0, 1, 3, 5])
    patients = np.where(positive, 0, np.arange(60))
    found, alone = average_precision(positive, scores, patients), average_precision(positive, scores)
    assert found.value == alone.value
    assert found.low < alone.low


def test_a_class_absent_from_test_is_undefined_and_so_are_the_averages(simulate_predictions):
    model = simulate_predictions(images=90)
    kept = model.true != 2
    found = ranking_of_predictions(model.true[kept], model.probabilities[kept], None)
    assert math.isnan(found.auroc[2].value)
    assert math.isnan(found.average_precision[2].value)
    assert math.isnan(found.macro_auroc.value)
    assert found.auroc[2].reason == found.average_precision[2].reason == "no image is of the class"
    assert found.auroc[0].has_interval


def test_a_single_image_is_undefined_or_uninformative():
    found = ranking_of_predictions(np.array([0]), np.array([[0.9, 0.1]]), None)
    assert all(math.isnan(area.value) for area in found.auroc)
    assert found.average_precision[0].high - found.average_precision[0].low > 0.7


def test_the_order_of_the_images_makes_no_difference(simulate_predictions):
    model = simulate_predictions(images=80, groups=30)
    order = np.random.default_rng(1).permutation(80)
    plain = ranking_of_predictions(model.true, model.probabilities, model.group)
    shuffled = ranking_of_predictions(model.true[order], model.probabilities[order], model.group[order])
    for one, other in zip(plain.average_precision, shuffled.average_precision, strict=True):
        assert astuple(one)[:3] == pytest.approx(astuple(other)[:3])


def test_labels_that_do_not_fit_are_refused(simulate_predictions):
    model = simulate_predictions(images=30)
    with pytest.raises(ValueError, match="29 true labels"):
        ranking_of_predictions(model.true[1:], model.probabilities, None)


def test_ten_thousand_predictions_take_little_memory(simulate_predictions):
    model = simulate_predictions(images=10_000)
    tracemalloc.start()
    found = ranking_of_predictions(model.true, model.probabilities, model.group)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.macro_auroc.has_interval
    assert peak < 100 * 2**20
