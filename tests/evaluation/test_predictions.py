from dataclasses import replace

import numpy as np
import pytest

from pylorus.evaluation.predictions import align_predictions


def shuffled(predictions, order):
    return replace(
        predictions,
        sample=predictions.sample[order],
        group=predictions.group[order],
        true=predictions.true[order],
        probabilities=predictions.probabilities[order],
    )


def test_images_in_another_order_are_put_in_the_first_order(said):
    first = said(images=50, groups=20)
    back = align_predictions(first, shuffled(first, np.random.default_rng(0).permutation(50)))
    assert (back.sample == first.sample).all()
    assert (back.true == first.true).all()
    assert (back.group == first.group).all()
    np.testing.assert_array_equal(back.probabilities, first.probabilities)


@pytest.mark.parametrize("order", [[1, 2, 0], [2, 0, 1], [1, 0, 2], [2, 1, 0]])
def test_classes_in_another_order_are_put_in_the_first_order(said, order):
    first = said(images=50)
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


def test_different_test_sets_are_refused(said):
    first, second = said(images=50), said(images=40)
    with pytest.raises(ValueError, match=r"not for the same images .* image-00040, image-00041, image-00042 and 7"):
        align_predictions(first, second)


def test_different_classes_are_refused(said):
    first = said(images=10)
    with pytest.raises(ValueError, match="classes differ"):
        align_predictions(first, replace(first, class_names=("GC", "GU", "normal")))


def test_another_truth_or_another_patient_for_the_same_image_is_refused(said):
    first = said(images=10)
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
def test_what_does_not_fit_together_is_refused(one_hot, change, message):
    good = one_hot(np.array([0, 1, 0]))
    with pytest.raises(ValueError, match=message):
        replace(good, **change)


def test_of_equally_likely_classes_the_first_is_the_answer(one_hot):
    even = replace(one_hot(np.array([0, 1])), probabilities=np.full((2, 2), 0.5))
    assert even.predicted.tolist() == [0, 0]
    assert even.correct.tolist() == [True, True]
