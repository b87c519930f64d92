import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from pylorus.evaluation.influence import estimate_mean_over_groups
from pylorus.evaluation.intervals import compute_confidence_below, compute_upper_bound


@pytest.mark.parametrize(("successes", "total"), [(0, 1), (0, 30), (3, 30), (29, 30), (30, 30), (120, 400)])
def test_binary_values_give_the_exact_clopper_pearson_interval(successes, total):
    values = np.repeat([1.0, 0.0], [successes, total - successes])
    found = estimate_mean_over_groups(values, None)
    low, high = proportion_confint(successes, total, alpha=0.05, method="beta")
    assert found.value == successes / total
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize("size", [1, 2, 5, 30, 300])
def test_the_confidence_is_that_of_randomly_weighted_means(size):
    generator = np.random.default_rng(size)
    values = np.round(generator.beta(0.3, 1.5, size), 2)
    weights = generator.dirichlet(np.ones(size + 1), 40_000)
    means = weights @ np.append(values, 1.0)
    for bound in (0.05, 0.2, 0.4, 0.9):
        assert compute_confidence_below(values, bound) == pytest.approx((means <= bound).mean(), abs=0.01)


def test_nearly_binary_values_give_nearly_the_same_interval():
    values = np.repeat([0.0, 1.0], [40, 3])
    near = np.abs(values - 1e-9)
    for bound in (0.05, 0.1, 0.3):
        assert compute_confidence_below(near, bound) == pytest.approx(compute_confidence_below(values, bound), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(0.1, 1.9), (0.5, 0.5), (2, 0.2)])
@pytest.mark.parametrize("size", [5, 30])
def test_the_interval_covers_the_mean_of_skewed_proportions(size, shape):
    generator = np.random.default_rng([size, 7])
    truth = shape[0] / sum(shape)
    held = 0
    for _ in range(200):
        found = estimate_mean_over_groups(generator.beta(*shape, size), None)
        assert found.low <= found.value <= found.high
        held += found.low <= truth <= found.high
    assert held / 200 >= 0.95 - 2.6 * np.sqrt(0.95 * 0.05 / 200)


def test_groups_have_equal_weight_and_copies_add_no_information():
    values, groups = np.array([1.0] * 9 + [0.0]), np.array(["a"] * 9 + ["b"])
    assert estimate_mean_over_groups(values, groups).value == 0.5
    assert estimate_mean_over_groups(values, groups) == estimate_mean_over_groups(np.array([1.0, 0.0]), None)


def test_a_perfect_result_has_an_interval_too():
    found = estimate_mean_over_groups(np.ones(50), None)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(0.025 ** (1 / 50))
    assert compute_upper_bound(np.ones(3), confidence=0.9) == 1.0


@pytest.mark.parametrize("values", [[], [0.5, 1.1], [-0.1], [np.nan], [[0.5]]])
def test_values_outside_0_and_1_are_refused(values):
    with pytest.raises(ValueError, match=r"values (have shape|are in)"):
        compute_confidence_below(np.array(values), 0.5)
