"""Read the files of a bundle so that what was checked is what is used: each file is opened and read once.

Small files are read whole, and hashed in memory. Of a safetensors file the header is read first and compared with what
is expected; then its tensors are read into memory that exists already, and hashed on the way. No path is used twice, so
nobody can exchange a file between the check and its use.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from pylorus.core.errors import PylorusError, format_name_list

WEIGHTS, DESCRIPTION, UNLIKE, CARD, SUMS = (
    "model.safetensors",
    "model.json",
    "unlike.safetensors",
    "MODEL_CARD.md",
    "SHA256SUMS",
)
FILES = (WEIGHTS, DESCRIPTION, UNLIKE, CARD)
"""The files that every bundle has, apart from the list of their hashes."""
LOOKS = "appearance.safetensors"
"""How the training images look; a bundle from before this file detects unlike images by features alone."""
FINGERPRINTS = "fingerprints.safetensors"
"""Salted fingerprints of the training and validation images, in bundles of runs with deploy.fingerprints=true."""
MODEL = "model.onnx"
"""The file that an export has in place of the weights; see `pylorus.deploy.onnx`."""
ENSEMBLE_RECORD = "ensemble.json"
"""File beside the bundle of an ensemble; see `pylorus.deploy.ensemble`."""
RECORD, README = "export.json", "README.md"
EXPORT_FILES = (MODEL, DESCRIPTION, RECORD, CARD, README)
"""The files that every export has, apart from the list of their hashes."""
SIGNATURE = "SHA256SUMS.sig"
"""The signature of SHA256SUMS, if there is one; see `pylorus.deploy.signature`."""

MAX_SUMS_BYTES = 65_536
"""The largest SHA256SUMS that is read, in bytes."""
MAX_DESCRIPTION_BYTES = 1_000_000
"""The largest model.json that is read: a hundred times the usual size."""
MAX_ONNX_BYTES = 2**31
"""The largest ONNX file, which its format itself can't exceed."""
MAX_FILE_BYTES = 16_000_000
"""The largest of the other files without tensors, such as the model card."""
MAX_HEADER_BYTES = 4_000_000
"""The largest header of a safetensors file: ten times that of the networks with the most tensors."""
MAX_TENSORS, MAX_DIMENSIONS = 20_000, 16
"""The most tensors of a file, and dimensions of a tensor."""
CHUNK = 2**24
"""Bytes that are read at once where a file is only hashed."""
MAX_REHASHED_BYTES = 2**31
"""The largest file with a wrong header that is read to its end, to find out whether it was damaged."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The types of tensors by their names in safetensors."""

