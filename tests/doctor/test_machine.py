"""Cores, precision and GPU, as a run would choose them."""

from types import SimpleNamespace

import pytest
import torch

from pylorus.doctor import machine
from pylorus.doctor.check import State
from pylorus.hardware.engine import resolve_precision

GIB = 2**30


def test_the_precision_is_the_one_that_a_run_takes(monkeypatch):
    for gain, precision, words in ((3.0, "bf16", "bf16 (matrix products run 3.0 times"), (0.4, "32", "fp32 (matrix")):
        monkeypatch.setattr("pylorus.hardware.engine.measure_bf16_speedup", lambda _, gain=gain: gain)
        assert resolve_precision("cpu")[0] == precision
        found = {check.name: check.found for check in machine.check_computing()}
        assert found["CPU precision"].startswith(words)


def test_one_core_of_many_is_told():
    assert machine.check_cores(1, 8).state is State.WARNING
    assert machine.check_cores(4, 8).state is State.GOOD


def test_a_machine_without_a_gpu_is_good():
    check = machine.check_no_gpu(None, [])
    assert (check.state, check.found) == (State.GOOD, "none; runs use the CPU")


def test_a_gpu_that_torch_does_not_reach_is_a_warning_with_torchs_own_reason(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    check = machine.check_no_gpu("470.57", ["CUDA initialization: The NVIDIA driver on your system is too old"])
    assert check.state is State.WARNING
    assert "470.57" in check.found
    assert "driver on your system is too old" in check.found
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "supports only CPUs" in machine.check_no_gpu("580.1", []).found


def test_a_gpu_that_the_user_hid_is_no_fault(monkeypatch):
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


def test_a_gpu_that_computes_is_told_with_memory_and_precision(gpu):
    check = machine.check_gpu(0)
    assert check.state is State.GOOD
    assert check.name == "GPU"
    assert "Card 9000, compute capability 9.0" in check.found
    assert "20.0 GiB free of 24.0 GiB; bf16" in check.found


def test_a_gpu_that_others_fill_is_a_warning(gpu):
    gpu["free"] = GIB
    check = machine.check_gpu(0)
    assert check.state is State.WARNING
    assert "nvidia-smi" in check.mend


def test_a_gpu_that_this_build_of_torch_can_not_use_is_wrong_with_its_reason(gpu):
    gpu["error"] = "CUDA error: no kernel image is available for execution on the device\nmore"
    check = machine.check_gpu(0)
    assert check.state is State.WRONG
    assert check.found.endswith("a test computation failed: RuntimeError: CUDA error: no kernel image is available for execution on the device")  # fmt: skip
    assert "trainer=cpu" in check.mend
