import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sklearn.metrics import roc_curve

from pylorus.report import result_figures
from pylorus.report.figure_style import report_style
from pylorus.report.result_figures import compute_roc_points, plot_published_confusion_matrices
from pylorus.report.study_tables import STUDY


@pytest.mark.parametrize("stages", [1, 2])
def test_titles_and_labels_are_not_cut_off(stages, monkeypatch):
    names = sorted({result.stage for result in STUDY.results})[:stages]
    results = tuple(result for result in STUDY.results if result.stage in names)
    monkeypatch.setattr(result_figures, "STUDY", type(STUDY)(**{**vars(STUDY), "results": results}))
    figure = plot_published_confusion_matrices().figure
    with report_style():
        canvas = FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        boxes = [axes.get_tightbbox(canvas.get_renderer()) for axes in figure.axes]
    assert min(min(box.x0, box.y0) for box in boxes) >= 0
    assert max(box.x1 for box in boxes) <= figure.bbox.width
    assert max(box.y1 for box in boxes) <= figure.bbox.height


@pytest.mark.parametrize("seed", range(10))
def test_the_roc_curve_is_that_of_scikit_learn_with_ties(seed):
    rng = np.random.default_rng(seed)
    positive = rng.random(50 * (seed + 1)) < 0.3
    scores = np.round(rng.random(len(positive)) + 0.3 * positive, seed % 4)
    false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
    computed_false, computed_true = compute_roc_points(positive, scores)
    assert np.array_equal(computed_false, false)
    assert np.array_equal(computed_true, true)
