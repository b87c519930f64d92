"""What a run computes on: cores, threads, the GPU, and the precision that each does well. Needs torch."""

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from pylorus.cache.budget import readable_size
from pylorus.doctor.check import Check, State, first_line
from pylorus.machine.engine import fitting_precision, usable_cores

AREA = "Computing"
DRIVER = Path("/proc/driver/nvidia/version")
FEW_GPU_MEMORY = 4 * 2**30
"""Free memory of a GPU: less is short for the study's models at their batch size."""


def check_computing() -> Iterator[Check]:
    """Cores, CPU precision and each GPU."""
    cores = usable_cores()
    yield check_cores(cores, os.cpu_count() or cores)
    torch.set_num_threads(cores)
    yield Check(AREA, "CPU precision", State.GOOD, _precision("cpu"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if there:
        for index in range(torch.cuda.device_count()):
            yield check_gpu(index)
    elif torch.backends.mps.is_available():
        yield Check(AREA, "GPU", State.GOOD, f"Apple's, through Metal; {_precision('mps')}")
    else:
        yield check_no_gpu(driver_version(), [str(warning.message) for warning in said])


def check_cores(usable: int, counted: int) -> Check:
    """What a run has of the processor, and how many threads it takes."""
    found = f"{usable} usable of {counted} that the system counts; a run computes with as many threads"
    if usable > 1:
        return Check(AREA, "cores", State.GOOD, found)
    mend = "Give the container, job or virtual machine more cores (docker --cpus, SLURM --cpus-per-task)."
    return Check(AREA, "cores", State.WARNING, f"{found}: training will take long", mend)


def _precision(accelerator: str) -> str:
    precision, reason = fitting_precision(accelerator)
    return f"{'bf16' if precision == 'bf16' else 'fp32'} ({reason})"


def check_gpu(index: int) -> Check:
    """One GPU: multiplies two matrices on it and looks whether the result is right."""
    properties = torch.cuda.get_device_properties(index)
    name = "GPU" if torch.cuda.device_count() == 1 else f"GPU {index}"
    about = f"{properties.name}, compute capability {properties.major}.{properties.minor}, driver {driver_version()}"
    mend = (
        "Install the PyTorch build for this GPU and driver (pytorch.org, Get Started), or train on the CPU: trainer=cpu"
    )
    try:
        free, total = torch.cuda.mem_get_info(index)
        ones = torch.ones(64, 64, device=f"cuda:{index}")
        right = bool((ones @ ones == 64).all())
    except RuntimeError as error:
        return Check(AREA, name, State.WRONG, f"{about}: it does not compute: {first_line(error)}", mend)
    if not right:
        return Check(AREA, name, State.WRONG, f"{about}: it computes wrongly", mend)
    memory = f"{readable_size(free)} free of {readable_size(total)}"
    found = f"{about}, {memory}; {_precision('cuda')}; torch for CUDA {torch.version.cuda or torch.version.hip}"
    if free < FEW_GPU_MEMORY:
        mend = "End what holds its memory (nvidia-smi lists it), or take a smaller trainer.batch_size."
        return Check(AREA, name, State.WARNING, found, mend)
    return Check(AREA, name, State.GOOD, found)


def check_no_gpu(driver: str | None, said: list[str]) -> Check:
    """Why torch sees no GPU: because there is none, or because something is in its way.

    Args:
        driver: Version of the machine's NVIDIA driver; None: there is none.
        said: What torch warned of as it looked.
    """
    if driver is None and not said:
        return Check(AREA, "GPU", State.GOOD, "none; runs compute on the CPU")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        found = f"hidden by CUDA_VISIBLE_DEVICES={hidden}; runs compute on the CPU"
        return Check(AREA, "GPU", State.GOOD, found, "unset CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None and torch.version.hip is None:
        found = f"an NVIDIA driver ({driver}) is there, but this build of torch knows CPUs only"
        return Check(AREA, "GPU", State.WARNING, found, "Install torch's CUDA build: pytorch.org, Get Started.")
    found = f"an NVIDIA driver ({driver}) is there, but torch reaches no GPU"
    reason = f": {' '.join(said[0].split())}" if said else ""
    mend = "Renew the driver, or in a container: docker run --gpus all. Without a GPU runs compute on the CPU."
    return Check(AREA, "GPU", State.WARNING, f"{found}{reason}", mend)


def driver_version() -> str | None:
    """Of the NVIDIA driver; None where there is none."""
    try:
        found = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", DRIVER.read_text())
    except OSError:
        return "of unknown version" if shutil.which("nvidia-smi") else None
    return found[1] if found else "of unknown version"
