"""Call functions on untrusted data in processes that are ended if they take too much CPU time or memory.

A decoder that gets a hostile file may compute for hours, take all memory or crash. A thread can't be ended; a process
can. `call_limited` calls a function in such a process, which is started once (about a second) and used again.

Most files need none: what their decoder will do at most can be seen from their structure. Code that meets another kind
calls `require_limits`; `call_within_limits` then repeats the call in a process with limits.

Limits need POSIX, and those of memory Linux. Elsewhere the checks of structure remain.
"""

import atexit
import ctypes
import mmap
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from pylorus.core.errors import PylorusError, UnreadableImageError

Argument = TypeVar("Argument")
Result = TypeVar("Result")

MAX_PIXELS_KEY, MAX_SECONDS_KEY = "PYLORUS_MAX_PIXELS", "PYLORUS_MAX_SECONDS"
"""Environment variables that change the budget of each image, for all commands alike."""
MAX_PIXELS, MAX_SECONDS = 25_000_000, 60
"""Pixels that an image may have (4K has 8 million), and seconds of CPU time that reading it may take."""
BYTES_PER_PIXEL, BASE_BYTES = 64, 1 << 30
"""Memory that reading an image may take: for each pixel that it may have, and in any case."""
WALL_FACTOR, WALL_EXTRA = 10, 60
"""A process is ended, too, that gives no result for so many times its seconds of CPU time, and so many seconds more."""


@dataclass(frozen=True)
class Budget:
    """What decoding one image may cost.

    Attributes:
        pixels: Pixels of an image; one that declares more is refused before it is decoded.
        seconds: Seconds of CPU time.
    """

    pixels: int = MAX_PIXELS
    seconds: int = MAX_SECONDS

    @property
    def memory(self) -> int:
        """Bytes of memory that decoding may take."""
        return BASE_BYTES + BYTES_PER_PIXEL * self.pixels

    @property
    def wall_seconds(self) -> int:
        """Seconds after which a process that gives no result is ended."""
        return WALL_EXTRA + WALL_FACTOR * self.seconds


def read_budget() -> Budget:
    """Read the budget of each image from the environment; what is not set there has its default.

    Raises:
        PylorusError: If a variable is not a whole number of at least 1; names the variable.
    """
    return Budget(_read_number(MAX_PIXELS_KEY, MAX_PIXELS), _read_number(MAX_SECONDS_KEY, MAX_SECONDS))


def _read_number(key: str, default: int) -> int:
    text = os.environ.get(key, "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise PylorusError(
            f"{key}: found {text!r} in the environment, expected a whole number of at least 1, such as {default}: "
            f"export {key}={default}"
        )
    return int(text)


class LimitsRequiredError(Exception):
    """What is to be done may cost any amount, so that only a process with limits may do it."""


_is_limited = False
"""Whether this process may do what only one with limits may."""
_seconds = 0.0
"""CPU time that this process may use for each result, if it has limits."""


def require_limits() -> None:
    """State that what follows may cost any amount of time or memory.

    Raises:
        LimitsRequiredError: If this process has no limits, and one with limits can be started.
    """
    if not _is_limited and os.name == "posix":
        raise LimitsRequiredError


def assume_limits(value: bool) -> None:
    """Have this process do whatever only a process with limits may, as one that has them or needs none."""
    global _is_limited
    _is_limited = value


