import math

import numpy as np
import pytest

from pylorus.evaluation import bootstrap
from pylorus.evaluation.bootstrap import (
    bootstrap_estimate,
    group_patterns,
    resampled_indices,
    resampled_weights,
    standard_error,
)


def test_groups_that_are_alike_are_counted_once():
    patterns = group_patterns(np.array([0, 0, 1, 1, 2]), np.array([5, 9, 9, 5, 5]))
    assert patterns.seen.tolist() == [5, 9]
    assert patterns.images.tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert patterns.groups.tolist() == [1, 2]


def test_drawing_patterns_is_drawing_whole_groups():
    """The spread of the pattern bootstrap is that of the plain one, which draws group after group."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 25, 80)
    codes = np.unique(codes, return_inverse=True)[1]
    cells = generator.integers(0, 4, 80)
    patterns = group_patterns(codes, cells)
    fast = resampled_indices(
        patterns, lambda tables: tables[:, :1] / tables.sum(axis=1, keepdims=True), width=4, resamples=6000, seed=1
    )[1:, 0]
    table = np.zeros((codes.max() + 1, 4))
    np.add.at(table, (codes, cells), 1)
    drawn = table[generator.integers(0, len(table), (6000, len(table)))].sum(axis=1)
    plain = drawn[:, 0] / drawn.sum(axis=1)
    assert fast.mean() == pytest.approx(plain.mean(), abs=0.003)
    assert fast.std() == pytest.approx(plain.std(), rel=0.05)


def test_the_first_row_is_the_set_itself():
    patterns = group_patterns(np.arange(6), np.array([0, 0, 3, 3, 3, 1]))
    itself = resampled_indices(patterns, lambda tables: tables, width=4, resamples=2, seed=0)[0]
    assert itself.tolist() == [2.0, 1.0, 0.0, 3.0]


def test_a_seed_gives_the_same_resamples_whatever_the_memory(monkeypatch):
    groups = np.array([3, 5, 1, 1])
    whole = np.concatenate(list(resampled_weights(groups, resamples=50, seed=4)))
    monkeypatch.setattr(bootstrap, "BATCH_NUMBERS", 12)
    batches = list(resampled_weights(groups, resamples=50, seed=4))
    assert max(len(batch) for batch in batches) == 3
    assert (np.concatenate(batches) == whole).all()
    assert (np.concatenate(list(resampled_weights(groups, resamples=50, seed=5))) != whole).any()


def test_fewer_than_two_resamples_are_refused():
    with pytest.raises(ValueError, match="resamples is 1"):
        list(resampled_weights(np.array([2]), resamples=1, seed=0))


def test_an_interval_stays_within_the_range_of_its_index():
    resampled = 0.99 + 0.01 * np.random.default_rng(0).random(500)
    high = bootstrap_estimate(0.995, resampled, groups=20)
    low = bootstrap_estimate(-0.995, -resampled, groups=20, lowest=-1.0)
    assert high.low < 0.995 < high.high < 1
    assert -1 < low.low < -0.995 < low.high


def test_a_set_without_an_error_has_a_value_but_no_interval():
    found = bootstrap_estimate(1.0, np.ones(100), groups=50)
    assert found.value == 1.0
    assert not found.has_interval


def test_one_group_has_no_interval():
    assert not bootstrap_estimate(0.8, np.full(100, 0.8), groups=1).has_interval


def test_undefined_resamples_are_counted_and_too_many_leave_no_interval():
    resampled = np.random.default_rng(0).normal(0.8, 0.02, 200)
    resampled[:4] = math.nan
    few = bootstrap_estimate(0.8, resampled, groups=40)
    assert (few.undefined, few.resamples, few.has_interval) == (4, 200, True)
    resampled[:20] = math.nan
    many = bootstrap_estimate(0.8, resampled, groups=40)
    assert (many.undefined, many.has_interval) == (20, False)


def test_an_undefined_index_stays_undefined():
    found = bootstrap_estimate(math.nan, np.full(10, math.nan), groups=5)
    assert not found.defined
    assert not found.has_interval
    assert found.undefined == 10


def test_values_that_agree_have_no_standard_error():
    assert math.isnan(standard_error(np.full(10, 0.1) + 1e-17))
    assert standard_error(np.array([0.0, 1.0])) == pytest.approx(math.sqrt(0.5))
