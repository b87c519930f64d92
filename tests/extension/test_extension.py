"""A package and a configuration outside Pylorus extend every part of a run: the examples of docs/extending.md."""

import csv
import json
import os
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import pylorus
from pylorus.cli import main
from pylorus.core.io import read_json
from pylorus.doctor.checks import check_bundle
from tests.extension.my_hospital.parts import create_network, list_images
from tests.forking import ForkServer

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]


COMMAND = (sys.executable, str(PROJECT / "train.py"), "--config-dir", str(HERE / "conf"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PROJECT / "src"), str(HERE)]), "OMP_NUM_THREADS": "1"}
"""With the package on Python's path and its configuration on Hydra's."""


@pytest.fixture(scope="module")
def experiment_folder(tmp_path_factory: pytest.TempPathFactory, synthetic_root: Path, fork_server: ForkServer) -> Path:
    """A folder in which the experiment has run, with its report."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "images").symlink_to(synthetic_root)
    command = [*COMMAND, "experiment=hospital", "hydra.run.dir=run", f"cache.folder={folder / 'cache'}"]
    done = fork_server.run(command, cwd=folder, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_custom_source_lists_the_images(experiment_folder):
    rows = list(csv.DictReader((experiment_folder / "run" / "source.csv").open()))
    assert len(rows) == 30
    assert json.loads((experiment_folder / "run" / "status.json").read_text())["state"] == "finished"


def test_a_custom_callback_and_logger_see_every_batch_and_epoch(experiment_folder):
    assert int((experiment_folder / "batches.txt").read_text()) > 0
    lines = [json.loads(line) for line in (experiment_folder / "lines.jsonl").read_text().splitlines()]
    assert lines[0]["config"]["loss"]["args"] == {"epsilon": 2.0}
    assert [line["step"] for line in lines if "finetune/val/loss" in line] == [1, 2]
    assert "root" not in lines[0]["config"]["data"]
    assert lines[-1] == {"status": "success"}


def test_custom_and_built_in_metrics_are_in_curves_tables_and_console(experiment_folder):
    columns = (experiment_folder / "run" / "finetune" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"finetune/val/youden/average", "finetune/val/specificity/average"} <= set(columns)
    (table,) = (experiment_folder / "run" / "report").rglob("*study-*.csv")
    text = table.read_text()
    assert "specificity" in text
    assert "youden" in text
    page = (experiment_folder / "run" / "report" / "report.html").read_text()
    assert "precision, sensitivity, specificity, F1 and youden of each class" in page


NETWORK = "my_hospital.parts.create_network"
HERE_AS_PACKAGE = f"tests.extension.{NETWORK}"


def test_prediction_with_an_own_network_says_what_to_type_and_imports_nothing_by_itself(
    experiment_folder, tmp_path, fork_server
):
    words = [
        "predict",
        str(experiment_folder / "run" / "model"),
        str(experiment_folder / "images"),
        "--output",
        str(tmp_path / "table.csv"),
    ]
    with pytest.raises(SystemExit) as refused:
        main(words)
    assert f"the network hospital_net was built by {NETWORK}, which is not part of Pylorus" in str(refused.value)
    assert f"add --network {NETWORK}, or in Python: load_model(…, network=create_network)" in str(refused.value)
    assert "my_hospital" not in sys.modules
    done = fork_server.run(["pylorus", *words, "--network", NETWORK], cwd=tmp_path, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "table.csv", keep_default_na=False)
    expected = pylorus.load_model(experiment_folder / "run", network=create_network).predict(
        experiment_folder / "images"
    )
    assert list(table["predicted"]) == list(expected["predicted"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("create_network", "--network: found create_network, expected the dotted path"),
        ("my_hospital.parts.create_netwrk", "--network: my_hospital.parts.create_netwrk can't be imported"),
    ],
)
def test_a_mistyped_network_is_named(experiment_folder, tmp_path, name, message):
    words = ["predict", str(experiment_folder / "run" / "model"), "images", "--output", "table.csv", "--network", name]
    with pytest.raises(SystemExit, match=message):
        main(words)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (list_images, "list_images, called with num_classes=3 and .*, failed: TypeError"),
        (torch.nn.Identity, "Identity has no forward_features, forward_head, get_classifier"),
    ],
)
def test_a_network_of_another_kind_is_refused(experiment_folder, network, message):
    with pytest.raises(pylorus.PylorusError, match=message):
        pylorus.load_model(experiment_folder / "run", network=network)


def test_a_module_gets_the_weights_in_a_copy(experiment_folder):
    module = create_network(3)
    before = module.fc.weight.clone()
    model = pylorus.load_model(experiment_folder / "run", network=module)
    assert torch.equal(module.fc.weight, before)
    expected = pylorus.load_model(experiment_folder / "run", network=create_network).predict(
        experiment_folder / "images"
    )
    pd.testing.assert_frame_equal(model.predict(experiment_folder / "images"), expected)
    with pytest.raises(pylorus.PylorusError, match="does not fit hospital_net with 3 classes"):
        pylorus.load_model(experiment_folder / "run", network=create_network(4))


def test_explanation_and_export_take_an_own_network_and_an_export_needs_none(experiment_folder, tmp_path, capsys):
    bundle, images, network = (
        experiment_folder / "run" / "model",
        str(experiment_folder / "images"),
        ["--network", HERE_AS_PACKAGE],
    )
    with pytest.raises(SystemExit):  # its exit code, or that the maps of such small images are too coarse
        main(["explain", str(bundle), images, "--output", str(tmp_path / "maps"), *network])
    assert "built by" not in capsys.readouterr().err
    main(["export", str(bundle), "--output", str(tmp_path / "onnx"), "--images", images, *network])
    exported, own = pylorus.load_model(tmp_path / "onnx"), pylorus.load_model(bundle, network=create_network)
    assert list(exported.predict(images)["predicted"]) == list(own.predict(images)["predicted"])
    with pytest.raises(pylorus.PylorusError, match="found an export, which contains its network"):
        pylorus.load_model(tmp_path / "onnx", network=create_network)


def test_the_doctor_says_how_to_check_such_a_bundle(experiment_folder):
    (check,) = check_bundle(experiment_folder / "run" / "model")
    assert check.state == "warning"
    assert "--network" in check.remedy


def test_own_metric_has_an_interval_in_the_table_of_all_metrics_and_in_the_card(experiment_folder):
    saved = read_json(experiment_folder / "run" / "finetune" / "own_metrics.json")
    assert set(saved) == {"val", "val/low", "val/high", "test", "test/low", "test/high"}
    (path,) = (experiment_folder / "run" / "report" / "tables").glob("classes-*.csv")
    table = pd.read_csv(path, na_values="–").set_index("class")
    for name, value in saved["test"]["youden"].items():
        assert table.loc[name, "youden, %"] == pytest.approx(100 * value, rel=1e-4)
    assert {"youden, %, low", "youden, %, high"} <= set(table.columns)
    assert "| youden |" in (experiment_folder / "run" / "model" / "MODEL_CARD.md").read_text()
    page = (experiment_folder / "run" / "report" / "report.html").read_text()
    assert "youden: defined by the user, with the interval of a grouped jackknife" in page


def test_report_names_the_loss_without_running_it(experiment_folder, fork_server):
    page = (experiment_folder / "run" / "report" / "report.html").read_text()
    assert "the loss my_hospital.parts.PolyLoss" in page
    assert "cross_entropy" not in page
    assert "cross_entropy" not in (experiment_folder / "run" / "config.yaml").read_text()
    done = fork_server.run(["pylorus", "report", str(experiment_folder / "run")], timeout=300)
    assert done.returncode == 0, done.stderr


def test_typo_in_a_target_names_key_and_remedy(tmp_path, synthetic_root, fork_server):
    (tmp_path / "images").symlink_to(synthetic_root)
    words = ["experiment=hospital", "loss._target_=my_hospital.parts.PolyLos"]
    done = fork_server.run([*COMMAND, *words], cwd=tmp_path, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 1
    assert "loss: my_hospital.parts.PolyLos can't be imported" in done.stderr
    assert 'my_hospital.parts has no PolyLos. Did you mean "PolyLoss"?' in " ".join(done.stderr.split())
    assert "HYDRA" not in done.stdout + done.stderr


def test_unknown_monitor_suggests_a_known_one(tmp_path, synthetic_root, fork_server):
    (tmp_path / "images").symlink_to(synthetic_root)
    words = ["experiment=hospital", "stages.finetune.monitor=youdem"]
    done = fork_server.run([*COMMAND, *words], cwd=tmp_path, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 1
    assert 'there is no metric "youdem". Did you mean "youden"' in " ".join(done.stderr.split())
