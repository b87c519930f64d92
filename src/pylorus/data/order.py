"""The order in which images are drawn and their augmented variants: functions of seed and epoch alone."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from pylorus.chance import compute_seed
from pylorus.parallel.processes import ALONE, Processes


class ShardWindows(NamedTuple):
    """How to traverse the images shard by shard.

    Attributes:
        shards: Shard number of each image, of shape (images,).
        width: Number of shards that are shuffled together.
    """

    shards: NDArray[np.int32]
    width: int

    def generate_order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """Return all image indices once: the shards in random order, and the images of each `width` shards shuffled."""
        shard_order = generator.permutation(int(self.shards.max()) + 1)
        ranks = np.empty_like(shard_order)
        ranks[shard_order] = np.arange(len(shard_order))
        shuffled = generator.permutation(len(self.shards))
        window = ranks[self.shards[shuffled]] // self.width
        return shuffled[np.argsort(window, kind="stable")]


class Draw(NamedTuple):
    """One image to load.

    Attributes:
        row: Its row in the split's table.
        view: Number of its augmented variant; None: unaugmented.
    """

    row: int
    view: int | None


class EpochSampler(Sampler[Draw]):
    """All images once, in an order that depends on seed and epoch; without a seed, in the table's order.

    Args:
        images: Number of images.
        seed: Seed of the order; None: the table's order.
        augmented: Whether each epoch draws another variant of an image.
        views: Number of epochs after which the variants repeat; None: never.
        windows: Shards to traverse; None: any image may follow any other.
    """

    def __init__(
        self,
        images: int,
        *,
        seed: int | None,
        augmented: bool = False,
        views: int | None = None,
        windows: ShardWindows | None = None,
    ) -> None:
        self.images, self.seed, self.augmented, self.views, self.epoch = images, seed, augmented, views, 0
        self._windows = windows

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; Lightning calls this before each epoch, including the first after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[Draw]:
        order = np.arange(self.images)
        if self.seed is not None:
            generator = np.random.default_rng(compute_seed(self.seed, "order", self.epoch))
            order = (
                generator.permutation(self.images) if self._windows is None else self._windows.generate_order(generator)
            )
        view = self.epoch if self.views is None else self.epoch % self.views
        return iter([Draw(int(row), view if self.augmented else None) for row in order])


class EpochBatchSampler(Sampler[list[Draw]]):
    """Batches of an order, or this process's share of each.

    A single remaining image joins the last batch, since batch norm can't be trained on one image; so do remaining
    images that are too few to give every process one.

    Args:
        sampler: The order.
        batch_size: Images per step, over all processes.
        processes: The processes that share each batch.
        first_batch: In the first epoch, batches before this one are skipped: they were drawn before an interruption.
    """

    def __init__(
        self, sampler: EpochSampler, batch_size: int, *, processes: Processes = ALONE, first_batch: int = 0
    ) -> None:
        self.sampler, self.batch_size, self._processes = sampler, batch_size, processes
        self._first_batch, self._resumed_epoch = first_batch, sampler.epoch

    def __len__(self) -> int:
        full_batches, remaining = divmod(len(self.sampler), self.batch_size)
        return max(1, full_batches + (remaining >= max(2 if self.batch_size > 1 else 1, self._processes.count)))

    def __iter__(self) -> Iterator[list[Draw]]:
        draws = list(self.sampler)
        first = self._first_batch if self.sampler.epoch == self._resumed_epoch else 0
        for index in range(first, len(self)):
            is_last = index == len(self) - 1
            start = index * self.batch_size
            batch = draws[start:] if is_last else draws[start : start + self.batch_size]
            yield batch[self._processes.own_slice]
