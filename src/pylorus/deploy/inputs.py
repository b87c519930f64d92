"""Write a table that does not fit in memory: in parts beside the output file, merged once it is complete."""

import csv
import dataclasses
import glob
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pylorus.core.errors import (
    PylorusError,
    UnreadableImageError,
    check_table_name,
    fold_name,
    format_path,
    normalize_name,
)
from pylorus.core.formatting import defuse_formula, defuse_formulas, format_count
from pylorus.core.io import lock_folder, read_json, write_atomically, write_json
from pylorus.core.limited_process import iterate_limited, restart_clock
from pylorus.data.decode import MAX_PIXELS
from pylorus.data.files import RGB, open_local_file
from pylorus.data.walk import MAX_SORTED_FILES, PROBLEM, IgnoredFile, IgnoredFiles, log_ignored, walk_images

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".mpg", ".mpeg", ".wmv", ".webm")


def decode_frames(path: Path, *, every: float) -> Iterator[tuple[float, RGB]]:
    """Decode the first frame at or after 0, `every`, 2 × `every`, … seconds.

    Args:
        path: The video file.
        every: Seconds between two frames, > 0.

    Yields:
        The time of the frame in seconds, and the frame.

    Raises:
        UnreadableImageError: If the file is not a video, has frames that are too large, or contains no frames.
    """
    try:
        open_local_file(str(path)).close()  # OpenCV would wait for whoever writes to a pipe
    except OSError as error:
        raise UnreadableImageError(error.strerror or str(error)) from error
    yield from iterate_limited(_decode_frames_here, path, every, MAX_PIXELS)


def _decode_frames_here(path: Path, every: float, max_pixels: int) -> Iterator[tuple[float, RGB]]:
    """Decode frames in this process; see `decode_frames`. Its limits hold for one frame after the other."""
    # A file may be a playlist of addresses: only local files may be opened.
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "protocol_whitelist;file")
    video = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG)
    try:
        if not video.isOpened():
            raise UnreadableImageError("not a video that OpenCV can read")
        if video.get(cv2.CAP_PROP_FRAME_WIDTH) * video.get(cv2.CAP_PROP_FRAME_HEIGHT) > max_pixels:
            raise UnreadableImageError(f"its frames exceed the limit of {max_pixels:,} pixels")
        next_index, count = 0, 0
        while video.grab():
            restart_clock()
            second = video.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if second < next_index * every - 1e-6:
                continue
            is_decoded, frame = video.retrieve()
            if is_decoded:
                count += 1
                yield round(second, 3), np.ascontiguousarray(frame[:, :, ::-1])
            next_index = max(next_index, int(second / every + 1e-6)) + 1
        if not count:
            raise UnreadableImageError("a video without frames")
    finally:
        video.release()


@dataclass(frozen=True, eq=False)
class Item:
    """One image to predict.

    Attributes:
        path: Path of its file, as tables and messages write it.
        source: The file, or a decoded frame of a video.
        label: Index of its class according to the name of its folder; None if no folder is named after a class.
        second: Time of the frame in its video, in seconds; None for an image file.
        error: Why there is no image; empty if there may be one.
        acquired: Day on which the image of a DICOM file was acquired, known once it was read; empty for others.
    """

    path: str
    source: Path | RGB
    label: int | None = None
    second: float | None = None
    error: str = ""
    acquired: str = ""

    @property
    def key(self) -> str:
        """Identifier of the image within a prediction."""
        return build_item_key(self.path, self.second)


def build_item_key(path: str, second: float | None) -> str:
    """Return the identifier of an image within a prediction: its path and, for a frame, its second."""
    return path if second is None else f"{path}\n{second:.3f}"


