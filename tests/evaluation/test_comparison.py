"""Two models compared: paired bootstrap, DeLong, McNemar, independent images, and Holm's adjustment."""

import itertools
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from statsmodels.stats import contingency_tables, multitest
from statsmodels.stats.proportion import confint_proportions_2indep

from pylorus.evaluation.comparison import (
    INDICES,
    delong_test,
    difference_of_independent,
    holm,
    mcnemar,
    paired_differences,
)
from pylorus.evaluation.confusion import confusion_matrix, overall_indices
from pylorus.evaluation.discrimination import auroc
from pylorus.evaluation.index_intervals import indices_of_confusion, wilson
from pylorus.evaluation.intervals import Estimate, decide_noninferiority
from pylorus.evaluation.predictions import Predictions
from pylorus.report.study_tables import STUDY


def ranked(score, helped):
    """A clinical measurement as the probability of one class of two; only its order matters."""
    chance = score / 20
    names = np.arange(len(score)).astype(str)
    return Predictions(names, names, (~helped).astype(int), np.column_stack([chance, 1 - chance]), ("yes", "no"))


@pytest.mark.parametrize(
    ("score", "difference", "error", "chi_square", "p_value"),
    [("albumin", 0.0108, 0.0953, 0.0127, 0.9102), ("protein", -0.0780, 0.1046, 0.5554, 0.4561)],
)
def test_the_paired_tests_of_the_published_delong_example_are_found(
    delong_1988, score, difference, error, chi_square, p_value
):
    """Ours takes Student's t with Welch's degrees of freedom, and so a slightly larger p."""
    first, second = (ranked(delong_1988[name], delong_1988["helped"]) for name in (score, "K-G score"))
    found = delong_test(first, second, class_name="yes")
    assert found.value == pytest.approx(difference, abs=5e-5)
    assert found.standard_error == pytest.approx(error, abs=5e-5)
    assert (found.value / found.standard_error) ** 2 == pytest.approx(chi_square, abs=5e-5)
    assert p_value < found.p_value < p_value + 0.02


def test_the_difference_of_areas_is_that_of_the_areas(simulate_predictions):
    first, second = (
        simulate_predictions(images=90, groups=30, skill=2.5, model=1),
        simulate_predictions(images=90, groups=30, skill=1.0, model=2),
    )
    for each, name in enumerate(first.class_names):
        found = delong_test(first, second, class_name=name)
        areas = [auroc(first.true == each, model.probabilities[:, each]).value for model in (first, second)]
        assert found.value == pytest.approx(areas[0] - areas[1])
        assert found.low < found.value < found.high


def test_areas_that_do_not_vary_have_an_interval_on_both_sides_of_zero(one_hot):
    truth = np.array([0, 0, 1, 1])
    perfect = replace(one_hot(truth), true=truth)
    assert delong_test(perfect, perfect, class_name="x").p_value == 1.0
    found = delong_test(perfect, perfect, class_name="x")
    assert -1 <= found.low < 0 < found.high <= 1
    wrong = replace(perfect, probabilities=1 - perfect.probabilities)
    apart = delong_test(perfect, wrong, class_name="x")
    assert apart.low > 0
    assert apart.p_value < 0.05


def test_a_class_absent_from_test_has_no_area_to_compare(one_hot):
    model = one_hot(np.array([0, 1]))  # all images are of class x
    assert math.isnan(delong_test(model, model, class_name="y").value)
    with pytest.raises(ValueError, match='no class "z"'):
        delong_test(model, model, class_name="z")


def test_differences_are_those_of_the_indices(simulate_predictions):
    first, second = (
        simulate_predictions(images=120, skill=2.5, model=1),
        simulate_predictions(images=120, skill=1.0, model=2),
    )
    found = paired_differences(first, second, seed=0)
    ours, theirs = (overall_indices(confusion_matrix(model.true, model.predicted, 3)) for model in (first, second))
    for name in INDICES:
        difference = getattr(found, name)
        assert difference.value == pytest.approx(float(getattr(ours, name) - getattr(theirs, name)))
        assert difference.low < difference.value < difference.high
    assert (found.macro_f1.p_value < 0.05) == (found.macro_f1.low > 0)


