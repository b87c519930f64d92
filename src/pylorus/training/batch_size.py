"""Find the largest batch size that fits: `trainer.batch_size=auto`.

Real training steps are tried in a separate process (`pylorus.training.batch_size`): no failure there ends the run, none
of its random numbers is drawn and none of its weights changes. So the run equals one with the same size set explicitly.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch

from pylorus.config.schema import Config, LossConfig, ModelConfig, OptimizerConfig, StageConfig, TrainerConfig
from pylorus.core.distributed import get_concurrent_jobs
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_bytes, format_percent
from pylorus.core.system import get_free_memory
from pylorus.hardware import Engine, get_batch_size, resolve_channels_last
from pylorus.model.backbone import Backbone, build_backbone
from pylorus.model.classifier import StageClassifier, StagePlan
from pylorus.model.finetuning import apply_depth, build_optimizer, resolve_depth, set_modes
from pylorus.training.callbacks import get_peak_memory
from pylorus.training.processes import is_out_of_memory


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
    classifier = StageClassifier(
        backbone,
        [str(number) for number in range(request["classes"])],
        StagePlan("trial", stage, 0, 0),
        optimizer_config,
        LossConfig(**request["loss"]),
        images_of_class=[1] * request["classes"],  # their weights change neither memory nor time
        channels_last=request["channels_last"],
    ).to(engine.accelerator)
    eval_modules = apply_depth(classifier.network, stage.learn).eval_modules
    optimizer = build_optimizer(classifier.network, stage, optimizer_config)

    def generate_noise(images: int) -> torch.Tensor:
        shape = (images, 3, backbone.image_size, backbone.image_size)
        return torch.randint(256, shape, dtype=torch.uint8, device=engine.accelerator)

    def run_step(size: int) -> float:
        set_modes(classifier.network, eval_modules)
        image, label = generate_noise(size), torch.arange(size, device=engine.accelerator) % request["classes"]
        start = time.perf_counter()
        for _ in range(min(2, request["accumulate"])):  # the second batch is computed beside the gradients of the first
            with engine.use_precision():
                loss: torch.Tensor = classifier.loss(classifier(image), label).mean()
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


MAX_BATCH_SIZE = {"cpu": 128, "cuda": 512}
"""Images of the largest step that is tried: larger ones change what is learned."""
MEMORY_FRACTION = {"cpu": 0.7, "cuda": 0.9}
"""Fraction of the free memory that a step may use."""
DEFAULT_BATCH_SIZE = get_batch_size(TrainerConfig())
"""Below this batch size, speed is no reason to stop."""
MIN_SPEEDUP = 1.05
"""Factor by which throughput (images/s) must grow when the step doubles on a CPU."""


class StepCost(NamedTuple):
    """Cost of one trial step.

    Attributes:
        peak: Peak memory of the process in bytes.
        seconds: Duration of the step.
    """

    peak: int
    seconds: float


Try = Callable[[int], StepCost | None]
"""Try a step of the given size; None if it does not fit."""


def resolve_batch_size(
    initial: TrainerConfig,
    config: Config,
    backbone: Backbone,
    engine: Engine,
    *,
    images: int,
    devices: int = 1,
    reserved: int = 0,
) -> tuple[int, str]:
    """Return the batch size over all devices, and why it was chosen.

    Args:
        initial: Trainer configuration with the values resolved when the run started.
        config: The run's configuration.
        backbone: The network.
        engine: The compute engine.
        images: Number of training images.
        devices: Devices that share a step; each is assumed to be like this one.
        reserved: Bytes of a device that training needs for something else.

    Raises:
        PylorusError: If not even two images fit, or if the trial fails for another reason.
    """
    configured = config.trainer.batch_size
    if isinstance(configured, int):
        return configured, "set by the user"
    if isinstance(initial.batch_size, int):
        return initial.batch_size, "as chosen when the run started"
    if engine.accelerator not in MAX_BATCH_SIZE:
        raise PylorusError(
            f"trainer.batch_size: found auto, which {engine.accelerator} does not support. Set a number, such as 16."
        )
    fraction = MEMORY_FRACTION[engine.accelerator]
    parts = devices * config.trainer.accumulate  # of a step
    with TrialProcess(_build_request(config, backbone, engine)) as trial:
        budget = int(fraction * trial.free / get_concurrent_jobs()) - reserved
        room = f"{format_percent(fraction, digits=0)} % of the {format_bytes(trial.free)} of free memory"
        size, why = find_largest_size(
            trial.measure_step,
            sizes=_list_sizes(images // parts, MAX_BATCH_SIZE[engine.accelerator] // parts),
            budget=budget,
            room=room if get_concurrent_jobs() == 1 else f"{room}, shared with other jobs of the sweep",
            careful=engine.accelerator == "cpu",
        )
    return size * devices, why


def find_largest_size(try_step: Try, *, sizes: Sequence[int], budget: int, room: str, careful: bool) -> tuple[int, str]:
    """Return the largest size whose steps fit, and why no larger one was chosen.

    Args:
        try_step: Tries one size.
        sizes: Sizes in ascending order, each twice the one before.
        budget: Bytes that a step may use.
        room: The budget in words.
        careful: Whether running out of memory would harm other processes: then a size is not tried if smaller ones
            predict that it does not fit, nor after one that is no faster.

    Raises:
        PylorusError: If the smallest does not fit.
    """
    fitting: list[tuple[int, StepCost]] = []
    reason = "fits; larger steps are not tried, since they change what is learned"
    for size in sizes:
        cost = None if careful and _estimate_next_peak(fitting) > budget else try_step(size)
        if cost is None or cost.peak > budget:
            reason = f"the largest that fits: a step of {size} would need more than {room}"
            break
        if (
            careful
            and size > DEFAULT_BATCH_SIZE
            and _compute_throughput(size, cost) < MIN_SPEEDUP * _compute_throughput(*fitting[-1])
        ):
            reason = f"a step of {size} would fit, but is no faster in images per second"
            break
        fitting.append((size, cost))
    if not fitting:
        raise PylorusError(
            f"trainer.batch_size: found auto, but not even {sizes[0]} images fit in {room}. Choose a smaller "
            "data.image_size or model, or stop other programs that use memory."
        )
    return fitting[-1][0], reason


def _estimate_next_peak(fitting: Sequence[tuple[int, StepCost]]) -> int:
    """Extrapolate the peak memory of the next size, twice the last: memory grows linearly."""
    if len(fitting) < 2:
        return 0
    previous, last = (cost.peak for _, cost in fitting[-2:])
    return last + 2 * (last - previous)


def _compute_throughput(size: int, cost: StepCost) -> float:
    """Return images per second."""
    return size / cost.seconds


def _list_sizes(images: int, most: int) -> list[int]:
    """List powers of two from 2 to `most`, and to half of the images."""
    return [2, *(size for size in (2**power for power in range(2, 32)) if size <= min(most, images // 2))]


def _build_request(config: Config, backbone: Backbone, engine: Engine) -> dict[str, object]:
    """Build the trial request, for the stage that trains the most parameter tensors."""
    stage = max(config.stages.values(), key=lambda stage: len(resolve_depth(backbone.network, stage.learn).trainable))
    return {
        "model": asdict(config.model) | {"weights": "none"},
        "classes": backbone.network.num_classes,
        "image_size": backbone.image_size,
        "timed_from": DEFAULT_BATCH_SIZE,
        "stage": asdict(stage),
        "optimizer": asdict(config.optimizer),
        "loss": asdict(config.loss),
        "accumulate": config.trainer.accumulate,
        "channels_last": resolve_channels_last(config.trainer.channels_last, backbone.network, engine.accelerator)[0],
        "engine": {"accelerator": engine.accelerator, "precision": engine.precision, "threads": engine.threads},
    }


class TrialProcess:
    """A process that tries training steps.

    Args:
        request: What `pylorus.training.batch_size` is to train, as plain values.

    Attributes:
        free: Free memory in bytes before the first step.
    """

    def __init__(self, request: object) -> None:
        self._request = request
        self.free = 0

    def __enter__(self) -> "TrialProcess":
        pipe = subprocess.PIPE
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pylorus.training.batch_size"],
            stdin=pipe,
            stdout=pipe,
            stderr=self._stderr,
            text=True,
        )
        try:
            self.free = int((self._query_process(self._request) or {"free": 0})["free"])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def measure_step(self, size: int) -> StepCost | None:
        """Try a step of the given size; None if it does not fit."""
        answer = self._query_process(size)
        return StepCost(int(answer["peak"]), answer["seconds"]) if answer else None

    def _query_process(self, request: object) -> dict[str, float] | None:
        """Return the process's answer to a request; None if the system killed it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        if line := self._process.stdout.readline():
            return dict(json.loads(line))
        if self._process.wait() == -signal.SIGKILL:  # Linux's reaction to memory shortage
            return None
        self._stderr.seek(0)
        raise PylorusError(
            "trainer.batch_size: found auto, but the trial steps failed. Set a number, such as "
            f"{DEFAULT_BATCH_SIZE}.\n{self._stderr.read().strip()[-2000:]}"
        )


if __name__ == "__main__":
    main()
