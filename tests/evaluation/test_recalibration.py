"""A recalibration corrects what is off, does little on few images, and carries thresholds over."""

import numpy as np
import pytest

from pylorus.evaluation import Recalibration, fit_recalibration, study_recalibration


def draw(images, *, scale=1.0, bias=(0.0, 0.0, 0.0), seed=0):
    """Draw probabilities of a model, and classes from what they are after a recalibration."""
    chance = np.random.default_rng(seed)
    probabilities = chance.dirichlet((0.6, 0.6, 0.6), size=images)
    truth = Recalibration(scale, bias).apply(probabilities)
    true = (chance.random((images, 1)) > np.cumsum(truth, axis=1)).sum(axis=1).clip(0, 2)
    return probabilities, true.astype(np.int64)


def test_scale_and_biases_are_recovered_from_many_images():
    found = fit_recalibration(*draw(4000, scale=0.5, bias=(1.0, -0.5, -0.5)))
    assert found.scale == pytest.approx(0.5, abs=0.05)
    assert found.bias == pytest.approx((1.0, -0.5, -0.5), abs=0.15)
    assert sum(found.bias) == pytest.approx(0)


def test_few_images_change_little():
    probabilities = np.full((3, 3), 1 / 3)
    few = fit_recalibration(probabilities, np.zeros(3, dtype=np.int64)).apply(probabilities)[0, 0]
    assert 1 / 3 < few < 0.8


def test_copies_of_one_patient_count_as_fewer_images():
    probabilities, true = draw(30, bias=(1.0, 0.0, -1.0))
    alone = fit_recalibration(np.repeat(probabilities, 5, axis=0), np.repeat(true, 5))
    grouped = fit_recalibration(np.repeat(probabilities, 5, axis=0), np.repeat(true, 5), np.repeat(np.arange(30), 5))
    assert np.abs(grouped.bias).max() < np.abs(alone.bias).max()
    assert grouped.bias == pytest.approx(fit_recalibration(probabilities, true).bias, abs=0.1)


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5])
def test_what_reached_a_threshold_still_does(scale):
    probabilities, _ = draw(20_000, seed=3)
    recalibration = Recalibration(scale, (0.7, -0.9, 0.2))
    after = recalibration.apply(probabilities)
    for column in range(3):
        for threshold in (0.05, 0.3, 0.8):
            reached = after[probabilities[:, column] >= threshold, column]
            carried = recalibration.carry_threshold(threshold, column)
            assert (reached >= carried - 1e-12).all()
            assert carried > reached.min() - 0.1  # and it is not needlessly low


def test_two_classes_are_decided_as_before():
    probabilities = np.stack([np.linspace(0.01, 0.99, 99), 1 - np.linspace(0.01, 0.99, 99)], axis=1)
    recalibration = Recalibration(1.7, (0.4, -0.4))
    after, carried = recalibration.apply(probabilities), recalibration.carry_threshold(0.305, 0)
    assert ((after[:, 0] >= carried) == (probabilities[:, 0] >= 0.305)).all()


def test_what_it_is_worth_is_measured_on_other_patients():
    probabilities, true = draw(150, scale=0.4, seed=1)
    study = study_recalibration(probabilities, true, np.repeat(np.arange(75), 2))
    assert study.change.value < 0
    assert study.scale.low < study.fitted.scale < study.scale.high
    probabilities, true = draw(40, seed=2)
    useless = study_recalibration(probabilities, true)
    rows = np.arange(40)
    seen = -np.log(useless.fitted.apply(probabilities)[rows, true]).mean()
    assert seen < -np.log(useless.after[rows, true]).mean()  # the fit on all images would be optimistic
