"""Operating points, sensitivity thresholds, abstention and net benefit."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.thresholds import Condition, simulate
from pylorus.evaluation.decisions import (
    net_benefit,
    operating_point,
    patients_needed,
    risk_coverage,
    threshold_at_sensitivity,
)
from pylorus.evaluation.index_intervals import wilson


def fixed(scores, groups=None, *, sensitivity=0.95, confidence=0.9):
    positive = np.ones(len(scores), dtype=bool)
    return threshold_at_sensitivity(
        positive, np.asarray(scores), groups, sensitivity=sensitivity, confidence=confidence
    )


@pytest.mark.parametrize("sensitivity", [0.5, 0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("positives", [1, 3, 20, 45, 100, 147])
def test_with_one_image_a_patient_it_is_the_tolerance_bound_of_order_statistics(sensitivity, positives):
    generator = np.random.default_rng(positives)
    positive = np.repeat([True, False], [positives, 200])
    scores = generator.random(positives + 200) + 0.5 * positive
    found = threshold_at_sensitivity(positive, scores, sensitivity=sensitivity, confidence=0.9)
    reached = stats.binom.sf(np.arange(positives), positives, 1 - sensitivity)  # of the k-th lowest: P(Bin >= k)
    ranks = np.flatnonzero(reached >= 0.9)
    rank = ranks[-1] if len(ranks) else 0
    assert found.threshold == np.sort(scores[positive])[rank]
    assert found.confidence_reached == pytest.approx(reached[rank], abs=1e-12)
    assert found.is_guaranteed == bool(len(ranks))
    needed = math.ceil(math.log(0.1) / math.log(sensitivity))
    assert found.patients_needed == needed
    assert found.is_guaranteed == (positives >= needed)
    if rank == 0:
        assert found.sensitivity_reached == pytest.approx(0.1 ** (1 / positives), abs=1e-9)
    assert (found.sensitivity_reached >= sensitivity) == found.is_guaranteed


def test_45_positive_patients_are_needed_for_95_percent_at_90_percent_confidence():
    assert patients_needed(sensitivity=0.95, confidence=0.9) == 45
    assert patients_needed(sensitivity=0.75, confidence=1 - 0.75**3) == 3
    assert patients_needed(sensitivity=1, confidence=0.9) is None
    assert fixed(np.arange(45.0)).is_guaranteed
    few = fixed(np.arange(44.0))
    assert (few.threshold, few.is_guaranteed, few.patients_needed) == (0.0, False, 45)
    assert few.confidence_reached == pytest.approx(1 - 0.95**44)


def test_more_images_of_the_same_patients_do_not_replace_patients():
    scores = np.random.default_rng(0).random(400)
    assert fixed(scores).is_guaranteed
    grouped = fixed(scores, np.arange(400) % 40)
    assert (grouped.is_guaranteed, grouped.images, grouped.patients) == (False, 400, 40)
    assert grouped.threshold == scores.min()
    assert grouped.confidence_reached == pytest.approx(1 - 0.95**40)


def test_images_that_are_copies_of_one_another_count_as_one():
    alone = np.random.default_rng(1).random(120)
    copied = fixed(np.repeat(alone, 6), np.repeat(np.arange(120), 6))
    expected = fixed(alone)
    assert copied.threshold == expected.threshold
    assert copied.confidence_reached == pytest.approx(expected.confidence_reached, abs=1e-12)


def test_unlike_images_of_a_patient_allow_a_higher_threshold_than_copies():
    alone = np.random.default_rng(2).random((120, 6))
    patients = np.repeat(np.arange(120), 6)
    unlike, copies = fixed(alone.ravel(), patients), fixed(np.repeat(alone[:, 0], 6), patients)
    assert unlike.is_guaranteed
    assert (alone.ravel() < unlike.threshold).mean() > (alone[:, 0] < copies.threshold).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    "condition",
    [
        Condition(50),
        Condition(100),
        Condition(50, "5", 0.5, "copies"),
        Condition(100, "1-30", 0.7, "copies"),
        Condition(50, "1 or 30", 0.5, "copies"),
        Condition(200, "1 or 30", 0.5),
    ],
    ids=str,
)
def test_the_guarantee_holds_in_90_percent_of_simulated_studies(condition):
    found = simulate(condition, sets=400)
    assert found.by_patient.guaranteed == 1
    assert found.by_patient.kept >= 0.9 - 2.6 * math.sqrt(0.9 * 0.1 / 400)
    assert found.share_of_positives.kept < 0.6  # what the rule of the share of validation positives gives
    assert found.coverage_by_patient >= 0.9 - 0.005
    if condition.images != "1":
        assert found.images_as_patients.kept < 0.84


def test_ties_at_the_threshold_are_all_called_positive():
    scores = np.repeat([0.4, 0.9], [100, 20])
    found = fixed(scores)
    assert (found.threshold, found.confidence_reached) == (0.4, pytest.approx(1 - 0.95**120))


def test_negatives_and_the_order_of_images_change_nothing():
    generator = np.random.default_rng(3)
    positive, groups, scores = generator.random(300) < 0.5, generator.integers(0, 90, 300), generator.random(300)
    order = generator.permutation(300)
    found = threshold_at_sensitivity(positive, scores, groups, sensitivity=0.9, confidence=0.9)
    again = threshold_at_sensitivity(positive[order], scores[order], groups[order], sensitivity=0.9, confidence=0.9)
    assert again == found
    alone = threshold_at_sensitivity(
        positive[positive], scores[positive], groups[positive], sensitivity=0.9, confidence=0.9
    )
    assert alone == found


def test_a_threshold_fixed_on_validation_is_applied_untouched_to_test():
    generator = np.random.default_rng(0)
    positive = generator.random(4000) < 0.3
    scores = generator.standard_normal(4000) + 2 * positive
    threshold = threshold_at_sensitivity(positive[:2000], scores[:2000], sensitivity=0.95, confidence=0.9).threshold
    point = operating_point(positive[2000:], scores[2000:], threshold=threshold)
    assert point.threshold == threshold
    assert point.sensitivity.value > 0.95
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
def test_a_sensitivity_outside_0_and_1_is_refused(sensitivity):
    with pytest.raises(ValueError, match="sensitivity is"):
        fixed([0.5], sensitivity=sensitivity)


@pytest.mark.parametrize("confidence", [0, 1, 90, math.nan])
def test_a_confidence_outside_0_and_1_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence is"):
        fixed([0.5], confidence=confidence)


def test_no_threshold_can_be_fixed_without_positives_or_applied_if_nan():
    with pytest.raises(ValueError, match="no validation image"):
        threshold_at_sensitivity(np.array([False]), np.array([0.5]), sensitivity=0.9, confidence=0.9)
    with pytest.raises(ValueError, match="threshold is NaN"):
        operating_point(np.array([True]), np.array([0.5]), threshold=math.nan)


def test_each_point_is_the_risk_on_the_most_confident_images():
    generator = np.random.default_rng(0)
    correct, certainty = generator.random(50) < 0.7, np.round(generator.random(50), 1)
    curve = risk_coverage(correct, certainty)
    for level, coverage, risk in zip(curve.certainty, curve.coverage, curve.risk, strict=True):
        answered = certainty >= level
        assert coverage == pytest.approx(answered.mean())
        assert risk == pytest.approx(1 - correct[answered].mean())
    assert curve.coverage[-1] == 1.0
    assert curve.risk[-1] == pytest.approx(1 - correct.mean())


def test_the_order_of_images_makes_no_difference():
    generator = np.random.default_rng(1)
    correct, certainty = generator.random(50) < 0.7, generator.choice([0.5, 0.7, 0.9], 50)
    order = generator.permutation(50)
    assert risk_coverage(correct, certainty).area == pytest.approx(risk_coverage(correct[order], certainty[order]).area)


def test_confidence_that_ranks_errors_last_has_the_smaller_area():
    correct = np.repeat([True, False], [80, 20])
    knows, reversed_, nothing = (
        risk_coverage(correct, score).area for score in (correct + 0.0, ~correct + 0.0, np.ones(100))
    )
    assert knows < nothing < reversed_
    assert nothing == pytest.approx(0.2)


def test_without_errors_the_risk_is_zero_at_any_coverage():
    curve = risk_coverage(np.ones(3, dtype=bool), np.array([0.3, 0.6, 0.9]))
    assert curve.risk.tolist() == [0.0, 0.0, 0.0]
    assert curve.area == 0.0


def test_a_single_image_is_one_point():
    curve = risk_coverage(np.array([False]), np.array([0.9]))
    assert (curve.coverage.tolist(), curve.risk.tolist(), curve.area) == ([1.0], [1.0], 1.0)


@pytest.mark.parametrize(
    ("correct", "certainty"),
    [
        (np.array([1, 0]), np.array([0.5, 0.6])),
        (np.array([True, False]), np.array([0.5])),
        (np.array([True, False]), np.array([0.5, np.nan])),
        (np.array([], dtype=bool), np.array([])),
    ],
)
def test_arguments_of_different_lengths_or_invalid_values_are_refused(correct, certainty):
    with pytest.raises(ValueError, match=r"correct|score"):
        risk_coverage(correct, certainty)


def simulate_binary(seed=0, images=300):
    generator = np.random.default_rng(seed)
    chance = np.round(generator.random(images), 2)
    return generator.random(images) < chance, chance


def test_it_is_the_formula_of_vickers_at_every_threshold():
    positive, chance = simulate_binary()
    curve = net_benefit(positive, chance)
    for threshold, benefit in zip(curve.threshold, curve.model, strict=True):
        called = chance >= threshold
        hits, needless = (called & positive).sum(), (called & ~positive).sum()
        assert benefit == pytest.approx((hits - needless * threshold / (1 - threshold)) / 300)


def test_treat_all_and_treat_none_equal_constant_models():
    positive, _ = simulate_binary()
    np.testing.assert_allclose(net_benefit(positive, np.ones(300)).model, net_benefit(positive, np.ones(300)).treat_all)
    assert not net_benefit(positive, np.zeros(300)).model.any()
    assert not net_benefit(positive, np.zeros(300)).treat_none.any()


def test_treat_all_has_no_net_benefit_at_the_prevalence():
    curve = net_benefit(np.repeat([True, False], [30, 70]), np.ones(100), thresholds=np.array([0.3]))
    assert curve.treat_all[0] == pytest.approx(0)
    assert curve.prevalence == 0.3


def test_a_calibrated_model_is_never_worse_than_treating_all_or_none():
    positive, chance = simulate_binary(images=50_000)
    curve = net_benefit(positive, chance)
    assert (curve.model >= np.maximum(curve.treat_all, 0) - 0.005).all()


def test_a_perfect_model_has_the_prevalence_as_net_benefit():
    positive = np.repeat([True, False], [30, 70])
    np.testing.assert_allclose(net_benefit(positive, positive.astype(float)).model, 0.3)


@pytest.mark.parametrize("thresholds", [[0.0, 0.5], [0.5, 1.0], [0.5, 0.2], [], [0.2, np.nan]])
def test_thresholds_outside_0_to_1_or_unsorted_are_refused(thresholds):
    with pytest.raises(ValueError, match="thresholds"):
        net_benefit(np.array([True]), np.array([0.5]), thresholds=np.array(thresholds))


def test_logits_are_refused():
    with pytest.raises(ValueError, match="probabilities"):
        net_benefit(np.array([True, False]), np.array([3.2, -1.0]))
