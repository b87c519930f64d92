"""Results of a stage that are worth nothing are called that, and sound ones are not."""

import numpy as np
import pytest

from pylorus.evaluation.intervals import Estimate
from pylorus.runs.predictions import explain_degenerate_predictions, explain_training_problems

SURE, CHANCE = Estimate(0.9, 0.8, 0.95), Estimate(0.35, 0.2, 0.5)
SOUND = {"loss": (0.4, 0.5), "train_accuracy": 0.92, "validation": SURE, "frequent": 0.4, "classes": 3}


@pytest.mark.parametrize(
    ("change", "start"),
    [
        ({}, None),
        ({"loss": (5e7, 0.5)}, "The loss exploded: 5e+07 on training images"),
        ({"loss": (0.4, 40.0)}, "The loss exploded: 40 on validation images"),
        ({"loss": (float("nan"), float("nan"))}, None),
        ({"train_accuracy": 0.99, "validation": CHANCE}, "Training and validation contradict each other: 99.0 %"),
        ({"train_accuracy": 0.4, "validation": CHANCE}, None),
        ({"train_accuracy": 0.5}, "Validation images are classified better (90.0 %) than training images (50.0 %)"),
    ],
)
def test_what_went_wrong_in_training_is_said_and_nothing_else(change, start):
    sentences = explain_training_problems(**(SOUND | change))
    assert [sentence.startswith(start) for sentence in sentences] == ([] if start is None else [True])


def test_a_sound_result_is_not_called_degenerate():
    true = np.array([0, 1, 2] * 20)
    assert explain_degenerate_predictions(true, true, ("a", "b", "c"), SURE) == ()
    one_class = explain_degenerate_predictions(true, np.zeros(60, int), ("a", "b", "c"), CHANCE)
    assert one_class == ("The model predicts a for every test image.",)
    two_classes = explain_degenerate_predictions(true, np.array([0, 1, 1] * 20), ("a", "b", "c"), CHANCE)
    assert [("always answering a, 33.3 %" in sentence) for sentence in two_classes] == [True]
