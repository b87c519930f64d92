import numpy as np
import pytest

from pylorus.evaluation.predictions import (
    check_flags,
    check_labels,
    check_logits,
    check_names,
    check_probabilities,
    check_scores,
    encode_groups,
)


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
def test_labels_that_are_no_class_indices_are_refused_with_what_was_found(labels, message):
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
def test_probabilities_that_are_none_are_refused(table, message):
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


def test_names_are_text():
    assert check_names(np.array(["a", "b"], dtype=object)).dtype.kind == "U"
    with pytest.raises(ValueError, match="expected text"):
        check_names(np.array([1, 2]))
