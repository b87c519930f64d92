import pytest
from statsmodels.stats.proportion import confint_proportions_2indep

from pylorus.evaluation.comparison import difference_of_independent
from pylorus.evaluation.index_intervals import indices_of_confusion, wilson
from pylorus.evaluation.intervals import Estimate
from pylorus.report.study_tables import STUDY


@pytest.mark.parametrize(("a", "n", "b", "m"), [(409, 450, 401, 450), (5, 56, 0, 29), (10, 10, 20, 20), (1, 9, 90, 95)])
def test_from_two_shares_it_is_the_interval_of_newcombe_in_statsmodels(a, n, b, m):
    found = difference_of_independent(wilson(a, n), wilson(b, m))
    low, high = confint_proportions_2indep(a, n, b, m, method="newcomb", compare="diff")
    assert found.value == pytest.approx(a / n - b / m)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_newcombes_own_example_is_found():
    """Newcombe (1998), table II, method 10: 56/70 - 48/80 = 0.2, interval 0.0524 to 0.3339."""
    found = difference_of_independent(wilson(56, 70), wilson(48, 80))
    assert (round(found.low, 4), round(found.high, 4)) == (0.0524, 0.3339)


def test_macro_f1_of_two_published_models_is_not_shown_to_differ():
    resnet50, vgg19 = (
        indices_of_confusion(STUDY.get_result(model, "finetune").confusion, seed=0).macro_f1
        for model in ("ResNet50", "VGG19")
    )
    difference = difference_of_independent(resnet50, vgg19)
    assert difference.low < 0 < difference.high


def test_an_undefined_estimate_makes_the_difference_undefined():
    assert not difference_of_independent(wilson(0, 0), wilson(3, 4)).defined


def test_an_estimate_without_an_interval_leaves_the_difference_without_one():
    found = difference_of_independent(Estimate(1.0, float("nan"), float("nan")), wilson(3, 4))
    assert found.value == 0.25
    assert not found.has_interval
