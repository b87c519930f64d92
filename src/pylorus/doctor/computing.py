"""Check what a run computes on: CPU cores, GPUs and the precision that suits each. Needs torch."""

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from pylorus.cache.budget import format_bytes
from pylorus.doctor.check import Check, State, format_first_line
from pylorus.machine.engine import count_usable_cores, resolve_precision

COMPUTING = "Computing"
DRIVER = Path("/proc/driver/nvidia/version")
FEW_GPU_MEMORY = 4 * 2**30
"""Bytes of free GPU memory; with less, the study's models may not fit at their batch size."""


def check_computing() -> Iterator[Check]:
    """Check the cores, the CPU precision and each GPU."""
    cores = count_usable_cores()
    yield check_cores(cores, os.cpu_count() or cores)
    torch.set_num_threads(cores)
    yield Check(COMPUTING, "CPU precision", State.GOOD, _format_precision("cpu"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        has_cuda = torch.cuda.is_available()
    if has_cuda:
        for index in range(torch.cuda.device_count()):
            yield check_gpu(index)
    elif torch.backends.mps.is_available():
        yield Check(COMPUTING, "GPU", State.GOOD, f"Apple GPU (Metal); {_format_precision('mps')}")
    else:
        yield check_no_gpu(read_driver_version(), [str(warning.message) for warning in caught])


def check_cores(usable: int, counted: int) -> Check:
    """Check how many CPU cores a run can use.

    Args:
        usable: Cores that this process may use; also the number of threads of a run.
        counted: Cores that the operating system reports.
    """
    summary = f"{usable} of {counted} usable; a run uses {usable} thread{'' if usable == 1 else 's'}"
    if usable > 1:
        return Check(COMPUTING, "cores", State.GOOD, summary)
    fix = "Give the container, job or virtual machine more cores (docker --cpus, SLURM --cpus-per-task)."
    return Check(COMPUTING, "cores", State.WARNING, f"{summary}: training will be slow", fix)


def _format_precision(accelerator: str) -> str:
    precision, reason = resolve_precision(accelerator)
    return f"{'bf16' if precision == 'bf16' else 'fp32'} ({reason})"


def check_gpu(index: int) -> Check:
    """Check one GPU: multiply two matrices on it and verify the result."""
    properties = torch.cuda.get_device_properties(index)
    name = "GPU" if torch.cuda.device_count() == 1 else f"GPU {index}"
    gpu = f"{properties.name}, compute capability {properties.major}.{properties.minor}, driver {read_driver_version()}"
    fix = (
        "Install the PyTorch build for this GPU and driver (pytorch.org, Get Started), or train on the CPU: trainer=cpu"
    )
    try:
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        is_correct = bool((ones @ ones == 64).all())
    except RuntimeError as error:
        return Check(COMPUTING, name, State.WRONG, f"{gpu}: a test computation failed: {format_first_line(error)}", fix)
    if not is_correct:
        return Check(COMPUTING, name, State.WRONG, f"{gpu}: a test computation gave a wrong result", fix)
    memory = f"{format_bytes(free)} free of {format_bytes(total)}"
    summary = (
        f"{gpu}, {memory}; {_format_precision('cuda')}; torch built for CUDA {torch.version.cuda or torch.version.hip}"
    )
    if free < FEW_GPU_MEMORY:
        fix = "Stop other programs on this GPU (nvidia-smi lists them), or set a smaller trainer.batch_size."
        return Check(COMPUTING, name, State.WARNING, summary, fix)
    return Check(COMPUTING, name, State.GOOD, summary)


def check_no_gpu(driver: str | None, messages: list[str]) -> Check:
    """Explain why torch sees no GPU: there is none, or something prevents its use.

    Args:
        driver: Version of the machine's NVIDIA driver; None if there is none.
        messages: Warnings that torch gave while it searched for a GPU.
    """
    if driver is None and not messages:
        return Check(COMPUTING, "GPU", State.GOOD, "none; runs use the CPU")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        summary = f"hidden by CUDA_VISIBLE_DEVICES={hidden}; runs use the CPU"
        return Check(COMPUTING, "GPU", State.GOOD, summary, "unset CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None and torch.version.hip is None:
        summary = f"the NVIDIA driver ({driver}) is installed, but this build of torch supports only CPUs"
        return Check(
            COMPUTING, "GPU", State.WARNING, summary, "Install the CUDA build of torch: pytorch.org, Get Started."
        )
    summary = f"the NVIDIA driver ({driver}) is installed, but torch can't use a GPU"
    reason = f": {' '.join(messages[0].split())}" if messages else ""
    fix = "Update the driver; in a container, start it with docker run --gpus all. Until then, runs use the CPU."
    return Check(COMPUTING, "GPU", State.WARNING, f"{summary}{reason}", fix)


def read_driver_version() -> str | None:
    """Return the version of the NVIDIA driver, or None if there is no driver."""
    try:
        match = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", DRIVER.read_text())
    except OSError:
        return "of unknown version" if shutil.which("nvidia-smi") else None
    return match[1] if match else "of unknown version"
