"""Parse the files of a request's body one at a time, in memory only: none is ever written to disk."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from pylorus.data.unreadable import format_path

FIELD = "files"
OVERHEAD = 8192
"""Bytes that a file may add to the body besides its content: boundary and headers."""
LONGEST_NAME = 200


class RefusedUploadError(Exception):
    """The whole request is refused, with this HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class UploadLimits:
    """Upload limits: bytes per file and files per request."""

    most_bytes: int
    most_files: int


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


async def iter_uploads(request: Request, limits: UploadLimits) -> AsyncIterator[Upload]:
    """Yield the files of a multipart body, each as soon as it is complete.

    A file that is too large is skipped and yields an error; the other files are still processed.

    Raises:
        RefusedUploadError: If the body is not such a form, is incomplete or too large.
    """
    max_bytes = limits.most_files * (limits.most_bytes + OVERHEAD)
    too_much = RefusedUploadError(413, f"the request is larger than {max_bytes:,} bytes")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > max_bytes:
        raise too_much
    parser = _UploadParser(_parse_boundary(request.headers.get("content-type", "")), limits)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > max_bytes:
            raise too_much
        for upload in parser.add(chunk):
            yield upload
    if not parser.ended:
        raise RefusedUploadError(400, "the form is incomplete: its last boundary is missing")


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
        if self._count > self._limits.most_files:
            raise RefusedUploadError(413, f"more than {self._limits.most_files} files in one request")
        self._headers, self._content, self._too_large = {}, bytearray(), False

    def _save_header(self) -> None:
        self._headers[bytes(self._field).lower()] = bytes(self._value)
        self._field, self._value = bytearray(), bytearray()

    def _read_headers(self) -> None:
        _, parameters = parse_options_header(self._headers.get(b"content-disposition"))
        field = parameters.get(b"name", b"").decode(errors="replace")
        if field != FIELD or b"filename" not in parameters:
            raise RefusedUploadError(400, f'found the field "{format_path(field)[:50]}", expected files as "{FIELD}"')
        self._name = format_file_name(parameters[b"filename"].decode(errors="replace"))

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if len(self._content) + end - start > self._limits.most_bytes:
            self._content, self._too_large = bytearray(), True
        if not self._too_large:
            self._content += data[start:end]

    def _close_part(self) -> None:
        error = f"the file is over the limit of {self._limits.most_bytes:,} bytes" if self._too_large else ""
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
    return format_path(last)[-LONGEST_NAME:] if last.strip(".") else "unnamed"


def _parse_boundary(content_type: str) -> bytes:
    media_type, parameters = parse_options_header(content_type)
    if media_type != b"multipart/form-data" or not parameters.get(b"boundary"):
        raise RefusedUploadError(415, f'expected multipart/form-data with files as "{FIELD}"')
    return parameters[b"boundary"]
