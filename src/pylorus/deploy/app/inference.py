"""From the body of a request to rows: its files are parsed and decoded in processes; one thread runs the network.

The files are parsed one at a time, in memory only: none is ever written to disk.
"""

import asyncio
import base64
import io
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from pylorus.core.errors import PylorusError, UnreadableImageError, format_path
from pylorus.core.limited_process import Budget, LimitedProcess, read_budget
from pylorus.data.files import RGB
from pylorus.data.input_format import InputFormat, prepare_upload
from pylorus.deploy.app.security import MIN_BODY_RATE
from pylorus.deploy.model import Bundle
from pylorus.model.inference import NetworkOutput

log = logging.getLogger(__name__)

FORM_FIELD = "files"
OVERHEAD = 8192
"""Bytes that a file may add to the body besides its content: boundary and headers."""
MAX_NAME_LENGTH = 200
CHUNKS_AHEAD = 64
"""Pieces of a body, of 256 KiB at most, that are read before they are needed."""


class RefusedUploadError(Exception):
    """The whole request is refused, with this HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class UploadLimits:
    """Upload limits: bytes per file and files per request."""

    max_bytes: int
    max_files: int


@dataclass(frozen=True)
class Upload:
    """One uploaded file.

    Attributes:
        name: File name from the sender, without folders and unprintable characters. Only displayed, never opened.
        content: The file's bytes; empty if `error` is set.
        error: Why the file is refused; empty if it is accepted.
    """

    name: str
    content: bytes
    error: str = ""


class UploadProgress:
    """How fast the files of a request arrive; the time in which the server is busy with them does not count."""

    def __init__(self) -> None:
        self._received, self._waited = 0, 0.0
        self._waits_since: float | None = None

    def start_waiting(self) -> None:
        """Note that the client has to send something now."""
        self._waits_since = time.monotonic()

    def add(self, length: int) -> None:
        """Note that the client has sent something."""
        self._waited += time.monotonic() - (self._waits_since or time.monotonic())
        self._waits_since = None
        self._received += length

    @property
    def lag(self) -> float:
        """Seconds by which the client is behind a client of the least rate."""
        waits = 0.0 if self._waits_since is None else time.monotonic() - self._waits_since
        return self._waited + waits - self._received / MIN_BODY_RATE


async def iter_uploads(
    request: Request, limits: UploadLimits, progress: UploadProgress
) -> AsyncGenerator[Upload, None]:
    """Yield the files of a multipart body, each as soon as it is complete.

    A file that is too large is skipped and yields an error; the other files are still processed.

    Args:
        request: The request.
        limits: Its limits.
        progress: Is told what arrives.

    Raises:
        RefusedUploadError: If the body is not such a form, is incomplete or too large.
    """
    max_bytes = limits.max_files * (limits.max_bytes + OVERHEAD)
    too_much = RefusedUploadError(413, f"the request is larger than {max_bytes:,} bytes")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > max_bytes:
        raise too_much
    parser = _UploadParser(_parse_boundary(request.headers.get("content-type", "")), limits)
    received = 0
    async with aclosing(_read_ahead(request, progress)) as chunks:
        async for chunk in chunks:
            received += len(chunk)
            if received > max_bytes:
                raise too_much
            for upload in parser.add(chunk):
                yield upload
    if not parser.ended:
        raise RefusedUploadError(400, "the form is incomplete: its last boundary is missing")


async def _read_ahead(request: Request, progress: UploadProgress) -> AsyncGenerator[bytes, None]:
    """Yield a body while more of it is read: a client that goes is noticed only when all that it sent was read."""
    chunks: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(CHUNKS_AHEAD)

    async def read() -> None:
        try:
            progress.start_waiting()
            async for chunk in request.stream():
                progress.add(len(chunk))
                await chunks.put(chunk)
                progress.start_waiting()
            progress.add(0)
            await chunks.put(None)
        except ClientDisconnect as error:
            await chunks.put(error)

    task = asyncio.create_task(read())
    try:
        while (chunk := await chunks.get()) is not None:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk
    finally:
        task.cancel()


class _UploadParser:
    """Incremental parser that splits a multipart body into files."""

    def __init__(self, boundary: bytes, limits: UploadLimits):
        self.ended = False
        self._limits = limits
        self._count = 0
        self._done: list[Upload] = []
        self._headers: dict[bytes, bytes] = {}
        self._field, self._value, self._content = bytearray(), bytearray(), bytearray()
        self._name = ""
        self._too_large = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._start_part,
                    "on_header_field": lambda data, start, end: self._field.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._save_header,
                    "on_headers_finished": self._read_headers,
                    "on_part_data": self._add_data,
                    "on_part_end": self._close_part,
                    "on_end": self._set_ended,
                },
            )
        except ValueError as error:
            raise RefusedUploadError(400, str(error)) from error

    def add(self, chunk: bytes) -> list[Upload]:
        """Parse the next piece of the body; return the files that it completes."""
        self._done = []
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise RefusedUploadError(400, f"malformed form: {error}") from error
        return self._done

    def _start_part(self) -> None:
        self._count += 1
        if self._count > self._limits.max_files:
            raise RefusedUploadError(413, f"more than {self._limits.max_files} files in one request")
        self._headers, self._content, self._too_large = {}, bytearray(), False

    def _save_header(self) -> None:
        self._headers[bytes(self._field).lower()] = bytes(self._value)
        self._field, self._value = bytearray(), bytearray()

    def _read_headers(self) -> None:
        _, parameters = parse_options_header(self._headers.get(b"content-disposition"))
        field = parameters.get(b"name", b"").decode(errors="replace")
        if field != FORM_FIELD or b"filename" not in parameters:
            raise RefusedUploadError(
                400, f'found the field "{format_path(field)[:50]}", expected files as "{FORM_FIELD}"'
            )
        self._name = format_file_name(parameters[b"filename"].decode(errors="replace"))

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if len(self._content) + end - start > self._limits.max_bytes:
            self._content, self._too_large = bytearray(), True
        if not self._too_large:
            self._content += data[start:end]

    def _close_part(self) -> None:
        error = f"the file is over the limit of {self._limits.max_bytes:,} bytes" if self._too_large else ""
        self._done.append(Upload(self._name, bytes(self._content), error))
        self._content = bytearray()

    def _set_ended(self) -> None:
        self.ended = True


def format_file_name(name: str) -> str:
    r"""Return the last part of a sender's file name, on one line.

    Example:
        >>> format_file_name("../../etc/passwd"), format_file_name("C:\\images\\a.png"), format_file_name("..")
        ('passwd', 'a.png', 'unnamed')
    """
    last = PurePosixPath(name.replace("\\", "/").replace("%22", '"')).name.strip()
    return format_path(last)[-MAX_NAME_LENGTH:] if last.strip(".") else "unnamed"


def _parse_boundary(content_type: str) -> bytes:
    media_type, parameters = parse_options_header(content_type)
    if media_type != b"multipart/form-data" or not parameters.get(b"boundary"):
        raise RefusedUploadError(415, f'expected multipart/form-data with files as "{FORM_FIELD}"')
    return parameters[b"boundary"]


def render_heat_overlay(bundle: Bundle, pixels: RGB, display: RGB, class_index: int) -> RGB:
    """Overlay the heat map of a class on the image for the page.

    Args:
        bundle: The trained model.
        pixels: The network's input, uint8 RGB of shape `bundle.input.shape`.
        display: The same image for the page, uint8 RGB, square.
        class_index: Index of the class in the bundle's class order.

    Raises:
        PylorusError: If the network has no usable map, or a package is missing; the message names it.
    """
    from pylorus.deploy.explain import compute_heat_map, render_overlay

    heat = compute_heat_map(bundle, pixels, class_index)
    resized = cv2.resize(heat, (display.shape[1], display.shape[0]), interpolation=cv2.INTER_LINEAR)
    return render_overlay(display, np.clip(resized, 0, 1))


def find_heat_map_problem(bundle: Bundle) -> str:
    """Return why there are no heat maps, found by computing one; empty if they work."""
    black = np.zeros(bundle.input.shape, dtype=np.uint8)
    try:
        render_heat_overlay(bundle, black, bundle.input.get_square(black), 0)
    except (PylorusError, ImportError) as error:
        return str(error).removeprefix(f"{bundle.folder}: ")
    except Exception as error:  # the page is useful without heat maps, too
        log.warning("heat maps failed: %s", error, exc_info=True)
        return "they can't be computed for this network; the server's log says why"
    return ""


READERS = 2
"""Processes that decode files; an image of 25 megapixels briefly takes up to 1 GiB."""
MAX_CPU_SECONDS = 10
"""CPU time that decoding a file may take; the largest honest images take about 2 s."""
MIN_DISPLAY_SIDE = 448
"""Minimum side of an image for the page, in pixels."""
MAX_BATCH = 8
"""Largest batch; after each batch it is the next user's turn."""
JPEG_QUALITY = 85

