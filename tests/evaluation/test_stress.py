"""The test of scores against chance, and paired differences of proportions."""

import numpy as np
import pytest

from pylorus.evaluation import Predictions, paired_differences
from pylorus.evaluation.comparison import difference_of_paired
from pylorus.evaluation.stress import chance_test


def test_scores_without_information_are_rarely_called_better_than_chance():
    generator = np.random.default_rng(0)
    patients = np.repeat(np.arange(30), 2)
    true = np.repeat(np.arange(30) % 3, 2)
    p_values = np.array(
        [
            chance_test(
                np.repeat(generator.standard_normal((30, 3)), 2, axis=0), true, patients, permutations=199
            ).p_value
            for _ in range(200)
        ]
    )
    assert (p_values <= 0.05).mean() == pytest.approx(0.05, abs=0.047)  # three standard errors
    assert p_values.mean() == pytest.approx(0.5, abs=0.062)


def test_copies_of_a_patients_images_add_no_evidence():
    generator = np.random.default_rng(1)
    true = np.arange(20) % 2
    scores = np.eye(2)[true] * 0.8 + generator.standard_normal((20, 2))
    once = chance_test(scores, true)
    often = chance_test(np.repeat(scores, 5, axis=0), np.repeat(true, 5), np.repeat(np.arange(20), 5))
    assert (once.area, once.p_value, once.units) == (often.area, often.p_value, often.units)


def test_the_class_that_is_told_apart_is_named():
    true = np.arange(60) % 3
    scores = np.zeros((60, 3))
    scores[:, 1] = true == 1
    test = chance_test(scores, true)
    assert (test.area, test.label) == (1.0, 1)
    assert test.p_value < 0.001


def test_scores_that_say_the_opposite_are_no_chance_either():
    true = np.arange(40) % 2
    test = chance_test(1 - np.eye(2)[true], true)
    assert test.area == 0
    assert test.p_value < 0.001


def test_a_patient_with_two_classes_exchanges_them_with_no_other_patient():
    patients, true = np.repeat(np.arange(3), 2), np.tile([0, 1], 3)
    test = chance_test(np.eye(2)[true], true, patients)
    assert test.smallest_p == pytest.approx(2 / 8)  # all three patients as they are, or all three the other way round
    assert test.p_value == pytest.approx(2 / 8, abs=0.01)


def test_one_class_has_no_test():
    test = chance_test(np.zeros((5, 2)), np.zeros(5, dtype=np.int64))
    assert np.isnan(test.area)
    assert test.smallest_p == 1


def test_the_paired_difference_is_that_of_two_models_accuracies():
    generator = np.random.default_rng(2)
    sample, group = np.arange(90).astype(str), np.repeat(np.arange(30), 3).astype(str)
    true = np.repeat(np.arange(30) % 2, 3)
    first, second = (
        Predictions(sample, group, true, np.eye(2)[np.where(generator.random(90) < share, true, 1 - true)], ("x", "y"))
        for share in (0.9, 0.7)
    )
    expected = paired_differences(first, second, seed=0, resamples=10).accuracy
    difference = difference_of_paired(first.correct, second.correct, group)
    assert difference.value == pytest.approx(expected.value)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high), abs=0.01)
    assert difference.p_value == pytest.approx(expected.p_value)
