"""The training images that represent each class are a bounded, even selection in which rare classes are complete."""

import numpy as np

from pylorus.model.inference import select_training_rows


def test_a_rare_class_is_complete_and_a_common_one_is_thinned_out_evenly():
    labels = np.repeat([0, 1, 2], [900, 40, 300])
    rows = select_training_rows(labels, classes=3)
    assert np.bincount(labels[rows]).tolist() == [100, 40, 100]
    assert np.all(np.diff(rows) > 0)
    assert np.diff(rows[labels[rows] == 0]).max() <= 10


def test_many_classes_share_a_thousand_images():
    labels = np.repeat(np.arange(50), 200)
    assert len(select_training_rows(labels, classes=50)) == 1000


def test_of_few_images_all_are_taken():
    labels = np.array([2, 0, 1, 1, 0])
    assert select_training_rows(labels, classes=3).tolist() == [0, 1, 2, 3, 4]
