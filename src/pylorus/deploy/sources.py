"""What is to be predicted: images in files, folders, patterns and videos, one after another, never all at once."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from pylorus.data.image import RGB, SUFFIXES
from pylorus.data.unreadable import UnreadableImageError, shown
from pylorus.deploy.video import VIDEOS, frames
from pylorus.errors import PylorusError

SORTED = 10_000
"""A folder of more files is taken as the disk gives it: to sort it, all its names would have to be held."""


@dataclass(frozen=True, eq=False)
class Item:
    """One image to predict.

    Attributes:
        path: Of its file, as tables and messages write it.
        source: The file, or a video's frame.
        label: Its class as the name of a folder says it; None where no folder does.
        second: Of the video at which the frame is shown; None for an image.
        error: Why there is no image; empty where there may be one.
    """

    path: str
    source: Path | RGB
    label: int | None = None
    second: float | None = None
    error: str = ""

    @property
    def key(self) -> str:
        """Tells it from all others of a prediction."""
        return key_of(self.path, self.second)


def key_of(path: str, second: float | None) -> str:
    """What tells an image from all others: its path, and for a frame its second."""
    return path if second is None else f"{path}\n{second:.3f}"


@dataclass(frozen=True)
class Sources:
    """Files, folders and patterns, and how they are read.

    Attributes:
        inputs: As its user gave them.
        classes: Names that a folder may have, in the order of the labels; each class may have several.
        frames_every: Seconds between two frames of a video; None: no videos.
    """

    inputs: tuple[str, ...]
    classes: Sequence[tuple[str, ...]]
    frames_every: float | None

    def check(self) -> None:
        """Refuses what is not there, before anything is computed.

        Raises:
            PylorusError: Names the input.
        """
        if self.frames_every is not None and not 0 < self.frames_every < float("inf"):
            raise PylorusError(f"--frames-every: found {self.frames_every:g}, expected seconds above 0.")
        for given in self.inputs:
            if not Path(given).exists() and next(_fitting(given), None) is None:
                raise PylorusError(
                    f"{shown(given)}: there is no such file or folder, and no file fits it as a pattern."
                )
            if self.frames_every is None and Path(given).suffix.lower() in VIDEOS and Path(given).is_file():
                raise PylorusError(f"{shown(given)}: is a video: say with --frames-every SECONDS which frames to take.")

    def items(self) -> Iterator[Item]:
        """All images in the order of the inputs; of a folder those with an image suffix, sorted where few."""
        for given in self.inputs:
            path = Path(given)
            if path.is_dir():
                yield from self._below(path, path)
            elif path.exists():
                yield from self._of_file(path, None)
            else:
                for found in _in_order(_fitting(given)):
                    yield from self._below(found, found) if found.is_dir() else self._of_file(found, None)

    def _below(self, folder: Path, root: Path) -> Iterator[Item]:
        try:
            with os.scandir(folder) as entries:
                named = (Path(entry.path) for entry in entries if not entry.name.startswith("."))
                for path in _in_order(named):
                    # A link to a folder may lead round in a circle; one to a file is read like the file.
                    if path.is_dir() and not path.is_symlink():
                        yield from self._below(path, root)
                    elif path.suffix.lower() in SUFFIXES or (self.frames_every and path.suffix.lower() in VIDEOS):
                        yield from self._of_file(path, root)
        except OSError as error:
            yield Item(shown(folder), folder, error=error.strerror or str(error))

    def _of_file(self, path: Path, root: Path | None) -> Iterator[Item]:
        name, label = shown(path), None if root is None else self._label(path.relative_to(root))
        if path.suffix.lower() not in VIDEOS or self.frames_every is None:
            yield Item(name, path, label)
            return
        try:
            for second, frame in frames(path, every=self.frames_every):
                yield Item(name, frame, label, second)
        except UnreadableImageError as error:
            yield Item(name, path, label, error=str(error))

    def _label(self, path: Path) -> int | None:
        """The class of the nearest folder that has the name of one."""
        for part in reversed(path.parts[:-1]):
            for label, names in enumerate(self.classes):
                if part in names:
                    return label
        return None


def _fitting(pattern: str) -> Iterator[Path]:
    # pathlib's own takes no absolute pattern.
    return map(Path, glob.iglob(pattern, recursive=True))  # noqa: PTH207


def _in_order(paths: Iterable[Path]) -> Iterator[Path]:
    remaining = iter(paths)
    first = list(islice(remaining, SORTED))
    following = next(remaining, None)
    if following is None:
        yield from sorted(first)
    else:
        yield from chain(first, [following], remaining)