def test_exchanging_the_models_negates_the_differences(simulate_predictions):
    first, second = (
        simulate_predictions(images=120, skill=2.5, model=1),
        simulate_predictions(images=120, skill=1.0, model=2),
    )
    there = paired_differences(first, second, seed=0).macro_f1
    back = paired_differences(second, first, seed=0).macro_f1
    assert back.value == pytest.approx(-there.value)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=0.005)


def test_correlated_errors_narrow_the_interval(simulate_predictions):
    """Two models mistaken on the same images are compared far more sharply than their own intervals suggest."""
    first = simulate_predictions(images=300, skill=1.5)
    chance = first.probabilities.copy()
    chance[:8] = np.roll(chance[:8], 1, axis=1)
    difference = paired_differences(first, replace(first, probabilities=chance), seed=0).accuracy
    assert difference.high - difference.low < 0.05


def test_the_p_of_accuracy_is_the_exact_one(simulate_predictions):
    first, second = (
        simulate_predictions(images=90, groups=30, model=1),
        simulate_predictions(images=90, groups=30, model=2),
    )
    assert paired_differences(first, second, seed=0).accuracy.p_value == mcnemar(first, second).p_value


def test_models_with_equal_predictions_do_not_differ(simulate_predictions):
    model = simulate_predictions(images=60)
    found = paired_differences(model, model, seed=0).macro_f1
    assert (found.value, found.p_value) == (0.0, 1.0)
    assert -0.1 < found.low <= 0 <= found.high < 0.1


def test_differences_stay_in_their_range(one_hot):
    """Twelve patients, a perfect model and one that is always wrong."""
    truth = np.arange(12) % 2
    perfect = replace(one_hot(truth), true=truth)
    wrong = replace(perfect, probabilities=1 - perfect.probabilities)
    found = paired_differences(perfect, wrong, seed=0)
    for name in INDICES:
        difference = getattr(found, name)
        most = 2 if name in ("cohen_kappa", "mcc") else 1
        assert -most <= difference.low <= difference.value <= difference.high <= most
    area = delong_test(perfect, wrong, class_name="x")
    assert -1 <= area.low <= area.high <= 1


def test_a_difference_of_few_patients_is_never_shown_with_a_tiny_p(simulate_predictions):
    """What twelve patients can show at most is 2 exchanges in 4,096, and 4 where 2 leave the index undefined."""
    truth = np.repeat(np.arange(12) % 2, 5)
    names = np.arange(60).astype(str)
    right, wrong = (
        Predictions(names, np.repeat(np.arange(12), 5), truth, np.eye(2)[answer], ("a", "b"))
        for answer in (truth, 1 - truth)
    )
    found = paired_differences(right, wrong, seed=0)
    for name in INDICES:
        assert 2 / 4096 <= getattr(found, name).p_value <= 4 / 4096


@pytest.mark.slow
def test_equal_models_differ_significantly_in_5_percent_of_studies_for_every_index():
    """Large and small patients with similar images: exchanging whole patients keeps the type I error."""
    generator, rejected = np.random.default_rng(0), dict.fromkeys(INDICES, 0)
    for study in range(200):
        sizes = np.where(generator.random(40) < 0.9, 1, 20)
        group = np.repeat(np.arange(40), sizes)
        truth = generator.integers(0, 3, 40)[group]
        models = []
        for _ in range(2):
            logits = generator.standard_normal((40, 3))[group] + generator.standard_normal((len(group), 3))
            logits[np.arange(len(group)), truth] += 2
            chance = np.exp(logits)
            names = np.arange(len(group)).astype(str)
            chance /= chance.sum(axis=1, keepdims=True)
            models.append(Predictions(names, group, truth, chance, ("a", "b", "c")))
        found = paired_differences(*models, seed=study, resamples=400)
        for name in INDICES:
            rejected[name] += getattr(found, name).p_value < 0.05
    assert max(rejected.values()) / 200 <= 0.085  # 0.05, and two standard errors


def test_one_discordant_image_is_not_significant(one_hot):
    truth = np.arange(20) % 2
    perfect = replace(one_hot(truth), true=truth)
    once_wrong = replace(perfect, probabilities=np.vstack([[0.0, 1.0], perfect.probabilities[1:]]))
    found = paired_differences(perfect, once_wrong, seed=0).macro_f1
    assert found.value > 0
    assert found.p_value == 1.0
    assert found.low < 0 < found.high


