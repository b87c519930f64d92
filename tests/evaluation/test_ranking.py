import math
import time
import tracemalloc
from dataclasses import astuple

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from pylorus.evaluation.ranking import ranking_of, ranking_of_predictions, weighted_ranking


@pytest.mark.parametrize("seed", range(4))
def test_weighted_areas_and_precisions_are_those_of_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    positive = generator.random(80) < 0.3
    scores = np.round(generator.random(80) + 0.4 * positive, 1)  # many ties
    weights = generator.integers(0, 4, (6, 80)).astype(float)
    areas, precisions = weighted_ranking(ranking_of(positive, scores), weights)
    for row, area, precision in zip(weights, areas, precisions, strict=True):
        assert area == pytest.approx(roc_auc_score(positive, scores, sample_weight=row))
        assert precision == pytest.approx(average_precision_score(positive, scores, sample_weight=row))


def test_a_weight_is_as_many_copies_of_the_image():
    positive, scores = np.array([True, False, True, False]), np.array([0.9, 0.7, 0.4, 0.2])
    counts = np.array([2, 1, 3, 2])
    weighted = weighted_ranking(ranking_of(positive, scores), counts[None].astype(float))
    copied = weighted_ranking(
        ranking_of(np.repeat(positive, counts), np.repeat(scores, counts)), np.ones((1, counts.sum()))
    )
    np.testing.assert_allclose(weighted, copied)


def test_resamples_without_positives_or_negatives_are_undefined():
    ranking = ranking_of(np.array([True, False]), np.array([0.9, 0.1]))
    area, precision = weighted_ranking(ranking, np.array([[0.0, 2.0], [2.0, 0.0], [1.0, 1.0]]))
    assert np.isnan(area).tolist() == [True, True, False]
    assert np.isnan(precision).tolist() == [True, False, False]


def test_each_class_is_ranked_against_the_rest(said):
    model = said(images=150)
    found = ranking_of_predictions(model.true, model.probabilities, model.group, seed=0)
    for each in range(3):
        hit, score = model.true == each, model.probabilities[:, each]
        assert found.auroc[each].value == pytest.approx(roc_auc_score(hit, score))
        assert found.average_precision[each].value == pytest.approx(average_precision_score(hit, score))
        assert found.average_precision[each].low < found.average_precision[each].value
    expected = roc_auc_score(model.true, model.probabilities, multi_class="ovr")
    assert found.macro_auroc.value == pytest.approx(expected)
    assert found.macro_auroc.low < expected < found.macro_auroc.high


def test_bootstrap_and_delong_agree_on_the_interval_of_one_area():
    """With two classes both areas are the same, so the bootstrap of their mean is one of either."""
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(150), 3)
    true = generator.integers(0, 2, 150)[group]
    chance = 1 / (1 + np.exp(-(1.2 * true + 0.5 * generator.standard_normal(150)[group] + generator.normal(size=450))))
    found = ranking_of_predictions(true, np.column_stack([1 - chance, chance]), group, seed=0)
    exact, drawn = found.auroc[1], found.macro_auroc
    assert drawn.value == pytest.approx(exact.value)
    assert (drawn.low, drawn.high) == pytest.approx((exact.low, exact.high), abs=0.004)


def test_a_class_absent_from_test_is_undefined_and_so_are_the_averages(said):
    model = said(images=90)
    kept = model.true != 2
    found = ranking_of_predictions(model.true[kept], model.probabilities[kept], None, seed=0, resamples=50)
    assert math.isnan(found.auroc[2].value)
    assert math.isnan(found.average_precision[2].value)
    assert math.isnan(found.macro_auroc.value)
    assert found.auroc[0].has_interval


def test_a_single_image_is_undefined_throughout():
    found = ranking_of_predictions(np.array([0]), np.array([[0.9, 0.1]]), None, seed=0, resamples=10)
    assert all(math.isnan(area.value) for area in found.auroc)
    assert not found.average_precision[0].has_interval


def test_the_order_of_the_images_makes_no_difference(said):
    model = said(images=80, groups=30)
    order = np.random.default_rng(1).permutation(80)
    plain = ranking_of_predictions(model.true, model.probabilities, model.group, seed=3, resamples=100)
    shuffled = ranking_of_predictions(
        model.true[order], model.probabilities[order], model.group[order], seed=3, resamples=100
    )
    for one, other in zip(plain.average_precision, shuffled.average_precision, strict=True):
        assert astuple(one) == pytest.approx(astuple(other))


def test_labels_that_do_not_fit_are_refused(said):
    model = said(images=30)
    with pytest.raises(ValueError, match="29 true labels"):
        ranking_of_predictions(model.true[1:], model.probabilities, None, seed=0)


def test_ten_thousand_predictions_take_seconds_and_little_memory(said):
    model = said(images=10_000)
    tracemalloc.start()
    start = time.perf_counter()
    found = ranking_of_predictions(model.true, model.probabilities, model.group, seed=0, resamples=500)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.macro_auroc.has_interval
    assert seconds < 8  # a quarter of the 2,000 resamples that a report draws
    assert peak < 100 * 2**20