ManifestCheck = Callable[[Path, bytes], None]
"""Checks the content of SHA256SUMS in a folder, such as its signature; raises PylorusError."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header of its file describes it.

    Attributes:
        dtype: Its type.
        shape: Its shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(eq=False)
class TensorFile:
    """An open safetensors file of which only the header was read.

    Attributes:
        path: The file, for error messages.
        expected_digest: The SHA-256 that SHA256SUMS states.
        file: The file, behind its header.
        digest: The hash of all bytes that were read so far.
        entries: Its tensors, in the order of their bytes.
    """

    path: Path
    expected_digest: str
    file: IO[bytes]
    digest: Any = field(default_factory=hashlib.sha256)
    entries: dict[str, TensorEntry] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """The number of numbers in the file."""
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    def read_header(self) -> None:
        """Read and check the header; a damaged file is reported as such, whatever its header says.

        Raises:
            PylorusError: If it is not the header of a safetensors file of this size.
        """
        size = os.fstat(self.file.fileno()).st_size
        length = int.from_bytes(self._read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            self.refuse(
                f"can't be read as safetensors, and no other format is ever loaded: its header has {length:,} bytes, "
                f"expected 2 to {MAX_HEADER_BYTES:,} within the {size:,} bytes of the file"
            )
        try:
            self.entries = parse_tensor_header(self._read(length), tensor_bytes=size - 8 - length)
        except PylorusError as error:
            self.refuse(f"can't be read as safetensors, and no other format is ever loaded: {error}")

    def check_entries(self, expected: Mapping[str, TensorEntry], *, purpose: str) -> None:
        """Check the tensors that the header lists.

        Args:
            expected: The tensors that there should be.
            purpose: What they should fit, for the message.

        Raises:
            PylorusError: If they differ; names the tensors.
        """
        mismatches = [
            f"{name[:100]}: found {self.entries.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
            for name in sorted({*self.entries, *expected})
            if self.entries.get(name) != expected.get(name)
        ]
        if mismatches:
            self.refuse(f"does not fit {purpose}:\n{format_name_list(mismatches, most=4)}", end="")

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Read all tensors into memory that exists, and verify the hash and the values of what was read.

        Args:
            tensors: Tensors of the types and shapes of `entries`, by name.

        Raises:
            PylorusError: If the hash differs, or a number is NaN or infinite.
        """
        non_finite = []
        with torch.no_grad():
            for name, entry in self.entries.items():
                target = tensors[name]
                is_writable = target.device.type == "cpu" and target.is_contiguous() and not target.is_conj()
                memory = target if is_writable else torch.empty(entry.shape, dtype=entry.dtype)
                self._read_tensor(memory, name)
                if memory is not target:
                    target.copy_(memory)
                if entry.dtype.is_floating_point and not memory.isfinite().all():
                    non_finite.append(name[:100])
        if self.file.read(1):
            raise PylorusError(f"{self.path}: was written to while it was read. Try again.")
        self._verify_digest()
        if non_finite:
            names = format_name_list(non_finite, most=4)
            raise PylorusError(f"{self.path}: contains NaN or infinite values in:\n{names}")

    def read_tensors(self) -> dict[str, Tensor]:
        """Read all tensors into new memory; see `read_into`."""
        tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in self.entries.items()}
        self.read_into(tensors)
        return tensors

    def refuse(self, reason: str, *, end: str = ".") -> None:
        """Raise an error for a reason; or, if the file is not too large to tell, for the hash if that differs."""
        if os.fstat(self.file.fileno()).st_size <= MAX_REHASHED_BYTES:
            self.verify()
        raise PylorusError(f"{self.path}: {reason.removesuffix('.')}{end}")

    def verify(self) -> None:
        """Verify the hash of the whole file without using its tensors; PylorusError if it differs."""
        while chunk := self.file.read(CHUNK):
            self.digest.update(chunk)
        self._verify_digest()

    def _read(self, count: int) -> bytes:
        content = self.file.read(count)
        self.digest.update(content)
        return content

    def _read_tensor(self, memory: Tensor, name: str) -> None:
        if not memory.numel():
            return
        view = memoryview(cast(Any, memory.reshape(-1).view(torch.uint8).numpy()))
        if self.file.readinto(view) != len(view):  # type: ignore[attr-defined]
            raise PylorusError(f"{self.path}: became shorter while it was read. Try again.")
        self.digest.update(view)
        if memory.dtype == torch.bool and bytes(view).strip(b"\0\1"):
            raise PylorusError(f"{self.path}: {name[:100]}: found other bytes than 0 and 1, expected true and false.")

    def _verify_digest(self) -> None:
        _compare_digests(self.path, self.digest.hexdigest(), self.expected_digest)


def parse_json(content: bytes, *, where: str) -> object:
    """Parse JSON in UTF-8.

    Args:
        content: All bytes of the file.
        where: Name of the file in error messages.

    Raises:
        PylorusError: If the content is not JSON in UTF-8, has duplicate keys, NaN or infinity, numbers or texts that
            nothing else can hold, or is nested too deeply; names the entry.
    """
    try:
        values = json.loads(
            content.decode("utf-8"), object_pairs_hook=_check_unique_names, parse_constant=_raise_not_finite
        )
    except RecursionError:
        raise PylorusError(f"{where}: the JSON is nested too deeply to be read.") from None
    except ValueError as error:  # from UTF-8, JSON, numbers with thousands of digits, and the two functions below
        raise PylorusError(f"{where}: can't be read as JSON: {error}.") from error
    _check_values(values, f"{where}: ", "", MAX_DEPTH)
    return values


MAX_DEPTH, MAX_INTEGER, MAX_TEXT_LENGTH = 16, 2**63, 10_000
"""How deep JSON may be nested, how large whole numbers are, and how many characters a text has."""


def _check_values(values: object, where: str, path: str, levels: int) -> None:
    """Reject values that can't be printed, stored or computed with, whatever they mean."""
    if isinstance(values, dict | list):
        if not levels:
            raise PylorusError(f"{where}the JSON is nested more than {MAX_DEPTH} levels deep.")
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            if isinstance(name, str):
                inner = f"{path}{'.' if path else ''}{name[:100].encode('unicode_escape').decode()}"
                _check_text(name, f'{where}the name "{inner}"')
            else:
                inner = f"{path}[{name}]"
            _check_values(value, where, inner, levels - 1)
    elif isinstance(values, str):
        _check_text(values, f"{where}{path or 'the text'}")
    elif isinstance(values, int | float) and not -MAX_INTEGER < values < MAX_INTEGER:
        raise PylorusError(f"{where}{path or 'it'}: found {str(values)[:40]}, expected a number of at most 64 bits.")