def test_an_index_undefined_for_one_model_is_undefined(one_hot):
    model, other = one_hot(np.array([0, 1, 0, 1])), one_hot(np.array([1, 1, 0, 0]))
    found = paired_differences(model, other, seed=0, resamples=50).balanced_accuracy
    assert math.isnan(found.value)
    assert math.isnan(found.p_value)
    assert not found.has_interval
    assert found.reason


def test_different_test_sets_are_refused(simulate_predictions):
    with pytest.raises(ValueError, match="not for the same images"):
        paired_differences(simulate_predictions(images=30), simulate_predictions(images=31), seed=0)
    with pytest.raises(ValueError, match="not for the same images"):
        delong_test(simulate_predictions(images=30), simulate_predictions(images=31), class_name="GC")


def test_a_class_that_is_always_right_in_one_model_and_never_in_the_other_leaves_the_interval_its_width():
    truth, half = np.repeat([0, 1], 40), np.tile([1, 0], 20)
    names = np.arange(80).astype(str)
    one, other = (
        Predictions(names, names, truth, np.eye(2)[np.concatenate([np.full(40, answer), half])], ("a", "b"))
        for answer in (0, 1)
    )
    found = paired_differences(one, other, seed=0).balanced_accuracy
    assert found.value == pytest.approx(0.5)
    assert found.high - found.low > 0.03


def test_a_single_patient_has_no_standard_error_and_still_an_interval(simulate_predictions):
    first, second = (
        simulate_predictions(images=30, groups=1, model=1),
        simulate_predictions(images=30, groups=1, model=2),
    )
    found = paired_differences(first, second, seed=0).accuracy
    assert math.isnan(found.standard_error)
    assert found.has_interval


