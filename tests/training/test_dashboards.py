"""Dashboards receive curves, matrices and the configuration, and nothing that names a patient."""

import json
import os
import struct
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import yaml

from pylorus.core.errors import PylorusError
from pylorus.evaluation.predictions import Predictions
from pylorus.report.result_figures import plot_confusion_matrix
from pylorus.runs.folder import RunFolder
from pylorus.training.dashboards import Dashboard, build_shareable_config

DOCS = Path(__file__).parents[2] / "docs"
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

    def define_metric(self, *_, **__):
        pass

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


def assert_no_file_names(folder: RunFolder, logger: str, root: Path) -> None:
    """Check that what a dashboard was given names neither the images' folder nor their files."""
    kept = [path for path in folder.path.rglob("*") if path.is_file() and logger in str(path.relative_to(folder.path))]
    assert kept
    assert not [path for path in kept if str(root).encode() in path.read_bytes() or b"patient_" in path.read_bytes()]


def test_a_dashboard_that_does_not_start_stops_the_run_before_it_trains(
    compose_config, tmp_path, dashboard_runs, monkeypatch
):
    def unreachable(**_):
        raise OSError("api.wandb.ai: no route to host")

    monkeypatch.setattr(sys.modules["wandb"], "init", unreachable)
    with pytest.raises(PylorusError, match=r"failed to start: .*no route.*\n.*logger=csv"):
        Dashboard(compose_config("logger=wandb"), RunFolder(tmp_path)).__enter__()


def read_wandb_records(folder: Path):
    """Records of an offline run, by kind: each block of a LevelDB log has a checksum, a length and a type."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = {}
    (path,) = folder.glob("*.wandb")
    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if at + 7 + length > len(content):
            break  # not completely written yet
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            name = record.WhichOneof("record_type")
            records.setdefault(name, []).append(getattr(record, name))
    return records


def read_items(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_offline_runs(folder: RunFolder):
    return [read_finished_run(path) for path in sorted(folder.path.glob("wandb/offline-run-*"))]


def read_finished_run(path):
    """Read the records of a finished run; wandb's service closes the file a moment after `finish` has returned."""
    end = time.monotonic() + 60
    while "exit" not in (records := read_wandb_records(path)):
        assert time.monotonic() < end, f"{path}: no record of the end, only {sorted(records)}"
        time.sleep(0.1)
    return records


