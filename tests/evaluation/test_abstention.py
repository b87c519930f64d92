import numpy as np
import pytest

from pylorus.evaluation.decisions import risk_coverage


def test_each_point_is_what_answering_the_surest_images_gives():
    generator = np.random.default_rng(0)
    correct, certainty = generator.random(50) < 0.7, np.round(generator.random(50), 1)
    curve = risk_coverage(correct, certainty)
    for level, coverage, risk in zip(curve.certainty, curve.coverage, curve.risk, strict=True):
        answered = certainty >= level
        assert coverage == pytest.approx(answered.mean())
        assert risk == pytest.approx(1 - correct[answered].mean())
    assert curve.coverage[-1] == 1.0
    assert curve.risk[-1] == pytest.approx(1 - correct.mean())


def test_the_order_of_images_makes_no_difference():
    generator = np.random.default_rng(1)
    correct, certainty = generator.random(50) < 0.7, generator.choice([0.5, 0.7, 0.9], 50)
    order = generator.permutation(50)
    assert risk_coverage(correct, certainty).area == pytest.approx(risk_coverage(correct[order], certainty[order]).area)


def test_certainty_that_knows_its_mistakes_has_the_smaller_area():
    correct = np.repeat([True, False], [80, 20])
    knows, reversed_, nothing = (
        risk_coverage(correct, score).area for score in (correct + 0.0, ~correct + 0.0, np.ones(100))
    )
    assert knows < nothing < reversed_
    assert nothing == pytest.approx(0.2)


def test_without_a_mistake_there_is_no_risk_at_any_coverage():
    curve = risk_coverage(np.ones(3, dtype=bool), np.array([0.3, 0.6, 0.9]))
    assert curve.risk.tolist() == [0.0, 0.0, 0.0]
    assert curve.area == 0.0


def test_a_single_image_is_one_point():
    curve = risk_coverage(np.array([False]), np.array([0.9]))
    assert (curve.coverage.tolist(), curve.risk.tolist(), curve.area) == ([1.0], [1.0], 1.0)


@pytest.mark.parametrize(
    ("correct", "certainty"),
    [
        (np.array([1, 0]), np.array([0.5, 0.6])),
        (np.array([True, False]), np.array([0.5])),
        (np.array([True, False]), np.array([0.5, np.nan])),
        (np.array([], dtype=bool), np.array([])),
    ],
)
def test_what_does_not_fit_is_refused(correct, certainty):
    with pytest.raises(ValueError, match=r"correct|score"):
        risk_coverage(correct, certainty)
