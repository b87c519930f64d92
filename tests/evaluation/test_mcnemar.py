import itertools
from dataclasses import replace

import numpy as np
import pytest
from statsmodels.stats import contingency_tables

from pylorus.evaluation.comparison import mcnemar


def pair(one_hot, *, both, first, second, neither):
    """Two models of which so many images are recognised by both, by one only, by none."""
    answers = [np.repeat(each, [both, first, second, neither]) for each in ([0, 0, 1, 1], [0, 1, 0, 1])]
    return one_hot(answers[0]), one_hot(answers[1])


@pytest.mark.parametrize(
    ("both", "first", "second", "neither"),
    [(387, 22, 14, 27), (10, 5, 5, 0), (0, 6, 0, 0), (3, 0, 1, 0), (50, 0, 0, 2), (200, 40, 90, 70)],
)
def test_with_one_image_a_patient_p_is_that_of_statsmodels(one_hot, both, first, second, neither):
    test = mcnemar(*pair(one_hot, both=both, first=first, second=second, neither=neither))
    expected = contingency_tables.mcnemar([[both, first], [second, neither]], exact=True).pvalue
    assert test.p_value == pytest.approx(min(1.0, expected))
    assert (test.only_first, test.only_second) == (first, second)
    assert (test.right_first, test.right_second) == (both + first, both + second)
    assert test.images == test.groups == both + first + second + neither


@pytest.mark.parametrize("seed", range(5))
def test_in_groups_p_is_the_share_of_all_turns_as_lopsided(one_hot, seed):
    generator = np.random.default_rng(seed)
    groups = generator.integers(0, 10, 40)
    first = replace(one_hot(generator.integers(0, 2, 40)), group=groups)
    second = replace(one_hot(generator.integers(0, 2, 40)), group=groups)
    lead = first.correct.astype(int) - second.correct
    balance = np.array([lead[groups == each].sum() for each in np.unique(groups)])
    turns = np.array(list(itertools.product([-1, 1], repeat=len(balance)))) @ balance
    assert mcnemar(first, second).p_value == pytest.approx(np.mean(np.abs(turns) >= abs(balance.sum())))


def test_copies_of_each_image_in_its_group_change_nothing(one_hot):
    first, second = pair(one_hot, both=20, first=9, second=2, neither=3)
    copied = [
        replace(one_hot(np.repeat(model.predicted, 3)), group=np.repeat(np.arange(34), 3)) for model in (first, second)
    ]
    assert mcnemar(*copied).p_value == pytest.approx(mcnemar(first, second).p_value)
    assert mcnemar(*copied).groups == 34


def test_exchanging_the_models_exchanges_the_counts_and_keeps_p(one_hot):
    first, second = pair(one_hot, both=20, first=9, second=2, neither=3)
    there, back = mcnemar(first, second), mcnemar(second, first)
    assert there.p_value == back.p_value
    assert (there.only_first, there.right_first) == (back.only_second, back.right_second)


def test_models_that_never_differ_give_p_of_one(one_hot):
    model = one_hot(np.array([0, 1, 0]))
    assert mcnemar(model, model).p_value == 1.0


def test_different_test_sets_are_refused(one_hot):
    with pytest.raises(ValueError, match="not for the same images"):
        mcnemar(one_hot(np.array([0, 1])), one_hot(np.array([0, 1, 1])))


def test_the_same_images_in_another_order_give_the_same_answer(said):
    first, second = said(images=80, model=1), said(images=80, model=2)
    order = np.random.default_rng(0).permutation(80)
    turned = replace(
        second,
        sample=second.sample[order],
        group=second.group[order],
        true=second.true[order],
        probabilities=second.probabilities[order],
    )
    assert mcnemar(first, turned) == mcnemar(first, second)


def test_ten_thousand_images_are_no_trouble(one_hot):
    generator = np.random.default_rng(0)
    first, second = one_hot(generator.integers(0, 2, 10_000)), one_hot(generator.integers(0, 2, 10_000))
    only = int((first.correct & ~second.correct).sum()), int((second.correct & ~first.correct).sum())
    expected = contingency_tables.mcnemar([[0, only[0]], [only[1], 0]], exact=True).pvalue
    assert mcnemar(first, second).p_value == pytest.approx(expected)
