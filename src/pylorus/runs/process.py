"""The process of a run: what stays the same when it is resumed, what it forks, and the signals that end it.

Ctrl-C, SIGTERM, SIGHUP of a terminal that closes, SIGXCPU of a CPU time limit that is almost reached, and SIGUSR1 or
SIGUSR2, which SLURM sends when a job's time is up, each end the run cleanly: during training after the current step
(after the last step of an epoch: after its validation), whose state is saved; otherwise at once. A second signal does
not wait for any of that. A signal that is ignored, as under nohup, stays ignored.
"""

import atexit
import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from pylorus.config.schema import TrainerConfig
from pylorus.core.errors import INTERRUPTED, PylorusError, TimeLimitReached
from pylorus.core.formatting import format_number
from pylorus.core.io import read_json, write_json
from pylorus.core.limited_process import end_with_parent

log = logging.getLogger(__name__)

ACCELERATORS = {"cuda": "gpu"}
"""Names of accelerators in torch, mapped to those of `trainer.accelerator`."""

IN_SWEEP = "PYLORUS_IN_SWEEP"
"""The environment variable of a job that a sweep started: the sweep handles its signals."""
STOP_TIMEOUT = 60.0
"""Seconds in which a run must finish and save its current step once it is asked to end."""
JOB_STOP_TIMEOUT = 1.5 * STOP_TIMEOUT
"""Seconds in which a job of a sweep must end; it may have to wait for processes of its own."""
JOB_STOP_SIGNAL = signal.SIGTERM
"""The signal that a sweep sends to its jobs when it has to end; a job that already received a signal ignores it."""
STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
HANGUP = getattr(signal, "SIGHUP", None)
"""The signal of a terminal that closes; the kernel and the shell both send it."""
REPEAT_SECONDS = 0.2
"""So long after a repeated signal, another one may be a repetition, too."""
OTHER = "other"
"""The part of a timeline that has no name of its own."""


