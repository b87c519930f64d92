"""What every contender is told and what it answers: the same work for all, as one JSON file and one JSON line."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

SAYS = "RESULT "
"""How the one line of a contender's output begins that the harness reads."""


@dataclass(frozen=True)
class Job:
    """The work: two phases, first the head alone, then the whole network."""

    data: str  # folder with {train,val,test}/CLASS
    classes: int
    model: str  # timm's name
    model_args: dict[str, Any]  # further arguments of timm.create_model
    weights: str  # a file, or hub
    size: int  # side of the input in pixels
    late: str  # the block from which the network learns where it learns in part
    group: str | None  # regular expression that finds the patient in a path; only Pylorus asks
    epochs: int  # of each phase
    batch_size: int = 16
    head_lr: float = 1e-3
    network_lr: float = 1e-4
    device: str = "cpu"
    bf16: bool = True  # whether bf16 products are measured to be faster here: contenders with the best flags take it
    workers: int = 2  # processes that decode, where the contender has no default of its own
    folder: str = ""  # of this measurement: empty, and removed afterwards
    options: dict[str, Any] = field(default_factory=dict)  # what tells two variants of one contender apart

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @staticmethod
    def of_command_line() -> "Job":
        """The job whose file is the contender's one argument."""
        return Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


@dataclass
class Answer:
    """What a contender says of its own run; the harness adds what it sees from outside."""

    phases: dict[str, float] = field(default_factory=dict)  # seconds, each epoch's validation included
    images_per_second: dict[str, float] = field(default_factory=dict)  # of training alone, median of a phase's epochs
    phase_memory_mib: dict[str, float] = field(default_factory=dict)  # peak of a phase, where it is known
    accuracy: float | None = None  # of the test images, at the very end
    memory_mib: float | None = None  # of the GPU, as the framework counts it
    note: str = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.phases[name] = perf_counter() - start

    def say(self) -> None:
        print(SAYS + json.dumps(asdict(self)), flush=True)
