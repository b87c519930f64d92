import math

import numpy as np
import pytest

from pylorus.evaluation.decision import operating_point, threshold_at_sensitivity
from pylorus.evaluation.proportion import wilson


@pytest.mark.parametrize("sensitivity", [0.5, 0.8, 0.9, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("positives", [1, 3, 20, 100, 147])
def test_the_threshold_reaches_the_sensitivity_and_no_higher_one_would(sensitivity, positives):
    generator = np.random.default_rng(positives)
    positive = np.repeat([True, False], [positives, 200])
    scores = generator.random(positives + 200) + 0.5 * positive
    threshold = threshold_at_sensitivity(positive, scores, sensitivity=sensitivity)
    assert np.mean(scores[positive] >= threshold) >= sensitivity - 1e-12
    assert np.mean(scores[positive] > threshold) < sensitivity


def test_nineteen_of_twenty_are_asked_for_at_95_percent_not_twenty():
    scores = np.arange(20.0)
    assert threshold_at_sensitivity(np.ones(20, dtype=bool), scores, sensitivity=0.95) == 1.0


def test_ties_at_the_threshold_are_all_called_positive():
    positive = np.array([True, True, True, False])
    scores = np.array([0.9, 0.4, 0.4, 0.4])
    threshold = threshold_at_sensitivity(positive, scores, sensitivity=0.6)
    point = operating_point(positive, scores, threshold=threshold)
    assert (point.sensitivity.successes, point.specificity.successes) == (3, 0)


def test_a_threshold_fixed_on_validation_is_applied_untouched_to_test():
    generator = np.random.default_rng(0)
    positive = generator.random(4000) < 0.3
    scores = generator.standard_normal(4000) + 2 * positive
    threshold = threshold_at_sensitivity(positive[:2000], scores[:2000], sensitivity=0.95)
    point = operating_point(positive[2000:], scores[2000:], threshold=threshold)
    assert point.threshold == threshold
    assert point.sensitivity.low < 0.95 < point.sensitivity.high
    called = scores[2000:] >= threshold
    assert point.sensitivity == wilson(int((called & positive[2000:]).sum()), int(positive[2000:].sum()))
    assert point.specificity == wilson(int((~called & ~positive[2000:]).sum()), int((~positive[2000:]).sum()))
    assert point.precision.total == called.sum()
    assert point.npv.total == (~called).sum()


def test_several_images_a_patient_widen_the_intervals():
    generator = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), 4)
    positive = (np.arange(60) % 2 == 0)[groups]
    scores = positive + 1.5 * generator.standard_normal(60)[groups]
    alone = operating_point(positive, scores, threshold=0.2).sensitivity
    grouped = operating_point(positive, scores, groups, threshold=0.2).sensitivity
    assert grouped.value == alone.value
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)


def test_a_class_absent_from_test_has_no_sensitivity_there():
    point = operating_point(np.zeros(5, dtype=bool), np.arange(5.0), threshold=2)
    assert math.isnan(point.sensitivity.value)
    assert point.specificity.value == 0.4
    assert point.precision.value == 0.0


def test_a_threshold_that_nothing_reaches_has_no_precision():
    point = operating_point(np.array([True, False]), np.array([0.1, 0.2]), threshold=0.9)
    assert math.isnan(point.precision.value)
    assert point.sensitivity.value == 0.0


@pytest.mark.parametrize("sensitivity", [0, 1.01, 95, math.nan])
def test_a_sensitivity_that_is_no_share_is_refused(sensitivity):
    with pytest.raises(ValueError, match="sensitivity is"):
        threshold_at_sensitivity(np.array([True]), np.array([0.5]), sensitivity=sensitivity)


def test_no_threshold_can_be_fixed_without_positives_or_applied_if_nan():
    with pytest.raises(ValueError, match="no validation image"):
        threshold_at_sensitivity(np.array([False]), np.array([0.5]), sensitivity=0.9)
    with pytest.raises(ValueError, match="threshold is nan"):
        operating_point(np.array([True]), np.array([0.5]), threshold=math.nan)
