"""The job that every contender receives as a JSON file, and the result that it prints as one line of JSON."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

SAYS = "RESULT "
"""Prefix of the line of a contender's output that contains the result."""


def list_python_paths(checkout: Path) -> str:
    """Return PYTHONPATH for a process that measures the Pylorus of a checkout; this process's own paths follow."""
    return os.pathsep.join(filter(None, [str(checkout / "src"), os.environ.get("PYTHONPATH")]))


@dataclass(frozen=True)
class Job:
    """The work: two phases, first only the head, then the whole network."""

    data: str  # folder with {train,val,test}/CLASS
    classes: int
    model: str  # timm's name
    model_args: dict[str, Any]  # further arguments of timm.create_model
    weights: str  # a file, hub, or none: random ones
    size: int  # side of the input in pixels
    late: str  # the block from which the network is trained in partial fine-tuning
    group: str | None  # regular expression that finds the patient in a path; only Pylorus uses it
    epochs: int  # of each phase
    work: str = "standard"  # one of lineup.WORKS
    batch_size: int = 16
    head_lr: float = 1e-3
    network_lr: float = 1e-4
    device: str = "cpu"
    bf16: bool = True  # whether bf16 is measured to be faster here; contenders with the best flags then use it
    workers: int = 2  # decoding processes, for contenders without a default of their own
    folder: str = ""  # empty folder for this measurement; removed afterwards
    cache: str = ""  # folder of Pylorus's cache, shared by contenders that continue another one; empty: in `folder`
    options: dict[str, Any] = field(default_factory=dict)  # options that distinguish variants of one contender

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @staticmethod
    def of_command_line() -> "Job":
        """Read the job from the file that the command line names."""
        return Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


@dataclass
class Answer:
    """The result that a contender reports; the harness adds what it measures from outside."""

    phases: dict[str, float] = field(default_factory=dict)  # seconds, including the validation of each epoch
    images_per_second: dict[str, float] = field(
        default_factory=dict
    )  # of training without validation, median over the epochs of a phase
    phase_memory_mib: dict[str, float] = field(default_factory=dict)  # peak of each phase, if known
    timeline: dict[str, float] = field(default_factory=dict)  # seconds of each part of a run of Pylorus
    accuracy: float | None = None  # on the test images, at the end
    memory_mib: float | None = None  # GPU memory, as reported by the framework
    note: str = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.phases[name] = perf_counter() - start

    def say(self) -> None:
        print(SAYS + json.dumps(asdict(self)), flush=True)
