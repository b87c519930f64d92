"""Optimizer and learning-rate schedule of one stage."""

import math
from typing import Any, Literal, cast

import torch
from timm.optim._optim_factory import create_optimizer_v2, list_optimizers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from pylorus.config import FUSED, OptimizerConfig, StageConfig
from pylorus.errors import PylorusError, format_suggestion


def compute_peak_lr(stage: StageConfig, optimizer: OptimizerConfig) -> float:
    """Return the stage's own learning rate, or its multiple of the run's."""
    return stage.lr if stage.lr is not None else optimizer.lr * stage.lr_factor


def get_monitor_mode(stage: StageConfig) -> Literal["min", "max"]:
    """Return whether a smaller or a larger value of the monitored metric is better."""
    return "min" if stage.monitor == "loss" else "max"


def build_optimizer(network: nn.Module, stage: StageConfig, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable parameters, grouped by layer where their learning rates differ.

    Raises:
        PylorusError: If timm has no optimizer of that name.
    """
    known = [str(name) for name in list_optimizers()]
    if config.name not in known:
        raise PylorusError(f'optimizer.name: timm has no "{config.name}".{format_suggestion(config.name, known)}')
    optimizer = create_optimizer_v2(
        network,
        opt=config.name,
        lr=compute_peak_lr(stage, config),
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        layer_decay=stage.layer_decay if stage.layer_decay < 1 else None,
        **cast(dict[str, Any], {"fused": True} if config.name in FUSED else {}),
    )
    for group in optimizer.param_groups:
        # timm leaves a group's lr_scale to its own schedulers; ours start from the group's learning rate.
        group["lr"] *= group.pop("lr_scale", 1.0)
    return optimizer


class WarmupCosine:
    """Learning rate as a fraction of its peak: linear warm-up, then half a cosine down to 0, or constant.

    Example:
        >>> schedule = WarmupCosine(steps=10, warmup=2, falls=True)
        >>> [round(schedule(step), 2) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(self, *, steps: int, warmup: int, falls: bool) -> None:
        self.steps, self.warmup, self.falls = steps, warmup, falls

    def __call__(self, step: int) -> float:
        """Return the fraction, in [0, 1], at a step in [0, steps]."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if not self.falls:
            return 1.0
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_schedule(optimizer: torch.optim.Optimizer, stage: StageConfig, *, steps: int) -> dict[str, Any]:
    """Build the stage's learning-rate schedule in the form that Lightning expects.

    Args:
        optimizer: The optimizer whose learning rates it changes.
        stage: Names the schedule, its warm-up and the metric that a plateau is judged by.
        steps: Optimizer steps in the whole stage.
    """
    scheduler: LRScheduler | ReduceLROnPlateau
    if stage.schedule == "plateau":
        scheduler = ReduceLROnPlateau(optimizer, mode=get_monitor_mode(stage), factor=0.1, patience=3)
        return {"scheduler": scheduler, "interval": "epoch", "monitor": "monitor"}
    lr_factor = WarmupCosine(steps=steps, warmup=round(stage.warmup * steps), falls=stage.schedule == "cosine")
    return {"scheduler": LambdaLR(optimizer, lr_factor), "interval": "step"}
