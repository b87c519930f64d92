"""Report to `benchmarks/soak.py` in which phase a process of Pylorus is; Python imports this module when it starts.

The phases are the parts of the run's own timeline, and `checkpoint` while a checkpoint is written. Each beginning is
one datagram, with the number of the process, to the socket that PYLORUS_TRACE names.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "PYLORUS_TRACE"
"""The environment variable that names the socket; without it, nothing is reported."""
WITHOUT_REPORTS = "PYLORUS_TRACE_WITHOUT_REPORTS"
CHECKPOINT = "checkpoint"


class Phase:
    """The present phase of this process, which a fork inherits."""

    name = "imports"


def report(name: str) -> None:
    """Report the beginning of a phase."""
    Phase.name = name
    address = os.environ.get(VARIABLE)
    if address:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as here:
            here.setblocking(False)  # nobody may be listening any more
            here.sendto(f"{os.getpid()} {name}".encode(), address)


def trace_timeline(module: ModuleType) -> None:
    """Report each part of a timeline."""
    begin = module.Timeline.begin

    def begin_part(timeline: Any, part: str) -> None:
        begin(timeline, part)
        if part != Phase.name:
            report(part)

    module.Timeline.begin = begin_part  # type: ignore[attr-defined]


def trace_checkpoints(module: ModuleType) -> None:
    """Report when a checkpoint is written."""
    write = module.write_atomically

    @contextmanager
    def write_file(path: Path) -> Iterator[Path]:
        before = Phase.name
        if path.suffix == ".ckpt":
            report(CHECKPOINT)
        with write(path) as temporary:
            yield temporary
        if before != Phase.name:
            report(before)

    module.write_atomically = write_file  # type: ignore[attr-defined]


def leave_out_reports(module: ModuleType) -> None:
    """Write no report of a sweep where PYLORUS_TRACE_WITHOUT_REPORTS is set: it takes longer than the tiny jobs."""
    write = module.write_report

    def write_report(*arguments: Any, **options: Any) -> Any:
        return "none" if os.environ.get(WITHOUT_REPORTS) else write(*arguments, **options)

    module.write_report = write_report  # type: ignore[attr-defined]


TRACED: dict[str, Callable[[ModuleType], None]] = {
    "pylorus.runs.process": trace_timeline,
    "pylorus.core.io": trace_checkpoints,
    "pylorus.report.page": leave_out_reports,
}


class TracingFinder(MetaPathFinder):
    """Find the traced modules, and change them once they are imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the module's specification; None for all other modules."""
        if name not in TRACED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_trace(module: ModuleType) -> None:
                execute(module)
                TRACED[name](module)

            spec.loader.exec_module = execute_and_trace  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, TracingFinder())
