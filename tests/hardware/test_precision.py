"""The precision that is chosen for a machine: by its instructions and a measurement that is made once."""

import json

import pytest
import torch

from pylorus.hardware import engine
from pylorus.hardware.engine import measure_bf16_speedup, resolve_precision


@pytest.fixture
def set_cpu(monkeypatch, tmp_path):
    """Return a function that replaces Linux's description of the CPU."""

    def set_features(features, model="Some CPU", name="flags"):
        file = tmp_path / "cpuinfo"
        file.write_text(f"processor\t: 0\nmodel name\t: {model}\n{name}\t\t: {features}\n\nprocessor\t: 1\n")
        monkeypatch.setattr(engine, "CPU_INFO", file)

    return set_features


def test_a_cpu_without_bf16_is_not_measured(set_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "_measure_product", lambda matrix: pytest.fail("it was measured"))
    for features, name in (("fpu sse avx2 avx512f", "flags"), ("fp asimd", "Features")):
        set_cpu(features, name=name)
        assert resolve_precision("cpu") == ("32", "this CPU is not known to be faster in bf16")
        assert resolve_precision("cpu", tmp_path / "cache")[0] == "32"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("features", ["fpu avx512_bf16", "fpu amx_bf16", "fp asimd bf16"])
def test_what_a_busy_machine_delays_does_not_count(set_cpu, features):
    set_cpu(features)

    def get_speedups(delays):
        waits = iter(delays)
        return measure_bf16_speedup("cpu", lambda m: (0.03 if m.dtype == torch.float32 else 0.01) * next(waits))

    quiet, busy = [1.0] * 20, [9.0, 1.2, 1.0, 5.0, 7.0, 3.0, 2.0, 1.0, *[4.0] * 12]
    assert get_speedups(quiet) == get_speedups(busy) == pytest.approx(3.0)


def test_a_measurement_is_made_once_per_cpu_and_version_of_torch(set_cpu, monkeypatch, tmp_path):
    folder, speedups = tmp_path / "cache", iter([2.4, 1.1, 3.0, 2.0])
    monkeypatch.setattr(engine, "measure_bf16_speedup", lambda accelerator: next(speedups))
    set_cpu("avx512_bf16")
    expected = ("bf16", "matrix products run 2.4 times as fast in bf16 as in fp32")
    assert [resolve_precision("cpu", folder) for _ in range(3)] == [expected] * 3
    set_cpu("avx512_bf16", model="Another CPU")
    assert [resolve_precision("cpu", folder)[0] for _ in range(2)] == ["32", "32"]
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert "3.0 times" in resolve_precision("cpu", folder)[1]
    saved = json.loads((folder / engine.SPEED_FILE).read_text())
    assert list(saved.values()) == [2.4, 1.1, 3.0]
    (folder / engine.SPEED_FILE).write_text("[damaged")
    assert "2.0 times" in resolve_precision("cpu", folder)[1]


def test_a_gpu_without_bf16_is_not_said_to_be_slower_by_a_figure():
    assert resolve_precision("mps") == ("32", "this GPU is not known to be faster in bf16")


def test_measuring_leaves_the_number_of_threads(set_cpu, monkeypatch):
    set_cpu("avx512_bf16")
    monkeypatch.setattr(engine, "_measure_product", lambda matrix: 1.0)
    threads = torch.get_num_threads()
    assert measure_bf16_speedup("cpu") == 1.0
    assert torch.get_num_threads() == threads
