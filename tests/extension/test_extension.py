"""A package and a configuration outside Pylorus extend every part of a run: the examples of docs/extending.md."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]


def start(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run train.py in a folder, with the package on Python's path and its configuration on Hydra's."""
    path = os.pathsep.join([str(PROJECT / "src"), str(HERE)])
    command = [sys.executable, str(PROJECT / "train.py"), "--config-dir", str(HERE / "conf"), *words]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, drawn: Path) -> Path:
    """A folder in which the experiment has run, with its report."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "images").symlink_to(drawn)
    done = start(folder, "experiment=hospital", "hydra.run.dir=run", f"cache.folder={folder / 'cache'}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_custom_source_lists_the_images(trained):
    rows = list(csv.DictReader((trained / "run" / "source.csv").open()))
    assert len(rows) == 30
    assert json.loads((trained / "run" / "status.json").read_text())["state"] == "finished"


def test_a_custom_callback_and_logger_see_every_batch_and_epoch(trained):
    assert int((trained / "batches.txt").read_text()) > 0
    lines = [json.loads(line) for line in (trained / "lines.jsonl").read_text().splitlines()]
    assert lines[0]["config"]["loss"]["args"] == {"epsilon": 2.0}
    assert [line["step"] for line in lines if "finetune/val/loss" in line] == [1, 2]
    assert "root" not in lines[0]["config"]["data"]
    assert lines[-1] == {"status": "success"}


def test_custom_and_built_in_metrics_are_in_curves_tables_and_console(trained):
    columns = (trained / "run" / "finetune" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"finetune/val/youden/average", "finetune/val/specificity/average"} <= set(columns)
    (table,) = (trained / "run" / "report").rglob("*study-*.csv")
    text = table.read_text()
    assert "specificity" in text
    assert "youden" in text
    page = (trained / "run" / "report" / "report.html").read_text()
    assert "precision, sensitivity, specificity, F1 and youden of each class" in page


def test_report_names_the_loss_without_running_it(trained):
    page = (trained / "run" / "report" / "report.html").read_text()
    assert "the loss my_hospital.parts.PolyLoss" in page
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    command = [sys.executable, "-m", "pylorus", "report", str(trained / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_typo_in_a_target_names_key_and_remedy(tmp_path, drawn):
    (tmp_path / "images").symlink_to(drawn)
    done = start(tmp_path, "experiment=hospital", "loss._target_=my_hospital.parts.PolyLos")
    assert done.returncode == 1
    assert "loss: my_hospital.parts.PolyLos can't be imported" in done.stderr


def test_unknown_monitor_suggests_a_known_one(tmp_path, drawn):
    (tmp_path / "images").symlink_to(drawn)
    done = start(tmp_path, "experiment=hospital", "stages.finetune.monitor=youdem")
    assert done.returncode == 1
    assert 'there is no metric "youdem". Did you mean "youden"' in " ".join(done.stderr.split())
