"""A run of two processes gives the result of one, counts every image once, and writes one set of results."""

import json
import os
import re
import signal

import pandas as pd
import pytest
import torch

from pylorus.core.errors import PylorusError
from pylorus.core.io import LOCK
from pylorus.launch.train import run
from pylorus.runs.folder import RunFolder
from tests.forking import ForkedProcess
from tests.launch.conftest import expect_alike, weights, when


@pytest.fixture(scope="module")
def two_process_run(prepare_run) -> RunFolder:
    folder = prepare_run("trainer.devices=2")
    run(folder)
    return folder


def test_two_processes_give_the_weights_curves_and_predictions_of_one(prepare_run, two_process_run):
    one = prepare_run()
    run(one)
    expect_alike(two_process_run, one)
    moved = prepare_run("seed=1", "stage=pretrain")  # the comparison can fail: another seed is not as close
    run(moved)
    assert not torch.allclose(weights(moved)["fc.weight"], weights(one)["fc.weight"], atol=1e-3)


@pytest.mark.parametrize(("strategy", "averaging"), [("ddp", "mean"), ("fsdp", "none")])
def test_two_processes_that_accumulate_gradients_give_the_weights_of_one(prepare_run, strategy, averaging):
    words = (
        f"averaging={averaging}",
        "trainer.batch_size=4",
        "trainer.accumulate=2",
        "stages.pretrain.epochs=1",
        "stages.finetune.epochs=2",
    )
    one, two = prepare_run(*words), prepare_run("trainer.devices=2", f"trainer.strategy={strategy}", *words)
    run(one)
    run(two)
    expect_alike(two, one)


def test_each_test_image_counts_once_and_results_are_written_once(two_process_run):
    split = pd.read_csv(two_process_run.path / "split.csv")
    tested = pd.read_parquet(two_process_run.get_predictions_path("finetune", "test"))
    assert sorted(tested["sample_id"]) == sorted(split.loc[split["split"] == "test", "sample_id"])
    log = (two_process_run.path / "run.log").read_text()
    assert log.count("training head") == 1
    assert not [
        path
        for path in two_process_run.path.rglob("*")
        if path.name.startswith(".") and path.name != LOCK and "cache" not in str(path)
    ]
    assert two_process_run.read_status()["state"] == "finished"


def test_the_status_names_the_shipped_stage(two_process_run):
    assert two_process_run.shipped is not None
    assert two_process_run.read_status()["shipped_stage"] == two_process_run.shipped.name


def test_the_timeline_includes_that_of_the_first_process(two_process_run):
    speed = json.loads(two_process_run.speed.read_text())
    assert {"imports", "setup", "reading", "pretrain", "finetune", "evaluation", "bundle"} <= set(speed["timeline"])
    assert speed["seconds"] == pytest.approx(sum(speed["timeline"].values()), abs=0.001)


def test_each_process_computes_its_part_of_the_cache(two_process_run):
    images = len(pd.read_csv(two_process_run.path / "split.csv").query("split != 'test'"))
    computed = re.findall(
        r"features pretrain: 0 cached, (\d+) computed", (two_process_run.path / "run.log").read_text()
    )
    assert computed == [str(images)]
    stores = list((two_process_run.path / "cache" / "features").iterdir())
    # Evaluation adds the other splits to the store of each stage.
    assert [len(list(store.glob("*.shard"))) >= 2 for store in stores] == [True, True]


def ranks(fork_server) -> list[ForkedProcess]:
    return [process for process in fork_server.started if "--rank" in process.args and process.poll() is None]


def test_interrupted_processes_end_and_resume_to_the_same_weights(prepare_run, two_process_run, fork_server):
    folder = prepare_run("trainer.devices=2")
    watcher = when(folder.get_stage("finetune").last_checkpoint, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    watcher.join()
    assert not ranks(fork_server)
    assert folder.read_status()["state"] == "interrupted"
    run(folder)
    assert all(torch.equal(tensor, weights(folder)[name]) for name, tensor in weights(two_process_run).items())


def test_a_killed_process_ends_the_others_and_is_named(prepare_run, fork_server):
    folder = prepare_run("trainer.devices=2")
    when(folder.get_stage("pretrain").last_checkpoint, lambda: ranks(fork_server)[-1].kill())
    with pytest.raises(PylorusError, match=r"process [12] of 2 was killed by SIGKILL"):
        run(folder)
    assert not ranks(fork_server)
    assert folder.read_status()["state"] == "failed"


def test_an_error_in_one_process_is_the_runs_error(prepare_run, synthetic_root):
    folder = prepare_run("trainer.devices=2", "stages.finetune.learn=layer9")
    with pytest.raises(PylorusError, match='no block "layer9"'):
        run(folder)
    assert 'no block "layer9"' in folder.read_status()["error"]


def test_a_batch_that_cannot_be_divided_is_refused(prepare_run):
    with pytest.raises(PylorusError, match=r"trainer.batch_size: found 8 for 3 devices.*such as 6"):
        run(prepare_run("trainer.devices=3"))


def test_several_machines_are_requested_from_slurm(prepare_run, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    with pytest.raises(PylorusError, match=r"trainer.nodes: found 2.*sbatch --nodes=2 --ntasks-per-node=4"):
        run(prepare_run("trainer.nodes=2", "trainer.devices=4"))
