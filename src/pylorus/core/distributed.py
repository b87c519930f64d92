"""The processes of a distributed run, its seeds, and the processes that read files for it.

Rank, order of work, exchange of values, derived random numbers; a map over files on all cores. torch is
imported only if there is more than one process.
"""

import hashlib
import logging
import mmap
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from itertools import count, groupby, islice
from typing import TYPE_CHECKING, Any, TypeVar

from pylorus.core.errors import TRAIN_COMMAND, PylorusError
from pylorus.core.limited_process import (
    SharedResults,
    call_in_fork,
    call_within_cpu_time,
    describe_end,
    end_with_parent,
    keep_freed_memory,
    read_budget,
)

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

log = logging.getLogger(__name__)

Value = TypeVar("Value")
Item = TypeVar("Item")
Result = TypeVar("Result")
Packed = TypeVar("Packed")

PARALLEL_JOBS = "PYLORUS_JOBS_AT_ONCE"
"""The environment variable that tells a job how many jobs of its sweep share this machine's cores."""
TIMEOUT = timedelta(hours=6)
"""How long a process waits for the others: the first one may be reading a million images meanwhile."""
PROBE = 32
"""Files that are read in threads before it is decided whether processes are worth starting."""
LEAST_SECONDS = 2.0
"""Processes are started if reading the remaining files in threads would take longer."""
STREAM_FACTOR = 8
"""A stream of unknown length is expected to take so many times as long as it has taken until now."""
CHUNK, AHEAD = 8, 4
"""Files that a process takes at a time; chunks per process that are submitted in advance."""
TICK, TICKS_TO_WARNING, TICKS_TO_ERROR = 5.0, 12, 120
"""Seconds between looks at what the readers do; looks at the same file until a warning, and until an error."""


@dataclass(frozen=True)
class Processes:
    """This process among those of its run; a single process behaves as a group of one.

    Attributes:
        index: Rank of this process, from 0.
        count: Number of processes.
        local_rank: Rank of this process on its machine; also the index of its GPU.
        local_count: Number of the run's processes on this machine.
    """

    index: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, logs and shows progress."""
        return self.index == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.count > 1

    @property
    def own_slice(self) -> slice:
        """This process's slice of any sequence; the slices of all processes cover each item once."""
        return slice(self.index, None, self.count)

    def wait(self) -> None:
        """Block until all processes have arrived here."""
        if self.is_distributed:
            self.gather(None)

    def run_on_first(self, make: Callable[[], Value]) -> Value:
        """Call `make` in the first process only and return its result in all of them."""
        if not self.is_distributed:
            return make()
        from torch import distributed

        results: list[Any] = [make() if self.is_first else None]
        distributed.broadcast_object_list(results)
        result: Value = results[0]
        return result

    def run_first_then_others(self, make: Callable[[], Value]) -> Value:
        """Call `make` in every process, in the first one before the others: they find what it downloaded."""
        result = make() if self.is_first else None
        self.wait()
        if result is None:
            result = make()
        return result

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, by rank, in each of them."""
        if not self.is_distributed:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def reduce_any(self, *flags: bool) -> tuple[bool, ...]:
        """Return, for each flag, whether it is true in any process."""
        if not self.is_distributed:
            return flags
        import torch
        from torch import distributed

        maximum = torch.tensor(flags, dtype=torch.uint8)
        distributed.all_reduce(maximum, distributed.ReduceOp.MAX)
        return tuple(bool(flag) for flag in maximum.tolist())


SINGLE_PROCESS = Processes()
"""A run with a single process."""


def is_launched() -> bool:
    """Return whether the user started this process beside others: with torchrun, or as one task of several of srun."""
    count = os.environ.get("WORLD_SIZE") if "RANK" in os.environ else os.environ.get("SLURM_STEP_NUM_TASKS")
    return int(count or "1") > 1


def read_processes() -> Processes:
    """Return this process's place in its run, from the environment variables that its launcher set.

    Raises:
        PylorusError: If they are missing.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "RANK" not in os.environ and "SLURM_PROCID" in os.environ:
        _set_slurm_variables()
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise PylorusError(
            f"found no {', '.join(missing)} in the environment; this command is for processes that a run starts. "
            f"To train on two devices: {TRAIN_COMMAND} trainer.devices=2"
        )
    rank, count, local_rank, local_count = (int(os.environ[name]) for name in names)
    return Processes(rank, count, local_rank, local_count)


def _set_slurm_variables() -> None:
    """Pass what srun says of this process on to torch and Lightning under torch's names."""
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    try:
        slurm = SLURMEnvironment()
    except RuntimeError as error:
        raise PylorusError(str(error)) from error
    values = (slurm.global_rank(), slurm.world_size(), slurm.local_rank(), os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})
    os.environ.update(MASTER_ADDR=slurm.main_address, MASTER_PORT=str(slurm.main_port))


