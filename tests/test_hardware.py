"""The engine of this machine: precision and full batches give the same training, or a clear refusal."""

import json

import pytest
import torch
from torch import nn

from pylorus import hardware
from pylorus.config.schema import TrainerConfig
from pylorus.core.errors import PylorusError
from pylorus.hardware import (
    Engine,
    FullBatchForward,
    capture_graphs,
    measure_bf16_speedup,
    resolve_cuda_graphs,
    resolve_engine,
    resolve_precision,
)


@pytest.fixture
def set_cpu(monkeypatch, tmp_path):
    """Return a function that replaces Linux's description of the CPU."""

    def set_features(features, model="Some CPU", name="flags"):
        file = tmp_path / "cpuinfo"
        file.write_text(f"processor\t: 0\nmodel name\t: {model}\n{name}\t\t: {features}\n\nprocessor\t: 1\n")
        monkeypatch.setattr(hardware, "CPU_INFO", file)

    return set_features


def test_a_cpu_without_bf16_is_not_measured(set_cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_measure_product", lambda matrix: pytest.fail("it was measured"))
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
    monkeypatch.setattr(hardware, "measure_bf16_speedup", lambda accelerator: next(speedups))
    set_cpu("avx512_bf16")
    expected = ("bf16", "matrix products run 2.4 times as fast in bf16 as in fp32")
    assert [resolve_precision("cpu", folder) for _ in range(3)] == [expected] * 3
    set_cpu("avx512_bf16", model="Another CPU")
    assert [resolve_precision("cpu", folder)[0] for _ in range(2)] == ["32", "32"]
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert "3.0 times" in resolve_precision("cpu", folder)[1]
    saved = json.loads((folder / hardware.SPEED_FILE).read_text())
    assert list(saved.values()) == [2.4, 1.1, 3.0]
    (folder / hardware.SPEED_FILE).write_text("[damaged")
    assert "2.0 times" in resolve_precision("cpu", folder)[1]


def test_a_gpu_without_bf16_is_not_said_to_be_slower_by_a_figure():
    assert resolve_precision("mps") == ("32", "this GPU is not known to be faster in bf16")


def test_measuring_leaves_the_number_of_threads(set_cpu, monkeypatch):
    set_cpu("avx512_bf16")
    monkeypatch.setattr(hardware, "_measure_product", lambda matrix: 1.0)
    threads = torch.get_num_threads()
    assert measure_bf16_speedup("cpu") == 1.0
    assert torch.get_num_threads() == threads


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def build_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))


class WaitingNetwork(nn.Module):
    """A network for which the host waits, so that CUDA can't capture it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_network()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = self.inner(image)
        return logits if logits.sum().item() < 1e9 else -logits


def train_network(
    device: str, *, is_captured: bool, is_required: bool = True, build=build_network
) -> dict[str, torch.Tensor]:
    """Train for four full batches, and return the weights and running statistics."""
    network = build().to(device)
    forward = FullBatchForward(network, 4, is_captured=True, is_required=is_required) if is_captured else None
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for step in range(4):
        image = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(device)
        logits = network(image) if forward is None else forward((image,))
        loss = nn.functional.cross_entropy(logits, torch.arange(4, device=device) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.state_dict()


@needs_gpu
def test_cuda_graphs_train_like_single_kernels():
    plain, captured = (train_network("cuda", is_captured=is_captured) for is_captured in (False, True))
    for name in plain:
        torch.testing.assert_close(captured[name], plain[name], rtol=1e-4, atol=1e-5)


@needs_gpu
def test_a_network_that_cuda_can_not_capture_trains_all_the_same():
    plain, other = (
        train_network("cuda", is_captured=is_captured, is_required=False, build=WaitingNetwork)
        for is_captured in (False, True)
    )
    for name in plain:
        torch.testing.assert_close(other[name], plain[name], rtol=1e-4, atol=1e-5)


@pytest.fixture
def made_up_graphs(monkeypatch):
    """In place of CUDA: as in torch, the module is run some times, with the random numbers that this takes."""

    def capture(module, examples, **_):
        for _ in range(3):
            module(*examples).sum().backward(inputs=list(examples) if examples[0].requires_grad else None)
            torch.rand(5)
        for parameter in module.parameters():
            parameter.grad = None
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)


def test_capturing_changes_neither_running_statistics_nor_random_numbers(made_up_graphs):
    network = build_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    capture_graphs(network, (torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_captured_batches_train_like_others(made_up_graphs):
    plain, captured = (train_network("cpu", is_captured=is_captured) for is_captured in (False, True))
    assert all(torch.equal(plain[name], captured[name]) for name in plain)


@pytest.fixture
def failing_graphs(monkeypatch):
    """In place of CUDA: the module is run once, and then can't be captured."""

    def fail(module, examples, **_):
        module(*examples)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)


def test_a_network_that_can_not_be_captured_trains_all_the_same_unless_asked_for(failing_graphs, caplog):
    caplog.set_level("INFO")
    plain, other = (train_network("cpu", is_captured=each, is_required=False) for each in (False, True))
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert caplog.messages == [
        "kernels are launched one by one, since this network can't be captured: operation not permitted when stream is "
        "capturing"
    ]


def test_a_network_that_can_not_be_captured_is_refused_in_words(failing_graphs):
    with pytest.raises(PylorusError, match=r"trainer.cuda_graphs: .*not permitted when stream is capturing\. Leave"):
        capture_graphs(build_network(), (torch.randn(4, 3, 8, 8),))


@pytest.mark.parametrize(
    ("settings", "is_captured", "reason"),
    [
        ({}, True, "with 16 images the GPU would wait"),
        ({"batch_size": 128}, False, "more than 64 images"),
        ({"devices": 2}, False, "several devices"),
        ({"compile": True}, False, "compile=true"),
        ({"accumulate": 2}, False, "accumulate"),
        ({"batch_size": 128, "cuda_graphs": True}, True, "set by the user"),
        ({"cuda_graphs": False}, False, "set by the user"),
    ],
)
def test_graphs_are_chosen_where_a_gpu_would_wait(settings, is_captured, reason):
    engine = Engine("cuda", "bf16", 1, {})
    assert resolve_cuda_graphs(TrainerConfig(**settings), engine)[0] == is_captured
    assert reason in resolve_cuda_graphs(TrainerConfig(**settings), engine)[1]
    assert resolve_cuda_graphs(TrainerConfig(), Engine("cpu", "bf16", 1, {})) == (False, "only an NVIDIA GPU has them")
    assert not resolve_cuda_graphs(TrainerConfig(), Engine("cuda", "16", 1, {}))[0]


def test_cuda_graphs_need_a_gpu():
    with pytest.raises(PylorusError, match="trainer.cuda_graphs: found true, but trainer.accelerator is cpu"):
        resolve_engine(TrainerConfig(accelerator="cpu", cuda_graphs=True))


@pytest.mark.parametrize(
    "words", [("trainer.devices=2", "trainer.batch_size=8"), ("trainer.compile=true",), ("trainer.accumulate=2",)]
)
def test_cuda_graphs_are_refused_with_several_devices_compilation_or_accumulation(compose_config, words):
    with pytest.raises(PylorusError, match="trainer.cuda_graphs: found true, expected false with"):
        compose_config("model=small", "trainer.cuda_graphs=true", *words)