def test_many_classes_and_patients_of_one_image_are_compared_in_bounded_memory():
    generator = np.random.default_rng(0)
    truth, names = generator.integers(0, 20, 20_000), np.arange(20_000).astype(str)
    models = []
    for _ in range(2):
        answers = np.where(generator.random(20_000) < 0.8, truth, generator.integers(0, 20, 20_000))
        models.append(Predictions(names, names, truth, np.eye(20)[answers], tuple(map(str, range(20)))))
    tracemalloc.start()
    found = paired_differences(*models, seed=0, resamples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.macro_f1.has_interval
    assert peak < 600 * 2**20


@pytest.mark.parametrize(("a", "n", "b", "m"), [(409, 450, 401, 450), (5, 56, 0, 29), (10, 10, 20, 20), (1, 9, 90, 95)])
def test_two_proportions_give_newcombes_interval_of_statsmodels(a, n, b, m):
    found = difference_of_independent(wilson(a, n), wilson(b, m))
    low, high = confint_proportions_2indep(a, n, b, m, method="newcomb", compare="diff")
    assert found.value == pytest.approx(a / n - b / m)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_newcombes_published_example_is_reproduced():
    """Newcombe (1998), table II, method 10: 56/70 - 48/80 = 0.2, interval 0.0524 to 0.3339."""
    found = difference_of_independent(wilson(56, 70), wilson(48, 80))
    assert (round(found.low, 4), round(found.high, 4)) == (0.0524, 0.3339)


def test_macro_f1_of_two_published_models_is_not_shown_to_differ():
    resnet50, vgg19 = (
        indices_of_confusion(STUDY.get_result(model, "finetune").confusion, seed=0).macro_f1
        for model in ("ResNet50", "VGG19")
    )
    difference = difference_of_independent(resnet50, vgg19)
    assert difference.low < 0 < difference.high


def test_an_undefined_estimate_makes_the_difference_undefined():
    assert not difference_of_independent(wilson(0, 0), wilson(3, 4)).defined


def test_an_estimate_without_an_interval_leaves_the_difference_without_one():
    found = difference_of_independent(Estimate(1.0, float("nan"), float("nan")), wilson(3, 4))
    assert found.value == 0.25
    assert not found.has_interval


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
def test_with_groups_p_is_the_proportion_of_exchanges_as_extreme(one_hot, seed):
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


def test_mcnemar_refuses_different_test_sets(one_hot):
    with pytest.raises(ValueError, match="not for the same images"):
        mcnemar(one_hot(np.array([0, 1])), one_hot(np.array([0, 1, 1])))


def test_the_same_images_in_another_order_give_the_same_answer(simulate_predictions):
    first, second = simulate_predictions(images=80, model=1), simulate_predictions(images=80, model=2)
    order = np.random.default_rng(0).permutation(80)
    turned = replace(
        second,
        sample=second.sample[order],
        group=second.group[order],
        true=second.true[order],
        probabilities=second.probabilities[order],
    )
    assert mcnemar(first, turned) == mcnemar(first, second)


def test_ten_thousand_images_are_compared_quickly(one_hot):
    generator = np.random.default_rng(0)
    first, second = one_hot(generator.integers(0, 2, 10_000)), one_hot(generator.integers(0, 2, 10_000))
    only = int((first.correct & ~second.correct).sum()), int((second.correct & ~first.correct).sum())
    expected = contingency_tables.mcnemar([[0, only[0]], [only[1], 0]], exact=True).pvalue
    assert mcnemar(first, second).p_value == pytest.approx(expected)


def test_corrected_p_values_follow_holms_steps():
    p_values = np.array([0.01, 0.4, 0.03, 0.005])
    ordered = np.sort(p_values)
    steps = np.minimum(1, np.maximum.accumulate(ordered * np.arange(4, 0, -1)))
    np.testing.assert_allclose(holm(p_values), steps[np.searchsorted(ordered, p_values)])


def test_one_test_needs_no_correction():
    assert holm(np.array([0.03])).tolist() == [0.03]


@pytest.mark.parametrize("family", [[], [0.1, np.nan], [1.2], [-0.1], [[0.1]]])
def test_a_family_with_an_invalid_p_value_is_refused(family):
    with pytest.raises(ValueError, match="p-values"):
        holm(np.array(family))


@pytest.mark.parametrize("seed", range(20))
def test_holm_gives_the_corrected_p_values_of_statsmodels(seed):
    rng = np.random.default_rng(seed)
    family = rng.choice([0.0, 1.0, 0.01, *rng.random(8)], rng.integers(1, 12))
    np.testing.assert_array_equal(holm(family), multitest.multipletests(family, method="holm")[1])


@pytest.mark.parametrize(
    ("low", "high", "decision"),
    [
        (-0.04, 0.02, (True, False, True)),
        (-0.06, 0.02, (False, False, False)),
        (0.01, 0.08, (True, True, False)),
        (-0.05, 0.02, (False, False, False)),
        (np.nan, np.nan, (False, False, False)),
    ],
)
def test_an_interval_decides_on_noninferiority_superiority_and_equivalence(low, high, decision):
    found = decide_noninferiority(Estimate(0.0, low, high), margin=0.05)
    assert (found.noninferior, found.superior, found.equivalent) == decision


@pytest.mark.parametrize("margin", [0.0, -0.05, np.nan, np.inf])
def test_a_margin_that_is_not_above_zero_is_refused(margin):
    with pytest.raises(ValueError, match="the margin is"):
        decide_noninferiority(Estimate(0.0, -0.1, 0.1), margin=margin)


@pytest.mark.slow
def test_a_model_that_is_worse_by_the_margin_is_seldom_called_noninferior():
    generator, sets, images = np.random.default_rng(6), 400, 300
    names, truth = np.array([f"image {index}" for index in range(images)]), np.zeros(images, dtype=np.int64)
    groups, passed = np.repeat(np.arange(images // 3), 3), 0
    for _ in range(sets):
        own = np.repeat(generator.random(images // 3), 3)  # the images of a patient are alike in difficulty
        same = generator.random(images) < 0.5
        draw = np.where(same, own, generator.random(images))
        first = Predictions(names, groups, truth, np.eye(2)[(draw > 0.85).astype(int)], ("x", "y"))
        second = Predictions(names, groups, truth, np.eye(2)[(draw > 0.90).astype(int)], ("x", "y"))
        difference = paired_differences(first, second, seed=0, resamples=1).accuracy
        passed += decide_noninferiority(difference, margin=0.05).noninferior
    assert passed / sets < 0.045
