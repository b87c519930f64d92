"""Cores, precision, GPU, memory, disks and the clock, as a run would choose or need them."""

import shutil
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from pylorus.doctor import machine
from pylorus.doctor.packages import State
from pylorus.hardware.engine import resolve_precision

GIB = 2**30


def test_the_doctor_shows_the_precision_that_a_run_chooses(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where no run has measured it
    for gain, precision, words in ((3.0, "bf16", "bf16 (matrix products run 3.0 times"), (0.4, "32", "fp32 (matrix")):
        monkeypatch.setattr("pylorus.hardware.engine.measure_bf16_speedup", lambda _, gain=gain: gain)
        assert resolve_precision("cpu")[0] == precision
        found = {check.name: check.found for check in machine.check_computing()}
        assert found["CPU precision"].startswith(words)


def test_using_one_of_many_cores_is_reported():
    assert machine.check_cores(1, 8).state is State.WARNING
    assert machine.check_cores(4, 8).state is State.GOOD


def test_a_machine_without_a_gpu_is_good():
    check = machine.check_no_gpu(None, [])
    assert (check.state, check.found) == (State.GOOD, "none; runs use the CPU")


def test_a_gpu_that_torch_cannot_use_is_a_warning_with_torchs_reason(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    check = machine.check_no_gpu("470.57", ["CUDA initialization: The NVIDIA driver on your system is too old"])
    assert check.state is State.WARNING
    assert "470.57" in check.found
    assert "driver on your system is too old" in check.found
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "supports only CPUs" in machine.check_no_gpu("580.1", []).found


def test_a_gpu_hidden_by_the_user_is_not_a_problem(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check = machine.check_no_gpu("580.1", [])
    assert check.state is State.GOOD
    assert "CUDA_VISIBLE_DEVICES" in check.found


def test_the_drivers_version_is_read_where_linux_states_it(tmp_path, monkeypatch):
    file = tmp_path / "version"
    monkeypatch.setattr(machine, "DRIVER", file)
    for line in ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build"):  # fmt: skip
        file.write_text(line)
        assert machine.read_driver_version() == "580.95.05"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as torch describes it, whose products are computed on the CPU, unless `computes` is made to fail."""
    state = {"free": 20 * GIB, "error": None}
    ones = torch.ones

    def made(*shape, device):
        assert device == "cuda:0"
        if state["error"]:
            raise RuntimeError(state["error"])
        return ones(*shape)

    properties = SimpleNamespace(name="Card 9000", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (state["free"], 24 * GIB))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch, "ones", made)
    return state


def test_a_working_gpu_is_reported_with_memory_and_precision(gpu):
    check = machine.check_gpu(0)
    assert check.state is State.GOOD
    assert check.name == "GPU"
    assert "Card 9000, compute capability 9.0" in check.found
    assert "20.0 GiB free of 24.0 GiB; bf16" in check.found


def test_a_gpu_whose_memory_is_in_use_is_a_warning(gpu):
    gpu["free"] = GIB
    check = machine.check_gpu(0)
    assert check.state is State.WARNING
    assert "nvidia-smi" in check.remedy


def test_a_gpu_unsupported_by_this_torch_build_is_an_error_with_the_reason(gpu):
    gpu["error"] = "CUDA error: no kernel image is available for execution on the device\nmore"
    check = machine.check_gpu(0)
    assert check.state is State.WRONG
    assert check.found.endswith("a test computation failed: RuntimeError: CUDA error: no kernel image is available for execution on the device")  # fmt: skip
    assert "trainer=cpu" in check.remedy


GIB = 2**30
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "state"), [(8.0, State.GOOD), (2.0, State.WARNING), (0.5, State.WRONG)])
def test_low_memory_is_reported(free, state):
    assert machine.check_memory(int(free * GIB), 16 * GIB).state is state


def test_the_memory_limit_of_a_container_counts_not_that_of_its_host(tmp_path, monkeypatch):
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text(f"{2 * GIB}\n")
    used.write_text(f"{GIB // 2}\n")
    monkeypatch.setattr(machine, "MEMORY_FILES", ((limit, used),))
    memory = next(iter(machine.check_space()))
    assert memory.found.endswith("of 2.0 GiB; the study's models should have 4.0 GiB free")
    limit.write_text("max\n")
    assert "of 2.0 GiB" not in next(iter(machine.check_space())).found


def test_a_containers_64_mib_of_shared_memory_are_reported_with_two_remedies():
    check = machine.check_shared_memory(64 * 2**20)
    assert check.state is State.WARNING
    assert "64.0 MiB" in check.found
    assert "--shm-size" in check.remedy
    assert "data.workers=0" in check.remedy


@pytest.mark.parametrize(("free", "state"), [(50, State.GOOD), (5, State.WARNING), (0, State.WRONG)])
def test_a_full_disk_is_reported(tmp_path, monkeypatch, free, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, free * GIB))
    assert machine.check_disk("outputs", tmp_path / "not" / "yet").state is state


def test_the_write_check_leaves_no_files(tmp_path):
    check = machine.check_writable(tmp_path / "outputs")
    assert check.state is State.GOOD
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "outputs").write_text("")
    assert machine.check_writable(tmp_path / "outputs").state is State.WRONG


def test_an_unwritable_folder_is_an_error_with_the_systems_reason(tmp_path, monkeypatch):
    def refused(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine, "write_atomically", refused)
    check = machine.check_writable(tmp_path)
    assert check.state is State.WRONG
    assert check.found == f"can't write to {tmp_path}: Permission denied"


def test_a_different_clock_of_a_file_server_is_reported(tmp_path, monkeypatch):
    now = time.time()
    monkeypatch.setattr(machine.time, "time", lambda: now + 60)
    check = machine.check_writable(tmp_path)
    assert check.state is State.WARNING
    assert "-60 s" in check.found


def test_a_clock_earlier_than_the_installation_is_reported():
    assert machine.check_clock(1.7e9, 1.6e9).state is State.GOOD
    assert machine.check_clock(1.6e9, 1.7e9).state is State.WARNING
