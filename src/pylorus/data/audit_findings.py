"""What an audit works on and reports: the image set, and findings with their severity, remedy and files.

The findings that need no facts of the files, about their names, are made here too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.core.errors import find_look_alikes, format_path
from pylorus.core.formatting import format_count
from pylorus.data.files import Root
from pylorus.data.walk import IgnoredFile

Severity: TypeAlias = Literal["leak", "error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("leak", "error", "warning", "note")
"""The most severe first. A leak invalidates the test, an error makes training wrong or impossible."""
BLOCKING: tuple[Severity, ...] = ("leak", "error")
"""An image set with one of these is not fit for training."""


@dataclass(frozen=True)
class Thresholds:
    """Limits of the audit. Detection rates and false positives were measured: see `docs/audit.md`.

    Attributes:
        distance: Maximum Hamming distance of the 64-bit hashes of near copies, at most 7.
        many: Number of images above which rotated and mirrored copies are searched for within `turned_distance` bits:
            they take seven times as many comparisons, and comparisons grow faster than the number of images.
        turned_distance: Maximum Hamming distance in bits; with 3 instead of 7, at least 97 % were still found.
        likeness: Least correlation of the fine structure of near copies' thumbnails, in [-1, 1]. Images of different
            subjects reached 0.83; copies that were re-encoded, downscaled, rotated or mirrored 0.96 and more.
        contrast: Standard deviation of grey levels below which an image is blank and not compared.
        crowd: Maximum number of images that are compared per hash key.
        shortest: Shorter side in pixels below which an image is tiny.
        longest: Longer side in pixels above which an image is very large.
        aspect: Ratio of the longer to the shorter side above which the proportions are odd.
        outlier: Robust standard deviations below the set's median from which an image is blurred or dark (Iglewicz
            and Hoaglin 1993 recommend 3.5).
        black: Mean grey level below which an image is dark, regardless of the others.
        least_for_outliers: Images that a set needs for outliers to be detected.
        imbalance: Ratio of the largest to the smallest class from which imbalance is reported.
        border: Fraction of the frame from which dark edges are a black border.
        letters: Number of letter-like shapes that indicate text.
        shortcut: Difference between classes in the proportion of images with border or text from which it is reported.
        least_for_shortcut: Images that a class needs for this comparison.
    """

    distance: int = 7
    many: int = 200_000
    turned_distance: int = 3
    likeness: float = 0.9
    contrast: float = 4.0
    crowd: int = 256
    shortest: int = 64
    longest: int = 8000
    aspect: float = 3.0
    outlier: float = 3.5
    black: float = 16.0
    least_for_outliers: int = 30
    imbalance: float = 3.0
    border: float = 0.1
    letters: int = 4
    shortcut: float = 0.3
    least_for_shortcut: int = 10


@dataclass(frozen=True)
class Item:
    """One occurrence of a finding.

    Attributes:
        files: Indices of the files in the image set's table: one file, or several that belong together.
        detail: What was found there, without names of files or patients; may be empty.
        group: The patient concerned; empty if there is none.
        content: Bytes of the file quoted in an error message, not to be shared; may be empty.
    """

    files: tuple[int, ...]
    detail: str = ""
    group: str = ""
    content: str = ""


@dataclass(frozen=True)
class Finding:
    """One kind of problem.

    Attributes:
        code: Machine-readable name, such as `near-copy-across-splits`.
        severity: One of SEVERITIES.
        sentence: What is wrong, with a count, without names of files or patients.
        remedy: How to fix it.
        items: Occurrences, the most severe first; empty if it concerns the set as a whole.
    """

    code: str
    severity: Severity
    sentence: str
    remedy: str
    items: tuple[Item, ...] = ()

    @property
    def is_blocking(self) -> bool:
        """Whether it must be fixed before training."""
        return self.severity in BLOCKING


def sort_by_severity(findings: list[Finding]) -> tuple[Finding, ...]:
    """Sort findings by severity, the most severe first; the order is stable."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))


@dataclass(frozen=True)
class ImageSet:
    """Files of an image set.

    Attributes:
        root: What the paths are relative to.
        table: One row per file: path, class, split (train, val, test or empty), group (empty if none was found);
            its index counts from 0.
        grouped: Whether groups are patients; else every image is its own group.
        ignored: Files and folders below the root that are not used.
    """

    root: Root
    table: pd.DataFrame
    grouped: bool
    ignored: Sequence[IgnoredFile] = ()

    @cached_property
    def has_split(self) -> bool:
        """Whether folders or a manifest define a split."""
        return bool((self.table["split"] != "").any())

    @cached_property
    def _columns(self) -> dict[str, NDArray[np.object_]]:
        # Rows of a DataFrame, selected one after another, would take most of an audit's time.
        return {name: self.table[name].to_numpy(dtype=object) for name in ("path", "class", "split", "group")}

    def get_values(self, name: str, files: Sequence[int]) -> list[str]:
        """Return the path, class, split or group of some files."""
        column = self._columns[name]
        return [column[index] for index in files]


def check_class_names(images: ImageSet) -> list[Finding]:
    """Return a finding about names of classes that only look alike."""
    alike = find_look_alikes(images.table["class"])
    if alike is None:
        return []
    return [
        Finding(
            "classes-look-alike",
            "error",
            f'The classes "{alike[0]}" and "{alike[1]}" differ only in capitals, spaces or the way in which they are '
            "written.",
            "If they are one class, give all images one spelling; else choose names that differ.",
        )
    ]


def report_ignored_files(images: ImageSet) -> list[Finding]:
    """Return a finding about files beside the images that may be images too; its cases have the path as content."""
    ignored = [each for each in images.ignored if each.may_be_image]
    if not ignored:
        return []
    count = format_count(len(ignored), "file or folder", "files or folders")
    return [
        Finding(
            "ignored-images",
            "warning",
            f"{count} that may be {'an image is' if len(ignored) == 1 else 'images are'} not used.",
            "See the reason of each. Save images of other formats as JPEG or PNG, and rename or remove the others.",
            tuple(Item((), each.reason, content=format_path(each.path)) for each in ignored),
        )
    ]
