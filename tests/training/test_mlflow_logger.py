"""What a run sends to MLflow, with the real package where it is installed."""

import pytest

from pylorus.core.errors import PylorusError
from pylorus.runs.folder import RunFolder
from pylorus.training.dashboards import Dashboard
from pylorus.training.stage import check_user_parts
from tests.conftest import TINY

SECRET = "/clinic/patients/miller"


def test_a_tracking_server_requires_two_settings(compose_config, tmp_path):
    config = compose_config("logger=mlflow", "++logger.args.tracking_uri=https://mlflow.example.org")
    with pytest.raises(PylorusError, match=r"found https://mlflow.example.org, a server.*logger.offline=false"):
        Dashboard(config, RunFolder(tmp_path))


def test_a_server_with_both_settings_is_accepted(compose_config, tmp_path):
    config = compose_config(
        "logger=mlflow",
        "++logger.args.tracking_uri=https://mlflow.example.org",
        "logger.offline=false",
        "logger.project=x",
    )
    check_user_parts(config)
    Dashboard(config, RunFolder(tmp_path))


def test_logger_name_mlflow_alone_is_refused_with_a_hint(compose_config, tmp_path):
    with pytest.raises(PylorusError, match="write logger=mlflow"):
        Dashboard(compose_config("logger.name=mlflow"), RunFolder(tmp_path))


def test_without_the_package_the_message_says_what_to_install(compose_config, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(PylorusError, match=r"logger=mlflow: needs mlflow-skinny.*pip install 'pylorus\[mlflow\]'"):
        Dashboard(compose_config("logger=mlflow"), RunFolder(tmp_path)).__enter__()


def open_store(folder: RunFolder):
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    return tracking.MlflowClient(tracking_uri=f"sqlite:///{folder.path / 'mlflow.db'}")


@pytest.mark.slow
def test_a_run_writes_curves_settings_and_matrices_to_its_folder(train_with_logger, synthetic_root):
    pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    folder = train_with_logger("mlflow", "logger.artifact=true", "logger.notes=a first try", epochs=2)
    client = open_store(folder)
    (saved,) = client.search_runs([client.get_experiment_by_name("pylorus").experiment_id])
    assert saved.info.status == "FINISHED"
    assert saved.data.params["model.name"] == TINY
    assert "data.root" not in saved.data.params
    losses = client.get_metric_history(saved.info.run_id, "pretrain/val/loss")
    assert [point.step for point in losses] == [1, 2]
    assert [point.step for point in client.get_metric_history(saved.info.run_id, "run/stage")] == [1, 2]
    assert {"result/test/accuracy_percent", "result/val/auroc", "result/test/auroc_low"} <= set(saved.data.metrics)
    tags = saved.data.tags
    assert (tags["model"], tags["stages"], tags["data"]) == (TINY, "pretrain", "folders")
    assert tags["mlflow.note.content"] == "a first try"
    assert "95 % CI" in tags["result/test/accuracy"]
    for name in ("val/confusion.png", "test/roc.png", "result/reliability.png", "model/MODEL_CARD.md"):
        assert list((folder.path / "mlflow").rglob(name)), name
    assert "failed; the run continues" not in (folder.path / "run.log").read_text()
    stored = [folder.path / "mlflow.db", *(path for path in (folder.path / "mlflow").rglob("*") if path.is_file())]
    assert not [
        path for path in stored if str(synthetic_root).encode() in path.read_bytes() or b"patient_" in path.read_bytes()
    ]


@pytest.mark.slow
def test_a_resumed_run_continues_its_record_and_a_failed_one_says_so(compose_config, tmp_path):
    pytest.importorskip("mlflow.tracking")
    pytest.importorskip("sqlalchemy")
    folder, config = RunFolder(tmp_path / "run"), compose_config("logger=mlflow", f"model.weights={SECRET}.pth")
    with folder.set_starting([]):
        pass
    with pytest.raises(RuntimeError), Dashboard(config, folder) as dashboard:
        dashboard.create_loggers()[0].log_metrics({"s/val/loss": 1.0}, step=1)
        raise RuntimeError
    client = open_store(folder)
    experiment = client.get_experiment_by_name("pylorus").experiment_id
    assert [each.info.status for each in client.search_runs([experiment])] == ["FAILED"]
    with Dashboard(config, folder) as dashboard:
        for step in (1, 2):
            dashboard.create_loggers(known_step=1)[0].log_metrics({"s/val/loss": 0.5}, step=step)
    (saved,) = client.search_runs([experiment])
    assert saved.info.status == "FINISHED"
    assert [(each.step, each.value) for each in client.get_metric_history(saved.info.run_id, "s/val/loss")] == [
        (1, 1.0), (2, 0.5),
    ]  # fmt: skip
    assert "miller" not in str(saved.data.params)
