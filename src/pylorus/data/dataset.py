"""Images of a split as a dataset: loaded, augmented, and in an order that is a function of seed and epoch alone."""

import contextlib
import copy
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import cv2
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from pylorus.cache.shards import Records
from pylorus.config.schema import AugmentConfig
from pylorus.core.distributed import SINGLE_PROCESS, Processes, compute_seed
from pylorus.core.limited_process import end_with_parent
from pylorus.data.augmentation import build_augmentation
from pylorus.data.device_augmentation import DeviceAugmentation, find_obstacle, send_array
from pylorus.data.files import Root
from pylorus.data.input_format import InputFormat

TERMINAL_SIGNALS = {each for each in signal.Signals if each.name in ("SIGINT", "SIGUSR1", "SIGUSR2")}
"""Signals that a terminal or SLURM sends to all processes of a run: the run's own process handles them."""
RUN_SIGNALS = TERMINAL_SIGNALS | {each for each in signal.Signals if each.name in ("SIGTERM", "SIGHUP")}
"""Those, and the ones that end all processes of a run, as when a terminal closes."""


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
        self, sampler: EpochSampler, batch_size: int, *, processes: Processes = SINGLE_PROCESS, first_batch: int = 0
    ) -> None:
        self.sampler, self.batch_size, self._processes = sampler, batch_size, processes
        self._first_batch, self._resumed_epoch = first_batch, sampler.epoch

    def rewind(self, epoch: int) -> None:
        """Begin the next iteration with the first batch of an epoch."""
        self.sampler.set_epoch(epoch)
        self._first_batch = 0

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


class DeviceMemory(NamedTuple):
    """Where tensors are held that are used in every epoch.

    Attributes:
        device: The device that trains.
        share: Fraction of its free memory that one such tensor may take.
    """

    device: torch.device
    share: float

    def has_space(self, size: int) -> bool:
        """Return whether a tensor of `size` bytes may be held there; True for a CPU, whose memory the user knows."""
        if self.device.type != "cuda":
            return True
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return size <= self.share * (torch.cuda.mem_get_info(self.device)[0] + cached)


class Batch(NamedTuple):
    """Images with their labels.

    Attributes:
        image: uint8 of shape (batch, 3, size, size), RGB in [0, 255]; the classifier normalizes it.
        label: int64 of shape (batch,).
        row: int64 of shape (batch,): row of each image in the split's table.
    """

    image: torch.Tensor
    label: torch.Tensor
    row: torch.Tensor


