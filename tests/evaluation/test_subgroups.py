"""Subgroups of the test images: calibration in the large, and the type I error of the test for differences."""

import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import chi2_contingency

from pylorus.evaluation.subgroups import calibration_in_the_large, subgroup_difference


def test_calibration_in_the_large_is_the_observed_share_less_the_mean_probability():
    found = calibration_in_the_large(np.array([True, True, False, False]), np.array([0.9, 0.7, 0.5, 0.3]))
    assert found.value == pytest.approx(0.5 - 0.6)
    assert -1 <= found.low < 0 < found.high <= 1


def test_images_of_one_patient_give_a_wider_interval_than_images_of_many():
    generator = np.random.default_rng(0)
    positive, probability = generator.random(60) < 0.4, np.full(60, 0.4)
    alone = calibration_in_the_large(positive, probability)
    grouped = calibration_in_the_large(np.repeat(positive[:10], 6), probability, np.repeat(np.arange(10), 6))
    assert grouped.high - grouped.low > 1.5 * (alone.high - alone.low)


def test_no_event_among_few_images_leaves_a_wide_calibration_interval():
    found = calibration_in_the_large(np.zeros(12, dtype=bool), np.full(12, 0.05))
    assert found.low < -0.05 < 0.05 < found.high


def test_one_patient_alone_gives_a_value_and_no_interval():
    found = calibration_in_the_large(np.array([True, False]), np.array([0.5, 0.5]), np.array(["p", "p"]))
    assert found.value == 0
    assert not found.has_interval


def test_probabilities_out_of_range_are_refused():
    with pytest.raises(ValueError, match="out of range"):
        calibration_in_the_large(np.array([True]), np.array([1.2]))


@pytest.mark.parametrize(("groups", "images", "shift"), [(20, 1, 0.0), (40, 5, 0.0), (30, 12, -2.0)])
def test_the_calibration_interval_covers_zero_for_calibrated_probabilities(groups, images, shift):
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        codes = np.repeat(np.arange(groups), generator.integers(1, images + 1, groups))
        latent = generator.normal(size=groups)[codes] + generator.normal(size=len(codes))
        probability = expit(shift + latent)
        found = calibration_in_the_large(generator.random(len(codes)) < probability, probability, codes)
        covered += found.low <= 0 <= found.high
    assert covered >= 0.93 * 300


def test_the_statistic_without_groups_is_that_of_the_chi_square_test_of_a_table():
    generator = np.random.default_rng(2)
    success, subgroup = generator.random(200) < 0.7, generator.integers(0, 3, 200)
    table = [[(success & (subgroup == part)).sum(), (~success & (subgroup == part)).sum()] for part in range(3)]
    expected = chi2_contingency(table, correction=False)
    found = subgroup_difference(success, subgroup)
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["one image", "patients of several images", "rare and uneven", "within patients"])
def test_the_type_1_error_is_five_percent(condition):
    generator = np.random.default_rng(3)
    sets, below = 600, 0
    for _ in range(sets):
        sizes = np.ones(40, dtype=int) if condition == "one image" else generator.integers(1, 7, 30)
        codes = np.repeat(np.arange(len(sizes)), sizes)
        skill = generator.normal(0, 0 if condition == "one image" else 1, len(sizes))
        success = generator.random(len(codes)) < expit(1 + skill[codes])
        share = [0.8, 0.15, 0.05] if condition == "rare and uneven" else [0.4, 0.3, 0.3]
        of_patient = generator.choice(3, size=len(sizes), p=share)
        subgroup = generator.choice(3, size=len(codes)) if condition == "within patients" else of_patient[codes]
        found = subgroup_difference(success, subgroup, codes, permutations=99)
        below += bool(found.p_value <= 0.05)
    assert 0.03 <= below / sets <= 0.07


def test_unequal_images_per_patient_keep_the_type_1_error():
    generator = np.random.default_rng(4)
    sets, below = 400, 0
    for _ in range(sets):
        site = np.repeat([0, 1], [30, 15])
        codes = np.repeat(np.arange(45), np.where(site == 0, 1, 8))
        success = generator.random(len(codes)) < expit(1 + generator.normal(size=45)[codes])
        below += bool(subgroup_difference(success, site[codes], codes, permutations=99).p_value <= 0.05)
    assert below / sets <= 0.08


def test_a_site_where_the_model_fails_is_significant():
    generator = np.random.default_rng(5)
    site = np.repeat(["A", "B", "C"], 40)
    success = generator.random(120) < np.where(site == "C", 0.5, 0.95)
    assert subgroup_difference(success, site, np.repeat(np.arange(60), 2)).p_value < 0.01


def test_a_failing_view_is_significant_although_each_patient_has_both_views():
    view = np.tile(["near", "far"], 30)
    success = view == "near"
    success[::10] = False
    assert subgroup_difference(success, view, np.repeat(np.arange(30), 2)).p_value < 0.01


def test_the_same_seed_gives_the_same_p():
    success, subgroup = np.arange(60) % 3 > 0, np.arange(60) % 4
    first, second = (subgroup_difference(success, subgroup, seed=7, permutations=199) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("success", "subgroup"), [([True] * 4, [0, 0, 1, 1]), ([False] * 4, [0, 0, 1, 1]), ([True, False], [0, 0])]
)
def test_p_is_undefined_if_nothing_can_differ(success, subgroup):
    assert math.isnan(subgroup_difference(np.array(success), np.array(subgroup)).p_value)
