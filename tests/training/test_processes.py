"""torchrun or srun may start the processes of a run; their number comes from the environment."""

import sys

import pytest

from pylorus.core.distributed import is_launched, read_processes
from pylorus.core.errors import PylorusError
from pylorus.training import processes


@pytest.fixture
def torchrun(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(processes, "announce_folder", lambda folder: None)


def test_devices_and_nodes_follow_the_launched_processes(torchrun, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1"])
    assert is_launched()
    assert processes.run_launched(lambda: 0, pytest.fail) == 0
    assert sys.argv == ["train.py", "seed=1", "trainer.devices=2", "trainer.nodes=2"]


def test_a_sweep_is_refused(torchrun, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "seed=1,2"])
    with pytest.raises(PylorusError, match=r"-m: found a sweep in 4 processes.*train.py -m trainer.devices=2"):
        processes.run_launched(lambda: 0, pytest.fail)


def test_srun_tasks_are_processes_but_a_batch_script_is_not(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert not is_launched()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert is_launched()


def test_a_process_without_a_launcher_gets_the_command_to_use(monkeypatch):
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PylorusError, match=r"found no RANK.*python train.py trainer.devices=2"):
        read_processes()
