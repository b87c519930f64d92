import numpy as np
import pytest

from pylorus.evaluation.comparison import holm


def test_corrected_p_values_follow_holms_steps():
    p_values = np.array([0.01, 0.4, 0.03, 0.005])
    ordered = np.sort(p_values)
    steps = np.minimum(1, np.maximum.accumulate(ordered * np.arange(4, 0, -1)))
    np.testing.assert_allclose(holm(p_values), steps[np.searchsorted(ordered, p_values)])


def test_one_test_needs_no_correction():
    assert holm(np.array([0.03])).tolist() == [0.03]


@pytest.mark.parametrize("family", [[], [0.1, np.nan], [1.2], [-0.1], [[0.1]]])
def test_a_family_with_a_test_missing_or_impossible_is_refused(family):
    with pytest.raises(ValueError, match="p-values"):
        holm(np.array(family))
