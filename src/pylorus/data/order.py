"""Which image is served when, and as which variant: one of seed and epoch alone."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from pylorus.chance import derived_seed
from pylorus.parallel.processes import ALONE, Processes


class Windows(NamedTuple):
    """How to walk through images shard by shard.

    Attributes:
        shards: The shard of each image, of shape (images,).
        width: How many shards are shuffled into one another.
    """

    shards: NDArray[np.int32]
    width: int

    def order(self, chance: np.random.Generator) -> NDArray[np.int64]:
        """All images once: shards by chance, the images of each `width` of them by chance."""
        turns = chance.permutation(int(self.shards.max()) + 1)
        places = np.empty_like(turns)
        places[turns] = np.arange(len(turns))
        shuffled = chance.permutation(len(self.shards))
        window = places[self.shards[shuffled]] // self.width
        return shuffled[np.argsort(window, kind="stable")]


class Draw(NamedTuple):
    """Which image to serve.

    Attributes:
        row: Its place in the table of the part.
        view: Which of its augmented variants; None: as it is.
    """

    row: int
    view: int | None


class EpochOrder(Sampler[Draw]):
    """All images once, in an order that is one of seed and epoch; without a seed as they stand.

    Args:
        images: How many there are.
        seed: Of the order; None: the table's.
        augmented: Whether an image is served as another variant in each epoch.
        views: After how many epochs the variants come round again; None: never.
        windows: Shards to walk through; None: any image may follow any other.
    """

    def __init__(
        self,
        images: int,
        *,
        seed: int | None,
        augmented: bool = False,
        views: int | None = None,
        windows: Windows | None = None,
    ) -> None:
        self.images, self.seed, self.augmented, self.views, self.epoch = images, seed, augmented, views, 0
        self._windows = windows

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it before each epoch, after a resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[Draw]:
        order = np.arange(self.images)
        if self.seed is not None:
            chance = np.random.default_rng(derived_seed(self.seed, "order", self.epoch))
            order = chance.permutation(self.images) if self._windows is None else self._windows.order(chance)
        turn = self.epoch if self.views is None else self.epoch % self.views
        return iter([Draw(int(row), turn if self.augmented else None) for row in order])


class EpochBatches(Sampler[list[Draw]]):
    """Batches of an order, or this process's share of each.

    A single image left over joins the last batch, since batch norm can't learn from one; so do images that are too few
    for every process to get one.

    Args:
        sampler: The order.
        batch_size: Images a step, of all processes together.
        processes: Who shares each batch.
        begun: In the first epoch that is walked through, so many batches were served before an interruption.
    """

    def __init__(self, sampler: EpochOrder, batch_size: int, *, processes: Processes = ALONE, begun: int = 0) -> None:
        self.sampler, self.batch_size, self._processes = sampler, batch_size, processes
        self._begun, self._begun_epoch = begun, sampler.epoch

    def __len__(self) -> int:
        full, left = divmod(len(self.sampler), self.batch_size)
        return max(1, full + (left >= max(2 if self.batch_size > 1 else 1, self._processes.count)))

    def __iter__(self) -> Iterator[list[Draw]]:
        draws = list(self.sampler)
        first = self._begun if self.sampler.epoch == self._begun_epoch else 0
        for number in range(first, len(self)):
            last = number == len(self) - 1
            start = number * self.batch_size
            batch = draws[start:] if last else draws[start : start + self.batch_size]
            yield batch[self._processes.mine]
