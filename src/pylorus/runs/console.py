"""The console of a run: its log, its last lines, and output that outlives the terminal."""

import logging
import math
import os
import queue
import shlex
import sys
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO, cast

from tqdm import tqdm

from pylorus.core.distributed import PARALLEL_JOBS
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import (
    format_command,
    format_count,
    format_duration,
    format_estimate,
    join_names,
    setup_terminal,
)
from pylorus.core.io import read_json
from pylorus.runs.folder import STATUS, RunFolder, explain_choice

MAX_PENDING = 10_000
"""Texts that wait for a terminal or a pipe that does not take them; further ones are dropped."""
DRAIN_SECONDS = 2.0
"""At its end, a run waits so long for its last lines to be taken."""


class _TerminalHandler(logging.Handler):
    """Handler that prints above a progress bar; if the terminal is gone, the run continues without output."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _LogFileHandler(logging.FileHandler):
    """Handler for run.log that ignores errors of a full disk: the terminal still shows the line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 the standard library's name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


@contextmanager
def open_run_log(folder: Path) -> Iterator[None]:
    """Send Pylorus's log to the terminal and to run.log, and silence warnings that users can do nothing about.

    Args:
        folder: The run's folder.
    """
    setup_terminal()
    logger = logging.getLogger("pylorus")
    terminal, file = _TerminalHandler(), _LogFileHandler(folder / "run.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in (terminal, file):
        logger.addHandler(handler)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Frozen layers are in evaluation mode on purpose, the number of workers is chosen for the machine, small data
        # sets have few steps, and predictions are sorted by row.
        for message in (
            "Found .* module.* in eval mode",
            ".*does not have many workers",
            ".*smaller than the logging interval",
            "You are using a custom batch sampler",
            ".*LeafSpec.* is deprecated",
            "The .srun. command is available on your system",
            r"Detected call of `lr_scheduler.step\(\)` before",  # in fp16, the first steps of the optimizer are skipped
            "You're resuming from a checkpoint that ended before the epoch ended",  # its batches are skipped
            "It is recommended to use .*sync_dist",  # the metrics already combine all processes
            "Attempting to run cuBLAS, but there was no current CUDA context",  # torch's own thread then has one
            "The AccumulateGrad node's stream does not match",  # CUDA graphs are captured on a stream of their own
        ):
            warnings.filterwarnings("ignore", message=message)
        # Deprecations between Lightning, torch and timm: nothing that a user of Pylorus could change.
        warnings.filterwarnings("ignore", category=FutureWarning, module="(pytorch_lightning|torch|timm).*")
        warnings.filterwarnings("ignore", category=UserWarning, module="pytorch_lightning.*checkpoint")
        try:
            yield
        except Exception:
            # The terminal shows the error anyway; the next morning only the file is left.
            file.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": "failed", "exc_info": sys.exc_info()}))
            raise
        finally:
            for handler in (terminal, file):
                logger.removeHandler(handler)
                with suppress(OSError):  # the run itself reports a full disk
                    handler.close()


@contextmanager
def detach_streams() -> Iterator[None]:
    """Print without waiting: a terminal that is closed, or a pipe that nobody reads, neither ends nor delays a run.

    A thread writes to the standard output and to the standard error; what they do not take is dropped.
    """
    texts: queue.Queue[tuple[TextIO, str] | None] = queue.Queue(MAX_PENDING)
    streams = sys.stdout, sys.stderr
    thread = threading.Thread(target=_write_texts, args=(texts,), name="console", daemon=True)
    thread.start()
    sys.stdout, sys.stderr = (cast(TextIO, stream and _DetachedStream(stream, texts)) for stream in streams)
    try:
        yield
    finally:
        with suppress(queue.Full):
            texts.put_nowait(None)
        thread.join(DRAIN_SECONDS)
        if not thread.is_alive():  # otherwise the next one who prints would wait
            sys.stdout, sys.stderr = streams


class _DetachedStream:
    """A text stream whose texts another thread writes; in a forked process, which has no such thread, it drops them."""

    def __init__(self, stream: TextIO, texts: "queue.Queue[tuple[TextIO, str] | None]") -> None:
        self._stream, self._texts, self._pid = stream, texts, os.getpid()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Pass on a text."""
        if os.getpid() == self._pid:
            with suppress(queue.Full):
                self._texts.put_nowait((self._stream, text))
        return len(text)

    def flush(self) -> None:
        """Do nothing: the other thread flushes."""


def _write_texts(texts: "queue.Queue[tuple[TextIO, str] | None]") -> None:
    while (entry := texts.get()) is not None:
        stream, text = entry
        with suppress(OSError, ValueError):
            stream.write(text)
            stream.flush()


def announce_job(
    folder: RunFolder, overrides: Sequence[str], *, jobs: int | None, varied: Collection[str] = ()
) -> None:
    """Print which job of a sweep begins, and how long the sweep will take if the other jobs are like those before.

    Args:
        folder: The job's folder, beside those of the other jobs.
        overrides: Of the job's command line.
        jobs: Number of jobs; None for a search, which decides as it goes.
        varied: Keys in which the jobs differ; empty: all overrides are printed.
    """
    seconds = []
    for path in folder.path.parent.glob("*/status.json"):
        with suppress(OSError, PylorusError):  # a damaged one is reported at the end of the sweep
            job = RunFolder(path.parent)
            status = job.read_status()
            seconds += [job.read_seconds(status)] if status["state"] == "finished" else []
    number = int(folder.path.name) + 1 if folder.path.name.isdigit() else len(seconds) + 1
    differing = [word for word in overrides if word.partition("=")[0].lstrip("+~") in varied]
    count = "" if jobs is None else f" ({number} of {jobs})"
    words = [f"job {folder.path.name}{count}", format_command(differing or overrides)]
    if jobs is not None and seconds:
        at_once = int(os.environ.get(PARALLEL_JOBS, "1"))
        rounds = math.ceil(max(1, jobs - len(seconds)) / at_once)
        words.append(f"about {format_duration(fmean(seconds) * rounds)} left in this sweep")
    print(f"\n{' | '.join(filter(None, words))}", flush=True)


def format_job_ends(statuses: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say how jobs ended that did not finish; what several have in common is said once.

    Args:
        statuses: Their status by the name of the job.

    Example:
        >>> failed = {"state": "failed", "error": "no weights"}
        >>> format_job_ends({"0": failed, "1": {"state": "stopped"}, "2": failed})
        ['jobs 0 and 2 failed: no weights', 'job 1 stopped: see its run.log']
    """
    jobs: dict[str, list[str]] = {}
    for job, status in statuses.items():
        jobs.setdefault(f"{status['state']}: {status.get('error', 'see its run.log')}", []).append(job)
    return [f"{'job' if len(names) == 1 else 'jobs'} {join_names(names)} {end}" for end, names in jobs.items()]


def find_earlier_failure(folder: RunFolder, message: str) -> str | None:
    """Return the name of an earlier job of the same sweep that failed with the same message; None if there is none."""
    for path in sorted(folder.path.parent.glob(f"*/{STATUS}")):
        job = path.parent.name
        if job.isdigit() and folder.path.name.isdigit() and int(job) < int(folder.path.name):
            status = RunFolder(path.parent).find_status()
            if status["state"] == "failed" and status.get("error") == message:
                return job
    return None


def print_results(folder: RunFolder, *, validated_on: str) -> None:
    """Print where the results of a run are, what its model achieved on the test images, and what to do next.

    Args:
        folder: The run's folder.
        validated_on: val, or test: then the test images selected the shipped stage.
    """
    print(f"\nresults: {folder.path}")
    page = folder.path / "report" / "report.html"
    if page.is_file():
        print(f"report: {page}")
    shipped = folder.shipped
    if shipped is None:
        return
    choice = explain_choice(shipped, validated_on=validated_on)
    bundle = folder.path / "model"
    print(f"model: {bundle} holds stage {shipped.name} ({choice})")
    description = read_json(bundle / "model.json") or {}
    test, class_name = description.get("test") or {}, (description.get("decision") or {}).get("class")
    if test:
        figures = [f"accuracy {format_estimate(*_list_limits(test.get('accuracy')))}"]
        figures += [
            f"{index} for {class_name} {format_estimate(*_list_limits(test[index][class_name]))}"
            for index in ("sensitivity", "specificity")
            if class_name in test.get(index, {})
        ]
        images = format_count(int(test["images"]), "test image")
        print(f"test: {', '.join(figures)}; {images}, 95 % confidence intervals")
    print_next_commands(bundle)


def print_next_commands(bundle: Path) -> None:
    """Print the commands that use a model.

    Args:
        bundle: The model's folder.
    """
    name = shlex.quote(str(bundle))
    print(f"next: pylorus predict {name} IMAGES --output predictions.csv\n      pylorus serve {name}")


def _list_limits(estimate: dict[str, float | None] | None) -> list[float]:
    """Return the value of a bundle's estimate, and the limits of its interval; NaN for each that is missing."""
    return [math.nan if (number := (estimate or {}).get(end)) is None else number for end in ("value", "low", "high")]
