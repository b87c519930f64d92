import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pylorus.report.figure_style import report_style
from pylorus.report.result_figures import plot_published_confusion_matrices
from pylorus.report.study_tables import STUDY


@pytest.mark.parametrize("stages", [1, 2])
def test_titles_and_labels_are_not_cut_off(stages, monkeypatch):
    names = sorted({result.stage for result in STUDY.results})[:stages]
    results = tuple(result for result in STUDY.results if result.stage in names)
    monkeypatch.setattr("pylorus.report.result_figures.STUDY", type(STUDY)(**{**vars(STUDY), "results": results}))
    figure = plot_published_confusion_matrices().figure
    with report_style():
        canvas = FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        boxes = [axes.get_tightbbox(canvas.get_renderer()) for axes in figure.axes]
    assert min(min(box.x0, box.y0) for box in boxes) >= 0
    assert max(box.x1 for box in boxes) <= figure.bbox.width
    assert max(box.y1 for box in boxes) <= figure.bbox.height