Row = dict[str, object]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What an answer should hold besides numbers.

    Attributes:
        image: The preprocessed image, as the network sees it.
        heat_map: The same image under the heat map of the predicted class.
    """

    image: bool = False
    heat_map: bool = False


@dataclass(frozen=True)
class DecodedUpload:
    """An uploaded file after decoding; only its small preprocessed images stay in memory.

    Attributes:
        name: File name as the sender gave it.
        pixels: The network's input, uint8 RGB of shape `bundle.input.shape`; None if there is an error.
        display: The same image, large enough for the page; None if no image was requested.
        error: Why the file can't be used; empty if it can.
        ended: Whether the process that decoded it had to be ended.
    """

    name: str
    pixels: RGB | None = None
    display: RGB | None = None
    error: str = ""
    ended: bool = False


class ReaderPool:
    """Processes with limits that decode files, shared fairly: clients take turns, however many files each has."""

    def __init__(self) -> None:
        budget = read_budget()
        self._budget = Budget(budget.pixels, min(budget.seconds, MAX_CPU_SECONDS))
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._lock = threading.Lock()
        self._processes = [LimitedProcess(self._budget) for _ in range(READERS)]
        self._idle = list(range(READERS))
        self._waiting: OrderedDict[str, deque[Future[int]]] = OrderedDict()

    async def decode(
        self, upload: Upload, form: InputFormat, display_form: InputFormat | None, *, client: str = ""
    ) -> DecodedUpload:
        """Decode a file when it is its client's turn; if this is cancelled, its process is ended.

        Args:
            upload: The file.
            form: How an image becomes the network's input.
            display_form: How it becomes the image for the page; None: none is wanted.
            client: Whose file it is.
        """
        number = await self._wait_for_turn(client)
        job = asyncio.get_running_loop().run_in_executor(
            self._threads, self._decode, number, upload, form, display_form
        )
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            self._processes[number].kill()
            await asyncio.wait([job])
            raise
        finally:
            self._pass_on(number)

    def get_process_ids(self) -> tuple[int, ...]:
        """Return the ids of the processes."""
        return tuple(process.id for process in self._processes)

    def close(self) -> None:
        """End the processes; pending work is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()

    def _decode(
        self, number: int, upload: Upload, form: InputFormat, display_form: InputFormat | None
    ) -> DecodedUpload:
        if not self._processes[number].is_usable:
            self._processes[number].close()
            self._processes[number] = LimitedProcess(self._budget)
        process = self._processes[number]
        try:
            return DecodedUpload(upload.name, *process.call(prepare_upload, upload.content, form, display_form))
        except UnreadableImageError as error:
            return DecodedUpload(upload.name, error=" ".join(str(error).split()), ended=not process.is_usable)
        except Exception as error:  # one file must not fail the whole request
            log.warning("failed to read a file: %s", type(error).__name__)
            message = "it could not be decoded; the server's log names the error"
            return DecodedUpload(upload.name, error=message, ended=not process.is_usable)

    async def _wait_for_turn(self, client: str) -> int:
        """Return the number of a process that nobody else uses."""
        turn: Future[int] = Future()
        with self._lock:
            if self._idle:
                return self._idle.pop()
            self._waiting.setdefault(client, deque()).append(turn)
        try:
            return await asyncio.wrap_future(turn)
        except asyncio.CancelledError:
            with self._lock:
                has_turn = turn.done() and not turn.cancelled()
            if has_turn:
                self._pass_on(turn.result())
            raise

    def _pass_on(self, number: int) -> None:
        with self._lock:
            while self._waiting:
                client, turns = self._waiting.popitem(last=False)
                turn = turns.popleft()
                if turns:
                    self._waiting[client] = turns  # at the end: another client is next
                if turn.set_running_or_notify_cancel():
                    turn.set_result(number)
                    return
            self._idle.append(number)


