"""The inputs of a prediction: images in files, folders, patterns and videos, one after another, never all at once."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from pylorus.data.image import RGB, SUFFIXES
from pylorus.data.unreadable import UnreadableImageError, format_path
from pylorus.deploy.video import VIDEOS, decode_frames
from pylorus.errors import PylorusError

SORTED = 10_000
"""A folder with more files is read in the order of the file system: sorting would need all names in memory."""


@dataclass(frozen=True, eq=False)
class Item:
    """One image to predict.

    Attributes:
        path: Path of its file, as tables and messages write it.
        source: The file, or a decoded frame of a video.
        label: Index of its class according to the name of its folder; None if no folder is named after a class.
        second: Time of the frame in its video, in seconds; None for an image file.
        error: Why there is no image; empty if there may be one.
    """

    path: str
    source: Path | RGB
    label: int | None = None
    second: float | None = None
    error: str = ""

    @property
    def key(self) -> str:
        """Identifier of the image within a prediction."""
        return build_item_key(self.path, self.second)


def build_item_key(path: str, second: float | None) -> str:
    """Return the identifier of an image within a prediction: its path and, for a frame, its second."""
    return path if second is None else f"{path}\n{second:.3f}"


@dataclass(frozen=True)
class Sources:
    """Files, folders and patterns, and how they are read.

    Attributes:
        inputs: The inputs as the user gave them.
        classes: Names of folders for each class, in the order of the labels; a class may have several.
        frames_every: Seconds between two frames of a video; None to accept no videos.
    """

    inputs: tuple[str, ...]
    classes: Sequence[tuple[str, ...]]
    frames_every: float | None

    def check_inputs(self) -> None:
        """Check that all inputs exist, before anything is computed.

        Raises:
            PylorusError: If an input does not exist or can't be used; names the input.
        """
        if self.frames_every is not None and not 0 < self.frames_every < float("inf"):
            raise PylorusError(f"--frames-every: found {self.frames_every:g}, expected a number of seconds above 0.")
        for user_input in self.inputs:
            if not Path(user_input).exists() and next(_find_matches(user_input), None) is None:
                raise PylorusError(
                    f"{format_path(user_input)}: found no such file or folder, and no file that matches it as a pattern."
                )
            if self.frames_every is None and Path(user_input).suffix.lower() in VIDEOS and Path(user_input).is_file():
                raise PylorusError(
                    f"{format_path(user_input)}: this is a video. Add --frames-every SECONDS to choose the frames to predict."
                )

    def iter_items(self) -> Iterator[Item]:
        """Iterate over all images in the order of the inputs; small folders are sorted (see `SORTED`)."""
        for user_input in self.inputs:
            path = Path(user_input)
            if path.is_dir():
                yield from self._iter_folder(path, path)
            elif path.exists():
                yield from self._iter_file(path, None)
            else:
                for match in _sort_if_few(_find_matches(user_input)):
                    yield from self._iter_folder(match, match) if match.is_dir() else self._iter_file(match, None)

    def _iter_folder(self, folder: Path, root: Path) -> Iterator[Item]:
        try:
            with os.scandir(folder) as entries:
                named = (Path(entry.path) for entry in entries if not entry.name.startswith("."))
                for path in _sort_if_few(named):
                    # A link to a folder may be circular and is not followed; a link to a file is read like the file.
                    if path.is_dir() and not path.is_symlink():
                        yield from self._iter_folder(path, root)
                    elif path.suffix.lower() in SUFFIXES or (self.frames_every and path.suffix.lower() in VIDEOS):
                        yield from self._iter_file(path, root)
        except OSError as error:
            yield Item(format_path(folder), folder, error=error.strerror or str(error))

    def _iter_file(self, path: Path, root: Path | None) -> Iterator[Item]:
        name, label = format_path(path), None if root is None else self._find_label(path.relative_to(root))
        if path.suffix.lower() not in VIDEOS or self.frames_every is None:
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
                if part in names:
                    return label
        return None


def _find_matches(pattern: str) -> Iterator[Path]:
    # Path.glob does not accept absolute patterns.
    return map(Path, glob.iglob(pattern, recursive=True))  # noqa: PTH207


def _sort_if_few(paths: Iterable[Path]) -> Iterator[Path]:
    remaining = iter(paths)
    first = list(islice(remaining, SORTED))
    next_path = next(remaining, None)
    if next_path is None:
        yield from sorted(first)
    else:
        yield from chain(first, [next_path], remaining)
