"""The golden test: the study's 72 printed cells follow from its six confusion matrices.

A cell of a class is the index in percent, rounded half up. An average is the mean of the three *rounded* cells,
rounded again: that reproduces all 18 printed averages, where the mean of the unrounded indices misses one.
"""

import numpy as np
import pytest

from pylorus.evaluation.comparison import difference_of_independent
from pylorus.evaluation.confusion import accuracy, class_indices
from pylorus.evaluation.index_intervals import proportions_of_confusion, wilson
from pylorus.report.study_tables import STUDY

INDICES = ("precision", "sensitivity", "f1")
CELLS = [(result, index) for result in STUDY.results for index in INDICES]
NAMES = [f"{result.model}-{result.stage}-{index}" for result, index in CELLS]

MISPRINT = ("Inception-V3", "pretrain", "precision")
DOUBLY_ROUNDED = ("ResNet50", "pretrain", "f1")


def whole_percent(share):
    return np.floor(np.asarray(share) * 100 + 0.5).astype(int)


def test_there_are_six_matrices_of_450_images_and_72_printed_cells():
    assert [result.confusion.sum() for result in STUDY.results] == [450] * 6
    assert all((result.confusion.sum(axis=1) == STUDY.test_images).all() for result in STUDY.results)
    assert sum(len(getattr(result, index)) for result, index in CELLS) == 72


@pytest.mark.parametrize(("result", "index"), CELLS, ids=NAMES)
def test_each_printed_cell_of_a_class_follows_from_its_confusion_matrix(result, index):
    cells = whole_percent(getattr(class_indices(result.confusion), index))
    printed = np.array(getattr(result, index)[:3])
    differs = np.flatnonzero(cells != printed)
    assert differs.tolist() == ([1] if (result.model, result.stage, index) == MISPRINT else [])


@pytest.mark.parametrize(("result", "index"), CELLS, ids=NAMES)
def test_each_printed_average_is_the_mean_of_the_rounded_cells(result, index):
    cells = whole_percent(getattr(class_indices(result.confusion), index))
    assert whole_percent(cells.mean() / 100) == getattr(result, index)[3]


@pytest.mark.parametrize(("result", "index"), CELLS, ids=NAMES)
def test_each_printed_average_but_one_is_also_the_mean_of_the_unrounded_indices(result, index):
    average = whole_percent(getattr(class_indices(result.confusion), index).mean())
    expected = 88 if (result.model, result.stage, index) == DOUBLY_ROUNDED else getattr(result, index)[3]
    assert average == expected


def test_the_cell_that_the_paper_has_wrong_is_66_5_where_it_printed_64():
    result = STUDY.get_result("Inception-V3", "pretrain")
    precision = class_indices(result.confusion).precision[1]
    assert precision == pytest.approx(121 / 182)
    assert round(100 * precision, 1) == 66.5
    assert result.precision[1] == 64


def test_the_average_that_the_paper_rounded_twice_is_88_49_where_it_printed_89():
    result = STUDY.get_result("ResNet50", "pretrain")
    f1 = class_indices(result.confusion).f1
    assert round(100 * f1.mean(), 2) == 88.49
    assert whole_percent(whole_percent(f1).mean() / 100) == 89
    assert result.f1[3] == 89


def test_resnet50_is_best_by_8_images_and_the_intervals_overlap():
    right = {result.model: int(result.confusion.trace()) for result in STUDY.results if result.stage == "finetune"}
    assert right == {"VGG19": 401, "ResNet50": 409, "Inception-V3": 401}
    best, other = wilson(409, 450), wilson(401, 450)
    assert (round(best.low, 3), round(best.high, 3)) == (0.879, 0.932)
    assert (round(other.low, 3), round(other.high, 3)) == (0.859, 0.917)
    difference = difference_of_independent(best, other)
    assert difference.low < 0 < difference.high


def test_the_intervals_of_a_published_matrix_are_around_its_own_indices():
    for result in STUDY.results:
        shares = proportions_of_confusion(result.confusion)
        indices = class_indices(result.confusion)
        assert shares.accuracy.value == pytest.approx(accuracy(result.confusion))
        for name in ("precision", "sensitivity", "specificity", "npv"):
            np.testing.assert_allclose([s.value for s in getattr(shares, name)], getattr(indices, name))


def test_an_unknown_model_is_refused_with_those_known():
    with pytest.raises(KeyError, match="it has VGG19 pretrain"):
        STUDY.get_result("VGG16", "pretrain")
