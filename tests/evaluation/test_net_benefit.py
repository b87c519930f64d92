import numpy as np
import pytest

from pylorus.evaluation.decisions import net_benefit


def drawn(seed=0, images=300):
    generator = np.random.default_rng(seed)
    chance = np.round(generator.random(images), 2)
    return generator.random(images) < chance, chance


def test_it_is_the_formula_of_vickers_at_every_threshold():
    positive, chance = drawn()
    curve = net_benefit(positive, chance)
    for threshold, benefit in zip(curve.threshold, curve.model, strict=True):
        called = chance >= threshold
        hits, needless = (called & positive).sum(), (called & ~positive).sum()
        assert benefit == pytest.approx((hits - needless * threshold / (1 - threshold)) / 300)


def test_treating_all_is_a_model_sure_of_everybody_and_treating_none_one_sure_of_nobody():
    positive, _ = drawn()
    np.testing.assert_allclose(net_benefit(positive, np.ones(300)).model, net_benefit(positive, np.ones(300)).treat_all)
    assert not net_benefit(positive, np.zeros(300)).model.any()
    assert not net_benefit(positive, np.zeros(300)).treat_none.any()


def test_treating_all_is_worth_nothing_where_the_threshold_is_the_prevalence():
    curve = net_benefit(np.repeat([True, False], [30, 70]), np.ones(100), thresholds=np.array([0.3]))
    assert curve.treat_all[0] == pytest.approx(0)
    assert curve.prevalence == 0.3


def test_a_calibrated_model_is_never_worse_than_treating_all_or_none():
    positive, chance = drawn(images=50_000)
    curve = net_benefit(positive, chance)
    assert (curve.model >= np.maximum(curve.treat_all, 0) - 0.005).all()


def test_a_perfect_model_gains_the_prevalence_everywhere():
    positive = np.repeat([True, False], [30, 70])
    np.testing.assert_allclose(net_benefit(positive, positive.astype(float)).model, 0.3)


@pytest.mark.parametrize("thresholds", [[0.0, 0.5], [0.5, 1.0], [0.5, 0.2], [], [0.2, np.nan]])
def test_thresholds_outside_0_to_1_or_not_rising_are_refused(thresholds):
    with pytest.raises(ValueError, match="thresholds"):
        net_benefit(np.array([True]), np.array([0.5]), thresholds=np.array(thresholds))


def test_logits_are_refused():
    with pytest.raises(ValueError, match="probabilities"):
        net_benefit(np.array([True, False]), np.array([3.2, -1.0]))
