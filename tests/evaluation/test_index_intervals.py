"""Confidence intervals of proportions, of each index and of their averages."""

import math
import tracemalloc
from dataclasses import astuple

import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from pylorus.evaluation.confusion import class_indices, confusion_matrix, overall_indices
from pylorus.evaluation.index_intervals import (
    OVERALL,
    clustered_wilson,
    indices_of_confusion,
    indices_of_predictions,
    proportions_of_confusion,
    proportions_of_predictions,
    wilson,
)
from pylorus.evaluation.influence import estimate_by_jackknife


def test_values_are_those_of_the_confusion_matrix(simulate_predictions):
    model = simulate_predictions(images=200)
    found = indices_of_predictions(model.true, model.predicted, model.group, classes=3)
    counts = confusion_matrix(model.true, model.predicted, 3)
    for name in OVERALL:
        estimate = getattr(found, name)
        assert estimate.value == pytest.approx(float(getattr(overall_indices(counts), name)))
        assert estimate.low < estimate.value < estimate.high
    assert [each.value for each in found.f1] == pytest.approx(class_indices(counts).f1.tolist())


def test_the_order_of_the_images_makes_no_difference(simulate_predictions):
    model = simulate_predictions(images=90, groups=30)
    order = np.random.default_rng(1).permutation(90)
    plain = indices_of_predictions(model.true, model.predicted, model.group, classes=3)
    shuffled = indices_of_predictions(model.true[order], model.predicted[order], model.group[order], classes=3)
    for name in OVERALL:
        assert astuple(getattr(plain, name))[:3] == pytest.approx(astuple(getattr(shuffled, name))[:3])


def test_images_of_few_patients_give_wider_intervals(simulate_predictions):
    model = simulate_predictions(images=300, groups=30)
    alone = indices_of_predictions(model.true, model.predicted, None, classes=3)
    grouped = indices_of_predictions(model.true, model.predicted, model.group, classes=3)
    for name in OVERALL:
        one, other = getattr(alone, name), getattr(grouped, name)
        assert other.value == pytest.approx(one.value)
        assert other.high - other.low > 1.3 * (one.high - one.low)


def test_a_published_matrix_is_a_set_of_independent_images():
    confusion = np.array([[143, 7, 0], [11, 120, 19], [0, 4, 146]])
    true = np.repeat([0, 1, 2], 150)
    predicted = np.concatenate([np.repeat([0, 1, 2], row) for row in confusion])
    assert indices_of_confusion(confusion) == indices_of_predictions(true, predicted, None, classes=3)


def test_balanced_accuracy_has_an_interval_for_a_class_without_errors():
    """10 of 10 right: the interval is that of the three classes' Wilson intervals, combined."""
    counts = np.array([[10, 0, 0], [4, 180, 6], [6, 12, 282]])
    found = indices_of_confusion(counts).balanced_accuracy
    parts = [wilson(10, 10), wilson(180, 190), wilson(282, 300)]
    assert found.low == pytest.approx(found.value - math.hypot(*(part.value - part.low for part in parts)) / 3)
    assert found.high >= found.value + math.hypot(*(part.high - part.value for part in parts)) / 3
    assert found.low == pytest.approx(0.868, abs=0.001)