@dataclass(frozen=True)
class Sources:
    """Files, folders and patterns, and how they are read; a file in several folders or patterns is read once.

    Attributes:
        inputs: The inputs as the user gave them; or decoded images, uint8 RGB of shape (height, width, 3).
        classes: Names of folders for each class, in the order of the labels; a class may have several.
        frames_every: Seconds between two frames of a video; None to accept no videos.
        on_ignored: Called with each file in a folder that is not used; its path begins with that of the folder. None:
            those that may be images are logged.
        evaluate: Whether a folder that only looks like that of a class is an error; otherwise it is noted.
    """

    inputs: tuple[str | RGB, ...]
    classes: Sequence[tuple[str, ...]]
    frames_every: float | None
    on_ignored: Callable[[IgnoredFile], None] | None = None
    evaluate: bool = False
    _reported: set[str] = field(default_factory=set)

    def check_inputs(self) -> None:
        """Check that all inputs exist, before anything is computed.

        Raises:
            PylorusError: If an input does not exist or can't be used; names the input.
        """
        if self.frames_every is not None and not 0 < self.frames_every < float("inf"):
            raise PylorusError(f"--frames-every: found {self.frames_every:g}, expected a number of seconds above 0.")
        for user_input in self._list_paths():
            if not user_input:
                raise PylorusError('found an empty path among the inputs. For the current folder, type ".".')
            if not Path(user_input).exists() and next(_find_matches(user_input), None) is None:
                raise PylorusError(
                    f"{format_path(user_input)}: found no such file or folder, and no file that matches it as a "
                    f"pattern."
                )
            if (
                self.frames_every is None
                and Path(user_input).suffix.lower() in VIDEO_SUFFIXES
                and Path(user_input).is_file()
            ):
                raise PylorusError(
                    f"{format_path(user_input)}: this is a video. Add --frames-every SECONDS to choose the frames to "
                    f"predict."
                )

    def iter_items(self) -> Iterator[Item]:
        """Iterate over all images in the order of the inputs; small folders are sorted (see `MAX_SORTED_FILES`).

        An input inside another one comes after it, because the outer folder knows more about the classes.
        """
        for number, image in enumerate(self.inputs):
            if not isinstance(image, str):
                yield Item(f"image {number}", image)
        paths = self._list_paths()
        may_repeat = len(paths) > 1 or not all(Path(path).exists() for path in paths)
        resolve = lru_cache(maxsize=1024)(os.path.realpath)
        seen = set[int]()
        for user_input in _sort_outer_first(paths):
            is_file = Path(user_input).is_file()
            for path, root, error in self._iter_files(user_input):
                if may_repeat:
                    key = _hash_key(f"{resolve(path.parent)}/{path.name}")
                    if key in seen:
                        continue
                    if not is_file:  # files that are listed one by one have a row for each time they are listed
                        seen.add(key)
                if error:
                    yield Item(format_path(path), path, error=error)
                else:
                    yield from self._iter_file(path, root)

    def iter_labelled_paths(self) -> Iterator[str]:
        """Iterate over the files in folders that are named after classes, as tables write them; no file is opened.

        Raises:
            PylorusError: If an evaluation is required, and the name of a folder only looks like that of a class.
        """
        quiet = dataclasses.replace(self, on_ignored=lambda _: None)
        for user_input in self._list_paths():
            for path, root, error in quiet._iter_files(user_input):
                if root is None or error:
                    continue
                if self._find_label(path.relative_to(root)) is not None:
                    yield format_path(path)
                elif self.evaluate:
                    self._report_look_alikes(path.relative_to(root).parent)

    def _list_paths(self) -> list[str]:
        return [user_input for user_input in self.inputs if isinstance(user_input, str)]

    def _iter_files(self, user_input: str) -> Iterator[tuple[Path, Path | None, str]]:
        """Iterate over the files of an input: path, the folder that was given, and why it can't be read, if known."""
        path = Path(user_input)
        for match in [path] if path.exists() else _sort_if_few(_find_matches(user_input)):
            if match.is_dir():
                yield from self._iter_folder(match)
            else:
                yield match, None, ""

    def _iter_folder(self, folder: Path) -> Iterator[tuple[Path, Path, str]]:
        problems: list[tuple[Path, Path, str]] = []
        collected: list[IgnoredFile] = []

        def receive(ignored: IgnoredFile) -> None:
            if ignored.reason.startswith(PROBLEM):
                problems.append((folder / ignored.path, folder, ignored.reason))
            elif self.on_ignored is not None:
                self.on_ignored(dataclasses.replace(ignored, path=f"{folder}/{ignored.path}"))
            elif ignored.may_be_image:
                collected.append(ignored)

        videos = VIDEO_SUFFIXES if self.frames_every else ()
        try:
            for path in walk_images(str(folder), IgnoredFiles(receive), suffixes=videos):
                yield from problems
                problems.clear()
                yield folder / path, folder, ""
        except OSError as error:
            yield folder, folder, error.strerror or str(error)
        yield from problems
        log_ignored(collected, listed_in="")

    def _iter_file(self, path: Path, root: Path | None) -> Iterator[Item]:
        name, label = format_path(path), None
        if root is not None:
            label = self._find_label(path.relative_to(root))
            if label is None:
                self._report_look_alikes(path.relative_to(root).parent)
        if path.suffix.lower() not in VIDEO_SUFFIXES or self.frames_every is None:
            yield Item(name, path, label)
            return
        try:
            for second, frame in decode_frames(path, every=self.frames_every):
                yield Item(name, frame, label, second)
        except UnreadableImageError as error:
            yield Item(name, path, label, error=str(error))

    def _find_label(self, path: Path) -> int | None:
        """Return the class of the nearest folder that is named after one."""
        for part in reversed(path.parts[:-1]):
            for label, names in enumerate(self.classes):
                if normalize_name(part) in map(normalize_name, names):
                    return label
        return None

    def _report_look_alikes(self, folder: Path) -> None:
        """Report folders whose names only look like that of a class: their images have no label.

        Raises:
            PylorusError: If an evaluation is required, so that labels are.
        """
        for part in set(folder.parts) - self._reported:
            self._reported.add(part)
            alike = [name for names in self.classes for name in names if fold_name(name) == fold_name(part)]
            if alike:
                text = f'a folder is called "{format_path(part)}", which only looks like the class "{alike[0]}"'
                if self.evaluate:
                    raise PylorusError(f"--evaluate: {text}. Rename the folder.")
                print(f"note: {text}: its images have no label. Rename it to evaluate them.", file=sys.stderr)


