"""The processes of one run, as each of them sees them: which one it is, who goes first, what the others have.

Nothing here imports torch before there is more than one process.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from pylorus.errors import PylorusError

Thing = TypeVar("Thing")

PATIENCE = timedelta(hours=6)
"""How long a process waits for another: the first one may look through a million images meanwhile."""


@dataclass(frozen=True)
class Processes:
    """This process among those of its run. What is said of all of them holds for a single one, too.

    Attributes:
        index: This one's number, from 0.
        count: How many there are.
        place: This one's number on its machine: that of its GPU.
        beside: How many there are on its machine.
    """

    index: int = 0
    count: int = 1
    place: int = 0
    beside: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes, logs and shows."""
        return self.index == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.count > 1

    @property
    def mine(self) -> slice:
        """This process's part of whatever stands in a row; together all processes have each of it once."""
        return slice(self.index, None, self.count)

    def wait(self) -> None:
        """Goes on when all have come here."""
        if self.several:
            self.gathered(None)

    def agreed(self, make: Callable[[], Thing]) -> Thing:
        """What `make` gives in the first process, in every one; the others do not call it."""
        if not self.several:
            return make()
        from torch import distributed

        box: list[Any] = [make() if self.first else None]
        distributed.broadcast_object_list(box)
        made: Thing = box[0]
        return made

    def in_turn(self, make: Callable[[], Thing]) -> Thing:
        """What `make` gives in each process, the first one before the others: what it fetches they find."""
        made = make() if self.first else None
        self.wait()
        if made is None:
            made = make()
        return made

    def gathered(self, mine: Thing) -> list[Thing]:
        """What each process has, in their order, in every one."""
        if not self.several:
            return [mine]
        from torch import distributed

        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, mine)
        return found

    def any(self, *mine: bool) -> tuple[bool, ...]:
        """Of each statement, whether it is true in any process."""
        if not self.several:
            return mine
        import torch
        from torch import distributed

        flags = torch.tensor(mine, dtype=torch.uint8)
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return tuple(bool(flag) for flag in flags.tolist())


ALONE = Processes()
"""A run of one process."""


def found() -> Processes:
    """Which process this is, by what who started it said in its environment.

    Raises:
        PylorusError: If that says nothing.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    slurm = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    if "RANK" not in os.environ:
        # srun started this one: torch and Lightning are told in torch's own words.
        said = {name: os.environ.get(other) for name, other in zip(names, slurm, strict=True)}
        os.environ.update({name: value for name, value in said.items() if value is not None})
    missing = [name for name in (*names, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise PylorusError(
            f"found no {', '.join(missing)} in the environment of this process, expected one that a run with "
            "trainer.devices started. Start the run itself: python train.py trainer.devices=2"
        )
    index, count, place, beside = (int(os.environ[name]) for name in names)
    return Processes(index, count, place, beside)


@contextmanager
def joined(processes: Processes, *, accelerator: str) -> Iterator[None]:
    """Meets the other processes, and parts from them at the end.

    Args:
        processes: As `found` says.
        accelerator: cpu or cuda.
    """
    import torch
    from torch import distributed

    if accelerator == "cuda":
        torch.cuda.set_device(processes.place)
    # What is agreed on lies in ordinary memory, so that no GPU waits for it.
    backend = "cpu:gloo,cuda:nccl" if accelerator == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE, rank=processes.index, world_size=processes.count)
    yield
    distributed.destroy_process_group()  # not after an error: the others may never come