class ImageDataset(Dataset[Batch]):
    """Dataset that returns whole batches; paths are held in one array, which worker processes share.

    Args:
        table: Rows of one split.
        root: Root of the table's paths: a folder or shards.
        form: How a file becomes the network's input.
        policy: The augmentation.
        seed: Seed of the augmentation.
        cached: The prepared images of all rows; None: each is read from its file.
        on_device: The same on the device that trains, uint8 of shape (rows, 3, size, size): batches are selected and
            augmented there; None: on the CPU.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        root: Root,
        form: InputFormat,
        *,
        policy: AugmentConfig,
        seed: int,
        cached: Records | None = None,
        on_device: torch.Tensor | None = None,
    ) -> None:
        self.root, self.form, self.policy, self.seed, self._cached = root, form, policy, seed, cached
        self.paths: NDArray[np.str_] = table["path"].to_numpy(dtype=np.str_)
        self.ids: NDArray[np.str_] = table["sample_id"].to_numpy(dtype=np.str_)
        self.labels: NDArray[np.int64] = table["label"].to_numpy(dtype=np.int64)
        self._hashes = table["sha256"].to_numpy(dtype="S64") if "sha256" in table else None
        self._augment = build_augmentation(policy)
        self._on_device = on_device
        if on_device is not None:
            self._device_labels = send_array(self.labels, on_device.device)
            self._augment_on_device = None if self._augment is None else DeviceAugmentation(self._augment)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def is_on_device(self) -> bool:
        """Whether batches come from the memory of the device, so that no processes are needed to load them."""
        return self._on_device is not None

    def __getitems__(self, draws: Sequence[Draw | int]) -> Batch:
        """Return the batch of the given draws: a pure function of them and the constructor's arguments.

        A number is a row, unaugmented: so samplers of torch and Lightning work as well.
        """
        rows = [draw.row if isinstance(draw, Draw) else draw for draw in draws]
        if self._on_device is not None:
            return self._select_on_device(self._on_device, rows, draws)
        images = self.load_rows(rows)
        if self._augment is not None:
            for index, draw in enumerate(draws):
                if isinstance(draw, Draw) and draw.view is not None:
                    images[index] = self._augment(images[index], self.get_augmentation_seed(draw.row, draw.view))
        return Batch(
            image=torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
            label=torch.from_numpy(self.labels[rows]),
            row=torch.tensor(rows),
        )

    def copy_with_augmentation(self, policy: AugmentConfig, seed: int) -> "ImageDataset":
        """Return the dataset of the same images with another augmentation, in the main memory."""
        dataset = copy.copy(self)
        dataset._on_device = None  # a forked process can't use a GPU that its parent uses
        dataset.policy, dataset.seed, dataset._augment = policy, seed, build_augmentation(policy)
        return dataset

    def _select_on_device(self, images: torch.Tensor, rows: list[int], draws: Sequence[Draw | int]) -> Batch:
        row = send_array(np.asarray(rows), images.device)
        selected = images.index_select(0, row)
        views = [draw.view for draw in draws if isinstance(draw, Draw) and draw.view is not None]
        if self._augment_on_device is not None and views:
            seeds = [self.get_augmentation_seed(index, view) for index, view in zip(rows, views, strict=True)]
            selected = self._augment_on_device(selected, seeds)
        return Batch(selected, self._device_labels.index_select(0, row), row)

    def get_augmentation_seed(self, row: int, view: int) -> int:
        """Return the seed of an augmented variant, in [0, 2^63)."""
        return compute_seed(self.seed, view, str(self.ids[row]))

    def load_rows(self, rows: list[int]) -> NDArray[np.uint8]:
        """Load unaugmented images of the network's input size, as a writable array of shape (rows, size, size, 3).

        Raises:
            UnreadableImageError: Names the file.
        """
        if self._cached is not None:
            return self._cached.read_rows(rows).reshape(len(rows), self.form.size, self.form.size, 3)
        paths = [self.root / str(self.paths[row]) for row in rows]
        if self._hashes is None:
            return self.form.load_images(paths)
        return self.form.load_images(paths, [self._hashes[row].decode() for row in rows])


def find_device_obstacle(policy: AugmentConfig) -> str | None:
    """Return why images can't be augmented on the device that trains; None if they can."""
    augmentation = build_augmentation(policy)
    return None if augmentation is None else find_obstacle(augmentation)


def return_batch(batch: Any) -> Any:
    """Return the batch unchanged, as the collate function of a DataLoader whose dataset returns whole batches."""
    return batch


def setup_loading_process(_: int) -> None:
    """Limit a process that loads images to one thread: those of several processes would compete for the cores.

    It ignores TERMINAL_SIGNALS.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    for number in TERMINAL_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _setup_run_process(index: int) -> None:
    """Set up a process that loads images for a run: it ends with the run, even if that is killed, and not before.

    Torch's own watch takes up to five seconds, and does not look while an image is read. It ignores RUN_SIGNALS, so
    that the run keeps its batches: it finishes and saves its step.
    """
    setup_loading_process(index)
    for number in RUN_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, RUN_SIGNALS)
    end_with_parent(signal.SIGKILL)


@contextlib.contextmanager
def _hold_signals() -> Iterator[None]:
    """Hold signals that would end this process until the block is left.

    A process that is started meanwhile holds them too, so that none ends it before it ignores them.
    """
    held = signal.pthread_sigmask(signal.SIG_BLOCK, RUN_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


class LoadingRequest(NamedTuple):
    """What a loading process is asked for: a batch of a split with a stage's augmentation."""

    split: str
    policy: AugmentConfig
    seed: int
    draws: Sequence[Draw]