def call_within_limits(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function here, or in a process with limits if it calls `require_limits`.

    Args:
        function: A function of a module. It may be called twice.
        arguments: Its arguments; they and the result can be pickled.

    Raises:
        UnreadableImageError: If the process with limits was ended; the message says why.
        Exception: Whatever the function raises.
    """
    try:
        return function(*arguments)
    except LimitsRequiredError:
        return call_limited(function, *arguments)


def call_limited(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function in a process with limits; where there can be none, here. See `call_within_limits`."""
    if _is_limited or os.name != "posix":
        return function(*arguments)
    with _borrow_process() as process:
        return process.call(function, *arguments)


def iterate_limited(function: Callable[..., Iterator[Result]], *arguments: Any) -> Generator[Result]:
    """Iterate over what a generator function yields in a process with limits, which hold from one item to the next.

    See `call_within_limits`. An iteration that is not completed ends the process.
    """
    if _is_limited or os.name != "posix":
        yield from function(*arguments)
        return
    with _borrow_process() as process:
        yield from process.iterate(_Stream(function), arguments)


def restart_clock() -> None:
    """Give this process, if it has limits, its full CPU time again: one of many similar steps is done."""
    if _seconds:
        signal.setitimer(signal.ITIMER_PROF, _seconds)


def call_within_cpu_time(seconds: float, function: Callable[[Argument], Result], argument: Argument) -> Result:
    """Call a function; the system ends this process if that takes more CPU time, even while a library computes.

    It costs a microsecond.
    """
    if os.name != "posix":
        return function(argument)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return function(argument)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def call_in_fork(function: Callable[[Argument], Result], argument: Argument) -> tuple[list[Result], int | None]:
    """Call a function in a forked process with the limit of CPU time.

    Returns:
        A list of its result, and 0; or no result and the exit code of the process, as `describe_end` takes it.

    Raises:
        Exception: Whatever the function raises.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    budget = read_budget()

    def work() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            answer = None, call_within_cpu_time(budget.seconds, function, argument)
        except Exception as error:
            answer = error, None  # type: ignore[assignment]
        sender.send(answer)

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        if not receiver.poll(budget.wall_seconds):
            return [], None
        error, result = receiver.recv()
    except EOFError:
        process.join()
        return [], process.exitcode
    finally:
        process.kill()
        process.join()
    if error is not None:
        raise error
    return [result], 0


class SharedResults:
    """Memory through which forked processes return arrays, which would take a pipe several times as long.

    Args:
        slots: Number of results that are on their way at a time, each in a slot of its own.
        size: Bytes of all slots together; the system provides those that are used.
    """

    def __init__(self, slots: int, size: int = 256 << 20) -> None:
        self._slot_size = size // slots
        self._memory = mmap.mmap(-1, slots * self._slot_size)

    def pack(self, slot: int, value: object) -> tuple[bytes, list[int]]:
        """Return a value as bytes and the lengths of its arrays that are in the slot; those without space are bytes."""
        position = slot * self._slot_size
        end, lengths = position + self._slot_size, list[int]()

        def is_passed_on(buffer: pickle.PickleBuffer) -> bool:
            nonlocal position
            with buffer.raw() as content:
                if position + len(content) > end:
                    return True
                self._memory[position : position + len(content)] = content
                position += len(content)
                lengths.append(len(content))
            return False

        return pickle.dumps(value, protocol=5, buffer_callback=is_passed_on), lengths

    def unpack(self, slot: int, content: bytes, lengths: Sequence[int]) -> Any:
        """Return the value that `pack` was given, with copies of its arrays; the slot is free afterwards."""
        position, buffers = slot * self._slot_size, list[bytearray]()
        for length in lengths:
            buffers.append(bytearray(memoryview(self._memory)[position : position + length]))
            position += length
        return pickle.loads(content, buffers=buffers)


def describe_end(code: int | None, budget: Budget) -> str:
    """Say why a process ended that was decoding an image.

    Args:
        code: Its exit code; the number of a signal is negative. None: it was ended because it gave no result.
        budget: What it was allowed.
    """
    if code is None:
        return f"decoding it gave no result for {budget.wall_seconds:,} s"
    if code == -signal.SIGPROF:
        return f"decoding it takes over {budget.seconds:,} s of CPU time, the limit ({MAX_SECONDS_KEY})"
    if code == -signal.SIGKILL:
        return "the process that decoded it was killed; most often the machine ran out of memory (see dmesg)"
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"damaged: its decoder crashed ({name})"


class _Stream:
    """A generator function, each of whose items is one result."""

    def __init__(self, function: Callable[..., Iterator[Any]]) -> None:
        self.function = function


class LimitedProcess:
    """A process with limits that calls functions, one at a time.

    Args:
        budget: What each call may cost.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        request, answer = os.pipe(), os.pipe()
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from pylorus.core.limited_process import serve_calls; "
            f"serve_calls({request[0]}, {answer[1]}, {budget.seconds}, {budget.memory})"
        )
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(request[0], answer[1]),
                env=environment,
            )
        except OSError as error:
            for descriptor in (*request, *answer):
                os.close(descriptor)
            raise PylorusError(f"Can't start a process that decodes images: {error.strerror or error}") from error
        os.close(request[0])
        os.close(answer[1])
        self._requests, self._answers = Connection(request[1], readable=False), Connection(answer[0], writable=False)

    def iterate(self, function: Any, arguments: tuple[Any, ...]) -> Generator[Any]:
        """Yield the results of a call.

        Raises:
            UnreadableImageError: If the process had to be ended or crashed; the message says why.
            Exception: Whatever the function raises.
        """
        is_ready = False
        try:
            with self._explain_end():
                _send(self._requests, (function, arguments))
            while not is_ready:
                kind, value = self._receive()
                is_ready = kind != "item"
                if kind == "error":
                    raise value
                if kind != "end":
                    yield value
        finally:
            if not is_ready:
                self.close()

    def _receive(self) -> tuple[str, Any]:
        with self._explain_end():
            if self._answers.poll(self.budget.wall_seconds):
                answer: tuple[str, Any] = _receive(self._answers)
                return answer
        raise UnreadableImageError(describe_end(None, self.budget))

    @contextmanager
    def _explain_end(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):  # its ends of the pipes are closed
            raise UnreadableImageError(describe_end(self._process.wait(), self.budget)) from None

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function of a module; see `iterate` for the errors."""
        result: Result = next(self.iterate(function, arguments))
        return result

    @property
    def id(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def is_usable(self) -> bool:
        """Whether the process lives."""
        return not self._requests.closed and self._process.poll() is None

    def kill(self) -> None:
        """End the process; a call that another thread waits for raises an error."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self._answers.close()


