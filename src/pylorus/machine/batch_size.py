"""How many images make a step, where the user leaves it to the machine: `trainer.batch_size=auto`.

Real steps are tried in a process of their own (`pylorus.machine.trial_steps`): whatever they meet does not end the
run, none of its random numbers is drawn and none of its weights moves. So the run is that of the same number given.
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

from pylorus.cache.budget import readable_size
from pylorus.config import Config, TrainerConfig
from pylorus.errors import PylorusError
from pylorus.machine.choices import channels_last, images_a_step
from pylorus.machine.engine import Engine, jobs_at_once
from pylorus.model.backbone import Backbone
from pylorus.model.freeze import depth

MOST = {"cpu": 128, "cuda": 512}
"""Images of the largest step that is tried: larger ones change what is learnt."""
SHARE = {"cpu": 0.7, "cuda": 0.9}
"""Of the free memory, that steps may take."""
ENOUGH = images_a_step(TrainerConfig())
"""Below so many images a step, speed is no reason to stop."""
GAIN = 1.05
"""How many times as many images a second a step of twice the size has to do on a CPU."""


class Tried(NamedTuple):
    """A step that was tried.

    Attributes:
        peak: Most bytes that the process ever held.
        seconds: That the step took.
    """

    peak: int
    seconds: float


Try = Callable[[int], Tried | None]
"""Tries steps of so many images; None: they do not fit."""


def settle_batch_size(
    began: TrainerConfig, config: Config, backbone: Backbone, engine: Engine, *, images: int, devices: int = 1
) -> tuple[int, str]:
    """The images of a step over all devices, and why so many.

    Args:
        began: The trainer's keys, with what was chosen when the run began.
        config: The run's.
        backbone: The network.
        engine: What computes.
        images: In training.
        devices: Among which a step is divided, each of them tried to be like this one.

    Raises:
        PylorusError: If not even two images fit, or if what is tried fails otherwise.
    """
    asked = config.trainer.batch_size
    if isinstance(asked, int):
        return asked, "asked for"
    if isinstance(began.batch_size, int):
        return began.batch_size, "as when the run began"
    if engine.accelerator not in MOST:
        raise PylorusError(
            f"trainer.batch_size: found auto, which can't be found on {engine.accelerator}. Give a number, such as 16."
        )
    share = SHARE[engine.accelerator]
    with Trial(_request(config, backbone, engine)) as trial:
        budget = int(share * trial.free / jobs_at_once())
        room = f"{share:.0%} of the {readable_size(trial.free)} that are free"
        size, why = largest(
            trial.step,
            sizes=_sizes(images // devices, MOST[engine.accelerator] // devices),
            budget=budget,
            room=room if jobs_at_once() == 1 else f"{room}, shared with the sweep's other jobs",
            careful=engine.accelerator == "cpu",
        )
    return size * devices, why


def largest(try_step: Try, *, sizes: Sequence[int], budget: int, room: str, careful: bool) -> tuple[int, str]:
    """The largest of some sizes, each twice the one before, whose steps fit, and why none larger.

    Args:
        try_step: Tries one.
        sizes: From the smallest.
        budget: Bytes that a step may take.
        room: The budget, for its user.
        careful: Whether memory that runs out would harm others too: then a size is not tried if smaller ones foretell
            that it does not fit, nor after one that is no faster.

    Raises:
        PylorusError: If the smallest does not fit.
    """
    fit: list[tuple[int, Tried]] = []
    why = "fits, and larger steps are not tried, since they change what is learnt"
    for size in sizes:
        found = None if careful and _foretold(fit) > budget else try_step(size)
        if found is None or found.peak > budget:
            why = f"the most that fits: a step of {size} would take more than {room}"
            break
        if careful and size > ENOUGH and _speed(size, found) < GAIN * _speed(*fit[-1]):
            why = f"a step of {size} would fit, but does no more images a second"
            break
        fit.append((size, found))
    if not fit:
        raise PylorusError(
            f"trainer.batch_size: found auto, but not even {sizes[0]} images fit into {room}. Take a smaller "
            "data.image_size or model, or end what else holds memory."
        )
    return fit[-1][0], why


def _foretold(fit: Sequence[tuple[int, Tried]]) -> int:
    """Bytes that the next size will take, twice the last: memory grows in a line."""
    if len(fit) < 2:
        return 0
    before, last = (tried.peak for _, tried in fit[-2:])
    return last + 2 * (last - before)


def _speed(size: int, tried: Tried) -> float:
    """Images a second."""
    return size / tried.seconds


def _sizes(images: int, most: int) -> list[int]:
    """Powers of two from 2 to `most` and to half of the images."""
    return [2, *(size for size in (2**power for power in range(2, 32)) if size <= min(most, images // 2))]


def _request(config: Config, backbone: Backbone, engine: Engine) -> dict[str, object]:
    """What is to be tried: the stage in which most learns."""
    stage = max(config.stages.values(), key=lambda one: len(depth(backbone.network, one.learn).learning))
    return {
        "model": asdict(config.model) | {"weights": "none"},
        "classes": backbone.network.num_classes,
        "image_size": backbone.image_size,
        "timed_from": ENOUGH,
        "stage": asdict(stage),
        "optimizer": asdict(config.optimizer),
        "channels_last": channels_last(config, engine, backbone.network)[0],
        "engine": {"accelerator": engine.accelerator, "precision": engine.precision, "threads": engine.threads},
    }


class Trial:
    """The process that tries steps.

    Args:
        request: What `pylorus.machine.trial_steps` is to train, as plain values.

    Attributes:
        free: Bytes that were free before the first step.
    """

    def __init__(self, request: object) -> None:
        self._request = request
        self.free = 0

    def __enter__(self) -> "Trial":
        pipe = subprocess.PIPE
        self._said = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pylorus.machine.trial_steps"], stdin=pipe, stdout=pipe, stderr=self._said, text=True
        )
        try:
            self.free = int((self._answer(self._request) or {"free": 0})["free"])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def step(self, size: int) -> Tried | None:
        """Tries steps of so many images; None: they do not fit."""
        found = self._answer(size)
        return Tried(int(found["peak"]), found["seconds"]) if found else None

    def _answer(self, question: object) -> dict[str, float] | None:
        """What the process says; None if the system killed it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        if line := self._process.stdout.readline():
            return dict(json.loads(line))
        if self._process.wait() == -signal.SIGKILL:  # Linux does that where memory is short
            return None
        self._said.seek(0)
        raise PylorusError(
            "trainer.batch_size: found auto, but the steps that were to be tried failed. Give a number, such as "
            f"{ENOUGH}.\n{self._said.read().strip()[-2000:]}"
        )