class Timeline:
    """What a run spends its time on: consecutive parts, whose seconds add up to the time since the start.

    It begins in the part `imports`.

    Args:
        start: What `time.monotonic()` returned at the start; None: now.

    Example:
        >>> timeline = Timeline()
        >>> with timeline.measure("reading"):
        ...     pass
        >>> list(timeline.compute_seconds())
        ['imports', 'reading']
    """

    def __init__(self, start: float | None = None) -> None:
        self._seconds: dict[str, float] = {}
        self._part = "imports"
        self._since = time.monotonic() if start is None else start
        self._path: Path | None = None

    @classmethod
    def from_process_start(cls) -> "Timeline":
        """Return a timeline that began when this process started, and that ends with it.

        When the process exits, the file that `write` wrote is written once more: with the seconds of the exit.
        """
        timeline = cls(compute_process_start())
        atexit.register(timeline._write_exit)  # early, since the functions that are registered last are called first
        return timeline

    def begin(self, part: str) -> None:
        """End the present part and begin another one."""
        now = time.monotonic()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the time inside the context to a part, except what an inner context counts to its own."""
        outer = self._part
        self.begin(part)
        try:
            yield
        finally:
            self.begin(outer)

    def include(self, seconds: Mapping[str, float]) -> None:
        """Count the parts of another process, which this one has waited for in its present part."""
        for part, value in seconds.items():
            self._seconds[part] = self._seconds.get(part, 0.0) + value
            self._since += value

    def compute_seconds(self) -> dict[str, float]:
        """Return the seconds of each part until now, rounded to milliseconds, in the order in which the parts began."""
        self.begin(self._part)
        rounded = {part: round(max(0.0, seconds), 3) for part, seconds in self._seconds.items()}
        other = rounded.pop(OTHER, None)
        return rounded if other is None else {**rounded, OTHER: other}

    def format_line(self) -> str:
        """Format the seconds of the parts as one line, without those that take less than a hundredth of all."""
        total = sum((parts := self.compute_seconds()).values())
        texts = [f"{part} {format_number(seconds, 1)} s" for part, seconds in parts.items() if seconds >= total / 100]
        return f"time     {', '.join(texts)}; total {format_number(total, 1)} s"

    def write(self, path: Path) -> None:
        """Write the seconds as JSON: `seconds` in total, and `timeline` with those of each part."""
        parts = self.compute_seconds()
        write_json(path, {"seconds": round(sum(parts.values()), 3), "timeline": parts})
        self._path = path

    def _write_exit(self) -> None:
        with suppress(OSError):  # the run's folder is gone, or the disk is full
            if self._path is not None and self._path.is_file():
                self.write(self._path)


def compute_process_start() -> float:
    """Return what `time.monotonic()` returned when this process started."""
    if sys.platform == "linux":
        with suppress(OSError, ValueError, IndexError):
            fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
            started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc(5): since boot
            return time.monotonic() - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    return time.monotonic() - max(0.0, time.time() - psutil.Process().create_time())


def restore_trainer_config(trainer: TrainerConfig, record: Path) -> TrainerConfig:
    """Return the trainer's configuration with the values that were chosen for the machine when the run started.

    They are not measured again when a run is resumed.

    Args:
        trainer: The configuration.
        record: The run's environment.json; if it does not exist, the run is new and the configuration is unchanged.
    """
    initial = read_json(record)
    if initial is None:
        return trainer
    accelerator = str(initial["accelerator"])
    return replace(
        trainer,
        precision=str(initial["precision"]),
        threads=initial["threads"],
        accelerator=ACCELERATORS.get(accelerator, accelerator),
        batch_size=initial.get("batch_size", trainer.batch_size),
    )


FIRST_IMAGE_RULES = {"policy": 2, "finder": 1, "mask": "none"}
"""How images were prepared before environment.json said so."""


def check_environment(record: Path, now: dict[str, Any]) -> None:
    """Write the environment of a new run, or compare it with the present one when a run is resumed.

    Args:
        record: The run's environment.json.
        now: The result of `hardware.collect_environment`, with `batch_size`, `weights_sha256` and
            `image_rules`.

    Raises:
        PylorusError: If the run started from other initial weights, or prepared its images by other rules.
    """
    initial = read_json(record)
    if initial is None:
        write_json(record, now, sealed=True)
        return
    if initial.get("weights_sha256") != now["weights_sha256"]:
        raise PylorusError(
            f"model.weights: the run in {record.parent} started from other weights: expected SHA-256 "
            f"{_format_digest(initial.get('weights_sha256'))}, found {_format_digest(now['weights_sha256'])}. Restore "
            f"that file, or start a new run."
        )
    if initial.get("image_rules", FIRST_IMAGE_RULES) != now["image_rules"]:
        raise PylorusError(
            f"{record.parent}: this run started with another version of Pylorus, which prepared images otherwise "
            f"(expected {initial.get('image_rules', FIRST_IMAGE_RULES)}, found {now['image_rules']}). Resume it with "
            "that version, or start a new run."
        )
    changed = [
        f"{name} {initial['packages'].get(name)} → {version}"
        for name, version in {**now["packages"], "python": now["python"]}.items()
        if {**initial["packages"], "python": initial["python"]}.get(name) != version
    ]
    changed += [
        f"{key} {initial[key]} → {now[key]}" for key in ("system", "processor", "gpu") if initial[key] != now[key]
    ]
    if changed:
        log.warning(
            "the run started with other versions or on another machine (%s): results may differ by rounding",
            ", ".join(changed),
        )


def _format_digest(digest: str | None) -> str:
    return digest[:12] if digest else "none: random weights"


class BackgroundTask:
    """A function that runs in a forked process while this one imports what it needs.

    Args:
        function: It is asked to end by a KeyboardInterrupt; its errors and its log are discarded.
        arguments: Its arguments.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        self._process: BaseProcess | None = None
        with suppress(OSError, ValueError):  # no memory, or a system without fork: whoever needs the result computes it
            process = multiprocessing.get_context("fork").Process(target=_run_in_background, args=(function, arguments))
            process.start()
            self._process = process

    def wait(self) -> None:
        """Wait until the function has returned."""
        if self._process is not None:
            self._process.join()

    def stop(self) -> None:
        """Ask the function to end, and wait for it."""
        end = time.monotonic() + STOP_TIMEOUT
        while self._process is not None and self._process.is_alive():
            if time.monotonic() > end:
                self._process.kill()
            self._process.terminate()  # again and again: Python drops an exception that is raised in a destructor
            self._process.join(5.0)


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Import large packages faster: what an import creates is not garbage, and is left out of later collections too."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def exit_process(code: int) -> NoReturn:
    """End this process without taking apart what it has imported, which takes a second or two."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed pipe, or no stream at all
            stream.flush()
    os._exit(code)


class ForkedProcess:
    """A function that runs in a fork of this process, isolated as a program is that `subprocess.Popen` starts.

    Its imports have been done before the fork. Signals, environment, log, open files and functions registered with
    `atexit` are its own.

    Args:
        function: What the process does; it returns or raises like the main module of a program.
        environment: Its environment variables.
        pass_fds: Descriptors that stay open in it, besides standard input, output and errors.

    Attributes:
        pid: Number of the process.
        returncode: Its exit code, negative for a signal; None while it runs.
    """

    def __init__(
        self, function: Callable[[], None], *, environment: Mapping[str, str], pass_fds: Sequence[int] = ()
    ) -> None:
        self.returncode: int | None = None
        for stream in (sys.stdout, sys.stderr):  # otherwise both processes would print what is buffered
            with suppress(OSError, ValueError):
                stream.flush()
        previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=DeprecationWarning)  # about threads: those of BLAS are idle
                self.pid = os.fork()
            if self.pid == 0:
                _run_as_program(function, environment, pass_fds, previous)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process has ended, and return its exit code.

        Raises:
            TimeoutExpired: If it has not ended after `timeout` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, 0 if deadline is None else os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0.0)
            else:
                time.sleep(0.02)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0.0)
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless the process has ended."""
        self.send_signal(signal.SIGKILL)


