"""Decode uploads in processes of their own, which are ended if a file takes too long, too much memory, or nobody waits.

The processes hold neither the network nor a password. They receive a file's bytes and return pixels and text, never
pickled objects, and can't write to any file.
"""

import asyncio
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import IO

import numpy as np

from pylorus.core.errors import UnreadableImageError
from pylorus.data.decode import decode_image
from pylorus.data.files import RGB
from pylorus.data.input_format import InputFormat

READERS = 2
"""Processes that decode files; an image of 25 megapixels briefly takes up to 1 GiB."""
CPU_SECONDS = 10
"""Processor time that a file may take; the largest honest images take about 2 s."""
WAIT_SECONDS = 120.0
"""Seconds after which a file is given up even if its process has not used that time."""
START_SECONDS = 120.0
"""Seconds that a process may take to start."""
MEMORY_BYTES = 2 * 2**30
"""Memory that a file may take on Linux, in addition to that of the idle process."""
MIN_DISPLAY_SIDE = 448
"""Minimum side of an image for the page, in pixels."""

REQUEST, ANSWER = struct.Struct("<?Q"), struct.Struct("<QQQ")
"""Whether an image for the page is wanted, and the file's length; lengths of the error and of both images."""
READY = b"+"
COMMAND = "from pylorus.deploy.app.reader import run_reader; run_reader()"


@dataclass(frozen=True)
class DecodedFile:
    """A file after decoding.

    Attributes:
        pixels: The network's input, uint8 RGB of shape (size, size, 3); None if there is an error.
        display: The same image, large enough for the page; None if it was not requested.
        error: Why the file can't be used; empty if it can.
        ended: Whether the process had to be ended because of this file.
    """

    pixels: RGB | None = None
    display: RGB | None = None
    error: str = ""
    ended: bool = False


class ReaderPool:
    """Some processes that decode files, shared fairly: clients take turns, however many files each has.

    Args:
        input_format: How an image becomes the network's input.
    """

    def __init__(self, input_format: InputFormat) -> None:
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._lock = threading.Lock()
        self._idle = [_ReaderProcess(input_format) for _ in range(READERS)]
        self._readers = tuple(self._idle)
        self._waiting: OrderedDict[str, deque[Future[_ReaderProcess]]] = OrderedDict()

    async def decode(self, content: bytes, *, with_display: bool, client: str = "") -> DecodedFile:
        """Decode a file when it is its client's turn; if this is cancelled, the process is ended.

        Args:
            content: The file's bytes.
            with_display: Whether to return the image for the page, too.
            client: Whose file it is.
        """
        reader = await self._wait_for_turn(client)
        job = asyncio.get_running_loop().run_in_executor(self._threads, reader.decode, content, with_display)
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            reader.end()
            await asyncio.wait([job])
            raise
        finally:
            self._pass_on(reader)

    def get_process_ids(self) -> tuple[int, ...]:
        """Return the ids of the processes."""
        return tuple(reader.process_id for reader in self._readers)

    def close(self) -> None:
        """End the processes; pending work is dropped."""
        for reader in self._readers:
            reader.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _wait_for_turn(self, client: str) -> "_ReaderProcess":
        turn: Future[_ReaderProcess] = Future()
        with self._lock:
            if self._idle:
                return self._idle.pop()
            self._waiting.setdefault(client, deque()).append(turn)
        try:
            return await asyncio.wrap_future(turn)
        except asyncio.CancelledError:
            with self._lock:
                has_reader = turn.done() and not turn.cancelled()
            if has_reader:
                self._pass_on(turn.result())
            raise

    def _pass_on(self, reader: "_ReaderProcess") -> None:
        with self._lock:
            while self._waiting:
                client, turns = self._waiting.popitem(last=False)
                turn = turns.popleft()
                if turns:
                    self._waiting[client] = turns  # at the end: another client is next
                if turn.set_running_or_notify_cancel():
                    turn.set_result(reader)
                    return
            self._idle.append(reader)


