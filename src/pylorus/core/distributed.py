"""The distributed processes of a run: this one's rank, the order of work, the exchange of values and the process group.

torch is imported only if there is more than one process.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from pylorus.core.errors import PylorusError

Thing = TypeVar("Thing")

JOBS_AT_ONCE = "PYLORUS_JOBS_AT_ONCE"
"""The environment variable that tells a job how many jobs of its sweep share this machine's cores."""
PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: the first one may be reading a million images meanwhile."""


@dataclass(frozen=True)
class Processes:
    """This process among those of its run; a single process behaves as a group of one.

    Attributes:
        index: Rank of this process, from 0.
        count: Number of processes.
        local_rank: Rank of this process on its machine; also the index of its GPU.
        beside: Number of the run's processes on this machine.
    """

    index: int = 0
    count: int = 1
    local_rank: int = 0
    beside: int = 1

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

    def run_on_first(self, make: Callable[[], Thing]) -> Thing:
        """Call `make` in the first process only and return its result in all of them."""
        if not self.is_distributed:
            return make()
        from torch import distributed

        results: list[Any] = [make() if self.is_first else None]
        distributed.broadcast_object_list(results)
        result: Thing = results[0]
        return result

    def run_first_then_others(self, make: Callable[[], Thing]) -> Thing:
        """Call `make` in every process, in the first one before the others: they find what it downloaded."""
        result = make() if self.is_first else None
        self.wait()
        if result is None:
            result = make()
        return result

    def gather(self, value: Thing) -> list[Thing]:
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


ALONE = Processes()
"""A run with a single process."""


def read_processes() -> Processes:
    """Return this process's place in its run, from the environment variables that its launcher set.

    Raises:
        PylorusError: If they are missing.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    slurm_names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    if "RANK" not in os.environ:
        # Started by srun: pass its variables on to torch and Lightning under torch's names.
        values = {name: os.environ.get(slurm_name) for name, slurm_name in zip(names, slurm_names, strict=True)}
        os.environ.update({name: value for name, value in values.items() if value is not None})
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise PylorusError(
            f"found no {', '.join(missing)} in the environment; this command is for processes that a run starts. "
            "To train on two devices: python train.py trainer.devices=2"
        )
    rank, count, local_rank, local_count = (int(os.environ[name]) for name in names)
    return Processes(rank, count, local_rank, local_count)


@contextmanager
def join_process_group(processes: Processes, *, accelerator: str) -> Iterator[None]:
    """Join the process group, and leave it at the end.

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
    distributed.init_process_group(backend, timeout=PATIENCE, rank=processes.index, world_size=processes.count)
    yield
    distributed.destroy_process_group()  # not after an error: the others may never arrive
