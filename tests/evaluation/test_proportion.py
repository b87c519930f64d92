import math

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from pylorus.evaluation.index_intervals import (
    clustered_wilson,
    proportions_of_confusion,
    proportions_of_predictions,
    wilson,
)


@pytest.mark.parametrize(("successes", "total"), [(0, 1), (1, 1), (0, 30), (30, 30), (7, 30), (409, 450)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_the_wilson_interval_is_that_of_statsmodels(successes, total, confidence):
    share = wilson(successes, total, confidence=confidence)
    low, high = proportion_confint(successes, total, alpha=1 - confidence, method="wilson")
    assert (share.low, share.high) == pytest.approx((low, high), abs=1e-12)
    assert 0 <= share.low <= share.value <= share.high <= 1
    assert (share.successes, share.total) == (successes, total)


def test_nothing_out_of_nothing_is_undefined_not_zero():
    share = wilson(0, 0)
    assert math.isnan(share.value)
    assert not share.defined
    assert not share.has_interval
    assert share.total == 0


@pytest.mark.parametrize(("successes", "total"), [(-1, 5), (6, 5), (0, -1)])
def test_more_successes_than_images_are_refused(successes, total):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, total)


@pytest.mark.parametrize("confidence", [0, 1, 95, math.nan])
def test_a_confidence_that_is_no_share_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, confidence=confidence)


def test_one_image_a_patient_gives_the_plain_interval_to_the_last_digit():
    success = np.random.default_rng(0).random(80) < 0.8
    names = np.random.default_rng(1).permutation(80)
    assert clustered_wilson(success, names) == wilson(int(success.sum()), 80)
    assert clustered_wilson(success, None) == wilson(int(success.sum()), 80)


def test_copies_of_each_image_add_no_certainty():
    success = np.random.default_rng(2).random(60) < 0.8
    alone = clustered_wilson(success, np.arange(60))
    tenfold = clustered_wilson(np.repeat(success, 10), np.repeat(np.arange(60), 10))
    assert tenfold.value == alone.value
    assert tenfold.low <= alone.low
    assert tenfold.high >= alone.high
    assert tenfold.high - tenfold.low < 1.1 * (alone.high - alone.low)


def test_all_right_in_groups_counts_the_groups_not_the_images():
    share = clustered_wilson(np.ones(100, dtype=bool), np.repeat(np.arange(10), 10))
    assert share.value == share.high == 1.0
    assert share.low <= wilson(10, 10).low


def test_many_images_of_one_patient_tell_no_more_than_one():
    share = clustered_wilson(np.array([True] * 9 + [False]), np.zeros(10, dtype=int))
    assert share.high - share.low > 0.6


def test_the_order_of_the_images_and_the_names_of_the_groups_make_no_difference():
    generator = np.random.default_rng(3)
    success, groups = generator.random(90) < 0.7, generator.integers(0, 30, 90)
    order = generator.permutation(90)
    renamed = np.array([f"p{number}" for number in 1000 - groups])
    shuffled, plain = clustered_wilson(success[order], renamed[order]), clustered_wilson(success, groups)
    assert (shuffled.value, shuffled.low, shuffled.high) == pytest.approx((plain.value, plain.low, plain.high))


def test_shares_of_a_class_without_images_or_answers_are_undefined():
    shares = proportions_of_predictions(np.array([0, 0, 1]), np.array([0, 1, 1]), None, classes=3)
    assert math.isnan(shares.sensitivity[2].value)
    assert math.isnan(shares.precision[2].value)
    assert shares.specificity[2].value == 1.0
    assert shares.accuracy.successes == 2


def test_a_matrix_gives_what_its_images_one_by_one_give():
    confusion = np.array([[5, 1, 0], [2, 7, 1], [0, 0, 4]])
    true = np.repeat([0, 1, 2], confusion.sum(axis=1))
    predicted = np.concatenate([np.repeat([0, 1, 2], row) for row in confusion])
    assert proportions_of_confusion(confusion) == proportions_of_predictions(true, predicted, None, classes=3)


@pytest.mark.parametrize("broken", [np.ones((2, 2)), np.ones((2, 3), dtype=int), np.zeros((2, 2), dtype=int)])
def test_what_is_no_matrix_of_images_is_refused(broken):
    with pytest.raises(ValueError, match=r"confusion|no true labels"):
        proportions_of_confusion(broken)


def test_three_wrong_single_images_among_large_patients_do_not_look_certain():
    """45 patients of one image, 5 of 30: what is wrong lies with small patients, but large ones might be."""
    patients = np.concatenate([np.arange(45), np.repeat(np.arange(45, 50), 30)])
    right = np.ones(195, dtype=bool)
    right[:3] = False
    found, plain = clustered_wilson(right, patients), clustered_wilson(right, None)
    assert found.low < plain.low - 0.05


def test_large_and_small_patients_are_covered_together():
    """Where one patient in ten has 30 images, a share of 90 % is held by at least 90 of 100 intervals."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(400):
        sizes = np.where(generator.random(50) < 0.9, 1, 30)
        chance = np.repeat(generator.beta(0.9 * 2 / 3, 0.1 * 2 / 3, 50), sizes)  # intraclass correlation 0.6
        found = clustered_wilson(generator.random(len(chance)) < chance, np.repeat(np.arange(50), sizes))
        held += found.low <= 0.9 <= found.high
    assert held / 400 >= 0.92


def test_an_undefined_share_says_why():
    shares = proportions_of_predictions(np.array([0, 0, 1]), np.array([0, 1, 1]), None, classes=3)
    assert shares.sensitivity[2].reason == "no image is of the class"
    assert shares.precision[2].reason == "the class is never predicted"
    assert shares.accuracy.reason == ""