_idle: list[LimitedProcess] = []
"""Processes that nobody uses at the moment; at most as many are ever started as threads call at once."""
_lock = threading.Lock()


@contextmanager
def _borrow_process() -> Iterator[LimitedProcess]:
    budget = read_budget()
    process = None
    with _lock:
        while _idle and process is None:
            process = _idle.pop()
            if not process.is_usable or process.budget != budget:
                process.close()
                process = None
    if process is None:
        process = LimitedProcess(budget)
    try:
        yield process
    finally:
        with _lock:
            if process.is_usable:
                _idle.append(process)


@atexit.register
def end_limited_processes() -> None:
    """End the processes with limits that nobody uses at the moment."""
    with _lock:
        while _idle:
            _idle.pop().close()


def _forget_processes() -> None:
    """Forget, in a forked process, the processes of its parent: both would write to the same pipes."""
    global _lock
    _lock = threading.Lock()
    _idle.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_processes)


def _send(connection: Connection, value: Any) -> None:
    """Send a value; arrays and bytes are not copied before."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    connection.send_bytes(len(buffers).to_bytes(4, "little") + content)
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def _receive(connection: Connection) -> Any:
    content = connection.recv_bytes()
    buffers = [bytearray(connection.recv_bytes()) for _ in range(int.from_bytes(content[:4], "little"))]
    return pickle.loads(memoryview(content)[4:], buffers=buffers)


def serve_calls(requests: int, answers: int, seconds: int, memory: int) -> None:
    """Call functions as requested until the requests end: all that a process with limits does.

    Args:
        requests: File descriptor that requests are read from.
        answers: File descriptor that results are written to.
        seconds: Seconds of CPU time for each result.
        memory: Bytes of memory that this process may take beyond what its modules take.
    """
    global _seconds
    _seconds = seconds
    assume_limits(True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent ends this one
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    forbid_core_dumps()
    source, target = Connection(requests, writable=False), Connection(answers, readable=False)
    has_memory_limit = False
    with suppress(EOFError, OSError):
        while True:
            function, arguments = _receive(source)  # imports the module of the function
            if not has_memory_limit:
                limit_memory(memory)
                has_memory_limit = True
            restart_clock()
            answer: tuple[str, Any]
            try:
                if isinstance(function, _Stream):
                    for value in function.function(*arguments):
                        _send(target, ("item", value))
                        restart_clock()
                    answer = "end", None
                else:
                    answer = "value", function(*arguments)
            except Exception as error:
                answer = "error", _prepare_error(error, memory)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _send(target, answer)
            del answer, arguments


def _prepare_error(error: Exception, memory: int) -> Exception:
    if is_memory_error(error) or is_memory_error(error.__cause__):
        return UnreadableImageError(
            f"decoding it takes over {memory / 2**30:.1f} GiB of memory, the limit ({MAX_PIXELS_KEY} × "
            f"{BYTES_PER_PIXEL} bytes + {BASE_BYTES // 2**30} GiB)"
        )
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return UnreadableImageError(f"damaged: {str(error) or type(error).__name__}")
    return error


def is_memory_error(error: BaseException | None) -> bool:
    """Return whether an error says that there is no memory, in Python, NumPy, Pillow or OpenCV."""
    return isinstance(error, MemoryError) or (
        error is not None and ("Insufficient memory" in str(error) or "out of memory error" in str(error))
    )


def limit_memory(extra: int) -> None:
    """Let this process take so many bytes of memory more than now; it gets a MemoryError beyond. Only Linux can."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            used = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used + extra if hard == resource.RLIM_INFINITY else min(hard, used + extra)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def forbid_core_dumps() -> None:
    """Have the system save no memory of this process if it crashes: it would hold images of patients, or a password."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def keep_freed_memory() -> None:
    """Have the memory of one frame reused for the next in this process; only glibc (Linux) can do that.

    Otherwise the system takes it back and clears other memory, for a tenth of the time that reading a frame takes.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the most that it accepts
        library.mallopt(-1, 128 << 20)  # M_TRIM_THRESHOLD: free memory beyond this is given back


def end_with_parent(signal_number: int) -> None:
    """Have the system send this process a signal when its parent ends, however that ends; only Linux can do that."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal_number))  # 1 is PR_SET_PDEATHSIG
