"""Full training batches by a compiled network or by CUDA graphs: the same training, and clear refusals."""

import pytest
import torch
from torch import nn

from pylorus.config.schema import TrainerConfig
from pylorus.core.errors import PylorusError
from pylorus.hardware.engine import FullBatchForward, capture_graphs, resolve_engine

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def build_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))


def train_network(device: str, *, is_captured: bool) -> dict[str, torch.Tensor]:
    """Train for four full batches, and return the weights and running statistics."""
    network = build_network().to(device)
    forward = FullBatchForward(network, 4, is_captured=True) if is_captured else None
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


def test_a_network_that_can_not_be_captured_is_refused_in_words(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with pytest.raises(PylorusError, match=r"trainer.cuda_graphs: .*not permitted when stream is capturing\. Leave"):
        capture_graphs(build_network(), (torch.randn(4, 3, 8, 8),))


def test_cuda_graphs_need_a_gpu():
    with pytest.raises(PylorusError, match="trainer.cuda_graphs: found true, but trainer.accelerator is cpu"):
        resolve_engine(TrainerConfig(accelerator="cpu", cuda_graphs=True))


@pytest.mark.parametrize(
    "words", [("trainer.devices=2", "trainer.batch_size=8"), ("trainer.compile=true",), ("trainer.accumulate=2",)]
)
def test_cuda_graphs_are_refused_with_several_devices_compilation_or_accumulation(compose_config, words):
    with pytest.raises(PylorusError, match="trainer.cuda_graphs: found true, expected false with"):
        compose_config("model=small", "trainer.cuda_graphs=true", *words)