def _check_text(text: str, where: str) -> None:
    if len(text) > MAX_TEXT_LENGTH:
        raise PylorusError(f"{where}: has {len(text):,} characters, expected {MAX_TEXT_LENGTH:,} at most.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PylorusError(f"{where}: contains half a character (a lone surrogate), which is not Unicode.")


def _check_unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("it contains the same name twice")
    return values


def _raise_not_finite(constant: str) -> object:
    raise ValueError(f"{constant} is not a finite number")


def parse_tensor_header(content: bytes, *, tensor_bytes: int) -> dict[str, TensorEntry]:
    """Parse and check the header of a safetensors file.

    Args:
        content: The JSON of the header.
        tensor_bytes: How many bytes follow it.

    Returns:
        The tensors in the order of their bytes, which follow each other without gaps.

    Raises:
        PylorusError: If it is not such a header; names the tensor.
    """
    header = parse_json(content, where="its header")
    if not isinstance(header, dict):
        raise PylorusError("its header is not an object with names and values.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise PylorusError("__metadata__ in its header is not an object of texts.")
    if not 1 <= len(header) <= MAX_TENSORS:
        raise PylorusError(f"it holds {len(header):,} tensors, expected 1 to {MAX_TENSORS:,}.")
    entries: list[tuple[int, int, str, TensorEntry]] = []
    for name, values in header.items():
        start, end, entry = _parse_tensor_entry(name, values)
        entries.append((start, end, name, entry))
    entries.sort(key=lambda each: each[:2])
    position = 0
    for start, end, name, entry in entries:
        if start != position or end - start != entry.size:
            raise PylorusError(
                f"the tensor {name[:100]!r} is at bytes {start:,} to {end:,}, expected {position:,} to "
                f"{position + entry.size:,}: {entry}, behind the tensor before it."
            )
        position = end
    if position != tensor_bytes:
        raise PylorusError(f"its tensors end at byte {position:,}, but {tensor_bytes:,} bytes follow its header.")
    return {name: entry for _, _, name, entry in entries}


def _parse_tensor_entry(name: str, values: object) -> tuple[int, int, TensorEntry]:
    """Return the first byte, the byte after the last, and the type and shape of a tensor."""
    if not name.isprintable() or not isinstance(values, dict) or set(values) != {"dtype", "shape", "data_offsets"}:
        raise PylorusError(f"the tensor {name[:100]!r} does not have dtype, shape and data_offsets alone.")
    dtype, shape, offsets = (values[key] for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise PylorusError(
            f"the tensor {name[:100]!r} has the dtype {str(dtype)[:40]!r}, expected one of {', '.join(DTYPES)}."
        )
    if not _is_list_of_counts(shape) or len(shape) > MAX_DIMENSIONS or not _is_list_of_counts(offsets):
        raise PylorusError(f"the shape or the data_offsets of the tensor {name[:100]!r} are no lists of whole numbers.")
    if len(offsets) != 2:
        raise PylorusError(f"the tensor {name[:100]!r} has {len(offsets)} data_offsets, expected 2.")
    return offsets[0], offsets[1], TensorEntry(DTYPES[dtype], tuple(shape))


def _is_list_of_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


@dataclass(frozen=True, eq=False)
class VerifiedFolder:
    """The files of a bundle or an export.

    Attributes:
        folder: The folder.
        hashes: The SHA-256 of each file, by name.
        contents: The whole content of SHA256SUMS and of each file without tensors that is used, by name.
        tensor_files: Safetensors files whose header was read, by name.
    """

    folder: Path
    hashes: Mapping[str, str]
    contents: Mapping[str, bytes]
    tensor_files: Mapping[str, TensorFile]


@contextmanager
def open_verified_folder(
    folder: Path, files: Sequence[str] = FILES, *, check_manifest: ManifestCheck | None = None
) -> Iterator[VerifiedFolder]:
    """Open the files of a bundle, and verify all of them but the tensors against SHA256SUMS.

    Tensors are verified when they are read, by `TensorFile.read_into`.

    Args:
        folder: Folder of a bundle or an export.
        files: Names of the files that it must contain.
        check_manifest: A further check of SHA256SUMS, before any other file is opened.

    Raises:
        PylorusError: If the folder is not a bundle, or if a file is missing, changed, or not a regular file in this
            folder.
    """
    if not folder.is_dir():
        kind = "a file, which is never loaded because it could be a pickle" if folder.is_file() else "nothing"
        raise PylorusError(f"{folder}: found {kind}, expected a bundle: the folder `model` of a run.")
    if (folder / "model" / SUMS).is_file():
        kind = "an ensemble" if (folder / ENSEMBLE_RECORD).is_file() else "a run"
        raise PylorusError(f"{folder}: this is {kind}; its bundle is {folder / 'model'}.")
    manifest = read_regular_file(folder / SUMS, limit=MAX_SUMS_BYTES)
    if check_manifest is not None:
        check_manifest(folder, manifest)
    hashes = parse_checksums(folder, manifest, files)
    contents, tensor_files = {SUMS: manifest}, {}
    with ExitStack() as stack:
        for name, digest in hashes.items():
            path = folder / name
            if name in (WEIGHTS, UNLIKE, LOOKS, FINGERPRINTS) and WEIGHTS in files:
                file = stack.enter_context(open_regular_file(path))
                tensor_files[name] = TensorFile(path, digest, file)
                continue
            content = read_regular_file(path, limit=LIMITS.get(name, MAX_FILE_BYTES))
            _compare_digests(path, hashlib.sha256(content).hexdigest(), digest)
            if name in files:
                contents[name] = content
        for tensor_file in tensor_files.values():
            tensor_file.read_header()
        yield VerifiedFolder(folder, hashes, contents, tensor_files)


LIMITS = {DESCRIPTION: MAX_DESCRIPTION_BYTES, MODEL: MAX_ONNX_BYTES}
"""The most bytes that are read of a file, where that is not `MAX_FILE_BYTES`."""


def is_export(folder: Path) -> bool:
    """Return whether a folder holds an export rather than a bundle."""
    return (folder / MODEL).is_file()


def parse_checksums(folder: Path, content: bytes, files: Sequence[str]) -> dict[str, str]:
    """Parse the content of SHA256SUMS.

    Args:
        folder: The folder that holds it, for error messages.
        content: Its bytes.
        files: Names of the files that it must list.

    Returns:
        The SHA-256 of each file, by name.

    Raises:
        PylorusError: If a line is malformed, or a file is missing.
    """
    path = folder / SUMS
    hashes: dict[str, str] = {}
    for line in content.decode("utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or set(digest) - set("0123456789abcdef") or name in hashes:
            raise PylorusError(
                f"{path}: found {line[:80]!r}, expected a SHA-256, two spaces and a file name on each line."
            )
        if name in ("", ".", "..", SUMS, SIGNATURE) or set(name) & set("/\\:") or not name.isprintable():
            raise PylorusError(f"{path}: found the name {name[:80]!r}, expected the name of a file in this folder.")
        hashes[name] = digest
    missing = [name for name in files if name not in hashes]
    if missing and MODEL in hashes:
        raise PylorusError(
            f"{folder}: this is an export, but this command needs the bundle that it was made from: the folder `model` "
            "of a run or an ensemble."
        )
    if missing:
        raise PylorusError(f"{path}: does not list {missing[0]}. Copy the bundle again from its original location.")
    return hashes


def read_regular_file(path: Path, *, limit: int) -> bytes:
    """Return the content of a regular file, without following links or waiting for a pipe.

    Raises:
        PylorusError: If there is no such file, it is of another kind, or it has more than `limit` bytes.
    """
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= limit else b""
    if size > limit or len(content) > limit:
        raise PylorusError(f"{path}: has {max(size, len(content)):,} bytes, expected {limit:,} at most.")
    return content


@contextmanager
def open_regular_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, and reject anything but a regular file in this folder: a link could lead anywhere.

    Raises:
        PylorusError: If there is no such file, or it is of another kind.
    """
    # Without O_NONBLOCK, opening a pipe would wait for its writer. Windows has neither flag.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        _check_mode(path, path.lstat().st_mode)
        descriptor = os.open(path, flags)
    except OSError as error:
        raise PylorusError(f"{path}: {error.strerror or error}; expected a file of a bundle.") from error
    with os.fdopen(descriptor, "rb") as file:
        _check_mode(path, os.fstat(descriptor).st_mode)
        yield file


def _check_mode(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "something that is not a regular file"
        raise PylorusError(f"{path}: found {kind}, expected a file: a bundle contains its files itself.")


def _compare_digests(path: Path, digest: str, expected: str) -> None:
    if digest != expected:
        raise PylorusError(
            f"{path}: its SHA-256 is {digest[:12]}…, expected {expected[:12]}… ({SUMS}): the file was "
            "changed or damaged. Copy the bundle again from its original location."
        )
