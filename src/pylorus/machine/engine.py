"""What this machine is and does well: accelerator, precision, versions. Each choice is told with its reason."""

import ctypes
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

import cv2
import joblib
import psutil
import torch

from pylorus.config import TrainerConfig
from pylorus.errors import PylorusError
from pylorus.sweeps.engines import JOBS_AT_ONCE

# Of mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
MOST_FREED_BYTES = 2**31 - 1

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
        threads: That compute on a CPU, of all processes of the run on this machine together.
        reasons: Why each of these was chosen, for its user: a sentence a field.
    """

    accelerator: str
    precision: str
    threads: int
    reasons: dict[str, str]

    @property
    def lightning_precision(self) -> Literal["bf16-mixed", "32-true"]:
        """Lightning's word for the precision: bf16 for products, 32 bits for weights and sums."""
        return "bf16-mixed" if self.precision == "bf16" else "32-true"

    def take_up(self, *, beside: int = 1) -> None:
        """Sets this process up to compute so.

        Args:
            beside: How many processes of the run share this machine's cores.
        """
        cv2.setNumThreads(0)
        torch.set_float32_matmul_precision("high")
        torch.set_num_threads(max(1, self.threads // beside))
        if self.accelerator == "cpu":
            keep_freed_memory()

    def computing(self) -> AbstractContextManager[object]:
        """The precision outside of Lightning's loops, the same as in them."""
        return torch.autocast(self.accelerator, torch.bfloat16, enabled=self.precision == "bf16")


def take_full_precision() -> None:
    """Has products of matrices and convolutions of 32-bit numbers computed in 32 bits, also on a GPU (no TF32)."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def full_precision() -> Iterator[None]:
    """Computes inside as `take_full_precision` says, afterwards as before."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    take_full_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def accelerators() -> list[str]:
    """The accelerators that this machine has, in torch's words (cuda, mps, cpu), the fastest first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, here in there.items() if here]


def choose_accelerator(config: TrainerConfig) -> tuple[str, str]:
    """The accelerator in torch's words (cpu, cuda or mps), and why it was chosen.

    Raises:
        PylorusError: If what was asked for is not there, or not as often.
    """
    there, wanted = accelerators(), config.accelerator
    chosen = there[0] if wanted == "auto" else "cuda" if wanted == "gpu" else wanted
    if chosen not in there:
        raise PylorusError(f"trainer.accelerator: found {wanted}, which this machine lacks. Take auto or cpu.")
    if chosen == "cuda" and config.devices > torch.cuda.device_count():
        raise PylorusError(
            f"trainer.devices: found {config.devices}, but this machine has {torch.cuda.device_count()} GPU(s) to use. "
            "Take as many, or more machines (trainer.nodes, under SLURM)."
        )
    if chosen == "mps" and config.devices > 1:
        raise PylorusError(f"trainer.devices: found {config.devices}, expected 1: Apple's GPU is one.")
    return chosen, "asked for" if wanted != "auto" else "the fastest that is there"


def settle_engine(config: TrainerConfig) -> Engine:
    """Chooses accelerator, precision and threads where the configuration leaves them to the machine.

    Raises:
        PylorusError: If the accelerator that was asked for is not there.
    """
    accelerator, why = choose_accelerator(config)
    threads = config.threads or usable_cores()
    reasons = {"accelerator": why}
    reasons["threads"] = "asked for" if config.threads else f"the cores that this process may use{_shared()}"
    precision, reasons["precision"] = config.precision, "asked for"
    if config.precision == "auto":
        precision, reasons["precision"] = fitting_precision(accelerator)
    return Engine(accelerator, precision, threads, reasons)


def usable_cores() -> int:
    """How many cores this process may use: fewer than there are in a container, under SLURM, beside other jobs."""
    cores = int(joblib.cpu_count(only_physical_cores=True))
    asked = int(os.environ.get("SLURM_CPUS_PER_TASK", cores))  # SLURM does not bind a job to these everywhere
    return max(1, min(cores, asked) // jobs_at_once())


def jobs_at_once() -> int:
    """How many jobs of a sweep share this machine."""
    return int(os.environ.get(JOBS_AT_ONCE, "1"))


def _shared() -> str:
    """Why a job of several gets fewer threads: two with all cores each are many times slower than two with half."""
    at_once = jobs_at_once()
    return f", shared with the sweep's other jobs: {at_once} run at once" if at_once > 1 else ""


def keep_freed_memory() -> None:
    """Has the C library keep freed memory for the next step, where it would hand each large tensor back at once.

    On Linux with glibc a training step spends much of its time on page faults otherwise; elsewhere nothing happens.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, MOST_FREED_BYTES)
        libc.mallopt(M_TOP_PAD, 64 << 20)
    except (OSError, AttributeError):
        return


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
        "threads": engine.threads,
    }


def fitting_precision(accelerator: str) -> tuple[str, str]:
    """The precision that an accelerator does well, "32" or "bf16", and why."""
    gain = bf16_gain(accelerator)
    return "bf16" if gain > 1.3 else "32", f"matrix products run {gain:.1f} times as fast in bf16 as in fp32"


def bf16_gain(accelerator: str) -> float:
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
