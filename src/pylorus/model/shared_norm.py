"""Batch norm over the whole batch where several processes each hold a share of it: the same numbers as in one process.

torch's own way to it knows no CPU, and replaces the modules by which a network's weights are found.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pylorus.parallel.processes import Processes


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:
        """Of tensors of one shape."""
        total = mine.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """What each process's loss wants of the sum."""
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        return total


@contextmanager
def norm_of_all(network: nn.Module, processes: Processes) -> Iterator[None]:
    """Inside, each batch norm that is in training mode normalises by the images of all processes."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and processes.several]
    for norm in norms:
        norm.forward = partial(_forward, norm, norm.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _forward(norm: _BatchNorm, alone: Any, image: Tensor) -> Tensor:
    if not norm.training:
        return cast(Tensor, alone(image))
    found = normalised(norm, image)
    # timm's batch norm brings its dropout and activation along.
    for name in ("drop", "act"):
        after = getattr(norm, name, None)
        found = found if after is None else after(found)
    return found


def normalised(norm: _BatchNorm, image: Tensor) -> Tensor:
    """What `norm` gives in training for this process's images, of shape (batch, channels, …), and moves its statistics.

    Mean and variance are those of all processes' images (Ioffe and Szegedy 2015), summed in 32 bits.
    """
    full = image.float()
    dimensions = [0, *range(2, image.ndim)]
    shape = [1, -1] + [1] * (image.ndim - 2)
    count = full.new_tensor([full.numel() / full.shape[1]])
    sums = _summed(torch.cat([full.sum(dimensions), count]))
    total = sums[-1].detach()
    mean = sums[:-1] / total
    centred = full - mean.view(shape)
    variance = _summed(centred.square().sum(dimensions)) / total
    _move_statistics(norm, mean.detach(), variance.detach(), total)
    found = centred * torch.rsqrt(variance + norm.eps).view(shape)
    if norm.affine:
        found = found * norm.weight.view(shape) + norm.bias.view(shape)
    return found.to(image.dtype)


def _summed(mine: Tensor) -> Tensor:
    return cast(Tensor, _Sum.apply(mine))


def _move_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    with torch.no_grad():
        norm.running_mean.lerp_(mean, share)
        norm.running_var.lerp_(variance * count / (count - 1).clamp(min=1), share)