def test_perfect_results_have_intervals_that_narrow_with_the_number_of_patients():
    true = np.arange(120) % 3
    many = indices_of_predictions(true, true, None, classes=3)
    few = indices_of_predictions(true, true, np.arange(120) // 10, classes=3)
    for name in (*OVERALL, "f1"):
        one, other = (getattr(each, name) if name != "f1" else each.f1[0] for each in (few, many))
        assert one.value == other.value == one.high == other.high == 1.0
        assert one.low < other.low < 1.0


def test_the_interval_of_a_perfect_kappa_is_as_wide_as_that_of_accuracy():
    true = np.arange(90) % 3
    found = indices_of_predictions(true, true, None, classes=3)
    assert found.cohen_kappa.low == pytest.approx(1 - (1 - wilson(90, 90).low) / (2 / 3))


def test_intervals_never_leave_the_range_of_the_index():
    generator = np.random.default_rng(0)
    for _ in range(200):
        images = int(generator.integers(1, 25))
        true, predicted = (generator.integers(0, 3, images) for _ in range(2))
        groups = generator.integers(0, int(generator.integers(1, images + 1)), images)
        found = indices_of_predictions(true, predicted, groups, classes=3)
        for name in OVERALL:
            estimate, lowest = getattr(found, name), -1 if name in ("cohen_kappa", "mcc") else 0
            if estimate.defined:
                assert lowest - 1e-9 <= estimate.low <= estimate.value + 1e-9
                assert estimate.value - 1e-9 <= estimate.high <= 1 + 1e-9
            else:
                assert estimate.reason


def test_an_absent_class_leaves_averages_undefined_and_kappa_defined():
    true, predicted = np.repeat([0, 1], 20), np.repeat([0, 1, 0, 1], [15, 5, 4, 16])
    found = indices_of_predictions(true, predicted, None, classes=3)
    assert math.isnan(found.macro_f1.value)
    assert math.isnan(found.f1[2].value)
    assert found.f1[2].reason == "no image is of the class or predicted as it"
    assert "no image is of the class" in found.balanced_accuracy.reason
    assert found.cohen_kappa.has_interval


def test_a_class_of_two_images_gives_a_wide_interval():
    true = np.repeat([0, 1, 2], [40, 40, 2])
    predicted = np.where(np.arange(82) % 7 == 0, (true + 1) % 2, true)
    found = indices_of_predictions(true, predicted, None, classes=3)
    sensitivity = proportions_of_predictions(true, predicted, None, classes=3).sensitivity[2]
    assert found.balanced_accuracy.value - found.balanced_accuracy.low > (sensitivity.value - sensitivity.low) / 3


def test_a_single_image_gives_an_uninformative_interval():
    found = indices_of_predictions(np.array([0]), np.array([0]), None, classes=2)
    assert not found.macro_f1.defined
    assert found.f1[0].value == 1.0
    assert found.f1[0].low < 0.5


def test_a_seed_argument_warns_that_it_has_no_effect():
    with pytest.warns(DeprecationWarning, match="no longer has an effect: seed, resamples"):
        indices_of_predictions(np.array([0, 1]), np.array([0, 1]), None, classes=2, seed=0, resamples=10)


@pytest.mark.parametrize("broken", [np.zeros((2, 2), dtype=int), np.ones((2, 2)), np.ones((3, 2, 2), dtype=int)])
def test_an_invalid_matrix_of_images_is_refused(broken):
    with pytest.raises(ValueError, match="confusion"):
        indices_of_confusion(broken)


@pytest.mark.parametrize("groups", [None, 3000])
def test_ten_thousand_predictions_take_little_memory(groups):
    generator = np.random.default_rng(0)
    true = generator.integers(0, 3, 10_000)
    predicted = np.where(generator.random(10_000) < 0.9, true, generator.integers(0, 3, 10_000))
    names = None if groups is None else generator.integers(0, groups, 10_000)
    tracemalloc.start()
    found = indices_of_predictions(true, predicted, names, classes=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.macro_f1.has_interval
    assert peak < 100 * 2**20


@pytest.mark.filterwarnings("error")
def test_kappa_of_an_always_wrong_model_is_negative():
    true = np.repeat([0, 1, 2], [10, 20, 5])
    predicted = np.concatenate([np.full(10, 1), np.full(15, 0), np.full(5, 2), np.full(5, 1)])
    found = indices_of_predictions(true, predicted, None, classes=3)
    assert found.cohen_kappa.high < 0
    assert found.mcc.high < 0


@pytest.mark.parametrize(("successes", "total"), [(0, 1), (1, 1), (0, 30), (30, 30), (7, 30), (409, 450)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_the_wilson_interval_is_that_of_statsmodels(successes, total, confidence):
    share = wilson(successes, total, confidence=confidence)
    low, high = proportion_confint(successes, total, alpha=1 - confidence, method="wilson")
    assert (share.low, share.high) == pytest.approx((low, high), abs=1e-12)
    assert 0 <= share.low <= share.value <= share.high <= 1
    assert (share.successes, share.total) == (successes, total)


def test_a_proportion_of_zero_images_is_undefined():
    share = wilson(0, 0)
    assert math.isnan(share.value)
    assert not share.defined
    assert not share.has_interval
    assert share.total == 0


@pytest.mark.parametrize(("successes", "total"), [(-1, 5), (6, 5), (0, -1)])
def test_more_successes_than_images_are_refused(successes, total):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, total)


@pytest.mark.parametrize("confidence", [0, 1, 95, math.nan])
def test_a_confidence_outside_0_and_1_is_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, confidence=confidence)


def test_one_image_a_patient_gives_the_plain_interval_to_the_last_digit():
    success = np.random.default_rng(0).random(80) < 0.8
    names = np.random.default_rng(1).permutation(80)
    assert clustered_wilson(success, names) == wilson(int(success.sum()), 80)
    assert clustered_wilson(success, None) == wilson(int(success.sum()), 80)


def test_copies_of_images_do_not_narrow_the_interval():
    success = np.random.default_rng(2).random(60) < 0.8
    alone = clustered_wilson(success, np.arange(60))
    tenfold = clustered_wilson(np.repeat(success, 10), np.repeat(np.arange(60), 10))
    assert tenfold.value == alone.value
    assert tenfold.low <= alone.low
    assert tenfold.high >= alone.high
    assert tenfold.high - tenfold.low < 1.1 * (alone.high - alone.low)


def test_perfect_accuracy_counts_groups_not_images():
    share = clustered_wilson(np.ones(100, dtype=bool), np.repeat(np.arange(10), 10))
    assert share.value == share.high == 1.0
    assert share.low <= wilson(10, 10).low


def test_many_images_of_one_patient_count_as_one():
    share = clustered_wilson(np.array([True] * 9 + [False]), np.zeros(10, dtype=int))
    assert share.high - share.low > 0.6


def test_the_order_of_the_images_and_the_names_of_the_groups_make_no_difference():
    generator = np.random.default_rng(3)
    success, groups = generator.random(90) < 0.7, generator.integers(0, 30, 90)
    order = generator.permutation(90)
    renamed = np.array([f"p{number}" for number in 1000 - groups])
    shuffled, plain = clustered_wilson(success[order], renamed[order]), clustered_wilson(success, groups)
    assert (shuffled.value, shuffled.low, shuffled.high) == pytest.approx((plain.value, plain.low, plain.high))


def test_proportions_of_a_class_without_images_or_predictions_are_undefined():
    shares = proportions_of_predictions(np.array([0, 0, 1]), np.array([0, 1, 1]), None, classes=3)
    assert math.isnan(shares.sensitivity[2].value)
    assert math.isnan(shares.precision[2].value)
    assert shares.specificity[2].value == 1.0
    assert shares.accuracy.successes == 2


def test_a_matrix_gives_what_its_images_one_by_one_give():
    confusion = np.array([[5, 1, 0], [2, 7, 1], [0, 0, 4]])
    true = np.repeat([0, 1, 2], confusion.sum(axis=1))
    predicted = np.concatenate([np.repeat([0, 1, 2], row) for row in confusion])
    assert proportions_of_confusion(confusion) == proportions_of_predictions(true, predicted, None, classes=3)


@pytest.mark.parametrize("broken", [np.ones((2, 2)), np.ones((2, 3), dtype=int), np.zeros((2, 2), dtype=int)])
def test_proportions_of_an_invalid_matrix_are_refused(broken):
    with pytest.raises(ValueError, match=r"confusion|no true labels"):
        proportions_of_confusion(broken)


def test_three_wrong_single_images_among_large_patients_do_not_look_certain():
    """45 patients with one image and 5 with 30: the errors are in small patients, but could be in large ones."""
    patients = np.concatenate([np.arange(45), np.repeat(np.arange(45, 50), 30)])
    right = np.ones(195, dtype=bool)
    right[:3] = False
    found, plain = clustered_wilson(right, patients), clustered_wilson(right, None)
    assert found.low < plain.low - 0.05


def test_large_and_small_patients_are_covered_together():
    """Where one patient in ten has 30 images, a share of 90 % is held by at least 90 of 100 intervals."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(400):
        sizes = np.where(generator.random(50) < 0.9, 1, 30)
        chance = np.repeat(generator.beta(0.9 * 2 / 3, 0.1 * 2 / 3, 50), sizes)  # intraclass correlation 0.6
        found = clustered_wilson(generator.random(len(chance)) < chance, np.repeat(np.arange(50), sizes))
        held += found.low <= 0.9 <= found.high
    assert held / 400 >= 0.92


def test_an_undefined_proportion_has_a_reason():
    shares = proportions_of_predictions(np.array([0, 0, 1]), np.array([0, 1, 1]), None, classes=3)
    assert shares.sensitivity[2].reason == "no image is of the class"
    assert shares.precision[2].reason == "the class is never predicted"
    assert shares.accuracy.reason == ""


def youden(table):
    """Sensitivity + specificity - 1 of each class, of a flat confusion matrix."""
    confusion = table.reshape(3, 3)
    present, hits = confusion.sum(axis=1), np.diag(confusion)
    return hits / present - (confusion.sum(axis=0) - hits) / (confusion.sum() - present)


def test_the_jackknife_of_single_images_has_the_standard_error_of_two_independent_proportions():
    true = np.repeat([0, 1, 2], 400)
    predicted = np.where(np.arange(1200) % 5 == 0, (true + 1) % 3, true)
    estimates = estimate_by_jackknife(youden, true * 3 + predicted, None, width=9)
    error = np.sqrt(0.8 * 0.2 / 400 + 0.1 * 0.9 / 800)
    for each in estimates:
        assert each.value == pytest.approx(0.7)
        assert (each.high - each.low) / 2 == pytest.approx(1.96 * error, rel=0.02)


def test_the_jackknife_takes_copies_of_an_image_for_one_image():
    true = np.repeat([0, 1, 2], 40)
    predicted = np.where(np.arange(120) % 5 == 0, (true + 1) % 3, true)
    cells = true * 3 + predicted
    single = estimate_by_jackknife(youden, cells, None, width=9)
    copies = estimate_by_jackknife(youden, np.repeat(cells, 4), np.repeat(np.arange(120), 4), width=9)
    assert [(each.value, each.low, each.high) for each in copies] == [
        pytest.approx((each.value, each.low, each.high)) for each in single
    ]


def test_the_jackknife_covers_the_true_value_of_grouped_images():
    generator, covered = np.random.default_rng(0), []
    for _ in range(300):
        ability = generator.beta(8, 2, size=60)
        true = np.repeat(np.arange(60) % 3, 5)
        hit = generator.random(300) < np.repeat(ability, 5)
        predicted = np.where(hit, true, (true + generator.integers(1, 3, size=300)) % 3)
        estimate = estimate_by_jackknife(youden, true * 3 + predicted, np.repeat(np.arange(60), 5), width=9)[0]
        covered.append(estimate.low <= 0.7 <= estimate.high)
    assert 0.91 <= np.mean(covered) <= 0.98


def divide(table):
    return np.array([int(table[0]) / int(table[3])])


@pytest.mark.parametrize(
    ("cells", "groups", "compute"),
    [
        ([0, 0, 3], [0, 0, 0], divide),  # one group
        ([0, 0, 3], [0, 1, 2], divide),  # undefined without the last image
        ([0, 4, 8], [0, 1, 2], lambda table: np.array([1.0])),  # nothing varies
        ([0, 4, 8], [0, 1, 2], lambda table: np.array([np.nan])),
    ],
)
def test_the_jackknife_gives_no_interval_where_it_knows_none(cells, groups, compute):
    (estimate,) = estimate_by_jackknife(compute, np.array(cells), np.array(groups), width=9)
    assert not estimate.has_interval
