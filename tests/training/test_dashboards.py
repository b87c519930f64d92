"""Dashboards receive curves, matrices and the configuration, and nothing that names a patient."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from pylorus.core.errors import PylorusError
from pylorus.evaluation.predictions import Predictions
from pylorus.report.result_figures import plot_confusion_matrix
from pylorus.runs.folder import RunFolder
from pylorus.training.dashboards import Dashboard, build_shareable_config

SECRET = "/clinic/patients/miller"


def test_no_folder_or_file_name_is_sent_to_a_dashboard(compose_config):
    config = compose_config(
        "data=folders", f"data.root={SECRET}", "data.group='miller_(.*)'", f"model.weights={SECRET}/w.pth"
    )
    shared = json.dumps(build_shareable_config(config))
    assert "miller" not in shared
    assert "resnet50" in shared


def test_without_a_dashboard_nothing_is_loaded_or_sent(compose_config, tmp_path):
    with Dashboard(compose_config(), RunFolder(tmp_path)) as dashboard:
        assert dashboard.create_loggers() == []


class FakeRun:
    """Stands in for a run of Weights & Biases: remembers how it was opened and closed."""

    def __init__(self, **options):
        self.options, self.code = options, None

    def finish(self, exit_code):
        self.code = exit_code


@pytest.fixture
def dashboard_runs(monkeypatch):
    """Weights & Biases with nobody logged in; gives the runs that were opened."""
    runs = []

    def init(**options):
        runs.append(FakeRun(**options))
        return runs[-1]

    fake = types.SimpleNamespace(init=init, Settings=lambda **given: given, login=lambda **_: False, __spec__=None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return runs


def test_a_run_that_fails_is_shown_as_failed_and_one_that_ends_as_finished(compose_config, tmp_path, dashboard_runs):
    config = compose_config("logger=wandb")
    with Dashboard(config, RunFolder(tmp_path)):
        pass
    with pytest.raises(RuntimeError), Dashboard(config, RunFolder(tmp_path)):
        raise RuntimeError
    assert [run.code for run in dashboard_runs] == [0, 1]


def test_wandb_stays_offline_and_records_nothing_about_the_machine(compose_config, tmp_path, dashboard_runs):
    with Dashboard(compose_config("logger=wandb"), RunFolder(tmp_path)):
        pass
    options = dashboard_runs[0].options
    assert options["mode"] == "offline"
    assert options["settings"]["console"] == "off"
    assert options["settings"]["x_disable_meta"]
    assert options["settings"]["disable_git"]
    assert not options["settings"]["x_save_requirements"]
    assert options["settings"]["host"] == "pylorus"
    assert tmp_path.name not in options["name"]


def test_jobs_of_a_sweep_are_a_group(compose_config, tmp_path, dashboard_runs):
    for job in ("0", "1"):
        folder = RunFolder(tmp_path / "sweep" / job)
        with folder.set_starting(["model=vgg19"], sweep="sweep"):
            pass
        with Dashboard(compose_config("logger=wandb"), folder):
            pass
    first, second = (run.options["group"] for run in dashboard_runs)
    assert first == second == "sweep dfd33796"
    assert "sweep/" not in "".join(run.options["name"] for run in dashboard_runs)  # no folder
    assert len({run.options["name"] for run in dashboard_runs}) == 2


def test_going_online_needs_a_login(compose_config, tmp_path, dashboard_runs):
    with (
        pytest.raises(PylorusError, match="nobody is logged in"),
        Dashboard(compose_config("logger=wandb", "logger.offline=false"), RunFolder(tmp_path)),
    ):
        pass  # fmt: skip
    assert dashboard_runs == []


def test_the_confusion_matrix_has_true_classes_in_rows():
    predictions = Predictions(
        sample=np.array(["a", "b", "c"]),
        group=np.array(["a", "b", "c"]),
        true=np.array([0, 0, 1]),
        probabilities=np.array([[0.7, 0.3], [0.3, 0.7], [0.3, 0.7]]),
        class_names=("GC", "GU"),
    )
    axes = plot_confusion_matrix(predictions, title="t").axes[0]
    counts = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert counts == {(0, 0): "1", (0, 1): "1", (1, 0): "0", (1, 1): "1"}
    assert axes.get_ylabel() == "true"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_run_with_a_dashboard_writes_curves_and_matrices_locally(
    train_with_logger, synthetic_root, tmp_path, name, monkeypatch
):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    folder = train_with_logger(name, epochs=1)
    kept = [path for path in folder.path.rglob("*") if path.is_file() and name in str(path)]
    assert kept
    assert not [
        path for path in kept if str(synthetic_root).encode() in path.read_bytes() or b"patient_" in path.read_bytes()
    ]
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(Path(kept[0]).parent))
        events.Reload()
        assert "pretrain/val/sensitivity/gastric_cancer" in events.Tags()["scalars"]
        assert {"pretrain/val/confusion", "pretrain/test/confusion"} <= set(events.Tags()["images"])
        assert [event.step for event in events.Scalars("pretrain/val/loss")] == [1]


def test_a_dashboard_that_does_not_start_stops_the_run_before_it_trains(
    compose_config, tmp_path, dashboard_runs, monkeypatch
):
    def unreachable(**_):
        raise OSError("api.wandb.ai: no route to host")

    monkeypatch.setattr(sys.modules["wandb"], "init", unreachable)
    with pytest.raises(PylorusError, match=r"failed to start: .*no route.*\n.*logger=csv"):
        Dashboard(compose_config("logger=wandb"), RunFolder(tmp_path)).__enter__()