def _run_as_program(
    function: Callable[[], None],
    environment: Mapping[str, str],
    pass_fds: Sequence[int],
    mask: set[int | signal.Signals],
) -> NoReturn:
    """Run a function in this new process, without what it has inherited, and end the process."""
    code = 1
    try:
        atexit._clear()
        for handler in list(logging.root.handlers):
            logging.root.removeHandler(handler)
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
            # Not closed: an inherited object that is deleted would close whatever has the number by then.
            if descriptor > 2 and descriptor not in (nothing, *pass_fds):
                os.dup2(nothing, descriptor, inheritable=False)
        os.environ.clear()
        os.environ.update(environment)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                is_ctrl_c = number == signal.SIGINT
                signal.signal(number, signal.default_int_handler if is_ctrl_c else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        exit_process(code)


def _run_in_background(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end_with_parent(signal.SIGTERM)
    logging.disable()
    with suppress(KeyboardInterrupt, Exception):
        function(*arguments)


class StopRequest:
    """Whether a run was asked to end, and when it may end: at once or after the current training step.

    Attributes:
        asked: Whether the run was asked to end.
        time_limit: The minutes of the time limit that asked for it; None: a signal did.
    """

    def __init__(self, handle_signals: Callable[[], None]) -> None:
        self._handle_signals = handle_signals
        self.asked = False
        self._name = ""
        self.time_limit: float | None = None
        self._waits = False

    def handle_request(self, name: str) -> None:
        """Raise a KeyboardInterrupt with the signal's name, or leave that to the end of the training step."""
        self.asked, self._name = True, name
        if not self._waits:
            self.raise_interrupt()

    def wait_for_step(self) -> None:
        """Let signals take effect at the end of a training step: from now on the trainer checks `asked`.

        Lightning has replaced the handler of SIGTERM by then: its own ends training elsewhere, before the state is
        saved, and lets processes wait for each other within the handler. This takes the handlers back.
        """
        self._waits = True
        self._handle_signals()

    def stop_waiting(self) -> None:
        """Let signals take effect at once, including one that was received in the meantime."""
        self._waits = False
        if self.asked:
            self.raise_interrupt()

    def raise_interrupt(self) -> None:
        """Raise a KeyboardInterrupt with the signal's name; TimeLimitReached if the time limit asked for it."""
        self._waits = False
        if self.time_limit is not None:
            raise TimeLimitReached(format_limit(self.time_limit))
        raise KeyboardInterrupt(self._name)


def format_limit(minutes: float) -> str:
    """Return why a run ended at its time limit."""
    return f"time limit: trainer.time_limit={minutes:g} minutes are over"


@contextmanager
def limit_time(minutes: float | None, stop: StopRequest) -> Iterator[None]:
    """Ask a run to end after some time, and kill its process if it has not ended STOP_TIMEOUT later.

    Args:
        minutes: The time from now; None: no limit.
        stop: From `handle_signals`.
    """
    ended = threading.Event()

    def end_run(seconds: float) -> None:
        if ended.wait(seconds) or stop.asked:
            return
        stop.time_limit = minutes
        os.kill(os.getpid(), JOB_STOP_SIGNAL)
        if not ended.wait(STOP_TIMEOUT):
            os._exit(INTERRUPTED)

    if minutes is not None:
        threading.Thread(target=end_run, args=(60.0 * minutes,), name="time limit", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def end_after_parent(parent: int) -> None:
    """Send this process SIGTERM when its parent is gone: if that was killed, it can't end this one."""

    def wait_for_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), JOB_STOP_SIGNAL)

    threading.Thread(target=wait_for_parent, name="parent", daemon=True).start()


@contextmanager
def handle_signals() -> Iterator[StopRequest]:
    """Turn the first signal inside the context into a KeyboardInterrupt; a second one ends the process.

    Python drops an exception that is raised while it runs a destructor or a callback of a C library: then it is raised
    once more, right after that. A SLURM job that received SIGUSR1 is requeued, unless submitit or a sweep started it:
    these requeue it themselves.
    """
    received: list[int] = []
    repeated: list[float] = []
    before: dict[signal.Signals, Any] = {}
    dropped = threading.Event()

    def send_again() -> None:
        while dropped.is_set():
            os.kill(os.getpid(), received[0])
            time.sleep(0.01)

    def handle_signal(number: int, frame: FrameType | None) -> None:
        if dropped.is_set():
            if any(each.f_code is repeat_dropped.__code__ for each, _ in traceback.walk_stack(frame)):
                return  # an exception would be dropped once more
            dropped.clear()
            repeated.append(time.monotonic())
            request.handle_request(signal.Signals(received[0]).name)
            return
        is_repetition = repeated and time.monotonic() < repeated[0] + REPEAT_SECONDS
        if received and (is_repetition or number == HANGUP or (number == JOB_STOP_SIGNAL and IN_SWEEP in os.environ)):
            return
        if received:
            os._exit(INTERRUPTED)
        received.append(number)
        request.handle_request(signal.Signals(number).name)

    def repeat_dropped(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt) and received:
            dropped.set()
            threading.Thread(target=send_again, daemon=True).start()
        else:
            previous_hook(unraisable)

    def set_handlers() -> None:
        for number in before:
            signal.signal(number, handle_signal)

    request = StopRequest(set_handlers)
    previous_hook = sys.unraisablehook
    try:
        sys.unraisablehook = repeat_dropped
        before |= {
            number: handler for number in STOP_SIGNALS if (handler := signal.getsignal(number)) is not signal.SIG_IGN
        }
        set_handlers()
        yield request
    finally:
        dropped.clear()
        sys.unraisablehook = previous_hook
        for number, handler in before.items():
            signal.signal(number, handler)
        if received and signal.Signals(received[0]).name == "SIGUSR1":
            _send_requeue()


@contextmanager
def ensure_uninterrupted() -> Iterator[None]:
    """Defer signals until the end of the context: an interrupted import leaves an incomplete module behind."""
    if threading.current_thread() is not threading.main_thread():  # signals only interrupt the main thread
        yield
        return
    deferred: list[int] = []
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: deferred.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in deferred:
            signal.raise_signal(number)


def _send_requeue() -> None:
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    if job is None or "SUBMITIT_EXECUTOR" in os.environ or IN_SWEEP in os.environ:
        return
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{job}_{task}" if task and os.environ.get("SLURM_ARRAY_JOB_ID") else job
    result = subprocess.run(["scontrol", "requeue", name], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        print(f"SLURM did not requeue job {name}: {result.stderr.strip()}", file=sys.stderr)
