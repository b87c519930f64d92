import numpy as np
import pandas as pd
import pytest

from pylorus.report.curve_figures import collect_curves, plot_class_metric_curves, plot_training_curves
from pylorus.runs.reading import read_run


@pytest.fixture
def curves(make_run):
    return collect_curves([read_run(make_run())])


def test_epochs_of_each_stage_start_at_one(curves):
    assert [each.epochs.tolist() for each in curves] == [[1, 2, 3, 4], [1, 2, 3, 4]]


def test_the_chosen_epoch_is_the_first_of_the_best_by_what_the_stage_monitors(make_run):
    run = make_run(stages=("s",), config={"stages.s.monitor": "f1"})
    path = run / "s" / "metrics.csv"
    table = pd.read_csv(path)
    table["s/val/f1/average"] = [np.nan, 0.7, 0.8, 0.8]
    table.to_csv(path, index=False)
    (each,) = collect_curves([read_run(run)])
    assert each.best == 2


def test_the_ring_and_the_note_follow_what_the_stage_recorded_of_its_average(make_run):
    config = {"averaging.name": "mean"}
    curves = collect_curves([read_run(make_run(stages=("s",), averaged=2, config=config))])
    assert [each.best for each in curves] == [2]
    notes = " ".join(map(str, plot_training_curves(curves).notes))
    assert (
        "Validation curves are those of the average once it has begun, at the ring the mean of the weights of 2 epochs;"
        in notes
    )
    other = collect_curves([read_run(make_run("other", stages=("s",), config=config))])  # nothing is recorded
    assert "average" not in " ".join(map(str, plot_training_curves(other).notes))


def test_a_metric_missing_from_the_file_is_undefined(curves):
    assert np.isnan(curves[0].get_metric("val/nothing")).all()
    assert curves[0].best is not None


def test_all_models_share_one_plot_of_four_panels(make_run):
    runs = [read_run(make_run("a")), read_run(make_run("b", model="vgg19.tv_in1k"))]
    drawing = plot_training_curves([each for each in collect_curves(runs) if each.stage.name == "finetune"])
    assert drawing.key == "curves-finetune"
    titles = [axes.get_title(loc="left") for axes in drawing.figure.axes]
    assert titles == ["training accuracy, %", "training loss", "validation accuracy, %", "validation loss"]


def test_undefined_precision_leaves_a_gap(curves):
    drawing = plot_class_metric_curves(curves[:1], ["GC", "GU", "CG"], label="resnet50", stem="resnet50")
    line = drawing.figure.axes[0].get_lines()[4]
    assert np.isnan(line.get_ydata()[0])
    assert not np.isnan(line.get_ydata()[1:]).any()
