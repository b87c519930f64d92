"""How fast an export computes beside PyTorch: on this machine, with as many threads, one after the other in turns."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.deploy.answers import TrainedModel

BATCHES = (1, 16)
REPEATS, SECONDS = 31, 20.0
"""Each batch is computed so often, or as often as this many seconds allow; five times at least."""


@dataclass(frozen=True)
class Speed:
    """Medians of one size of batch.

    Attributes:
        batch: Images at once.
        repeats: How often each was measured.
        milliseconds: An image, by what computed it.
        times_pytorch: How many times as fast as PyTorch, by what computed it: the median of the ratios of neighbours.
    """

    batch: int
    repeats: int
    milliseconds: dict[str, float]
    times_pytorch: dict[str, float]


def measured_speed(pytorch: TrainedModel, others: Mapping[str, TrainedModel], images: NDArray[np.uint8]) -> list[Speed]:
    """Times of models, measured in turns so that what else the machine does meets all of them.

    Args:
        pytorch: What the others are compared with.
        others: By name.
        images: Of shape (n, size, size, 3); repeated where n is too few.
    """
    models = {"pytorch": pytorch, **others}
    found = []
    for size in BATCHES:
        batch = np.resize(images, (size, *images.shape[1:]))
        for model in models.values():
            model.output(batch)
        times: dict[str, list[float]] = {name: [] for name in models}
        began = time.perf_counter()
        while (done := len(times["pytorch"])) < REPEATS and (done < 5 or time.perf_counter() - began < SECONDS):
            for name, model in models.items():
                start = time.perf_counter()
                model.output(batch)
                times[name].append(time.perf_counter() - start)
        found.append(
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
    return found
