"""Control limits hold their false-alarm rate, and find what has changed."""

import numpy as np
import pytest

from pylorus.evaluation import build_rate_reference, build_score_reference, compare_rate, compare_score
from pylorus.evaluation.drift import accumulate_samples, compare_sample, summarize_score


def test_without_drift_limits_are_exceeded_about_as_often_as_stated():
    chance = np.random.default_rng(0)
    rates = scores = 0
    for _ in range(300):
        flags, values = chance.random(150) < 0.3, chance.normal(size=150)
        rates += compare_rate(chance.random(80) < 0.3, build_rate_reference(flags), false_alarms=0.1).is_beyond
        scores += compare_score(chance.normal(size=80), build_score_reference(values), false_alarms=0.1).is_beyond
    assert 0.04 < rates / 300 < 0.15
    assert 0.04 < scores / 300 < 0.15


def test_limits_and_p_values_agree():
    reference = build_rate_reference(np.arange(150) < 30)
    for count in range(61):
        drift = compare_rate(np.arange(60) < count, reference, false_alarms=0.02)
        assert drift.is_beyond == (drift.p <= 0.02)
        assert drift.is_beyond == (not drift.low - 1e-9 <= drift.value <= drift.high + 1e-9)


def test_the_rate_is_compared_by_the_conditional_test_with_mid_p():
    hypergeom = pytest.importorskip("scipy.stats").hypergeom
    drift = compare_rate(np.arange(40) < 15, build_rate_reference(np.arange(100) < 20), false_alarms=0.01)
    above = hypergeom.sf(15, 140, 35, 40) + hypergeom.pmf(15, 140, 35, 40) / 2
    assert drift.p == pytest.approx(2 * above)


def test_a_small_reference_widens_the_limits():
    period = np.arange(100) < 20
    small, large = (
        compare_rate(period, build_rate_reference(np.arange(size) < size // 5), false_alarms=0.01)
        for size in (50, 5000)
    )
    assert small.low < large.low
    assert large.high < small.high


def test_images_of_one_patient_count_as_fewer():
    flags = np.repeat(np.arange(40) < 8, 5)
    patients = np.repeat(np.arange(40), 5)
    reference = build_rate_reference(flags, patients)
    assert reference.correlation == pytest.approx(1)
    assert reference.effective == pytest.approx(40)
    period = np.repeat(np.arange(10) < 5, 5)
    unknown = compare_rate(period, reference, false_alarms=0.05)
    alone = compare_rate(period, reference, np.arange(50), false_alarms=0.05)
    grouped = compare_rate(period, reference, np.repeat(np.arange(10), 5), false_alarms=0.05)
    assert alone.is_beyond
    assert not grouped.is_beyond
    assert unknown == grouped  # as many images per patient as in the reference are assumed


def test_few_patients_in_the_reference_widen_the_limits():
    reference = build_rate_reference(np.repeat(np.arange(12) < 4, 5), np.repeat(np.arange(12), 5))
    period, patients = np.repeat(np.arange(12) < 4, 5), np.repeat(np.arange(12), 5)
    certain = compare_rate(period, reference, patients, false_alarms=0.05)
    uncertain = compare_rate(period, reference, patients, false_alarms=0.05, patients=12)
    assert uncertain.low <= certain.low < certain.high < uncertain.high


def test_the_average_of_recent_periods_finds_a_lasting_change_that_no_period_shows():
    reference = build_score_reference(np.random.default_rng(0).normal(size=1000))
    scores = np.sort(np.random.default_rng(1).normal(size=1000))[12::25] + 0.25  # like the reference, but higher
    samples = [summarize_score(scores, reference) for _ in range(12)]
    level = {"false_alarms": 0.001}
    assert not any(compare_sample(sample, reference, **level).is_beyond for sample in samples)
    assert compare_sample(accumulate_samples(samples, decay=0.8), reference, **level).is_beyond
    assert accumulate_samples(samples, decay=1).effective == pytest.approx(480)
    assert accumulate_samples(samples, decay=0) == samples[-1]


def test_a_score_that_rises_is_found_and_said_to_be_higher():
    values = np.random.default_rng(1).normal(size=200)
    reference = build_score_reference(values)
    drift = compare_score(values[:60] + 0.8, reference, false_alarms=0.001)
    assert drift.is_beyond
    assert drift.value > 0.6
    assert sum(reference.counts) == 200


def test_a_score_without_any_variation_is_no_alarm():
    reference = build_score_reference(np.zeros(50))
    drift = compare_score(np.zeros(20), reference, false_alarms=0.01)
    assert (drift.value, drift.is_beyond) == (0.5, False)
    samples = [summarize_score(np.zeros(size), reference) for size in (7, 11, 13, 17, 19, 23)]
    for count in range(1, 7):
        average = accumulate_samples(samples[:count], decay=0.8)
        assert not compare_sample(average, reference, false_alarms=0.01).is_beyond