@contextmanager
def join_process_group(processes: Processes, *, accelerator: str) -> Iterator[None]:
    """Join the process group, and leave it at the end.

    Lightning's strategies join it for a fit only; a run also exchanges values before, between and after its fits.

    Args:
        processes: The processes, from `read_processes`.
        accelerator: cpu or cuda.
    """
    import torch
    from torch import distributed

    if accelerator == "cuda":
        torch.cuda.set_device(processes.local_rank)
    # Exchanged objects stay in CPU memory, so that no GPU waits for them.
    backend = "cpu:gloo,cuda:nccl" if accelerator == "cuda" else "gloo"
    distributed.init_process_group(
        backend, timeout=TIMEOUT, store=connect_store(), rank=processes.index, world_size=processes.count
    )
    yield
    distributed.destroy_process_group()  # not after an error: the others may never arrive


@cache
def connect_store() -> "Store":
    """Connect to the key-value store of all processes; the launcher holds it, or else the first process."""
    from torch.distributed.rendezvous import rendezvous

    store: Store = next(rendezvous("env://", timeout=TIMEOUT))[0]
    store.set_timeout(TIMEOUT)
    return store


FOLDER_KEY = "pylorus/folder"
"""Key of the store under which the first of several launched processes names the run's folder; empty: nothing to do."""


def announce_folder(folder: str) -> None:
    """Tell the processes that were launched beside this one which run's folder to train in, unless they know it."""
    store = connect_store()
    if not store.check([FOLDER_KEY]):
        store.set(FOLDER_KEY, folder)


def wait_for_folder() -> str:
    """Wait until the first process announces the run's folder; return an empty string if it ended without one."""
    from torch import distributed

    try:
        store = connect_store()
        while not store.check([FOLDER_KEY]):
            time.sleep(0.1)
        return store.get(FOLDER_KEY).decode()
    except distributed.DistError:
        return ""


def compute_seed(*purpose: str | int) -> int:
    """Return a seed in [0, 2^63) that depends on all of `purpose` and on nothing else.

    Unlike `hash`, it is the same on every machine, in every process and in every version of Python.

    Example:
        >>> compute_seed(0, "order", 1) == compute_seed(0, "order", 1)
        True
        >>> compute_seed(0, "order", 1) == compute_seed(0, "order", 2)
        False
    """
    # repr distinguishes 1 from "1", and ("a", "bc") from ("ab", "c").
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class _ReaderKilledError(Exception):
    """A process that reads was killed; the arguments are the items without a result, and which were being read."""


class _ReaderStuckError(Exception):
    """A process that reads does not get on; the argument is the item that it reads."""


_function: Callable[[Any], Any] | None = None
"""What a reading process does with each item."""
_progress: mmap.mmap | None = None
"""Memory that a reading process shares with its parent: the number, from 1, of the item that it reads of each chunk."""
_shared: SharedResults | None = None
"""Memory in which it returns arrays."""


