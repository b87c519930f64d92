import math
import time
import tracemalloc
from dataclasses import astuple

import numpy as np
import pytest

from pylorus.evaluation.confusion import confusion_matrix, overall_indices
from pylorus.evaluation.index_intervals import OVERALL, indices_of_confusion, indices_of_predictions


def test_values_are_those_of_the_confusion_matrix(said):
    model = said(images=200)
    found = indices_of_predictions(model.true, model.predicted, model.group, classes=3, seed=0)
    expected = overall_indices(confusion_matrix(model.true, model.predicted, 3))
    for name in OVERALL:
        estimate = getattr(found, name)
        assert estimate.value == pytest.approx(float(getattr(expected, name)))
        assert estimate.low < estimate.value < estimate.high
        assert (estimate.groups, estimate.resamples, estimate.undefined) == (200, 2000, 0)


def test_the_order_of_the_images_makes_no_difference(said):
    model = said(images=90, groups=30)
    order = np.random.default_rng(1).permutation(90)
    plain = indices_of_predictions(model.true, model.predicted, model.group, classes=3, seed=3)
    shuffled = indices_of_predictions(model.true[order], model.predicted[order], model.group[order], classes=3, seed=3)
    assert astuple(plain) == astuple(shuffled)


def test_a_seed_gives_the_same_interval_and_another_seed_nearly_so(said):
    model = said(images=150)
    one, same, other = (
        indices_of_predictions(model.true, model.predicted, None, classes=3, seed=seed).macro_f1 for seed in (1, 1, 2)
    )
    assert one == same
    assert one != other
    assert other.low == pytest.approx(one.low, abs=0.01)


def test_images_of_few_patients_give_wider_intervals(said):
    model = said(images=300, groups=30)
    alone = indices_of_predictions(model.true, model.predicted, None, classes=3, seed=0).macro_f1
    grouped = indices_of_predictions(model.true, model.predicted, model.group, classes=3, seed=0).macro_f1
    assert grouped.value == alone.value
    assert grouped.high - grouped.low > 1.3 * (alone.high - alone.low)


def test_a_published_matrix_is_a_set_of_independent_images():
    confusion = np.array([[143, 7, 0], [11, 120, 19], [0, 4, 146]])
    true = np.repeat([0, 1, 2], 150)
    predicted = np.concatenate([np.repeat([0, 1, 2], row) for row in confusion])
    whole = indices_of_confusion(confusion, seed=0).macro_f1
    single = indices_of_predictions(true, predicted, None, classes=3, seed=0).macro_f1
    assert whole.value == pytest.approx(single.value)
    assert (whole.low, whole.high) == pytest.approx((single.low, single.high), abs=0.003)


def test_an_absent_class_leaves_averages_undefined_and_kappa_defined():
    true, predicted = np.repeat([0, 1], 20), np.repeat([0, 1, 0, 1], [15, 5, 4, 16])
    found = indices_of_predictions(true, predicted, None, classes=3, seed=0)
    assert math.isnan(found.macro_f1.value)
    assert math.isnan(found.f1[2].value)
    assert found.macro_f1.undefined == 2000
    assert found.cohen_kappa.has_interval


def test_a_class_of_two_images_is_absent_from_too_many_resamples_for_an_interval():
    true = np.repeat([0, 1, 2], [40, 40, 2])
    predicted = np.where(np.arange(82) % 7 == 0, (true + 1) % 2, true)
    found = indices_of_predictions(true, predicted, None, classes=3, seed=0).balanced_accuracy
    assert found.defined
    assert found.undefined > 100
    assert not found.has_interval


def test_a_single_image_has_no_interval():
    found = indices_of_predictions(np.array([0]), np.array([0]), None, classes=2, seed=0)
    assert not found.macro_f1.defined
    assert not found.macro_f1.has_interval
    assert found.f1[0].value == 1.0
    assert not found.f1[0].has_interval


@pytest.mark.parametrize("broken", [np.zeros((2, 2), dtype=int), np.ones((2, 2)), np.ones((3, 2, 2), dtype=int)])
def test_what_is_no_matrix_of_images_is_refused(broken):
    with pytest.raises(ValueError, match="confusion"):
        indices_of_confusion(broken, seed=0)


@pytest.mark.parametrize("groups", [None, 3000])
def test_ten_thousand_predictions_take_seconds_and_little_memory(groups):
    generator = np.random.default_rng(0)
    true = generator.integers(0, 3, 10_000)
    predicted = np.where(generator.random(10_000) < 0.9, true, generator.integers(0, 3, 10_000))
    names = None if groups is None else generator.integers(0, groups, 10_000)
    tracemalloc.start()
    start = time.perf_counter()
    found = indices_of_predictions(true, predicted, names, classes=3, seed=0, resamples=2000)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.macro_f1.has_interval
    assert seconds < 5
    assert peak < 100 * 2**20
