"""What is chosen for the machine and the network where the user leaves it open: told once, each with its reason."""

import logging
from typing import NamedTuple

from torch import nn

from pylorus.config import FUSED, Config, TrainerConfig
from pylorus.machine.engine import Engine, usable_cores

log = logging.getLogger(__name__)

DENSE = 50_000_000
"""Weights of a convolution that a CPU takes longer to turn round than it gains."""


class Choice(NamedTuple):
    """One choice: the key that overrides it, what was chosen, and why."""

    key: str
    value: str
    reason: str


def channels_last(config: Config, engine: Engine, network: nn.Module) -> tuple[bool, str]:
    """Whether a pixel's channels lie together in memory, and why."""
    if config.trainer.channels_last is not None:
        return config.trainer.channels_last, "asked for"
    if not gains_channels_last(network, engine.accelerator):
        return False, "a convolution of this network is so wide that a CPU would turn it round in every step"
    return True, "convolutions run faster with a pixel's channels together"


def gains_channels_last(network: nn.Module, accelerator: str) -> bool:
    """Whether a network computes faster with a pixel's channels together; `accelerator` in torch's words."""
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    # VGG's first wide layer is a convolution of 103 million weights.
    return accelerator != "cpu" or all(part.weight.numel() <= DENSE for part in convolutions)


def workers(config: Config, engine: Engine) -> tuple[int, str]:
    """How many processes decode images, and why."""
    if config.data.workers is not None:
        return config.data.workers, "asked for"
    if engine.accelerator == "cpu":
        return 0, "on a CPU the network is the slower part and wants all cores"
    return min(16, max(1, usable_cores() - 1)), "all cores but the one that feeds the GPU, 16 at most"


def images_a_step(trainer: TrainerConfig) -> int:
    """Images of a step over all devices.

    Raises:
        ValueError: If it is not settled yet.
    """
    if not isinstance(trainer.batch_size, int):
        raise ValueError(f"found trainer.batch_size={trainer.batch_size}, expected it to be settled by now")
    return trainer.batch_size


def choices(config: Config, engine: Engine, network: nn.Module, *, why_batch_size: str = "asked for") -> list[Choice]:
    """All choices of a run."""
    last, why_last = channels_last(config, engine, network)
    processes, why_processes = workers(config, engine)
    size, optimizer = images_a_step(config.trainer), config.optimizer.name
    why_size = "" if why_batch_size == "asked for" else f"{why_batch_size}; "
    found = [
        Choice("trainer.accelerator", engine.accelerator, engine.reasons["accelerator"]),
        Choice("trainer.precision", engine.precision, engine.reasons["precision"]),
        Choice("trainer.threads", str(engine.threads), engine.reasons["threads"]),
        Choice("trainer.channels_last", str(last).lower(), why_last),
        Choice("trainer.batch_size", str(size), f"{why_size}{2 * size} in evaluation, which keeps no gradients"),
        Choice(
            "trainer.compile", str(config.trainer.compile).lower(), "pays in runs of hours: it takes minutes to begin"
        ),
        Choice("data.workers", str(processes), why_processes),
    ]
    devices = config.trainer.devices * config.trainer.nodes
    if devices > 1 or config.trainer.strategy != "ddp":
        found.insert(1, Choice("trainer.strategy", config.trainer.strategy, _strategy(config.trainer, devices)))
    if optimizer in FUSED:
        found.append(Choice("optimizer.name", optimizer, "in one pass over all weights (fused)"))
    return found


def _strategy(trainer: TrainerConfig, devices: int) -> str:
    if devices == 1:
        return "of one device, which holds everything"
    if trainer.strategy == "fsdp":
        return f"each of {devices} devices holds its share of what learns"
    return f"each of {devices} devices holds all weights"


def tell(found: list[Choice]) -> None:
    """Prints the choices as a table."""
    widths = [max(len(choice[column]) for choice in found) for column in (0, 1)]
    lines = [f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for key, value, reason in found]
    log.info("chosen for this machine, each to be overridden by its key:\n%s", "\n".join(lines))
