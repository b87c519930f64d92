"""Runs and sweeps as real processes, on a few synthetic images."""

import json
import re
import signal
import subprocess
import sys
import time

import pandas as pd

from pylorus.core.io import LOCK
from tests.conftest import TINY
from tests.forking import REAL_PROCESSES, TRAIN

from .conftest import AirGap

PLAIN = ("experiment=debug", "model=timm", f"model.name={TINY}", "trainer=cpu", "data.image_size=32")
QUICK = (*PLAIN, "report=false")


def test_a_run_of_both_stages_from_any_folder_needs_no_network(tmp_path, fork_server):
    gap = AirGap(tmp_path, fork_server)
    start = time.monotonic()
    found = gap.python(str(TRAIN), *PLAIN, "model.weights=none", "data.workers=1", "logger=tensorboard")
    seconds = time.monotonic() - start
    assert found.returncode == 0, found.stderr
    assert any("train.py" in process for process in gap.watched())
    assert gap.attempts() == []
    folder = next(gap.work.glob("outputs/20*/*"))
    results, report, model, test, following, last = found.stdout.rstrip().splitlines()[-6:]
    assert results == f"results: {folder}"
    assert report == f"report: {folder / 'report' / 'report.html'}"
    assert model.startswith(f"model: {folder / 'model'} holds stage ")
    assert re.match(r"test: accuracy [\d.]+ % \([\d.]+ to [\d.]+\), sensitivity for GC [\d.]+ %", test)
    assert following == f"next: pylorus predict {folder / 'model'} IMAGES --output predictions.csv"
    assert last.strip() == f"pylorus serve {folder / 'model'}"
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert (folder / "model" / "model.safetensors").is_file()
    assert "<h2>Result</h2>" in (folder / "report" / "report.html").read_text()
    for stage in ("pretrain", "finetune"):
        assert f"{stage}: after its only epoch" in found.stdout
        assert (folder / stage / "predictions-test.parquet").is_file()
    assert "Traceback" not in found.stdout + found.stderr
    speed = json.loads((folder / "speed.json").read_text())
    assert 0.7 * seconds < speed["seconds"] < seconds + 0.1  # interpreters start and end outside of it
    assert {"imports", "reading", "pretrain", "finetune", "evaluation", "bundle", "report", "exit"} <= set(
        speed["timeline"]
    )
    assert "\ntime     imports " in found.stdout


def test_synthetic_images_train_without_a_hub_and_with_a_warning(train):
    found = train(*QUICK, "stage=pretrain")
    assert found.returncode == 0, found.stderr
    assert "RANDOM WEIGHTS" in found.stdout


def test_user_images_are_not_trained_from_random_weights_by_default(train, synthetic_root):
    start = time.monotonic()
    found = train("data=folders", f"data.root={synthetic_root}", "model=resnet50", "data.image_size=32")
    assert found.returncode == 1
    assert "save it as resnet50.tv_in1k.safetensors" in found.stderr
    assert time.monotonic() - start < 60


def test_a_sweep_names_failed_jobs_and_ends_with_a_table(train, tmp_path):
    found = train("-m", *QUICK, "model.weights=none,no/such/file", "stage=pretrain,both")
    assert found.returncode == 1
    sweep = next(tmp_path.glob("multirun/*/*"))
    table = pd.read_csv(sweep / "sweep.csv")
    assert table[table["state"] == "finished"]["job"].tolist().count(1) == 2
    assert set(table["job"]) == {0, 1, 2, 3}
    assert set(table[table["state"] == "failed"]["job"]) == {2, 3}
    finished = table[table["state"] == "finished"].drop_duplicates("job", keep="last")
    assert finished["val accuracy"].is_monotonic_decreasing
    assert f"sweep: {sweep}" in found.stdout
    assert f"report: {sweep}/report/report.html" in found.stdout
    assert re.search(r"^job 1 \(2 of 4\) \| .* \| about \d+ (s|min) left in this sweep$", found.stdout, flags=re.M)
    assert (sweep / "report" / "report.html").is_file()
    assert "jobs 2 and 3 failed: model.weights: found" in found.stdout
    assert (found.stdout + found.stderr).count("model.weights: found") == 1
    text = (sweep / "sweep.md").read_text()
    assert text.startswith("The same test images. Ordered by the validation accuracy of the shipped stage, best first.")
    assert sum(line.startswith("| ") for line in text.splitlines()) == len(table) + 2  # two tables, a head each


def test_a_run_of_two_devices_that_divide_the_weights(train, tmp_path, monkeypatch):
    monkeypatch.setenv(REAL_PROCESSES, "1")
    found = train(*QUICK, "model.weights=none", "trainer.devices=2", "trainer.strategy=fsdp")
    assert found.returncode == 0, found.stderr
    assert "Traceback" not in found.stdout + found.stderr
    assert "each of 2 devices holds a shard of the trainable weights" in found.stdout
    assert "finetune: the first device holds " in found.stdout
    folder = next(tmp_path.glob("outputs/20*/*"))
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert (folder / "model" / "model.safetensors").is_file()


def test_an_interrupted_run_leaves_no_partial_files(tmp_path, fork_server):
    words = [*QUICK, "model.weights=none", "stages.pretrain.epochs=500", "data.drawn.images=40"]
    pipe = subprocess.PIPE
    run = fork_server.start([sys.executable, str(TRAIN), *words], cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("outputs/20*/*/pretrain/metrics.csv")) and time.monotonic() < deadline:
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    folder = next(tmp_path.glob("outputs/20*/*"))
    assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"
    assert run.returncode == 130
    assert "Traceback" not in errors
    assert not [path for path in folder.rglob(".*") if path.is_file() and path.name != LOCK]


def test_a_killed_run_is_distinguished_from_a_running_one(tmp_path, fork_server):
    from pylorus.runs.folder import RunFolder

    words = [*QUICK, "model.weights=none", "stages.pretrain.epochs=500"]
    nowhere = subprocess.DEVNULL
    run = fork_server.start([sys.executable, str(TRAIN), *words], cwd=tmp_path, stdout=nowhere, stderr=nowhere)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("outputs/20*/*/pretrain/metrics.csv")) and time.monotonic() < deadline:
        time.sleep(0.2)
    folder = RunFolder(next(tmp_path.glob("outputs/20*/*")))
    assert folder.read_status()["state"] == "running"
    run.kill()
    run.wait()
    assert folder.read_status()["state"] == "stopped"
    assert len(pd.read_csv(folder.get_stage("pretrain").path / "metrics.csv")) >= 1
