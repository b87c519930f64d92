"""Describe the machine: hardware, versions, peak rate of matrix products, number of operations of a training step.

`python benchmarks/machine.py` prints them as one JSON line. The harness runs it in a separate process, because the
memory of a process that has imported torch would be counted in the peak memory of the processes that it starts.
"""

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from time import perf_counter
from typing import Any

PACKAGES = (
    "albumentations",
    "fastai",
    "hydra-core",
    "numpy",
    "pillow",
    "pytorch-lightning",
    "timm",
    "torch",
    "torchvision",
)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(device: str) -> dict[str, Any]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "device": device,
        "threads": torch.get_num_threads(),
    }


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak(device: str, *, precision: str, seconds: float = 3.0) -> float:
    """Return the operations per second of the fastest of several square matrix products (a multiply-add is two).

    A size is left out if its product would take longer than `seconds`: bf16 is emulated on a CPU that lacks it, and one
    product of 4,096 then takes minutes.
    """
    import torch

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    sizes = (256, 1024, 2048, 4096) if device == "cpu" else (4096, 8192, 16384)

    def rate(size: int) -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        result = torch.empty(size, size, device=device, dtype=dtype)
        best, end = float("inf"), perf_counter() + seconds / len(sizes)
        torch.mm(a, b, out=result)
        while perf_counter() < end or best == float("inf"):
            _wait(device)
            start = perf_counter()
            torch.mm(a, b, out=result)
            _wait(device)
            best = min(best, perf_counter() - start)
        return 2 * size**3 / best

    fastest = 0.0
    for size in sizes:
        if fastest and 2 * size**3 / fastest > seconds:
            break
        fastest = max(fastest, rate(size))
    return fastest


def operations_per_image(model: str, arguments: dict[str, Any], *, size: int, classes: int) -> tuple[float, float]:
    """Count the floating-point operations of a training step (forward and backward of the whole network) for one image.

    Returns them and those of its forward pass alone.

    Torch counts them from shapes; an addition and a multiplication are two. The backward pass costs twice the forward
    pass, except in the first layer, whose input needs no gradient. Torch's own count of the backward pass agrees with
    this except for grouped convolutions, which it counts as if they were not grouped.
    """
    import timm
    import torch
    from torch import nn
    from torch.utils.flop_counter import FlopCounterMode

    batch = 2
    with torch.device("meta"):
        network = timm.create_model(model, num_classes=classes, **arguments).train()
        pixels = torch.zeros(batch, 3, size, size)
    with torch.no_grad(), FlopCounterMode(display=False, depth=99) as counter:
        network(pixels)
    by_module = counter.get_flop_counts()
    name = next(name for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    first = sum(by_module[f"{type(network).__name__}.{name}"].values())
    forward = counter.get_total_flops()
    return (3 * forward - first) / batch, forward / batch


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        if named:
            return named[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", help="timm's name: count the operations of a training step")
    parser.add_argument("--args", type=json.loads, default={})
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--peak-only", action="store_true", help="measure only the peak of bf16")
    options = parser.parse_args()
    found: dict[str, Any] = {"peak_bf16": peak(options.device, precision="bf16")}
    if not options.peak_only:
        found |= {"peak_fp32": peak(options.device, precision="fp32"), "machine": machine(options.device)}
        found["versions"] = versions()
    if options.model:
        training, forward = operations_per_image(
            options.model, options.args, size=options.size, classes=options.classes
        )
        found |= {"operations_per_image": training, "forward_operations_per_image": forward}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
