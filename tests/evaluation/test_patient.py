from dataclasses import replace

import numpy as np
import pytest

from pylorus.evaluation.predictions import patient_level


def test_a_patient_is_the_mean_of_its_images(said):
    images = said(images=60, groups=25)
    patients = patient_level(images)
    said_of_patients = patients.predictions
    assert len(said_of_patients.true) == 25
    assert patients.images.sum() == 60
    assert (said_of_patients.sample == said_of_patients.group).all()
    for row, name in enumerate(said_of_patients.sample):
        own = images.group == name
        np.testing.assert_allclose(said_of_patients.probabilities[row], images.probabilities[own].mean(axis=0))
        assert (images.true[own] == said_of_patients.true[row]).all()


def test_one_image_a_patient_changes_nothing_but_names(said):
    images = said(images=30)
    patients = patient_level(images).predictions
    np.testing.assert_array_equal(patients.probabilities, images.probabilities)
    assert (patients.true == images.true).all()


def test_a_patient_with_several_true_classes_is_refused_by_name(said):
    images = said(images=20, groups=10)
    truth = images.true.copy()
    truth[0] = (truth[0] + 1) % 3
    with pytest.raises(ValueError, match=r"1 of 10 groups .*patient-00000"):
        patient_level(replace(images, true=truth))


def test_a_patient_with_several_true_classes_can_be_left_out_and_is_named(said):
    images = said(images=20, groups=10)
    truth = images.true.copy()
    truth[0] = (truth[0] + 1) % 3
    patients = patient_level(replace(images, true=truth), leave_out_mixed=True)
    assert patients.left_out == ("patient-00000",)
    assert "patient-00000" not in patients.predictions.sample
    assert len(patients.predictions.true) == len(patients.images) == 9


def test_nothing_is_left_where_every_patient_is_mixed(said):
    images = replace(said(images=4, groups=2), true=np.array([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="no patient-level prediction remains"):
        patient_level(images, leave_out_mixed=True)


def test_patients_numbered_by_integers_become_names(said):
    images = replace(said(images=4), group=np.array([7, 7, 12, 12]), true=np.array([0, 0, 1, 1]))
    assert patient_level(images).predictions.sample.tolist() == ["7", "12"]
