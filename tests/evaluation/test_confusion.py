import subprocess
import sys

import numpy as np
import pytest
from sklearn import metrics

from pylorus.evaluation.confusion import (
    accuracy,
    balanced_accuracy,
    class_indices,
    cohen_kappa,
    compute_macro_average,
    confusion_matrix,
    macro_f1,
    mcc,
    overall_indices,
)


def labels(seed, *, images=200, classes=4):
    generator = np.random.default_rng(seed)
    true = generator.integers(0, classes, images)
    return true, np.where(generator.random(images) < 0.6, true, generator.integers(0, classes, images))


@pytest.mark.parametrize("seed", range(5))
def test_every_index_agrees_with_scikit_learn(seed):
    true, predicted = labels(seed)
    confusion = confusion_matrix(true, predicted, 4)
    found = class_indices(confusion)
    assert (confusion == metrics.confusion_matrix(true, predicted)).all()
    np.testing.assert_allclose(found.precision, metrics.precision_score(true, predicted, average=None))
    np.testing.assert_allclose(found.sensitivity, metrics.recall_score(true, predicted, average=None))
    np.testing.assert_allclose(found.f1, metrics.f1_score(true, predicted, average=None))
    for each in range(4):
        others = metrics.recall_score(true != each, predicted != each)
        assert found.specificity[each] == pytest.approx(others)
        assert found.npv[each] == pytest.approx(metrics.precision_score(true != each, predicted != each))
    assert accuracy(confusion) == pytest.approx(metrics.accuracy_score(true, predicted))
    assert balanced_accuracy(confusion) == pytest.approx(metrics.balanced_accuracy_score(true, predicted))
    assert macro_f1(confusion) == pytest.approx(metrics.f1_score(true, predicted, average="macro"))
    assert cohen_kappa(confusion) == pytest.approx(metrics.cohen_kappa_score(true, predicted))
    assert mcc(confusion) == pytest.approx(metrics.matthews_corrcoef(true, predicted))


def test_a_class_absent_from_the_test_set_is_undefined_and_so_is_every_average_over_it():
    confusion = confusion_matrix(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), classes=3)
    found, overall = class_indices(confusion), overall_indices(confusion)
    assert np.isnan(found.sensitivity).tolist() == [False, False, True]
    assert np.isnan(found.precision).tolist() == [False, False, True]
    assert np.isnan(found.f1).tolist() == [False, False, True]
    assert found.specificity[2] == 1.0
    assert np.isnan(overall.balanced_accuracy)
    assert np.isnan(overall.macro_f1)
    assert np.isnan(overall.macro_precision)
    assert overall.accuracy == 0.75


def test_a_class_never_predicted_has_no_precision_but_an_f1_of_zero():
    found = class_indices(confusion_matrix(np.array([0, 1]), np.array([0, 0]), classes=2))
    assert np.isnan(found.precision[1])
    assert found.f1[1] == 0.0
    assert found.sensitivity[1] == 0.0


def test_a_single_image_has_an_accuracy_and_nothing_that_needs_two_classes():
    confusion = confusion_matrix(np.array([1]), np.array([1]), classes=3)
    assert accuracy(confusion) == 1.0
    assert np.isnan([balanced_accuracy(confusion), macro_f1(confusion), cohen_kappa(confusion), mcc(confusion)]).all()


def test_a_constant_prediction_leaves_mcc_undefined():
    confusion = np.array([[5, 0], [3, 0]])
    assert np.isnan(mcc(confusion))
    assert cohen_kappa(confusion) == 0.0


def test_no_images_give_undefined_metrics():
    assert np.isnan(accuracy(np.zeros((2, 2))))


def test_a_stack_gives_what_its_matrices_give_one_by_one():
    stack = np.array([confusion_matrix(*labels(seed), 4) for seed in range(6)])
    together = overall_indices(stack)
    for one, matrix in enumerate(stack):
        assert together.mcc[one] == mcc(matrix)
        assert together.macro_f1[one] == macro_f1(matrix)
        np.testing.assert_array_equal(class_indices(stack).f1[one], class_indices(matrix).f1)


def test_naming_the_classes_in_another_order_only_reorders_the_indices():
    confusion = confusion_matrix(*labels(7), 4)
    order = np.array([2, 0, 3, 1])
    shuffled = confusion[np.ix_(order, order)]
    np.testing.assert_allclose(class_indices(shuffled).f1, class_indices(confusion).f1[order])
    assert mcc(shuffled) == pytest.approx(mcc(confusion))


def test_exchanging_true_and_predicted_exchanges_precision_and_sensitivity():
    confusion = confusion_matrix(*labels(8), 4)
    np.testing.assert_allclose(class_indices(confusion.T).precision, class_indices(confusion).sensitivity)
    assert cohen_kappa(confusion.T) == pytest.approx(cohen_kappa(confusion))


def test_macro_average_never_leaves_a_class_out():
    assert np.isnan(compute_macro_average(np.array([1.0, np.nan, 1.0])))


@pytest.mark.parametrize(
    ("true", "predicted", "message"),
    [
        (np.array([0, 1]), np.array([0]), "2 true and 1 predicted labels"),
        (np.array([0, 2]), np.array([0, 1]), "true label 2"),
        (np.array([0, 1]), np.array([0, -1]), "predicted label -1"),
        (np.array([0.0, 1.0]), np.array([0, 1]), "float64"),
        (np.array([], dtype=int), np.array([], dtype=int), "expected at least one image"),
    ],
)
def test_labels_that_cannot_be_counted_are_refused(true, predicted, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(true, predicted, 2)


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="at least 2 classes"):
        confusion_matrix(np.array([0]), np.array([0]), 1)


@pytest.mark.parametrize("broken", [np.ones((2, 3)), np.array([[1.0, np.nan], [0, 1]]), np.array([[-1, 0], [0, 1]])])
def test_an_invalid_confusion_matrix_is_refused(broken):
    with pytest.raises(ValueError, match="confusion"):
        overall_indices(broken)


def test_a_stack_of_matrices_is_refused_for_a_single_value():
    with pytest.raises(ValueError, match="a single matrix"):
        accuracy(np.ones((3, 2, 2)))


@pytest.mark.slow
def test_importing_the_confusion_matrix_loads_numpy_and_nothing_heavier():
    code = (
        "import sys, pylorus.evaluation.confusion\n"
        "print([name for name in ('scipy', 'sklearn', 'statsmodels', 'pandas', 'torch') if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
