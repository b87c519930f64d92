"""Runs and sweeps that are stopped from outside and resumed."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from pylorus.core.io import read_json
from pylorus.runs.folder import RunFolder
from tests.conftest import TINY
from tests.forking import ForkedProcess, ForkServer

from .conftest import COMMAND

WORDS = ("experiment=debug", "model=timm", f"model.name={TINY}", "trainer=cpu", "data.image_size=32", "model.weights=none",
         "report=false", "stage=both", "augment=light", "stages.pretrain.epochs=3", "stages.finetune.epochs=60")  # fmt: skip


@pytest.fixture
def start_training(tmp_path: Path, fork_server: ForkServer) -> Callable[..., ForkedProcess]:
    """Starts a run in a process of its own, from `tmp_path`."""

    def start(*words: str) -> ForkedProcess:
        return fork_server.start(
            [*COMMAND, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start


def wait_for_epochs(folder: Path, count: int) -> None:
    """Until the second stage has so many epochs behind it."""
    deadline = time.monotonic() + 120
    metrics = folder / "finetune" / "metrics.csv"
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > count):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def same_results(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    curves = [(folder / "finetune" / "metrics.csv").read_bytes() for folder in (one, other)]
    return curves[0] == curves[1] and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_run_stopped_in_three_ways_resumes_to_the_uninterrupted_result(train, start_training, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    assert train(*WORDS, f"hydra.run.dir={whole}").returncode == 0
    command = [*WORDS, f"hydra.run.dir={folder}"]
    ways = [(signal.SIGKILL, "stopped"), (signal.SIGTERM, "interrupted"), (signal.SIGINT, "interrupted")]
    for number, (way, state) in enumerate(ways):
        run = start_training(*command)
        wait_for_epochs(folder, 3 + 12 * number)
        run.send_signal(way)
        _, errors = run.communicate(timeout=60)
        assert RunFolder(folder).read_status()["state"] == state
        assert "Traceback" not in errors
        if state == "interrupted":
            assert f"to resume: python train.py resume={folder}" in errors
            assert run.returncode == 130
        command = [f"resume={folder}"]
    found = train(f"resume={folder}")
    assert found.returncode == 0, found.stderr
    assert "finetune resumes after epoch" in found.stdout
    assert same_results(whole, folder)
    assert RunFolder(folder).read_status()["resumed"] == 3
    again = train(f"resume={folder}")
    assert again.returncode == 0
    assert "already finished" in again.stdout


def test_another_configuration_is_refused_immediately_and_named(train, tmp_path):
    folder = tmp_path / "run"
    words = [word for word in WORDS if "finetune.epochs" not in word]
    assert train(*words, f"hydra.run.dir={folder}").returncode == 0
    start = time.monotonic()
    other = train(f"resume={folder}", "optimizer.lr=0.5")
    assert other.returncode == 1
    assert "found 0.5" in other.stderr
    assert "optimizer.lr: the run has " in other.stderr
    same_folder = train(*words, f"hydra.run.dir={folder}", "seed=7")
    assert same_folder.returncode == 1
    assert "seed: the run has 0, found 7" in same_folder.stderr
    assert time.monotonic() - start < 20
    nothing = train(f"resume={tmp_path / 'nowhere'}")
    assert nothing.returncode == 1
    assert "found no run in" in nothing.stderr


def test_a_repeated_sweep_runs_only_missing_or_failed_jobs(train, tmp_path):
    sweep = tmp_path / "sweep"
    kept = [word for word in WORDS if not word.startswith(("stage", "augment"))]
    words = ["-m", *kept, "stage=pretrain", "stages.pretrain.epochs=1", f"hydra.sweep.dir={sweep}", "seed=0,1,2"]
    assert train(*words).returncode == 0
    ended = read_json(sweep / "0" / "status.json")["ended"]
    (sweep / "1" / "status.json").write_text(
        json.dumps({**read_json(sweep / "1" / "status.json"), "state": "failed", "error": "disk full"})
    )
    for path in sorted((sweep / "2").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    found = train(*words)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("already finished") == 1 + found.stdout.count("is already finished")
    assert read_json(sweep / "0" / "status.json")["ended"] == ended
    table = pd.read_csv(sweep / "sweep.csv")
    assert table["state"].tolist() == ["finished"] * 3


def test_a_second_ctrl_c_stops_immediately(start_training, tmp_path):
    run = start_training(*WORDS, f"hydra.run.dir={tmp_path / 'run'}")
    wait_for_epochs(tmp_path / "run", 1)
    run.send_signal(signal.SIGINT)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=20)
    assert run.returncode in (130, -signal.SIGINT)
    assert RunFolder(tmp_path / "run").read_status()["state"] in ("interrupted", "stopped")
