"""Measure the memory per device for training a whole network, with complete (ddp) or divided (fsdp) weights.

`python benchmarks/strategies.py --model vit_large_patch16_224 --devices 2` trains two steps with each strategy, in
processes that share this machine's CPU, and prints a table in Markdown. Torch's tensor tracker counts the bytes in the
first process; they would be the same on a GPU. The seconds are those of a step without the tracker, using gloo on one
machine; communication between GPUs is different.
"""

import argparse
import json
import os
import socket
import tempfile
import time
from pathlib import Path

import timm
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from pylorus.model.distributed import apply_sharding, find_called_modules

MIB = 2**20


def train(rank: int, strategy: str, options: argparse.Namespace, port: int, answer: str) -> None:
    """Train two steps under the tracker, then one that is timed; the first process writes the results to `answer`."""
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": options.devices}
    os.environ.update({name: str(value) for name, value in names.items()})
    distributed.init_process_group("gloo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.devices))
    network = timm.create_model(options.model, num_classes=3)
    side = network.default_cfg["input_size"][-1]
    pixels = torch.randn(options.images, 3, side, side)
    if strategy == "fsdp":
        apply_sharding(
            network,
            find_called_modules(network, lambda: network(pixels)),
            set(),
            init_device_mesh("cpu", (options.devices,)),
        )
    model = network if strategy == "fsdp" else DistributedDataParallel(network, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for _ in range(2):
            step(model, optimizer, pixels)
            tracker.reset_mod_stats()
        kept, peak = (sum_of(tracker.get_tracker_snapshot(kind)) for kind in ("current", "peak"))
    began = time.perf_counter()
    step(model, optimizer, pixels)
    seconds = time.perf_counter() - began
    if rank == 0:
        parameters = sum(parameter.numel() for parameter in network.parameters())
        found = {"parameters": parameters, "kept": kept, "peak": peak, "seconds": seconds}
        Path(answer).write_text(json.dumps(found))
    distributed.destroy_process_group()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, pixels: torch.Tensor) -> None:
    """Run the forward pass, the backward pass and the update."""
    model(pixels).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def sum_of(snapshot: dict[torch.device, dict[str, int]]) -> int:
    """Return the bytes of all tensors on the CPU."""
    return snapshot[torch.device("cpu")]["Total"]


def measured(strategy: str, options: argparse.Namespace) -> dict[str, float]:
    """Start the processes and return the results of the first one."""
    with socket.socket() as listener, tempfile.NamedTemporaryFile() as answer:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
        listener.close()
        multiprocessing.spawn(train, (strategy, options, port, answer.name), nprocs=options.devices)
        found: dict[str, float] = json.loads(Path(answer.name).read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_large_patch16_224")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--images", type=int, default=2, help="images per step and device")
    options = parser.parse_args()
    ddp, fsdp = (measured(strategy, options) for strategy in ("ddp", "fsdp"))
    print(
        f"{options.model}: {ddp['parameters'] / 1e6:,.0f} million parameters, all trainable; {options.devices} "
        f"devices, {options.images} images per device, fp32, AdamW\n\n"
        "| in the first process | ddp | fsdp | fsdp ÷ ddp |\n| --- | --: | --: | --: |"
    )
    for name, words, unit in (
        ("kept", "between steps: weights, moments, buckets; MiB", MIB),
        ("peak", "at the peak of a step; MiB", MIB),
        ("seconds", "one step; seconds", 1),
    ):
        print(f"| {words} | {ddp[name] / unit:,.1f} | {fsdp[name] / unit:,.1f} | {fsdp[name] / ddp[name]:.2f} |")


if __name__ == "__main__":
    main()
