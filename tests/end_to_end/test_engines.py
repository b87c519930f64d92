"""Sweeps with parallel jobs or a search as real processes, if the extra is installed."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pandas as pd
import pytest

from pylorus.runs.folder import RunFolder
from tests.forking import TRAIN

from .test_runs import QUICK

WORDS = (*QUICK, "model.weights=none")
JOBLIB = ("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")

joblib_launcher = pytest.mark.skipif(
    find_spec("hydra_plugins") is None or find_spec("hydra_plugins.hydra_joblib_launcher") is None,
    reason="needs the extra `parallel`",
)
optuna_sweeper = pytest.mark.skipif(
    find_spec("hydra_plugins") is None or find_spec("hydra_plugins.hydra_optuna_sweeper") is None,
    reason="needs the extra `optuna`",
)


def states(sweep) -> list[str]:
    return [RunFolder(sweep / str(job)).read_status()["state"] for job in range(len(list(sweep.glob("*/status.json"))))]


@joblib_launcher
def test_parallel_jobs_share_the_cores_and_a_failed_one_leaves_the_others(train_for_real, tmp_path):
    sweep = tmp_path / "sweep"
    words = (
        *JOBLIB,
        *QUICK,
        "stage=pretrain",
        f"hydra.sweep.dir={sweep}",
        "model.weights=none,no/such/file",
        "seed=0,1",
    )
    found = train_for_real(*words)
    assert found.returncode == 1
    assert states(sweep) == ["finished", "finished", "failed", "failed"]
    assert "job 2 failed: model.weights: found" in found.stdout
    assert "Traceback" not in found.stderr
    assert f"report: {sweep}/report/report.html" in found.stdout
    assert "2 run at once" in (sweep / "0" / "run.log").read_text()
    threads = json.loads((sweep / "0" / "environment.json").read_text())["threads"]
    assert threads <= max(1, (os.cpu_count() or 2) // 2)
    first = [RunFolder(sweep / job).read_status() for job in "01"]
    assert first[0]["pid"] != first[1]["pid"]
    assert first[1]["started"] <= first[0]["ended"]
    again = train_for_real(*words)
    assert again.stdout.count("already finished") == 2


@joblib_launcher
@pytest.mark.parametrize("group", [True, False], ids=["as a terminal sends it", "to the sweep alone"])
def test_ctrl_c_ends_all_jobs_cleanly(tmp_path, group):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sweep = tmp_path / "sweep"
    words = (*JOBLIB, *WORDS, "stages.finetune.epochs=3000", f"hydra.sweep.dir={sweep}", "seed=0,1,2,3")
    run = subprocess.Popen(
        [sys.executable, str(TRAIN), *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list(sweep.glob("*/finetune/metrics.csv"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    (os.killpg if group else os.kill)(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=90)
    assert run.returncode == 130, errors
    assert states(sweep)[:2] == ["interrupted", "interrupted"]
    assert "running" not in states(sweep)
    assert f"hydra.sweep.dir={sweep}" in errors


@optuna_sweeper
def test_a_search_maximizes_validation_accuracy_and_resumes(train, tmp_path):
    sweep = tmp_path / "sweep"
    words = [
        "-m", "experiment=search", "trainer=cpu", "data.image_size=32", "data.drawn.images=12", "data.drawn.size=64",
        "model=timm", "model.name=test_resnet.r160_in1k", "model.weights=none", "report=false", "~hydra.sweeper.params.model",
        "stages.pretrain.epochs=1", "stages.finetune.epochs=1", f"hydra.sweep.dir={sweep}",
    ]  # fmt: skip
    found = train(*words, "hydra.sweeper.n_trials=1")
    assert found.returncode == 0, found.stderr
    ended = RunFolder(sweep / "0").read_status()["ended"]
    found = train(*words, "hydra.sweeper.n_trials=2")
    assert found.returncode == 0, found.stderr
    assert RunFolder(sweep / "0").read_status()["ended"] == ended
    assert states(sweep) == ["finished", "finished"]
    table = pd.read_csv(sweep / "sweep.csv").drop_duplicates("job", keep="last")
    best = (sweep / "optimization_results.yaml").read_text()
    assert f"best_value: {table['val accuracy'].max()}" in best


def test_a_sweep_in_the_folder_of_another_fails_and_names_differences(train, tmp_path):
    words = ("-m", *WORDS, "stage=pretrain", f"hydra.sweep.dir={tmp_path / 'sweep'}", "seed=0")
    assert train(*words).returncode == 0
    found = train(*words, "optimizer.lr=0.5")
    assert found.returncode == 1
    assert "optimizer.lr: the run has " in found.stderr
    assert "found 0.5" in found.stderr
