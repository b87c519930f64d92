"""Measure the time of a fine-tuning step and of a frozen forward pass by kind of operation.

`python benchmarks/profile_step.py [--models resnet50,vgg19] [--device cuda]` prints a table in Markdown. Network,
memory format and precision are those that Pylorus chooses for the machine; the weights are random.
"""

import argparse
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import environment
from lineup import MODELS

HERE = Path(__file__).parent

KINDS = {
    "data": r"^data$",
    "optimiser": r"^Optimizer|adamw|foreach|linalg_vector_norm|clip_",
    "convolution, backward": r"conv\w*_backward|ConvolutionBackward|MkldnnConv\w*Backward|dgrad|wgrad",
    "convolution, forward": r"conv|implicit_gemm|xmma_fprop",
    "batch norm, backward": r"batch_?norm\w*_?backward|BatchNormBackward|bn_bw",
    "batch norm, forward": r"batch_?norm|bn_fw",
    "activation": r"relu|threshold|clamp|silu|hardtanh|gelu",
    "pooling": r"pool|mean|sum_dim",
    "add, concatenate": r"^aten::(add_?|cat|narrow|split|stack)$|AddBackward|CatBackward|CUDAFunctor_add|CatArray",
    "linear": r"addmm|::mm$|linear|AddmmBackward|gemm|matmul|bmm",
    "casts and copies": r"copy|::to$|contiguous|clone|empty|fill|zero|Memcpy|Memset",
}
"""Kinds of operations by a pattern for their names; the first match decides, and operations without one are `REST`."""
REST = "other"


def steps(model: str, device: str, batch_size: int) -> dict[str, Callable[[], object]]:
    """Return a function for a fine-tuning step and one for a frozen forward pass, as Pylorus executes them."""
    import torch
    from torch.profiler import record_function

    from pylorus.config.schema import Config, ModelConfig, StageConfig, TrainerConfig
    from pylorus.hardware import resolve_channels_last, resolve_engine
    from pylorus.model.backbone import build_backbone
    from pylorus.model.classifier import StageClassifier, StagePlan
    from pylorus.model.finetuning import build_optimizer

    config = Config(
        model=ModelConfig(name=MODELS[model].name, weights="none"),
        trainer=TrainerConfig(accelerator="gpu" if device == "cuda" else device),
    )
    stage, engine = StageConfig(lr=1e-4), resolve_engine(config.trainer)
    engine.setup_process()
    backbone = build_backbone(config.model, classes=3)
    last, _ = resolve_channels_last(config.trainer.channels_last, backbone.network, engine.accelerator)
    plan = StagePlan("finetune", stage, 0, 0)
    names = ("a", "b", "c")
    classifier = StageClassifier(backbone, names, plan, config.optimizer, config.loss, channels_last=last).to(device)
    optimizer = build_optimizer(classifier.network, stage, config.optimizer)
    served = _batches(backbone.image_size, backbone.interpolation, batch_size)
    autocast = torch.autocast(device, torch.bfloat16, enabled=engine.precision == "bf16")
    print(f"{model}: {engine.precision}, {'channels last' if last else 'channels first'}", file=sys.stderr)

    def batch() -> object:
        with record_function("data"):
            read = next(served)
            return type(read)(*(tensor.to(device) for tensor in read))

    def finetune() -> None:
        classifier.network.train()
        taken = batch()
        optimizer.zero_grad()
        with autocast:
            loss = classifier.training_step(taken, 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(classifier.network.parameters(), config.optimizer.clip)
        optimizer.step()

    def forward() -> None:
        classifier.network.eval()
        with torch.inference_mode(), autocast:
            classifier(batch().image)

    return {"fine-tuning": finetune, "frozen forward": forward}


def _batches(size: int, interpolation: str, batch_size: int) -> Iterator[object]:
    """Yield batches of synthetic images that are read from files each time."""
    import numpy as np
    import torch
    from images import draw

    from pylorus.data.decode import read_image, resize_image
    from pylorus.model.classifier import Batch

    (HERE / "outputs").mkdir(exist_ok=True)
    folder = draw(HERE / "outputs" / "images-48-320", images=48, size=320)
    paths = itertools.cycle(sorted((folder / "train").glob("*/*")))
    while True:
        images = [
            resize_image(read_image(next(paths)), size=size, how="pad", interpolation=interpolation)
            for _ in range(batch_size)
        ]
        pixels = torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())
        yield Batch(pixels, torch.arange(batch_size) % 3, torch.arange(batch_size))


def timed(step: Callable[[], object], device: str, count: int) -> float:
    """Measure the median milliseconds of a step, without the profiler."""
    import torch

    found = []
    for _ in range(count):
        start = perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(1000 * (perf_counter() - start))
    return median(found)


def shares(step: Callable[[], object], device: str, count: int) -> dict[str, float]:
    """Measure the fraction of time of each kind of operation in [0, 1], without the operations that it calls."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(count):
            step()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        spent[kind(event.key)] += own
    total = sum(spent.values())
    return {name: time / total for name, time in spent.items()}


def kind(operation: str) -> str:
    """Return the kind of an operation from its name.

    Example:
        >>> kind("aten::convolution_backward"), kind("aten::mkldnn_convolution"), kind("aten::native_batch_norm")
        ('convolution, backward', 'convolution, forward', 'batch norm, forward')
    """
    return next((name for name, pattern in KINDS.items() if re.search(pattern, operation)), REST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--models", default="vgg19,resnet50,inception_v3")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--steps", type=int, default=5, help="number of steps that are profiled, and of steps that are timed"
    )
    parser.add_argument("--use-this-python", action="store_true")
    options = parser.parse_args()
    if not options.use_this_python:
        environment.enter()
    columns: dict[str, tuple[float, dict[str, float]]] = {}
    for model in options.models.split(","):
        for name, step in steps(model, options.device, options.batch_size).items():
            timed(step, options.device, 2)
            milliseconds = timed(step, options.device, options.steps)
            columns[f"{model}, {name}"] = milliseconds, shares(step, options.device, options.steps)
    print("| % | " + " | ".join(columns) + " |")
    print("| --- |" + " --: |" * len(columns))
    for group in (*KINDS, REST):
        print(f"| {group} | " + " | ".join(f"{100 * share.get(group, 0):.1f}" for _, share in columns.values()) + " |")
    print(
        f"| ms per step of {options.batch_size} | " + " | ".join(f"{time:.0f}" for time, _ in columns.values()) + " |"
    )


if __name__ == "__main__":
    main()