def _sort_outer_first(paths: Sequence[str]) -> list[str]:
    """Return the paths with those inside another one last, otherwise in their order."""
    resolved = [Path(os.path.realpath(path)) for path in paths]
    all_resolved = set(resolved)
    depths = [sum(folder in all_resolved for folder in path.parents) for path in resolved]
    return [paths[index] for index in sorted(range(len(paths)), key=depths.__getitem__)]


def _find_matches(pattern: str) -> Iterator[Path]:
    # Path.glob does not accept absolute patterns.
    return map(Path, glob.iglob(pattern, recursive=True))  # noqa: PTH207


def _sort_if_few(paths: Iterable[Path]) -> Iterator[Path]:
    remaining = iter(paths)
    first = list(islice(remaining, MAX_SORTED_FILES + 1))
    yield from chain(first, remaining) if len(first) > MAX_SORTED_FILES else sorted(first)


RESUME_HINT = "finished rows are saved: run the same command to continue"
RECORD_SUFFIX = ".about.json"
IGNORED_SUFFIX = ".ignored.csv"


class CompactKeySet:
    """A set of image keys that stores eight bytes per key: a million keys take 8 MB.

    Args:
        keys: The keys of the images; see `pylorus.deploy.inputs.build_item_key`.
    """

    def __init__(self, keys: Iterator[str]) -> None:
        self._digests = np.sort(np.fromiter((_hash_key(key) for key in keys), dtype=np.uint64))

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, key: str) -> bool:
        digest = np.uint64(_hash_key(key))
        position = int(np.searchsorted(self._digests, digest))
        return position < len(self._digests) and bool(self._digests[position] == digest)


