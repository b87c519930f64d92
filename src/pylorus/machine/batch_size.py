"""Find the largest batch size that fits: `trainer.batch_size=auto`.

Real training steps are tried in a separate process (`pylorus.machine.trial_steps`): no failure there ends the run, none
of its random numbers is drawn and none of its weights changes. So the run equals one with the same size set explicitly.
"""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import NamedTuple

from pylorus.cache.budget import format_bytes
from pylorus.config import Config, TrainerConfig
from pylorus.errors import PylorusError
from pylorus.machine.choices import get_batch_size, resolve_channels_last
from pylorus.machine.engine import Engine, get_concurrent_jobs
from pylorus.model.backbone import Backbone
from pylorus.model.freeze import resolve_depth

MOST = {"cpu": 128, "cuda": 512}
"""Images of the largest step that is tried: larger ones change what is learned."""
SHARE = {"cpu": 0.7, "cuda": 0.9}
"""Fraction of the free memory that a step may use."""
ENOUGH = get_batch_size(TrainerConfig())
"""Below this batch size, speed is no reason to stop."""
GAIN = 1.05
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
    initial: TrainerConfig, config: Config, backbone: Backbone, engine: Engine, *, images: int, devices: int = 1
) -> tuple[int, str]:
    """Return the batch size over all devices, and why it was chosen.

    Args:
        initial: Trainer configuration with the values resolved when the run started.
        config: The run's configuration.
        backbone: The network.
        engine: The compute engine.
        images: Number of training images.
        devices: Devices that share a step; each is assumed to be like this one.

    Raises:
        PylorusError: If not even two images fit, or if the trial fails for another reason.
    """
    configured = config.trainer.batch_size
    if isinstance(configured, int):
        return configured, "set by the user"
    if isinstance(initial.batch_size, int):
        return initial.batch_size, "as chosen when the run started"
    if engine.accelerator not in MOST:
        raise PylorusError(
            f"trainer.batch_size: found auto, which {engine.accelerator} does not support. Set a number, such as 16."
        )
    fraction = SHARE[engine.accelerator]
    with TrialProcess(_build_request(config, backbone, engine)) as trial:
        budget = int(fraction * trial.free / get_concurrent_jobs())
        room = f"{fraction:.0%} of the {format_bytes(trial.free)} of free memory"
        size, why = find_largest_size(
            trial.measure_step,
            sizes=_list_sizes(images // devices, MOST[engine.accelerator] // devices),
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
        if careful and size > ENOUGH and _compute_throughput(size, cost) < GAIN * _compute_throughput(*fitting[-1]):
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
    stage = max(config.stages.values(), key=lambda stage: len(resolve_depth(backbone.network, stage.learn).learning))
    return {
        "model": asdict(config.model) | {"weights": "none"},
        "classes": backbone.network.num_classes,
        "image_size": backbone.image_size,
        "timed_from": ENOUGH,
        "stage": asdict(stage),
        "optimizer": asdict(config.optimizer),
        "channels_last": resolve_channels_last(config, engine, backbone.network)[0],
        "engine": {"accelerator": engine.accelerator, "precision": engine.precision, "threads": engine.threads},
    }


class TrialProcess:
    """A process that tries training steps.

    Args:
        request: What `pylorus.machine.trial_steps` is to train, as plain values.

    Attributes:
        free: Free memory in bytes before the first step.
    """

    def __init__(self, request: object) -> None:
        self._request = request
        self.free = 0

    def __enter__(self) -> "TrialProcess":
        pipe = subprocess.PIPE
        self._stderr = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pylorus.machine.trial_steps"],
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
            f"{ENOUGH}.\n{self._stderr.read().strip()[-2000:]}"
        )
