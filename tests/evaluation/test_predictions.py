"""Predictions as evaluation reads them: what is refused, how models are aligned, one prediction per patient."""

from dataclasses import replace

import numpy as np
import pytest

from pylorus.evaluation.predictions import (
    align_predictions,
    check_flags,
    check_labels,
    check_logits,
    check_names,
    check_probabilities,
    check_scores,
    encode_groups,
    patient_level,
)


def shuffled(predictions, order):
    return replace(
        predictions,
        sample=predictions.sample[order],
        group=predictions.group[order],
        true=predictions.true[order],
        probabilities=predictions.probabilities[order],
    )


def test_images_in_another_order_are_put_in_the_first_order(simulate_predictions):
    first = simulate_predictions(images=50, groups=20)
    back = align_predictions(first, shuffled(first, np.random.default_rng(0).permutation(50)))
    assert (back.sample == first.sample).all()
    assert (back.true == first.true).all()
    assert (back.group == first.group).all()
    np.testing.assert_array_equal(back.probabilities, first.probabilities)


@pytest.mark.parametrize("order", [[1, 2, 0], [2, 0, 1], [1, 0, 2], [2, 1, 0]])
def test_classes_in_another_order_are_put_in_the_first_order(simulate_predictions, order):
    first = simulate_predictions(images=50)
    turned = replace(
        first,
        class_names=tuple(first.class_names[each] for each in order),
        probabilities=first.probabilities[:, order],
        true=np.argsort(order)[first.true],
    )
    back = align_predictions(first, turned)
    assert back.class_names == first.class_names
    assert (back.true == first.true).all()
    np.testing.assert_array_equal(back.probabilities, first.probabilities)


def test_different_test_sets_are_refused(simulate_predictions):
    first, second = simulate_predictions(images=50), simulate_predictions(images=40)
    with pytest.raises(ValueError, match=r"not for the same images .* image-00040, image-00041, image-00042 and 7"):
        align_predictions(first, second)


def test_different_classes_are_refused(simulate_predictions):
    first = simulate_predictions(images=10)
    with pytest.raises(ValueError, match="classes differ"):
        align_predictions(first, replace(first, class_names=("GC", "GU", "normal")))


def test_another_true_class_or_patient_for_the_same_image_is_refused(simulate_predictions):
    first = simulate_predictions(images=10)
    truth, group = first.true.copy(), first.group.copy()
    truth[3] = (truth[3] + 1) % 3
    group[4] = "somebody else"
    with pytest.raises(ValueError, match="true classes of image-00003"):
        align_predictions(first, replace(first, true=truth))
    with pytest.raises(ValueError, match="groups of image-00004"):
        align_predictions(first, replace(first, group=group))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": np.array(["a", "b"])}, "2 samples"),
        ({"sample": np.array(["a", "a", "b"])}, "more than once: a"),
        ({"true": np.array([0, 1])}, "2 true labels"),
        ({"true": np.array([0.0, 1.0, 1.0])}, "float64"),
        ({"true": np.array([0, 1, 2])}, "true label 2"),
        ({"group": np.array([0.5, 1.5, 2.5])}, "groups"),
        ({"class_names": ("x",)}, "class names"),
        ({"class_names": ("x", "x")}, "class names"),
        ({"probabilities": np.array([[0.5, 0.5], [np.nan, 1.0], [1.0, 0.0]])}, "image 1 are NaN"),
        ({"probabilities": np.full((3, 2), 0.4)}, "sum to 0.8"),
    ],
)
def test_inconsistent_predictions_are_refused(one_hot, change, message):
    good = one_hot(np.array([0, 1, 0]))
    with pytest.raises(ValueError, match=message):
        replace(good, **change)


def test_ties_are_predicted_as_the_first_class(one_hot):
    even = replace(one_hot(np.array([0, 1])), probabilities=np.full((2, 2), 0.5))
    assert even.predicted.tolist() == [0, 0]
    assert even.correct.tolist() == [True, True]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0.0, 1.0]), "float64"),
        (np.array([True, False]), "bool"),
        (np.array([0, 3]), "label 3 at position 1 is not in"),
        (np.array([-1, 0]), "label -1 at position 0"),
        (np.array([], dtype=np.int64), "expected at least one image"),
        (np.array([[0, 1]]), "shape"),
    ],
)
def test_invalid_labels_are_refused_with_the_value_found(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels, 3, name="true")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0.5, np.nan]], "image 0 are NaN"),
        ([[0.5, 0.5], [np.inf, 0.0]], "image 1 are NaN or infinite"),
        ([[0.7, 0.7]], "sum to 1.4"),
        ([[0.3, 0.3]], "sum to 0.6"),
        ([[1.5, -0.5]], r"not in \[0, 1\]"),
        ([[1.0]], "shape"),
        ([0.5, 0.5], "shape"),
        (np.empty((0, 3)), "shape"),
    ],
)
def test_invalid_probabilities_are_refused(table, message):
    with pytest.raises(ValueError, match=message):
        check_probabilities(np.array(table))