class _ReaderProcess:
    """One process that decodes a file at a time, replaced by a new one when it was ended."""

    def __init__(self, input_format: InputFormat) -> None:
        self._size = input_format.size
        self._arguments = json.dumps(asdict(input_format))
        self._is_closed, self._is_ready = False, False
        self._process = self._start()

    def decode(self, content: bytes, with_display: bool) -> DecodedFile:
        """Decode a file; blocks until that is done or given up."""
        if self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        timer = _KillTimer(process)
        try:
            if not self._is_ready:  # importing what it needs takes seconds on a busy machine, and is no file's fault
                timer.start(START_SECONDS)
                self._is_ready = _read_exactly(process.stdout, 1) == READY
            timer.start(WAIT_SECONDS)
            process.stdin.write(REQUEST.pack(with_display, len(content)) + content)
            process.stdin.flush()
            return self._receive(process.stdout)
        except (OSError, ValueError, EOFError, struct.error):
            process.kill()
            code = process.wait()
            if not self._is_ready:
                return DecodedFile(error="the process that decodes files failed to start")
            if not self._is_closed:
                self._process = self._start()
            return DecodedFile(error=_explain_end(code, is_late=timer.has_killed), ended=True)
        finally:
            timer.stop()

    @property
    def process_id(self) -> int:
        """Id of the process."""
        return self._process.pid

    def end(self) -> None:
        """End the process; a file that it decodes gets an error."""
        process = self._process
        process.kill()
        process.wait()

    def close(self) -> None:
        """End the process for good."""
        self._is_closed = True
        process = self._process
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()

    def _start(self) -> "subprocess.Popen[bytes]":
        self._is_ready = False
        paths = os.pathsep.join(path for path in sys.path if path)
        return subprocess.Popen(
            [sys.executable, "-P", "-c", COMMAND, self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )

    def _receive(self, pipe: IO[bytes]) -> DecodedFile:
        error, pixels, display = ANSWER.unpack(_read_exactly(pipe, ANSWER.size))
        if error:
            return DecodedFile(error=_read_exactly(pipe, min(error, 10_000)).decode(errors="replace"))
        shown = max(self._size, MIN_DISPLAY_SIDE)
        if pixels != 3 * self._size**2 or display not in (0, 3 * shown**2):
            raise ValueError("an answer of another size")
        return DecodedFile(
            _to_image(_read_exactly(pipe, pixels), self._size),
            _to_image(_read_exactly(pipe, display), shown) if display else None,
        )


class _KillTimer:
    """Kills a process after some time."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process, self._timer, self.has_killed = process, threading.Timer(0, int), False

    def start(self, seconds: float) -> None:
        """Start anew."""
        self.stop()
        self._timer = threading.Timer(seconds, self._kill)
        self._timer.start()

    def stop(self) -> None:
        """Let the process live."""
        self._timer.cancel()

    def _kill(self) -> None:
        self.has_killed = True
        self._process.kill()


def _to_image(content: bytes, side: int) -> RGB:
    return np.frombuffer(content, dtype=np.uint8).reshape(side, side, 3)


def _read_exactly(pipe: IO[bytes], length: int) -> bytes:
    content = pipe.read(length)
    if len(content) != length:
        raise EOFError
    return content


def _explain_end(code: int, *, is_late: bool) -> str:
    if is_late:
        return f"decoding it took more than {WAIT_SECONDS:g} s"
    if code == -getattr(signal, "SIGXCPU", 0):
        return f"decoding it took more than {CPU_SECONDS} s of processor time"
    return "decoding it failed: the process that read it was ended, perhaps for lack of memory"


def run_reader() -> None:
    """Decode the files that arrive on standard input until it is closed; this is what a reader's process runs."""
    import cv2

    from pylorus.core.distributed import keep_freed_memory

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal of the server, which decides
    cv2.setNumThreads(0)
    keep_freed_memory()
    source = sys.stdin.buffer
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints would otherwise be read as an answer
    input_format = InputFormat(**json.loads(sys.argv[1]))
    limit_cpu = _set_limits()
    sink.write(READY)
    sink.flush()
    with suppress(EOFError, BrokenPipeError):
        while True:
            with_display, length = REQUEST.unpack(_read_exactly(source, REQUEST.size))
            content = _read_exactly(source, length)
            limit_cpu()
            answer = _decode(content, input_format, with_display=with_display)
            error = answer.error.encode()
            images = [b"" if image is None else image.tobytes() for image in (answer.pixels, answer.display)]
            sink.write(ANSWER.pack(len(error), *map(len, images)) + error + b"".join(images))
            sink.flush()


def _decode(content: bytes, input_format: InputFormat, *, with_display: bool) -> DecodedFile:
    display_format = replace(input_format, size=max(input_format.size, MIN_DISPLAY_SIDE))
    try:
        image = decode_image(content, policy=input_format.policy)
        pixels = input_format.prepare_image(image)
        return DecodedFile(pixels, display_format.prepare_image(image) if with_display else None)
    except UnreadableImageError as error:
        return DecodedFile(error=" ".join(str(error).split()) or "damaged")
    except MemoryError:
        return DecodedFile(error=f"decoding it needs more than {MEMORY_BYTES / 2**30:g} GiB of memory")
    except Exception as error:  # one file must not fail the whole request
        print(f"failed to read a file: {type(error).__name__}", file=sys.stderr)
        return DecodedFile(error=f"damaged: {type(error).__name__}")


def _set_limits() -> Callable[[], None]:
    """Limit memory, files and core dumps; return what gives the next file its processor time."""
    try:
        import resource
    except ImportError:  # Windows: only the time is limited, by the server
        return lambda: None

    def set_soft_limit(kind: int, value: int) -> None:
        hard = resource.getrlimit(kind)[1]
        with suppress(OSError, ValueError):
            resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))

    def limit_cpu() -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        set_soft_limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS)

    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        set_soft_limit(resource.RLIMIT_AS, mapped + MEMORY_BYTES)
    set_soft_limit(resource.RLIMIT_FSIZE, 0)
    set_soft_limit(resource.RLIMIT_CORE, 0)  # a core dump would hold the image
    return limit_cpu
