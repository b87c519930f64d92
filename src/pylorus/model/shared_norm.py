"""Batch norm over the whole batch when several processes each hold a part of it: the same numbers as in one process.

torch.nn.SyncBatchNorm does not support the CPU, and replaces the modules by whose names a network's weights are found.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pylorus.parallel.processes import Processes


class _AllReduceSum(torch.autograd.Function):
    """Sum over all processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Sum tensors of equal shape."""
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Sum the gradients that the processes' losses have with respect to the sum."""
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        return total


@contextmanager
def use_sync_batch_norm(network: nn.Module, processes: Processes) -> Iterator[None]:
    """Inside, batch-norm layers in training mode normalize over the images of all processes."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and processes.is_distributed]
    for norm in norms:
        norm.forward = partial(_forward_batch_norm, norm, norm.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _forward_batch_norm(norm: _BatchNorm, original_forward: Any, image: Tensor) -> Tensor:
    if not norm.training:
        return cast(Tensor, original_forward(image))
    output = normalize_batch(norm, image)
    # timm's batch-norm layers include their dropout and activation.
    for name in ("drop", "act"):
        layer = getattr(norm, name, None)
        output = output if layer is None else layer(output)
    return output


def normalize_batch(norm: _BatchNorm, image: Tensor) -> Tensor:
    """Return what `norm` gives in training for this process's images (batch, channels, …); update its statistics.

    Mean and variance are those of all processes' images (Ioffe and Szegedy 2015), summed in 32 bits.
    """
    image_fp32 = image.float()
    dimensions = [0, *range(2, image.ndim)]
    shape = [1, -1] + [1] * (image.ndim - 2)
    count = image_fp32.new_tensor([image_fp32.numel() / image_fp32.shape[1]])
    sums = _sum_over_processes(torch.cat([image_fp32.sum(dimensions), count]))
    total = sums[-1].detach()
    mean = sums[:-1] / total
    centered = image_fp32 - mean.view(shape)
    variance = _sum_over_processes(centered.square().sum(dimensions)) / total
    _update_running_statistics(norm, mean.detach(), variance.detach(), total)
    output = centered * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.affine:
        output = output * norm.weight.view(shape) + norm.bias.view(shape)
    return output.to(image.dtype)


def _sum_over_processes(tensor: Tensor) -> Tensor:
    return cast(Tensor, _AllReduceSum.apply(tensor))


def _update_running_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    with torch.no_grad():
        norm.running_mean.lerp_(mean, momentum)
        norm.running_var.lerp_(variance * count / (count - 1).clamp(min=1), momentum)