class _RunDataset(Dataset[Batch]):
    """The images of all splits of a run, with the augmentation that each request names."""

    def __init__(self, datasets: Mapping[str, ImageDataset]) -> None:
        self._datasets = datasets
        self._augmented: dict[tuple[str, str, int], ImageDataset] = {}

    def __getitems__(self, request: LoadingRequest) -> Batch:
        key = (request.split, repr(request.policy), request.seed)
        if key not in self._augmented:
            self._augmented[key] = self._datasets[request.split].copy_with_augmentation(request.policy, request.seed)
        return self._augmented[key].__getitems__(request.draws)


class LoadingProcesses:
    """Processes that load the batches of all splits and stages of a run; the first batch starts them.

    They serve one loader at a time: whoever asks for a first batch ends what another loader has asked for.

    Args:
        count: Number of processes, at least 1.
        pin_memory: Whether to pin the batches' memory for transfer to a GPU.
    """

    def __init__(self, count: int, *, pin_memory: bool) -> None:
        self._count, self._pin_memory = count, pin_memory
        self._requests: Iterable[LoadingRequest] = ()
        self._loader: DataLoader[Batch] | None = None
        self._iterator: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()
            for process in self._iterator._workers:  # torch would send SIGTERM
                process.kill()
        self._loader = self._iterator = None

    def __iter__(self) -> Iterator[LoadingRequest]:
        """Iterate over the requests of the present loader, as the sampler of torch's DataLoader."""
        return iter(self._requests)

    def load_batches(
        self, datasets: Mapping[str, ImageDataset], split: str, batches: Iterable[list[Draw]]
    ) -> Iterator[Batch]:
        """Load batches of a split.

        Args:
            datasets: The images of each split, with the augmentation. Those of the first call serve all later ones,
                which may differ in augmentation and seed alone.
            split: Name of the split.
            batches: The batches.
        """
        if self._loader is None:
            self._loader = DataLoader(
                _RunDataset(datasets),
                batch_sampler=self,  # type: ignore[arg-type]
                num_workers=self._count,
                collate_fn=return_batch,
                worker_init_fn=_setup_run_process,
                persistent_workers=True,
                pin_memory=self._pin_memory,
            )
        policy, seed = datasets[split].policy, datasets[split].seed
        requests = (LoadingRequest(split, policy, seed, draws) for draws in batches)
        self._requests = requests
        # Only the first iterator starts processes; later ones may wait for them, and must not keep Ctrl-C waiting.
        with _hold_signals() if self._iterator is None else contextlib.nullcontext():
            self._iterator = iter(self._loader)
        for batch in self._iterator:
            yield batch
            if self._requests is not requests:
                raise RuntimeError(f"the processes that load the {split} images serve another loader by now")


class SharedLoader:
    """A loader of a split whose batches come from the processes of its run; it may be iterated over again.

    Attributes:
        batch_sampler: The batches; Lightning sets the epoch of its sampler.
    """

    def __init__(
        self,
        processes: LoadingProcesses,
        datasets: Mapping[str, ImageDataset],
        split: str,
        batches: Iterable[list[Draw]],
    ) -> None:
        self._processes, self._datasets, self._split = processes, datasets, split
        self.batch_sampler = batches

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        return self._processes.load_batches(self._datasets, self._split, self.batch_sampler)


class ImageBatches(Protocol):
    """What the layers above need of a data module: the images of each split, in batches."""

    parts: dict[str, pd.DataFrame]
    form: InputFormat
    policy: AugmentConfig
    views: int | None
    batch_size: int
    pin_memory: bool
    memory: DeviceMemory | None

    @property
    def processes(self) -> Processes:
        """The distributed processes, each of which loads its part of a batch."""

    @property
    def augments(self) -> bool:
        """Whether training images are augmented."""

    def get_dataset(self, split: str) -> ImageDataset:
        """Return the images of a split."""

    def build_batches(self, split: str) -> EpochBatchSampler:
        """Build the batches of a split."""

    def build_loader(self, split: str) -> DataLoader[Batch] | SharedLoader:
        """Build the loader that yields every image of a split once."""

    def build_batch_loader(self, split: str, batches: Iterable[list[Draw]]) -> DataLoader[Batch] | SharedLoader:
        """Build a loader of the given batches of a split's images."""