class ResumableTable:
    """The rows of an output file while they are being computed; an interrupted output can be resumed.

    Args:
        output: The final file: .csv, .parquet or .json.
        request: The options that determine the rows, as plain values.
        also: The options that are only applied to the complete table.

    Raises:
        PylorusError: If the file has another suffix.
    """

    def __init__(self, output: Path, request: Mapping[str, object], *, also: Mapping[str, object]) -> None:
        check_table_name(output, argument="--output")
        self.output = output
        self._of_rows = json.loads(json.dumps(request))
        self.request = {**self._of_rows, **json.loads(json.dumps(also))}
        self.folder = output.with_name(f".{output.name}.parts")
        self.about = output.with_name(output.name + RECORD_SUFFIX)
        self.ignored = output.with_name(output.name + IGNORED_SUFFIX)
        self._written, self._complete = 0, False

    def load_record(self) -> dict[str, object] | None:
        """Return the record of a complete output, or None if the output is not complete.

        Raises:
            PylorusError: If the output file exists but was written for another request.
        """
        if self.output.is_file() and not self.folder.is_dir():
            record = read_json(self.about) or {}
            self._check_same_request(record.get("request"), self.request, self.output)
            return dict(record)
        return None

    @contextmanager
    def lock_parts(self) -> Iterator[None]:
        """Lock the parts for this process, so that no other process writes them.

        Raises:
            PylorusError: If another process has locked them, or if they belong to another request.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        message = f"{self.output}: another process is writing this file. Wait for it, or choose another --output."
        with lock_folder(self.folder, lambda: message):
            request = self.folder / "request.json"
            earlier = read_json(request)
            if earlier is None:
                write_json(request, self._of_rows)
            else:
                self._check_same_request(earlier, self._of_rows, self.folder)
            for leftover in self.folder.glob(".part-*"):
                leftover.unlink()
            self._written = len(self.list_parts())
            try:
                yield
            finally:
                if self._complete or not self.list_parts():
                    shutil.rmtree(self.folder)

    @contextmanager
    def list_ignored(self, sources: Sources) -> Iterator[Sources]:
        """Write the files that are not used beside the parts while the sources are read, each time from the start."""
        with (self.folder / "ignored.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("path", "reason", "may_be_image"))

            def write(ignored: IgnoredFile) -> None:
                row = format_path(ignored.path), ignored.reason, "yes" if ignored.may_be_image else "no"
                writer.writerow(map(defuse_formula, row))

            yield dataclasses.replace(sources, on_ignored=write)

    def _move_ignored(self) -> dict[str, int]:
        """Put the list of files that are not used beside the output, and count them."""
        path = self.folder / "ignored.csv"
        self.ignored.unlink(missing_ok=True)
        if not path.is_file():
            return {}
        with path.open(encoding="utf-8", newline="") as file:
            counts = Counter(row[2] for row in csv.reader(file))
        if not counts["yes"] + counts["no"]:
            return {}
        path.replace(self.ignored)
        return {"ignored": counts["yes"] + counts["no"], "ignored_images": counts["yes"]}

    def list_parts(self) -> list[Path]:
        """Return the files of the parts, in order."""
        return sorted(self.folder.glob("part-*.parquet"))

    def discard_outdated_parts(self, columns: Sequence[str]) -> None:
        """Discard the parts if another version of Pylorus wrote them with other columns, and say so.

        Args:
            columns: The columns that parts have now.
        """
        schemas = [set(pq.read_schema(path).names) for path in self.list_parts()]
        differing = [name for name in columns if not all(name in names for names in schemas)]
        differing += sorted({name for names in schemas for name in names} - set(columns))
        if not differing:
            return
        print(
            f"note: {self.folder} has rows of another version of Pylorus, with other columns ({', '.join(differing)}): "
            "all images are predicted anew"
        )
        for path in self.list_parts():
            path.unlink()
        self._written = 0

    def iter_tables(self) -> Iterator[pd.DataFrame]:
        """Read the rows, part by part."""
        for path in self.list_parts():
            yield pd.read_parquet(path)

    def read_finished_keys(self) -> CompactKeySet:
        """Return the keys of the images that are already predicted."""
        return CompactKeySet(
            build_item_key(path, None if pd.isna(second) else float(second))
            for table in self.iter_tables()
            for path, second in zip(table["path"], table["second"], strict=True)
        )

    def add_part(self, table: pd.DataFrame) -> None:
        """Write a part atomically."""
        with write_atomically(self.folder / f"part-{self._written:08d}.parquet") as temporary:
            table.to_parquet(temporary, index=False)
        self._written += 1

    def merge_parts(self, record: Mapping[str, object], *, columns: Sequence[str]) -> dict[str, object]:
        """Merge the parts into the output file and return its record; they are deleted once it is written.

        Args:
            record: What to write to the .about.json beside the request.
            columns: The columns to write.
        """
        with write_atomically(self.output) as temporary:
            _WRITERS[self.output.suffix.lower()](temporary, (table[list(columns)] for table in self.iter_tables()))
        complete_record = {"request": self.request, **record, **self._move_ignored()}
        write_json(self.about, complete_record)
        self._complete = True
        return complete_record

    def read_first_error(self) -> str:
        """Return the first file of a complete table that can't be read, and why."""
        readers: dict[str, Callable[[Path], pd.DataFrame]]
        readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".json": pd.read_json}
        table = readers[self.output.suffix.lower()](self.output)
        first = table[table["error"].notna() & (table["error"] != "")].iloc[0]
        return f"{format_path(first['path'])}: {first['error']}"

    def _check_same_request(self, request: object, expected: dict[str, object], path: Path) -> None:
        if request != expected:
            existing = request if isinstance(request, dict) else {}
            every = dict.fromkeys((*expected, *existing))
            names = [name.removesuffix(" are") for name in every if existing.get(name) != expected.get(name)]
            differing = dict.fromkeys(names)  # "inputs" and "inputs are" differ together
            raise PylorusError(
                f"{path}: already exists, from another request (different: {', '.join(differing)}). "
                "Delete it, or choose another --output."
            )


