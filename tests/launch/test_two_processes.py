"""A run of two processes gives the result of one, counts every image once, and writes one set of results."""

import os
import re
import signal

import pandas as pd
import pytest
import torch

from pylorus.core.errors import PylorusError
from pylorus.launch.train import run
from pylorus.runs.folder import RunFolder
from tests.forking import Forked
from tests.launch.conftest import expect_alike, weights, when


@pytest.fixture(scope="module")
def two(begin) -> RunFolder:
    folder = begin("trainer.devices=2")
    run(folder)
    return folder


def test_two_processes_give_the_weights_curves_and_predictions_of_one(begin, two):
    one = begin()
    run(one)
    expect_alike(two, one)
    moved = begin("seed=1", "stage=pretrain")  # the comparison can fail: another seed is not as close
    run(moved)
    assert not torch.allclose(weights(moved)["fc.weight"], weights(one)["fc.weight"], atol=1e-3)


def test_each_test_image_counts_once_and_results_are_written_once(two):
    split = pd.read_csv(two.path / "split.csv")
    tested = pd.read_parquet(two.get_predictions_path("finetune", "test"))
    assert sorted(tested["sample_id"]) == sorted(split.loc[split["split"] == "test", "sample_id"])
    log = (two.path / "run.log").read_text()
    assert log.count("training head") == 1
    assert not [path for path in two.path.rglob("*") if path.name.startswith(".") and "cache" not in str(path)]
    assert two.read_status()["state"] == "finished"


def test_the_status_names_the_shipped_stage(two):
    assert two.shipped is not None
    assert two.read_status()["shipped_stage"] == two.shipped.name


def test_each_process_computes_its_part_of_the_cache(two):
    images = len(pd.read_csv(two.path / "split.csv").query("split != 'test'"))
    computed = re.findall(r"features pretrain: 0 cached, (\d+) computed", (two.path / "run.log").read_text())
    assert computed == [str(images)]
    stores = list((two.path / "cache" / "features").iterdir())
    assert [len(list(store.glob("*.shard"))) for store in stores] == [2, 2]


def ranks(forks) -> list[Forked]:
    return [process for process in forks.started if "pylorus.launch.rank" in process.args and process.poll() is None]


def test_interrupted_processes_end_and_resume_to_the_same_weights(begin, two, forks):
    folder = begin("trainer.devices=2")
    watcher = when(folder.get_stage("finetune").last_checkpoint, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run(folder)
    watcher.join()
    assert not ranks(forks)
    assert folder.read_status()["state"] == "interrupted"
    run(folder)
    assert all(torch.equal(tensor, weights(folder)[name]) for name, tensor in weights(two).items())


def test_a_killed_process_ends_the_others_and_is_named(begin, forks):
    folder = begin("trainer.devices=2")
    when(folder.get_stage("pretrain").last_checkpoint, lambda: ranks(forks)[-1].kill())
    with pytest.raises(PylorusError, match=r"process [12] of 2 was killed by SIGKILL"):
        run(folder)
    assert not ranks(forks)
    assert folder.read_status()["state"] == "failed"


def test_an_error_in_one_process_is_the_runs_error(begin, drawn):
    folder = begin("trainer.devices=2", "stages.finetune.learn=layer9")
    with pytest.raises(PylorusError, match='no block "layer9"'):
        run(folder)
    assert 'no block "layer9"' in folder.read_status()["error"]


def test_a_batch_that_cannot_be_divided_is_refused(begin):
    with pytest.raises(PylorusError, match=r"trainer.batch_size: found 8 for 3 devices.*such as 6"):
        run(begin("trainer.devices=3"))


def test_several_machines_are_requested_from_slurm(begin, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    with pytest.raises(PylorusError, match=r"trainer.nodes: found 2.*sbatch --nodes=2 --ntasks-per-node=4"):
        run(begin("trainer.nodes=2", "trainer.devices=4"))