@pytest.mark.slow
def test_wandb_shows_all_stages_on_one_axis_and_the_result_of_the_shipped_model(
    train_with_logger, synthetic_root, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    words = ("stages.finetune.epochs=1", "logger.predictions=true", "logger.artifact=true", "logger.notes=a first try")
    folder = train_with_logger("wandb", *words, epochs=2, stage="both")
    assert_no_file_names(folder, "wandb", synthetic_root)
    (records,) = read_offline_runs(folder)
    (run,) = records["run"]
    assert run.notes == "a first try"
    assert run.job_type == "train"
    assert {"pretrain", "finetune", "folders"} < set(run.tags)
    assert folder.path.name not in run.display_name.split()
    axes = {metric.glob_name: metric.step_metric for metric in records["metric"] if metric.glob_name}
    assert axes == {"run/*": "epoch", "pretrain/*": "epoch", "finetune/*": "epoch"}
    rows = [read_items(row.item) for row in records["history"]]
    assert [row["epoch"] for row in rows] == [row["_step"] for row in rows] == [1, 2, 3]
    assert [row["run/stage"] for row in rows] == [1, 1, 2]
    assert [row["run/val/loss"] for row in rows] == [
        *(row["pretrain/val/loss"] for row in rows[:2]),
        rows[2]["finetune/val/loss"],
    ]
    images = {name for row in rows for name, value in row.items() if name.endswith("/_type") and value == "image-file"}
    figures = [f"{part}/{kind}" for part in ("val", "test") for kind in ("confusion", "roc", "precision_recall")]
    assert {f"{stage}/{each}/_type" for stage in ("pretrain", "finetune") for each in figures} <= images
    assert "result/reliability/_type" in images
    summary = {}
    for each in records["summary"]:
        summary |= read_items(each.update)
    model = json.loads((folder.path / "model" / "model.json").read_text())
    chosen = model["decision"]["class"]
    assert summary["result/stage"] == model["shipped"]["name"]
    assert summary["result/best_epoch"] == model["training"]["stages"][-1]["best_epoch"]
    for limit, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
        assert summary[f"result/test/accuracy_percent{suffix}"] == pytest.approx(100 * model["test"]["accuracy"][limit])
        for index, unit, factor in (
            ("sensitivity", "_percent", 100),
            ("specificity", "_percent", 100),
            ("auroc", "", 1),
        ):
            expected = model["test"][index][chosen][limit]
            assert summary[f"result/test/{index}{unit}{suffix}"] == pytest.approx(factor * expected)
            assert f"result/val/{index}{unit}{suffix}" in summary
    (artifact,) = records["artifact"]
    assert artifact.type == "model"
    assert {"model.json", "MODEL_CARD.md", "model.safetensors"} <= {entry.path for entry in artifact.manifest.contents}
    assert artifact.description == (folder.path / "model" / "MODEL_CARD.md").read_text()
    (table,) = folder.path.glob("wandb/offline-run-*/files/media/html/finetune/test/predictions*.html")
    assert "sample_id" in table.read_text()
    assert "patient_" not in table.read_text()
    assert "failed; the run continues" not in (folder.path / "run.log").read_text()


@pytest.mark.slow
def test_nothing_but_curves_figures_and_results_is_sent_unless_a_key_allows_it(train_with_logger):
    folder = train_with_logger("wandb", "logger.images=false", epochs=1)
    (records,) = read_offline_runs(folder)
    assert "artifact" not in records
    files = [path.name for path in folder.path.glob("wandb/offline-run-*/files/media/**/*") if path.is_file()]
    assert {name.rpartition("_")[0].rpartition("_")[0] for name in files} == {
        "confusion", "roc", "precision_recall", "reliability",
    }  # fmt: skip


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_run_of_wandb_and_a_failed_one_says_so(compose_config, tmp_path):
    folder, config = RunFolder(tmp_path / "run"), compose_config("logger=wandb")
    with folder.set_starting([]):
        pass
    with pytest.raises(RuntimeError), Dashboard(config, folder) as dashboard:
        dashboard.create_loggers()[0].log_metrics({"pretrain/val/loss": 1.0}, step=1)
        raise RuntimeError
    time.sleep(1.1)  # the folder of W&B is named after the second
    with Dashboard(config, folder) as dashboard:
        for step in (1, 2):
            dashboard.create_loggers(known_step=1)[0].log_metrics({"pretrain/val/loss": 0.5}, step=step)
    first, second = sorted(read_offline_runs(folder), key=lambda records: records["exit"][0].exit_code, reverse=True)
    assert [records["exit"][0].exit_code for records in (first, second)] == [1, 0]
    assert first["run"][0].run_id == second["run"][0].run_id == folder.read_status()["id"]
    curve = [read_items(row.item) for records in (first, second) for row in records["history"]]
    assert [(row["_step"], row["pretrain/val/loss"]) for row in curve] == [(1, 1.0), (2, 0.5)]


@pytest.mark.slow
def test_the_agent_of_a_wandb_sweep_starts_runs_with_the_sweeps_settings(tmp_path, fork_server):
    """What `wandb agent` does with a setting of the sweep that the server chose, without the server."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((DOCS / "sweep.yaml").read_text())
    assert sweep["metric"]["name"] == "result/val/accuracy_percent"
    chosen = {name: {"value": options.get("values", [3e-4])[0]} for name, options in sweep["parameters"].items()}
    chosen["model"] = {"value": "vgg19"}
    parameters = tmp_path / "parameters.yaml"
    parameters.write_text(yaml.safe_dump({"wandb_version": 1, **chosen}))
    words = create_sweep_command_args({"args": chosen})
    words |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [sweep["program"]]}
    command = []
    for word in create_sweep_command(sweep["command"]):
        command += words[word[2:-1]] if word.startswith("${") else [word]
    replaced = {
        "logger.offline=false": "logger.offline=true",
        "model=vgg19": "model=timm",
        "data=folders": "data=synthetic",
    }
    command = [replaced.get(word, word) for word in command if not word.startswith("data.root=")]
    command += [
        "model.name=test_resnet.r160_in1k", "model.weights=none", "data.image_size=32", "trainer=cpu", "report=false",
        "stages.pretrain.epochs=1", "stages.finetune.epochs=1", "hydra.run.dir=run",
    ]  # fmt: skip
    environment = {**os.environ, "WANDB_SWEEP_ID": "abcd1234", "WANDB_RUN_ID": "ab12cd34"}
    environment |= {"WANDB_SWEEP_PARAM_PATH": str(parameters), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert command[:3] == ["/usr/bin/env", sys.executable, sweep["program"]]
    done = fork_server.run(command[1:], cwd=tmp_path, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    (records,) = read_offline_runs(RunFolder(tmp_path / "run"))
    (run,) = records["run"]
    assert (run.run_id, run.sweep_id) == ("ab12cd34", "abcd1234")
    assert sweep["metric"]["name"] in {name for row in records["history"] for name in read_items(row.item)}


@pytest.mark.slow
def test_tensorboard_shows_the_same_names_with_figures_settings_and_a_layout_in_one_folder(
    train_with_logger, synthetic_root
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    folder = train_with_logger(
        "tensorboard", "stages.finetune.epochs=1", "logger.predictions=true", epochs=2, stage="both"
    )
    assert_no_file_names(folder, "tensorboard", synthetic_root)
    assert {path.parent for path in folder.path.rglob("events.out.*")} == {folder.path / "tensorboard"}
    events = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    assert [(each.step, each.value) for each in events.Scalars("run/stage")] == [(1, 1), (2, 1), (3, 2)]
    assert [each.step for each in events.Scalars("run/val/loss")] == [1, 2, 3]
    assert {"result/test/accuracy_percent", "result/test/auroc_low", "result/best_epoch"} <= set(tags["scalars"])
    assert "pretrain/val/sensitivity/gastric_cancer" in tags["scalars"]
    assert {"pretrain/val/confusion", "pretrain/test/confusion"} <= set(tags["images"])
    assert {"finetune/val/roc", "finetune/test/precision_recall", "result/reliability"} <= set(tags["images"])
    assert {"finetune/test/predictions/text_summary", "result/test/sensitivity/text_summary"} <= set(tags["tensors"])
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["run", "pretrain", "finetune"]
    metadata = {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"}
    assert metadata <= set(events.summary_metadata)
    assert "failed; the run continues" not in (folder.path / "run.log").read_text()