def map_items(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    ahead: int | None = None,
    in_threads: bool = False,
    name: Callable[[Item], object] = str,
    on_failure: Callable[[Item, str], Result] | None = None,
) -> Iterator[Result]:
    """Yield the result of a function for each item, in order, computed on all cores while the caller uses earlier ones.

    Threads compute them at first, and processes continue if that takes long: decoders hold Python's lock for a part of
    the time.

    Args:
        function: Reads one file, say. It and its results are passed between processes; it must not need a GPU.
        items: What to call the function with. Those of a stream are taken only as they are needed.
        ahead: Number of items to compute ahead of the caller, rounded up to what keeps the cores busy. None: a few per
            core.
        in_threads: Whether to start no processes, for items that are too large to be passed to them.
        name: Returns what an error message calls an item.
        on_failure: Returns the result of an item whose decoder crashes or takes more CPU time than the limit, given
            the reason; the others are then read by new processes. None: that is an error.

    Raises:
        PylorusError: If a process that reads was killed, or got no result from one item for ten minutes; the message
            names the item, or the first of those that it was reading.
        Exception: Whatever the function raises.
    """
    cores = count_free_cores()
    remaining = iter(items)
    if in_threads or cores == 1 or sys.platform != "linux" or multiprocessing.current_process().daemon:
        yield from _map_in_threads(function, remaining, cores, ahead or cores * AHEAD, name)
        return
    length = len(items) if isinstance(items, Sized) else None
    done, seconds, expected_seconds = 0, 0.0, 0.0

    def compute_with_time(item: Item) -> tuple[Result, float]:
        start = time.perf_counter()
        return function(item), time.perf_counter() - start

    while not done or expected_seconds < LEAST_SECONDS:
        size = PROBE * cores if done else PROBE
        if not (first := list(islice(remaining, min(size, ahead or size)))):
            return
        for result, duration in _map_in_threads(compute_with_time, iter(first), cores, len(first), name):
            seconds += duration / cores
            yield result
        done += len(first)
        expected_seconds = seconds * (STREAM_FACTOR if length is None else (length - done) / done)
    chunks = cores * AHEAD if ahead is None else max(2 * cores, -(-ahead // CHUNK))
    try:
        yield from _map_in_new_processes(function, remaining, cores, chunks, name, on_failure)
    except _ReaderStuckError as error:
        raise PylorusError(
            f"{name(error.args[0])}: reading it gave no result for {TICK * TICKS_TO_ERROR / 60:.0f} minutes. Does the "
            "disk or the network drive answer? If other files on it can be read, this one makes its decoder hang: "
            "leave it out."
        ) from None
    except _ReaderKilledError as error:
        pending, _ = error.args
        others = f" or one of the next {CHUNK * chunks}" if len(pending) > 1 else ""
        raise PylorusError(
            f"A process that was reading files was killed, at {name(pending[0])}{others}. Most often the machine ran "
            "out of memory (see dmesg); else this makes a decoder crash."
        ) from None


def _map_in_new_processes(
    function: Callable[[Item], Result],
    items: Iterator[Item],
    processes: int,
    ahead: int,
    name: Callable[[Item], object],
    on_failure: Callable[[Item, str], Result] | None,
) -> Iterator[Result]:
    """Yield the results in order; with `on_failure`, new processes go on after one was killed, which is then named."""
    while True:
        try:
            yield from _map_in_processes(function, items, processes, ahead, name=name, limited=on_failure is not None)
            return
        except _ReaderKilledError as error:
            if on_failure is None:
                raise
            pending, suspects = error.args
        for is_suspect, group in groupby(pending, key=lambda item: any(item is each for each in suspects)):
            if not is_suspect:
                yield from _map_in_new_processes(function, iter(list(group)), processes, ahead, name, on_failure)
            for item in group if is_suspect else ():
                results, code = call_in_fork(function, item)
                if code == -signal.SIGKILL:
                    raise _ReaderKilledError([item], [])
                yield from results or [on_failure(item, describe_end(code, read_budget()))]


def compute_in_processes(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Return the result of a function for each item, in order, computed on all cores in forked processes.

    Args:
        function: Takes long for one item; its results are passed between processes. It must not need a GPU.
        items: What to call the function with, one item at a time.
    """
    processes = min(count_free_cores(), len(items))
    if processes > 1 and sys.platform == "linux":
        # Else this process computes them: one was killed, /dev/shm can't be written to, or none may be started.
        with suppress(_ReaderKilledError, OSError):
            return list(_map_in_processes(function, iter(items), processes, processes, chunk_size=1))
    return [function(item) for item in items]


def count_free_cores() -> int:
    """Return how many cores this process may use; jobs of a sweep that run at once share those of the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // get_concurrent_jobs())


def get_concurrent_jobs() -> int:
    """Return how many jobs of a sweep share this machine."""
    return int(os.environ.get(PARALLEL_JOBS, "1"))


def _map_in_threads(
    function: Callable[[Item], Result],
    items: Iterator[Item],
    threads: int,
    ahead: int,
    name: Callable[[Item], object],
) -> Iterator[Result]:
    submitted: deque[Future[Result]] = deque(maxlen=ahead + 1)

    def submit(item: Item) -> "Future[Result]":
        submitted.append(get_threads(threads).submit(function, item))
        return submitted[-1]

    def get_result(item: Item, future: "Future[Result]") -> Result:
        if not wait([future], TICK * TICKS_TO_WARNING).done:  # a thread can't be stopped
            _warn_of_slow_item(item, name)
        return future.result()

    try:
        yield from _compute_ahead(submit, get_result, items, ahead)
    finally:
        wait([future for future in submitted if not future.cancel()])


@cache
def get_threads(count: int) -> ThreadPoolExecutor:
    """Return threads for OpenCV that live as long as this process; none of their functions may use them in turn.

    A thread that ends holds locks of OpenCV for a moment, after Python has let go of it. If the process is forked in
    that moment, the new process waits for them forever.
    """
    return ThreadPoolExecutor(count, thread_name_prefix="reader")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=get_threads.cache_clear)  # a forked process has none of these threads


def _map_in_processes(
    function: Callable[[Item], Result],
    items: Iterator[Item],
    processes: int,
    ahead: int,
    *,
    chunk_size: int = CHUNK,
    name: Callable[[Item], object] | None = None,
    limited: bool = False,
) -> Iterator[Result]:
    """Yield the results in order; with `name`, an item without a result for long is a warning, and then an error."""
    chunks = iter(lambda: list(islice(items, chunk_size)), [])
    progress, numbers, slots = mmap.mmap(-1, ahead), count(), deque[tuple[int, list[Item]]]()
    shared = SharedResults(ahead)

    def submit(chunk: list[Item]) -> "Future[tuple[bytes, list[int]]]":
        slot = next(numbers) % ahead
        slots.append((slot, chunk))
        progress[slot] = 0
        try:
            return pool.submit(_process_chunk, slot, chunk)
        except BrokenProcessPool as error:  # the chunk that is waited for says which items it happened at
            broken: Future[tuple[bytes, list[int]]] = Future()
            broken.set_exception(error)
            return broken

    def get_results(chunk: list[Item], future: "Future[tuple[bytes, list[int]]]") -> list[Result]:
        slot = slots[0][0]
        try:
            if name is not None:
                _wait_for_chunk(future, chunk, lambda: max(0, progress[slot] - 1), name)
            results: list[Result] = shared.unpack(slot, *future.result())
        except BrokenProcessPool:
            started = [chunk[progress[slot] - 1] for slot, chunk in slots if 0 < progress[slot] <= len(chunk)]
            raise _ReaderKilledError([item for _, chunk in slots for item in chunk], started) from None
        slots.popleft()
        return results

    # Forked, as the workers of a DataLoader are: they start in milliseconds and need not import anything.
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # about threads: these processes use none
        seconds = read_budget().seconds if limited else 0
        pool = ProcessPoolExecutor(processes, context, _start_reader, (function, progress, shared, seconds))
        is_stuck = False
        try:
            for results in _compute_ahead(submit, get_results, chunks, ahead):
                yield from results
        except BaseException as error:  # nobody needs the results of the chunks that are being read
            is_stuck = isinstance(error, _ReaderStuckError)  # a process that waits for a disk may not end when killed
            for process in list((pool._processes or {}).values()):
                process.kill()
            raise
        finally:
            pool.shutdown(wait=not is_stuck, cancel_futures=True)


def _compute_ahead(
    submit: Callable[[Item], "Future[Packed]"],
    get_result: Callable[[Item, "Future[Packed]"], Result],
    items: Iterator[Item],
    ahead: int,
) -> Iterator[Result]:
    """Yield the results of submitted items in order, with `ahead` of them submitted in advance."""
    submitted = deque((item, submit(item)) for item in islice(items, ahead))
    while submitted:
        result = get_result(*submitted.popleft())
        submitted.extend((item, submit(item)) for item in islice(items, 1))
        yield result


def _wait_for_chunk(
    future: "Future[Any]",
    chunk: Sequence[Item],
    get_progress: Callable[[], int],
    name: Callable[[Item], object],
) -> None:
    """Wait for the results of a chunk, as long as one item after the other is read.

    Intervals are counted, not seconds: a run may be stopped with Ctrl-Z for hours, and the machine be suspended.
    """
    ticks, done = 0, 0
    while not wait([future], TICK).done:
        ticks, done = (ticks + 1 if get_progress() == done else 0), get_progress()
        if ticks == TICKS_TO_WARNING:
            _warn_of_slow_item(chunk[min(done, len(chunk) - 1)], name)
        elif ticks >= TICKS_TO_ERROR:
            raise _ReaderStuckError(chunk[min(done, len(chunk) - 1)])


def _warn_of_slow_item(item: Item, name: Callable[[Item], object]) -> None:
    log.warning("%s: reading it has given no result for %.0f s; still waiting", name(item), TICK * TICKS_TO_WARNING)


def _start_reader(function: Callable[[Any], Any], progress: mmap.mmap, shared: SharedResults, seconds: int) -> None:
    """Set up a process that reads: one thread, deaf to Ctrl-C, which its parent handles, and gone with its parent."""
    global _function, _progress, _shared
    import cv2

    _function = partial(call_within_cpu_time, seconds, function) if seconds else function
    _progress, _shared = progress, shared
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent(signal.SIGKILL)
    keep_freed_memory()


def _process_chunk(slot: int, chunk: Sequence[Any]) -> tuple[bytes, list[int]]:
    assert _function is not None
    assert _progress is not None
    assert _shared is not None
    results = []
    for number, item in enumerate(chunk, 1):
        _progress[slot] = number
        results.append(_function(item))
    _progress[slot] = len(chunk) + 1
    return _shared.pack(slot, results)
