"""Detect what this machine can do, and resolve the settings that the user leaves open for it and the network.

Accelerator, precision, threads, memory layout, workers: each choice comes with its reason, which the run logs.
"""

import ctypes
import importlib.metadata
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import cv2
import joblib
import psutil
import torch
from torch import Tensor, nn

from pylorus.config.schema import FUSED_OPTIMIZERS, Config, TrainerConfig
from pylorus.core.distributed import get_concurrent_jobs
from pylorus.core.errors import PylorusError
from pylorus.core.io import read_json, write_json

log = logging.getLogger(__name__)

# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
MAX_TRIM_BYTES = 2**31 - 1

PACKAGES = (
    "albumentations",
    "hydra-core",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "pytorch-lightning",
    "timm",
    "torch",
    "torchmetrics",
    "torchvision",
)


@dataclass(frozen=True)
class Engine:
    """The compute engine of a run.

    Attributes:
        accelerator: cpu, cuda or mps.
        precision: "32", "bf16" or "16", resolved.
        threads: CPU threads for computation, of all the run's processes on this machine together.
        reasons: Why each of these was chosen, for the user: one sentence per field.
    """

    accelerator: str
    precision: str
    threads: int
    reasons: dict[str, str]

    @property
    def lightning_precision(self) -> Literal["bf16-mixed", "16-mixed", "32-true"]:
        """Lightning's name for the precision: 16 bits for matrix products, 32 bits for weights and sums."""
        names: dict[str, Literal["bf16-mixed", "16-mixed"]] = {"bf16": "bf16-mixed", "16": "16-mixed"}
        return names.get(self.precision, "32-true")

    def setup_process(self, *, local_count: int = 1) -> None:
        """Configure this process to compute with these settings.

        Args:
            local_count: Number of the run's processes that share this machine's cores.
        """
        cv2.setNumThreads(0)
        torch.set_float32_matmul_precision("high")
        torch.set_num_threads(max(1, self.threads // local_count))
        if self.accelerator == "cpu":
            set_malloc_options()

    def use_precision(self) -> AbstractContextManager[object]:
        """Return an autocast context for use outside of Lightning's loops, with the precision that they use."""
        dtype = torch.float16 if self.precision == "16" else torch.bfloat16
        return torch.autocast(self.accelerator, dtype, enabled=self.precision != "32")


MOST_CAPTURED_IMAGES = 64
"""Batches of up to so many images are computed as CUDA graphs by default; those of larger ones take more memory."""


class FullBatchForward:
    """The forward pass of full training batches, compiled or as CUDA graphs; for batches of other sizes there is none.

    Both are prepared for inputs of one shape, at the first batch of this size: so a network is compiled only once, not
    again for the last batch of an epoch and for evaluation.

    Args:
        module: From the inputs to the logits, in training mode.
        images: Number of images in a full batch of this process.
        is_captured: Whether to replay CUDA graphs; otherwise the module is compiled with torch.
        is_required: Whether it is an error if the module can't be captured; if not, it is called as it is.
    """

    def __init__(self, module: nn.Module, images: int, *, is_captured: bool, is_required: bool = True) -> None:
        self.images, self._module, self._is_required = images, module, is_required
        self._forward: Callable[..., Tensor] | None = None
        if not is_captured:
            self._forward = cast(Callable[..., Tensor], torch.compile(module, dynamic=False))

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Compute logits of shape (images, classes)."""
        if self._forward is None:
            try:
                self._forward = capture_graphs(self._module, inputs)
            except PylorusError as error:
                if self._is_required:
                    raise
                reason = str(error.__cause__).partition("\n")[0]
                log.info("kernels are launched one by one, since this network can't be captured: %s", reason)
                self._forward = self._module
        return self._forward(*inputs)


def capture_graphs(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """Capture a module's forward and backward pass as CUDA graphs, each of which is then started as a whole.

    Args:
        module: Takes tensors and returns one; trained, on a GPU, and without operations for which the host waits.
        inputs: An example of its inputs; later ones must have the same shapes.

    Returns:
        The forward pass. Running statistics and the random state are those from before this call, although capturing
        runs the module several times.

    Raises:
        PylorusError: If the module can't be captured.
    """

    class Forward(nn.Module):
        """A module of its own, since torch replaces the function `forward` of what it captures."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Tensor) -> Tensor:
            return cast(Tensor, self.module(*inputs))

    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    examples = tuple(tensor.detach().clone() for tensor in inputs)
    devices = [inputs[0].device.index] if inputs[0].device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            captured = torch.cuda.make_graphed_callables(Forward(), examples, allow_unused_input=True)
    except RuntimeError as error:
        raise PylorusError(
            f"trainer.cuda_graphs: found true, but this network can't be captured: {str(error).splitlines()[0]}. "
            "Leave it out."
        ) from error
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return cast(Callable[..., Tensor], captured)


def set_full_precision() -> None:
    """Compute 32-bit matrix products and convolutions in full 32-bit precision, also on a GPU (no TF32)."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@contextmanager
def use_full_precision() -> Iterator[None]:
    """Apply `set_full_precision` inside, and restore the previous settings on exit."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_full_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def list_accelerators() -> list[str]:
    """List this machine's accelerators by torch's names (cuda, mps, cpu), the fastest first."""
    availability = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, is_available in availability.items() if is_available]


def resolve_accelerator(config: TrainerConfig) -> tuple[str, str]:
    """Return the accelerator by torch's name (cpu, cuda or mps), and why it was chosen.

    Raises:
        PylorusError: If the requested accelerator is missing, or there are fewer devices than requested.
    """
    available, requested = list_accelerators(), config.accelerator
    accelerator = available[0] if requested == "auto" else "cuda" if requested == "gpu" else requested
    if accelerator not in available:
        raise PylorusError(
            f"trainer.accelerator: found {requested}, which this machine does not have. Use auto or cpu."
        )
    if accelerator == "cuda" and config.devices > torch.cuda.device_count():
        raise PylorusError(
            f"trainer.devices: found {config.devices}, but PyTorch can use {torch.cuda.device_count()} here. "
            "Use at most that many, or more machines (trainer.nodes, under SLURM)."
        )
    if accelerator == "mps" and config.devices > 1:
        raise PylorusError(f"trainer.devices: found {config.devices}, expected 1: a Mac has a single GPU.")
    reason = "set by the user" if requested != "auto" else "the fastest available"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if accelerator == "cuda" else None
    return accelerator, f"{reason}; CUDA_VISIBLE_DEVICES is {visible}" if visible is not None else reason


def resolve_engine(config: TrainerConfig, folder: Path | None = None) -> Engine:
    """Choose accelerator, precision and threads where the configuration leaves them open.

    Args:
        config: The requested settings.
        folder: See `resolve_precision`.

    Raises:
        PylorusError: If the requested accelerator is missing.
    """
    accelerator, accelerator_reason = resolve_accelerator(config)
    if config.cuda_graphs and accelerator != "cuda":
        raise PylorusError(f"trainer.cuda_graphs: found true, but trainer.accelerator is {accelerator}. Leave it out.")
    threads = config.threads or count_usable_cores()
    reasons = {"accelerator": accelerator_reason}
    reasons["threads"] = (
        "set by the user" if config.threads else f"the cores available to this process{_explain_shared_cores()}"
    )
    precision, reasons["precision"] = config.precision, "set by the user"
    if config.precision == "auto":
        precision, reasons["precision"] = resolve_precision(accelerator, folder)
        if precision == "16" and config.strategy == "fsdp":
            precision, reasons["precision"] = "32", "fp16 with loss scaling does not work with trainer.strategy=fsdp"
    elif precision == "16" and accelerator != "cuda":
        raise PylorusError(
            f"trainer.precision: found 16, which needs an NVIDIA GPU, but the run computes on {accelerator}. Use auto, "
            "bf16 or 32."
        )
    return Engine(accelerator, precision, threads, reasons)


def count_usable_cores() -> int:
    """Count the cores available to this process: fewer than exist in containers, under SLURM, or beside other jobs."""
    cores = int(joblib.cpu_count(only_physical_cores=True))
    allocated = int(os.environ.get("SLURM_CPUS_PER_TASK", cores))  # not every SLURM installation binds a job to these
    return max(1, min(cores, allocated) // get_concurrent_jobs())


def _explain_shared_cores() -> str:
    """Explain fewer threads for one of several jobs: two with all cores each are far slower than two with half."""
    jobs = get_concurrent_jobs()
    return f", shared with other jobs of the sweep: {jobs} run at once" if jobs > 1 else ""


def set_malloc_options() -> None:
    """Make the C library keep freed memory for the next step, instead of returning each large tensor to the system.

    On Linux with glibc a training step otherwise spends much of its time on page faults; elsewhere this does nothing.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, MAX_TRIM_BYTES)
        libc.mallopt(M_TOP_PAD, 64 << 20)
    except (OSError, AttributeError):
        return


def collect_environment(engine: Engine) -> dict[str, object]:
    """Return versions and hardware, for the record of a run."""
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if engine.accelerator == "cuda" else None,
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "accelerator": engine.accelerator,
        "precision": engine.precision,
        "threads": engine.threads,
    }


def resolve_precision(accelerator: str, folder: Path | None = None) -> tuple[str, str]:
    """Return the precision that suits an accelerator, "32", "bf16" or "16", and why.

    Args:
        accelerator: cpu, cuda or mps.
        folder: Folder in which the measurement of a CPU is found or saved, so that a machine always chooses the same;
            None: it is measured now.
    """
    speedup = _recall_bf16_speedup(folder) if accelerator == "cpu" and folder else measure_bf16_speedup(accelerator)
    if accelerator == "cuda" and speedup == 0.0 and is_faster_in_fp16():
        return "16", "this GPU is fast in fp16 and has no bf16; the loss is scaled to keep small gradients"
    if speedup == 0.0:
        return "32", f"this {'CPU' if accelerator == 'cpu' else 'GPU'} is not known to be faster in bf16"
    if accelerator == "cuda":
        return "bf16", "this GPU has bf16, in which matrix products run faster than in fp32"
    reason = f"matrix products run {speedup:.1f} times as fast in bf16 as in fp32"
    return "bf16" if speedup > MIN_BF16_SPEEDUP else "32", reason


WITHOUT_FP16 = re.compile(r"GTX 16|MX450|Quadro T\d|T(400|500|550|600|1000|1200|2000)\b")
"""GPUs of the Turing generation without tensor cores: little faster in fp16, and known for NaN in its convolutions."""


def is_faster_in_fp16() -> bool:
    """Return whether the GPU has tensor cores for fp16 only: NVIDIA's Volta and Turing (V100, T4, RTX 20xx)."""
    major, _ = torch.cuda.get_device_capability()
    return torch.version.hip is None and major == 7 and not WITHOUT_FP16.search(torch.cuda.get_device_name())


MIN_BF16_SPEEDUP = 1.3
"""Matrix products must be so many times as fast in bf16 for a CPU to compute in it."""
BF16_FEATURES = ("amx_bf16", "avx512_bf16", "bf16")
"""Linux's names of the CPU features, of x86 and ARM, one of which is needed to compute in bf16 without emulation."""
SPEED_FILE = "bf16.json"
CPU_INFO = Path("/proc/cpuinfo")


def measure_bf16_speedup(accelerator: str, seconds: Callable[[Tensor], float] | None = None) -> float:
    """Return the speedup of matrix products in bf16; 0 if the hardware does not have it.

    On a CPU that has it, it is measured in a way that does not depend on what else the machine computes: on one thread,
    in processor time, as a ratio of the fastest of several products.

    Args:
        accelerator: cpu, cuda or mps.
        seconds: Measures how long the product of a matrix with itself takes; None for the thread's processor time.
    """
    if accelerator == "mps":
        return 0.0
    if accelerator == "cuda":
        return 2.0 if torch.cuda.is_bf16_supported(including_emulation=False) else 0.0
    if not has_bf16_features():
        return 0.0
    full = torch.ones(768, 768)
    half = full.to(torch.bfloat16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measure = seconds or _measure_product
        # Alternate, since a shared machine's speed drifts; the first pair only warms up.
        pairs = [(measure(full), measure(half)) for _ in range(10)][1:]
    finally:
        torch.set_num_threads(threads)
    return min(pair[0] for pair in pairs) / min(pair[1] for pair in pairs)


def _measure_product(matrix: Tensor) -> float:
    start = time.thread_time()
    matrix @ matrix
    return time.thread_time() - start


def has_bf16_features() -> bool:
    """Return whether the CPU has instructions for bf16, or the system does not list its features."""
    features = _read_cpu_entry("flags") or _read_cpu_entry("Features")
    return not features or any(name in BF16_FEATURES for name in features.split())


def _read_cpu_entry(name: str) -> str:
    """Return a line of Linux's description of the first CPU; empty if there is none."""
    try:
        found = re.search(rf"^{name}\s*:\s*(.*)$", CPU_INFO.read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""


def _recall_bf16_speedup(folder: Path) -> float:
    """Return the CPU's speedup in bf16 as measured once by this version of torch; a new measurement is saved."""
    if not has_bf16_features():
        return 0.0
    features = (_read_cpu_entry("flags") or _read_cpu_entry("Features")).split()
    known = [name for name in BF16_FEATURES if name in features]
    model = _read_cpu_entry("model name") or platform.processor() or platform.machine()
    machine = f"{' '.join([model, *known])}, torch {torch.__version__}"
    saved: Any = None
    with suppress(OSError, PylorusError):  # unreadable or damaged: measured again
        saved = read_json(folder / SPEED_FILE)
    speeds = saved if isinstance(saved, dict) else {}
    if not isinstance(speeds.get(machine), float):
        speeds[machine] = round(measure_bf16_speedup("cpu"), 2)
        with suppress(OSError):  # a folder that can't be written
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / SPEED_FILE, speeds)
    return float(speeds[machine])


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


def resolve_cuda_graphs(config: TrainerConfig, engine: Engine) -> tuple[bool, str]:
    """Return whether full training batches are computed as CUDA graphs, and why."""
    if config.cuda_graphs is not None:
        return config.cuda_graphs, "set by the user"
    size = get_batch_size(config)
    reasons = {
        "only an NVIDIA GPU has them": engine.accelerator != "cuda",
        "not tried with several devices": config.devices * config.nodes > 1,
        "not tried with loss scaling": engine.precision == "16",
        "trainer.compile=true reduces launches by itself": config.compile,
        "not possible with trainer.accumulate above 1": config.accumulate > 1,
        f"a batch of more than {MOST_CAPTURED_IMAGES} images keeps the GPU busy": size > MOST_CAPTURED_IMAGES,
    }
    for reason, applies in reasons.items():
        if applies:
            return False, reason
    return True, f"with {size} images the GPU would wait for the launches of single kernels"


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
    if engine.accelerator == "cuda":
        is_captured, capture_reason = resolve_cuda_graphs(config.trainer, engine)
        settings.insert(-1, Choice("trainer.cuda_graphs", str(is_captured).lower(), capture_reason))
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
        return f"one device, which holds everything: {strategy} needs trainer.devices=2 or more to share the work"
    if strategy == "fsdp":
        return f"each of {devices} devices holds a shard of the trainable weights"
    return f"each of {devices} devices holds all weights"


def log_choices(settings: list[Choice]) -> None:
    """Log the settings as a table."""
    widths = [max(len(choice[column]) for choice in settings) for column in (0, 1)]
    lines = [f"  {key:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for key, value, reason in settings]
    log.info("settings chosen for this machine (override by key):\n%s", "\n".join(lines))
