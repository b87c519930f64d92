"""What this machine is and does well: accelerator, precision, versions. Each choice is told with its reason."""

import importlib.metadata
import logging
import os
import platform
import time
from dataclasses import dataclass
from typing import Literal

import cv2
import psutil
import torch
from torch import nn

from pylorus.config import TrainerConfig
from pylorus.errors import PylorusError

log = logging.getLogger(__name__)

PACKAGES = (
    "albumentations",
    "hydra-core",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "pytorch-lightning",
    "scikit-learn",
    "timm",
    "torch",
    "torchmetrics",
    "torchvision",
)


@dataclass(frozen=True)
class Engine:
    """What a run computes on.

    Attributes:
        accelerator: cpu, cuda or mps.
        precision: "32" or "bf16", settled.
    """

    accelerator: str
    precision: str

    @property
    def lightning_precision(self) -> Literal["bf16-mixed", "32-true"]:
        """Lightning's word for the precision: bf16 for products, 32 bits for weights and sums."""
        return "bf16-mixed" if self.precision == "bf16" else "32-true"


def settle_engine(config: TrainerConfig) -> Engine:
    """Chooses accelerator and precision where the configuration leaves it to the machine.

    Raises:
        PylorusError: If the accelerator that was asked for is not there.
    """
    there = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    wanted = config.accelerator
    if wanted != "auto" and not there[wanted]:
        raise PylorusError(f"trainer.accelerator: found {wanted}, which this machine lacks. Take auto or cpu.")
    chosen = wanted if wanted != "auto" else next(name for name in ("gpu", "mps", "cpu") if there[name])
    accelerator = "cuda" if chosen == "gpu" else chosen
    cv2.setNumThreads(0)
    torch.set_float32_matmul_precision("high")
    if config.precision != "auto":
        return Engine(accelerator, config.precision)
    gain = _bf16_gain(accelerator)
    precision = "bf16" if gain > 1.3 else "32"
    log.info("precision %s: bf16 products run %.1f times as fast as fp32 here (trainer.precision)", precision, gain)
    return Engine(accelerator, precision)


def prefers_channels_last(network: nn.Module, engine: Engine) -> bool:
    """Whether convolutions run faster with a pixel's channels together: nearly always.

    VGG's first wide layer is a convolution of 103 million weights; a CPU would turn them round twice a step.
    """
    dense = any(isinstance(part, nn.Conv2d) and part.weight.numel() > 50_000_000 for part in network.modules())
    return not (dense and engine.accelerator == "cpu")


def environment(engine: Engine) -> dict[str, object]:
    """Versions and machine, for the record of a run."""
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if engine.accelerator == "cuda" else None,
        "accelerator": engine.accelerator,
        "precision": engine.precision,
    }


def _bf16_gain(accelerator: str) -> float:
    """How many times as fast a product of matrices is in bf16: measured, since some machines only emulate it."""
    if accelerator == "mps":
        return 0.0
    if accelerator == "cuda":
        return 2.0 if torch.cuda.is_bf16_supported(including_emulation=False) else 0.0
    full = torch.ones(1024, 1024)
    half = full.to(torch.bfloat16)

    def seconds(matrix: torch.Tensor) -> float:
        start = time.perf_counter()
        matrix @ matrix
        return time.perf_counter() - start

    # In turn, since a shared machine's speed drifts; the first pair only warms up.
    pairs = [(seconds(full), seconds(half)) for _ in range(9)][1:]
    return min(pair[0] for pair in pairs) / min(pair[1] for pair in pairs)