class InferenceService:
    """Answers requests for one bundle, from any number of users at once.

    Args:
        bundle: The trained model; only one thread uses it.
    """

    def __init__(self, bundle: Bundle):
        cv2.setNumThreads(0)
        self.bundle = bundle
        self._readers = ReaderPool()  # its processes start while the heat maps are tried
        self.why_no_heat = find_heat_map_problem(bundle)
        self._network = ThreadPoolExecutor(1, thread_name_prefix="network")

    async def decode_upload(self, upload: Upload, wanted: AnswerOptions, *, client: str = "") -> DecodedUpload:
        """Decode and preprocess a file of a client; one that can't be read gets an error."""
        if upload.error:
            return DecodedUpload(upload.name, error=upload.error)
        form = self.bundle.input
        wants_display = wanted.image or wanted.heat_map
        display_form = replace(form.forms[0], size=max(form.size, MIN_DISPLAY_SIDE)) if wants_display else None
        return await self._readers.decode(upload, form, display_form, client=client)

    async def classify_uploads(self, frames: Sequence[DecodedUpload], wanted: AnswerOptions) -> list[Row]:
        """Return one row per image, in their order, with the columns of `pylorus predict`."""
        rows: list[Row] = []
        for start in range(0, len(frames), MAX_BATCH):
            batch = frames[start : start + MAX_BATCH]
            rows += await _run_in_pool(self._network, lambda batch=batch: self._build_rows(batch, wanted))  # type: ignore[misc]
        return rows

    def get_reader_ids(self) -> tuple[int, ...]:
        """Return the ids of the processes that decode files."""
        return self._readers.get_process_ids()

    def close(self) -> None:
        """Stop the processes and the thread; pending work is dropped."""
        self._readers.close()
        self._network.shutdown(wait=False, cancel_futures=True)

    def _build_rows(self, frames: Sequence[DecodedUpload], wanted: AnswerOptions) -> list[Row]:
        pixels = [frame.pixels for frame in frames if frame.pixels is not None]
        answers = iter(self._run_inference(np.stack(pixels)) if pixels else [])
        rows = []
        for frame in frames:
            row: Row = {"file": frame.name, "error": frame.error}
            if frame.pixels is not None:
                row |= next(answers)
                if not row["error"] and frame.display is not None:
                    row |= self._encode_images(frame.pixels, frame.display, row, wanted)
            rows.append(row)
        return rows

    def _run_inference(self, images: RGB) -> list[Row]:
        """Run inference on uint8 images of shape (n, *bundle.input.shape); return one row per image."""
        description = self.bundle.description
        class_names, decision_class = description.short_names, description.decision.class_name
        output = self.bundle.run_network(images)
        is_finite = (output.logits.isfinite().all(dim=1) & output.unlikeness.isfinite()).tolist()
        answers = self.bundle.apply_thresholds(
            NetworkOutput(output.logits.nan_to_num(0, 0, 0), output.unlikeness.nan_to_num(0, 0, 0))
        )
        rows: list[Row] = []
        for index, has_output in enumerate(is_finite):
            if not has_output:
                rows.append({"error": "the network's output is NaN or infinite for this image"})
                continue
            probabilities = answers.probabilities[index]
            rows.append(
                {
                    "error": "",
                    "predicted": class_names[answers.predicted[index]],
                    "probability": {name: float(share) for name, share in zip(class_names, probabilities, strict=True)},
                    "decision": decision_class if answers.positive[index] else f"not {decision_class}",
                    "abstain": bool(answers.why[index]),
                    "why": str(answers.why[index]),
                    "unlikeness": float(answers.unlikeness[index]),
                }
            )
            if answers.sets is not None:
                members = zip(class_names, answers.sets[index], strict=True)
                rows[-1]["prediction_set"] = [name for name, member in members if member]
        return rows

    def _encode_images(self, pixels: RGB, display: RGB, row: Row, wanted: AnswerOptions) -> Row:
        encoded: Row = {}
        if wanted.image:
            encoded["image"] = _encode_data_url(display)
        if wanted.heat_map and not self.why_no_heat:
            class_index = self.bundle.description.short_names.index(str(row["predicted"]))
            try:
                encoded["heat_map"] = _encode_data_url(render_heat_overlay(self.bundle, pixels, display, class_index))
            except PylorusError as error:
                log.warning("heat map failed: %s", error)
        return encoded


def _encode_data_url(image: RGB) -> str:
    """Encode an image as a JPEG data URL, without any metadata of the original file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


async def _run_in_pool(pool: ThreadPoolExecutor, act: Callable[[], Result]) -> Result:
    """Run a function in a thread pool without blocking the event loop."""
    return await asyncio.get_running_loop().run_in_executor(pool, act)
