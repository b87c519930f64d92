"""Resolve settings that the user leaves open for the machine and the network, and log each with its reason."""

import logging
from typing import NamedTuple

from torch import nn

from pylorus.config.schema import FUSED_OPTIMIZERS, Config, TrainerConfig
from pylorus.hardware.engine import Engine, count_usable_cores

log = logging.getLogger(__name__)

MAX_CONVOLUTION_WEIGHTS = 50_000_000
"""Weights in a convolution above which a CPU loses more time converting its memory layout than it gains."""


class Choice(NamedTuple):
    """One setting: the key that overrides it, the value chosen, and why."""

    key: str
    value: str
    reason: str


def resolve_channels_last(requested: bool | None, network: nn.Module, accelerator: str) -> tuple[bool, str]:
    """Return whether to store a pixel's channels adjacently in memory (channels-last), and why."""
    if requested is not None:
        return requested, "set by the user"
    if not is_faster_channels_last(network, accelerator):
        return False, "one convolution is so large that a CPU would convert its layout in every step"
    return True, "convolutions run faster in this layout"


def is_faster_channels_last(network: nn.Module, accelerator: str) -> bool:
    """Return whether a network computes faster in channels-last layout; `accelerator` is torch's device type."""
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    # VGG's first wide layer is a convolution of 103 million weights.
    return accelerator != "cpu" or all(module.weight.numel() <= MAX_CONVOLUTION_WEIGHTS for module in convolutions)


def resolve_workers(requested: int | None, accelerator: str) -> tuple[int, str]:
    """Return how many processes decode images, and why."""
    if requested is not None:
        return requested, "set by the user"
    if accelerator == "cpu":
        return 0, "on a CPU the network is the bottleneck and needs all cores"
    return min(16, max(1, count_usable_cores() - 1)), "all cores but one, which feeds the GPU; at most 16"


def get_batch_size(trainer: TrainerConfig) -> int:
    """Return the batch size over all devices.

    Raises:
        ValueError: If it is not resolved yet.
    """
    if not isinstance(trainer.batch_size, int):
        raise ValueError(f"found trainer.batch_size={trainer.batch_size}, expected a resolved number")
    return trainer.batch_size


def list_choices(
    config: Config, engine: Engine, network: nn.Module, *, why_batch_size: str = "set by the user"
) -> list[Choice]:
    """List all settings of a run that were chosen for the machine."""
    is_channels_last, layout_reason = resolve_channels_last(config.trainer.channels_last, network, engine.accelerator)
    worker_count, workers_reason = resolve_workers(config.data.workers, engine.accelerator)
    size, optimizer = get_batch_size(config.trainer), config.optimizer.name
    size_note = "" if why_batch_size == "set by the user" else f"{why_batch_size}; "
    settings = [
        Choice("trainer.accelerator", engine.accelerator, engine.reasons["accelerator"]),
        Choice("trainer.precision", engine.precision, engine.reasons["precision"]),
        Choice("trainer.threads", str(engine.threads), engine.reasons["threads"]),
        Choice("trainer.channels_last", str(is_channels_last).lower(), layout_reason),
        Choice("trainer.batch_size", str(size), f"{size_note}{2 * size} in evaluation, which needs no gradients"),
        Choice(
            "trainer.compile",
            str(config.trainer.compile).lower(),
            "worthwhile for runs of hours: compiling takes minutes",
        ),
        Choice("data.workers", str(worker_count), workers_reason),
    ]
    devices = config.trainer.devices * config.trainer.nodes
    if devices > 1 or config.trainer.strategy != "ddp":
        settings.insert(
            1, Choice("trainer.strategy", config.trainer.strategy, _explain_strategy(config.trainer.strategy, devices))
        )
    accumulate = config.trainer.accumulate
    if accumulate > 1:
        reason = f"the optimizer takes a step every {accumulate} batches, that is, {accumulate * size} images"
        index = next(index for index, choice in enumerate(settings) if choice.key == "trainer.batch_size") + 1
        settings.insert(index, Choice("trainer.accumulate", str(accumulate), reason))
    if optimizer in FUSED_OPTIMIZERS and engine.precision != "16":  # gradients are unscaled before they are clipped
        settings.append(Choice("optimizer.name", optimizer, "fused: one kernel updates all weights"))
    return settings


def _explain_strategy(strategy: str, devices: int) -> str:
    if devices == 1:
        return "one device, which holds everything"
    if strategy == "fsdp":
        return f"each of {devices} devices holds a shard of the trainable weights"
    return f"each of {devices} devices holds all weights"


def log_choices(settings: list[Choice]) -> None:
    """Log the settings as a table."""
    widths = [max(len(choice[column]) for choice in settings) for column in (0, 1)]
    lines = [f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for key, value, reason in settings]
    log.info("settings chosen for this machine (override by key):\n%s", "\n".join(lines))