def test_half_precision_probabilities_are_accepted():
    logits = np.random.default_rng(0).standard_normal((500, 23))
    chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert check_probabilities(chance.astype(np.float16)).dtype == np.float64


def test_logits_may_be_any_finite_numbers_but_not_nan():
    assert check_logits(np.array([[-50.0, 900.0]])).tolist() == [[-50.0, 900.0]]
    with pytest.raises(ValueError, match="logits of image 0"):
        check_logits(np.array([[np.nan, 0.0]]))


def test_scores_and_flags_must_fit_the_images():
    with pytest.raises(ValueError, match=r"expected \(2,\)"):
        check_scores(np.ones(3), length=2)
    with pytest.raises(ValueError, match="score of image 1 is nan"):
        check_scores(np.array([0.0, np.nan]), length=2)
    with pytest.raises(ValueError, match="booleans"):
        check_flags(np.array([0, 1]), name="positive")


@pytest.mark.parametrize(
    "groups", [np.array([1.0, np.nan]), np.array(["a", None], dtype=object), np.array(["a"]), np.array([[1, 2]])]
)
def test_a_missing_or_misshapen_group_is_refused(groups):
    with pytest.raises(ValueError, match="groups"):
        encode_groups(groups, length=2)


def test_groups_are_numbered_by_name_whatever_their_type():
    text = np.array(["b", "a", "b"])
    assert encode_groups(text, length=3).tolist() == [1, 0, 1]
    assert encode_groups(text.astype(object), length=3).tolist() == [1, 0, 1]
    assert encode_groups(np.array([70, 7, 70]), length=3).tolist() == [1, 0, 1]
    assert encode_groups(None, length=3).tolist() == [0, 1, 2]


def test_names_are_converted_to_text():
    assert check_names(np.array(["a", "b"], dtype=object)).dtype.kind == "U"
    with pytest.raises(ValueError, match="expected text"):
        check_names(np.array([1, 2]))


def test_a_patient_is_the_mean_of_its_images(simulate_predictions):
    images = simulate_predictions(images=60, groups=25)
    patients = patient_level(images)
    said_of_patients = patients.predictions
    assert len(said_of_patients.true) == 25
    assert patients.images.sum() == 60
    assert (said_of_patients.sample == said_of_patients.group).all()
    for row, name in enumerate(said_of_patients.sample):
        own = images.group == name
        np.testing.assert_allclose(said_of_patients.probabilities[row], images.probabilities[own].mean(axis=0))
        assert (images.true[own] == said_of_patients.true[row]).all()


def test_one_image_a_patient_changes_nothing_but_names(simulate_predictions):
    images = simulate_predictions(images=30)
    patients = patient_level(images).predictions
    np.testing.assert_array_equal(patients.probabilities, images.probabilities)
    assert (patients.true == images.true).all()


def test_a_patient_with_several_true_classes_is_refused_by_name(simulate_predictions):
    images = simulate_predictions(images=20, groups=10)
    truth = images.true.copy()
    truth[0] = (truth[0] + 1) % 3
    with pytest.raises(ValueError, match=r"1 of 10 groups .*patient-00000"):
        patient_level(replace(images, true=truth))


def test_a_patient_with_several_true_classes_can_be_left_out_and_is_named(simulate_predictions):
    images = simulate_predictions(images=20, groups=10)
    truth = images.true.copy()
    truth[0] = (truth[0] + 1) % 3
    patients = patient_level(replace(images, true=truth), leave_out_mixed=True)
    assert patients.left_out == ("patient-00000",)
    assert "patient-00000" not in patients.predictions.sample
    assert len(patients.predictions.true) == len(patients.images) == 9


def test_no_patient_remains_if_all_have_several_classes(simulate_predictions):
    images = replace(simulate_predictions(images=4, groups=2), true=np.array([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="no patient-level prediction remains"):
        patient_level(images, leave_out_mixed=True)


def test_patients_numbered_by_integers_become_names(simulate_predictions):
    images = replace(simulate_predictions(images=4), group=np.array([7, 7, 12, 12]), true=np.array([0, 0, 1, 1]))
    assert patient_level(images).predictions.sample.tolist() == ["7", "12"]
