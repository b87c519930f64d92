"""Non-inferiority and equivalence: p-values that belong to the intervals, and the error at the margin."""

import math

import numpy as np
import pytest

from pylorus.evaluation import (
    Estimate,
    clustered_wilson,
    compute_margin_test,
    decide_noninferiority,
    paired_share_difference,
    wilson,
)


@pytest.mark.parametrize("successes", [150, 170, 175, 180, 185, 200])
def test_p_is_below_the_level_if_and_only_if_the_interval_is_on_the_right_side_of_the_margin(successes):
    test = compute_margin_test(lambda c: wilson(successes, 200, confidence=c), reference=0.9, margin=0.05)
    assert (test.noninferior_p < 0.025) == test.noninferior
    assert (test.equivalent_p < 0.025) == test.equivalent
    assert test.equivalent_p >= test.noninferior_p
    decision = decide_noninferiority(wilson(successes, 200), reference=0.9, margin=0.05)
    assert (test.noninferior, test.equivalent) == (decision.noninferior, decision.equivalent)


def test_p_of_a_wilson_interval_is_that_of_the_score_test():
    # The score test of p = 0.85 for 180 of 200: z = (0.9 - 0.85) / sqrt(0.85 * 0.15 / 200).
    test = compute_margin_test(lambda c: wilson(180, 200, confidence=c), reference=0.9, margin=0.05)
    z = 0.05 / math.sqrt(0.85 * 0.15 / 200)
    assert test.noninferior_p == pytest.approx(math.erfc(z / math.sqrt(2)) / 2, rel=1e-4)


def test_a_model_that_is_worse_by_more_than_the_margin_is_inferior_with_p_near_1():
    test = compute_margin_test(lambda c: wilson(140, 200, confidence=c), reference=0.9, margin=0.05)
    assert test.inferior
    assert test.noninferior_p > 0.975


def test_without_an_interval_nothing_is_shown():
    test = compute_margin_test(lambda c: Estimate(0.9, math.nan, math.nan), reference=0.9, margin=0.05)
    assert math.isnan(test.noninferior_p)
    assert (test.noninferior, test.equivalent, test.inferior) == (False, False, False)


def draw_models(generator, patients, difference):
    """Draw whether two models are correct on three images of each patient, of whom some are hard for both."""
    easy = np.repeat(generator.random(patients) < 0.8, 3)
    chance = np.where(easy, 0.95, 0.6)
    first = generator.random(3 * patients) < chance - difference
    return first, generator.random(3 * patients) < chance


def test_a_model_worse_by_the_margin_is_called_non_inferior_in_at_most_the_level_of_all_studies():
    generator, groups, wrong = np.random.default_rng(1), np.repeat(np.arange(150), 3), 0
    for _ in range(1000):
        first, second = draw_models(generator, 150, 0.1)
        wrong += decide_noninferiority(paired_share_difference(first, second, groups), margin=0.1).noninferior
    assert wrong / 1000 <= 0.025 + 2 * math.sqrt(0.025 * 0.975 / 1000)


def test_a_figure_above_the_model_by_the_margin_is_reached_in_at_most_the_level_of_all_studies():
    generator, groups, wrong = np.random.default_rng(2), np.repeat(np.arange(150), 3), 0
    for _ in range(1000):
        own = generator.beta(0.85 * 2, 0.15 * 2, 150)[groups]
        estimate = clustered_wilson(generator.random(450) < own, groups)
        wrong += decide_noninferiority(estimate, reference=0.9, margin=0.05).noninferior
    assert wrong / 1000 <= 0.025 + 2 * math.sqrt(0.025 * 0.975 / 1000)
