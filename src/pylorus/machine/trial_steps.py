"""Run training steps on noise to measure their memory and duration: `python -m pylorus.machine.trial_steps`.

Started by `pylorus.machine.batch_size`; the two exchange lines of JSON on standard input and output. The first request
says what to train and is answered with the free memory in bytes. Each further request is a batch size, answered with
the peak memory and the duration of a step, or with an empty object if it did not fit.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.nn import functional

from pylorus.config import LossConfig, ModelConfig, OptimizerConfig, StageConfig
from pylorus.machine.engine import Engine
from pylorus.machine.memory import get_free_memory
from pylorus.model.backbone import build_backbone
from pylorus.model.classifier import Classifier, StagePlan
from pylorus.model.freeze import apply_depth, set_modes
from pylorus.model.schedule import build_optimizer
from pylorus.runs.faults import is_out_of_memory
from pylorus.stages.speed import get_peak_memory


def main() -> None:
    """Answer requests until standard input ends."""
    with suppress(OSError):  # if memory runs out, the system kills this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output must not mix with the answers
    step = _prepare_step(json.loads(sys.stdin.readline()), answers)
    for line in sys.stdin:
        try:
            _send_answer(answers, step(int(line)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _send_answer(answers, {})
            return


def _prepare_step(request: dict[str, Any], answers: TextIO) -> Callable[[int], dict[str, float]]:
    """Build what is to be trained; return a function that runs a step of a given size and measures it."""
    engine = Engine(**request["engine"], reasons={})
    free = torch.cuda.mem_get_info()[0] if engine.accelerator == "cuda" else get_free_memory()
    engine.setup_process()
    backbone = build_backbone(
        ModelConfig(**request["model"]), classes=request["classes"], image_size=request["image_size"]
    )
    stage, optimizer_config = StageConfig(**request["stage"]), OptimizerConfig(**request["optimizer"])
    classifier = Classifier(
        backbone,
        [str(number) for number in range(request["classes"])],
        StagePlan("trial", stage, 0, 0),
        optimizer_config,
        LossConfig(),
        channels_last=request["channels_last"],
    ).to(engine.accelerator)
    eval_modules = apply_depth(classifier.network, stage.learn).still
    optimizer = build_optimizer(classifier.network, stage, optimizer_config)

    def generate_noise(images: int) -> torch.Tensor:
        shape = (images, 3, backbone.image_size, backbone.image_size)
        return torch.randint(256, shape, dtype=torch.uint8, device=engine.accelerator)

    def run_step(size: int) -> float:
        set_modes(classifier.network, eval_modules)
        image, label = generate_noise(size), torch.arange(size, device=engine.accelerator) % request["classes"]
        start = time.perf_counter()
        with engine.use_precision():
            loss = functional.cross_entropy(classifier(image), label)
        loss.backward()  # type: ignore[no-untyped-call]
        classifier.configure_gradient_clipping(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for a GPU
        return time.perf_counter() - start

    def measure_step(size: int) -> dict[str, float]:
        seconds = min(run_step(size) for _ in range(2 if size >= request["timed_from"] else 1))
        classifier.network.eval()
        with engine.use_precision(), torch.inference_mode():
            classifier(generate_noise(2 * size)).sum().item()  # evaluation uses twice the batch size
        if engine.accelerator != "cuda":
            return {"peak": get_peak_memory("cpu"), "seconds": seconds}
        peak = torch.cuda.max_memory_reserved()  # includes what torch's allocator caches
        torch.cuda.empty_cache()
        return {"peak": peak, "seconds": seconds}

    _send_answer(answers, {"free": free})
    return measure_step


def _send_answer(answers: TextIO, message: object) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
