import numpy as np
import pytest

from pylorus.evaluation.calibration import reliability_curve


def sure_of(certainty):
    return np.column_stack([certainty, 1 - np.asarray(certainty)])


def test_bins_hold_equally_many_images(said):
    model = said(images=100)
    curve = reliability_curve(model.probabilities, model.true, bins=10)
    assert curve.images.tolist() == [10] * 10
    assert (np.diff(curve.certainty) > 0).all()
    assert sum(share.successes for share in curve.accuracy) == model.correct.sum()


def test_the_error_is_the_mean_distance_of_accuracy_and_certainty(said):
    model = said(images=97)
    curve = reliability_curve(model.probabilities, model.true, bins=7)
    accuracy = np.array([share.value for share in curve.accuracy])
    assert curve.ece == pytest.approx((np.abs(accuracy - curve.certainty) * curve.images).sum() / 97)


def test_equal_certainties_share_a_bin_so_the_order_of_images_makes_no_difference():
    generator = np.random.default_rng(0)
    chance = sure_of(generator.choice([0.6, 0.9, 1.0], 60))
    true = generator.integers(0, 2, 60)
    order = generator.permutation(60)
    plain, shuffled = reliability_curve(chance, true), reliability_curve(chance[order], true[order])
    assert len(plain.images) <= 3
    assert plain.ece == pytest.approx(shuffled.ece)
    assert plain.accuracy == shuffled.accuracy


def test_calibrated_probabilities_have_a_small_error():
    generator = np.random.default_rng(0)
    certainty = generator.uniform(0.5, 1, 50_000)
    true = (generator.random(50_000) > certainty).astype(int)
    assert reliability_curve(sure_of(certainty), true).ece < 0.01


def test_fewer_images_than_bins_give_a_bin_an_image():
    curve = reliability_curve(sure_of([0.6, 0.8]), np.array([0, 1]), bins=10)
    assert curve.images.tolist() == [1, 1]
    assert curve.ece == pytest.approx((0.4 + 0.8) / 2)


def test_a_patient_with_many_images_widens_the_intervals():
    chance, true = sure_of(np.full(40, 0.8)), np.arange(40) % 5 // 4
    alone = reliability_curve(chance, true).accuracy[0]
    grouped = reliability_curve(chance, np.sort(true), np.repeat(np.arange(8), 5)).accuracy[0]
    assert grouped.value == alone.value
    assert grouped.high - grouped.low > alone.high - alone.low


@pytest.mark.parametrize(("true", "bins", "message"), [([0], 10, "1 true labels"), ([0, 1], 0, "bins is 0")])
def test_what_does_not_fit_is_refused(true, bins, message):
    with pytest.raises(ValueError, match=message):
        reliability_curve(sure_of([0.6, 0.8]), np.array(true), bins=bins)
