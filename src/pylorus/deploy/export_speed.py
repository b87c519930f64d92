"""Measure the speed of an export compared with PyTorch, on this machine, with equal threads and in turns."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.deploy.answers import InferenceModel

BATCHES = (1, 16)
REPEATS, SECONDS = 31, 20.0
"""Repetitions of each batch, or as many as fit into this number of seconds; at least five."""


@dataclass(frozen=True)
class Speed:
    """Median speed for one batch size.

    Attributes:
        batch: Images per batch.
        repeats: Number of repetitions.
        milliseconds: Time per image, by model name.
        times_pytorch: Speed relative to PyTorch, by model name (2: twice as fast); median ratio of paired repetitions.
    """

    batch: int
    repeats: int
    milliseconds: dict[str, float]
    times_pytorch: dict[str, float]


def measure_speed(
    pytorch: InferenceModel, others: Mapping[str, InferenceModel], images: NDArray[np.uint8]
) -> list[Speed]:
    """Measure models in turns, so that other load on the machine affects all of them alike.

    Args:
        pytorch: The reference.
        others: Models to compare, by name.
        images: uint8 RGB of shape (n, size, size, 3); repeated if n is less than the batch.
    """
    models = {"pytorch": pytorch, **others}
    speeds = []
    for size in BATCHES:
        batch = np.resize(images, (size, *images.shape[1:]))
        for model in models.values():
            model.run_network(batch)
        times: dict[str, list[float]] = {name: [] for name in models}
        begin = time.perf_counter()
        while (repeats := len(times["pytorch"])) < REPEATS and (repeats < 5 or time.perf_counter() - begin < SECONDS):
            for name, model in models.items():
                start = time.perf_counter()
                model.run_network(batch)
                times[name].append(time.perf_counter() - start)
        speeds.append(
            Speed(
                batch=size,
                repeats=len(times["pytorch"]),
                milliseconds={name: 1000 * statistics.median(each) / size for name, each in times.items()},
                times_pytorch={
                    name: statistics.median(a / b for a, b in zip(times["pytorch"], times[name], strict=True))
                    for name in others
                },
            )
        )
    return speeds