def format_ignored(record: Mapping[str, Any], output: Path) -> list[str]:
    """Return the line of a summary about files in folders that are not used, if there are any."""
    if not record.get("ignored"):
        return []
    notable = record["ignored_images"]
    may_be = f", of which {notable:,} may be {'an image' if notable == 1 else 'images'}" if notable else ""
    verb = "is" if record["ignored"] == 1 else "are"
    count = format_count(record["ignored"], "other file or folder", "other files or folders")
    return [f"{count} {verb} not used{may_be} ({output}{IGNORED_SUFFIX} lists them with reasons)"]


def _write_csv(path: Path, tables: Iterator[pd.DataFrame]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        for number, table in enumerate(tables):
            rows = defuse_formulas(table)
            rows.to_csv(file, index=False, header=number == 0, float_format="%.9g", lineterminator="\n")


def _write_parquet(path: Path, tables: Iterator[pd.DataFrame]) -> None:
    writer = None
    try:
        for table in tables:
            rows = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
            writer = writer or pq.ParquetWriter(path, rows.schema)
            writer.write_table(rows.cast(writer.schema))
    finally:
        if writer is not None:
            writer.close()


def _write_json(path: Path, tables: Iterator[pd.DataFrame]) -> None:
    with path.open("w", encoding="utf-8") as file:
        separator = "[\n"
        for table in tables:
            for row in table.astype(object).where(table.notna(), None).to_dict("records"):
                file.write(separator + json.dumps(row, ensure_ascii=False, allow_nan=False))
                separator = ",\n"
        file.write("\n]\n" if separator == ",\n" else "[]\n")


_WRITERS = {".csv": _write_csv, ".parquet": _write_parquet, ".json": _write_json}


def _hash_key(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(key), digest_size=8).digest(), "big")
