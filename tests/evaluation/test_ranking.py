import math
import tracemalloc
from dataclasses import astuple

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from pylorus.evaluation.auroc import compute_mean_share_above
from pylorus.evaluation.ranking import average_precision, ranking_of_predictions


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
