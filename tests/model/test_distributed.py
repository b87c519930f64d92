"""Batch norm over several processes equals that of one process on the whole batch."""

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import distributed, multiprocessing, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pylorus.core.distributed import Processes
from pylorus.model.distributed import use_sync_batch_norm

TWO = [Processes(index, 2, index, 2) for index in range(2)]


def build_network(norm: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm(4))


def compute_step(network: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients and statistics of a step in training mode."""
    output = network(pixels)
    output.pow(3).sum().backward()  # of squares, the gradient before a batch norm is nearly 0
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in network.named_parameters()}
    return {"output": output.detach(), **gradients, **dict(network.named_buffers())}


def compute_share(rank: int, store: str, norm: type[nn.Module], pixels: list[torch.Tensor], answers) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2)
    network = build_network(norm)
    with use_sync_batch_norm(network, TWO[rank], accelerator="cpu"):
        answers.put((rank, {name: tensor.numpy() for name, tensor in compute_step(network, pixels[rank]).items()}))
    distributed.barrier()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_two_processes_normalize_over_the_whole_batch_even_if_uneven(tmp_path, norm):
    pixels = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    expected = compute_step(build_network(norm), pixels)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    shares = [pixels[:3], pixels[3:]]
    processes = [
        context.Process(target=compute_share, args=(rank, str(tmp_path / "store"), norm, shares, answers))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    steps = dict(answers.get() for _ in processes)
    for process in processes:
        process.join()
    for name, tensor in expected.items():
        first, second = (torch.as_tensor(steps[rank][name]) for rank in range(2))
        if name == "output":
            first, second = torch.cat([first, second]), tensor
        elif name.startswith("gradient"):
            first, second = first + second, tensor
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second, tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNormAct2d])
def test_gpus_use_torchs_own_sync_batch_norm(monkeypatch, norm):
    called = []
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda layer, image: called.append(layer) or image)
    with FakeTensorMode():
        network = build_network(norm)[1]
        with use_sync_batch_norm(network, TWO[0], accelerator="cuda"):
            network(torch.empty(2, 4, 3, 3, device="cuda"))
    assert called == [network]


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_batch_norm_layers_are_restored_after_training(accelerator):
    network = build_network(BatchNormAct2d)
    pixels = torch.randn(2, 3, 6, 6)
    before = network.eval()(pixels)
    with use_sync_batch_norm(network, TWO[0], accelerator=accelerator):
        assert type(network[1]) is not BatchNormAct2d
        torch.testing.assert_close(network(pixels), before)
    assert type(network[1]) is BatchNormAct2d
    with use_sync_batch_norm(network, Processes(), accelerator=accelerator):
        assert type(network[1]) is BatchNormAct2d
