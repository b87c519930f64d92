"""What an audit works on and reports: the image set, findings with severity, remedy and files, and leaks of a split.

The findings that need no facts of the files, about their names, are made here too.
"""

import errno
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pylorus.core.errors import find_look_alikes, format_name_list, format_path, is_valid_name
from pylorus.core.formatting import format_count
from pylorus.data.catalog import NO_VALUE
from pylorus.data.files import Root, is_utf8
from pylorus.data.walk import IgnoredFile

Severity: TypeAlias = Literal["leak", "error", "warning", "note"]

SEVERITIES: tuple[Severity, ...] = ("leak", "error", "warning", "note")
"""The most severe first. A leak invalidates the test, an error makes training wrong or impossible."""
NO_SUCH_FILE = os.strerror(errno.ENOENT)
"""Why a file that does not exist can't be read."""
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
        neighbor: Least cosine of descriptors from which two images are aligned and compared, in [-1, 1].
        neighbors: Maximum number of images with which each is aligned and compared.
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
        repeated: Fraction of the frames of one size that have a text-like shape at one place, from which it is text.
        shortcut: Difference between classes in the proportion of images with border or text from which it is reported.
        least_for_shortcut: Images that a class needs for this comparison.
    """

    distance: int = 7
    many: int = 200_000
    turned_distance: int = 3
    likeness: float = 0.9
    neighbor: float = 0.85
    neighbors: int = 8
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
    repeated: float = 0.2
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
    def _columns(self) -> dict[str, list[str]]:
        # Rows of a DataFrame, selected one after another, would take most of an audit's time.
        return {name: self.table[name].to_numpy(dtype=object).tolist() for name in ("path", "class", "split", "group")}

    def get_values(self, name: str, files: Sequence[int]) -> list[str]:
        """Return the path, class, split or group of some files."""
        column = self._columns[name]
        return [column[index] for index in files]


def check_class_names(images: ImageSet) -> list[Finding]:
    """Return findings about classes that training would refuse: a single one, and unsuitable names."""
    names = sorted(set(images.table["class"]))
    findings = []
    if len(names) == 1:
        findings.append(
            Finding(
                "single-class",
                "error",
                f'All images are of one class, "{names[0]}"; training needs at least two.',
                "Name the folder that directly contains the class folders, or add images of another class.",
            )
        )
    alike = find_look_alikes(names)
    if alike is not None:
        findings.append(
            Finding(
                "classes-look-alike",
                "error",
                f'The classes "{alike[0]}" and "{alike[1]}" differ only in capitals, spaces or the way in which they '
                "are written.",
                "If they are one class, give all images one spelling; else choose names that differ.",
            )
        )
    findings += [
        Finding(
            "class-name",
            "error",
            f"The class {name!r} has a name that is too long, contains a character that can't be seen, or stands for a "
            "missing value.",
            "Rename the class, or leave it out of training with data.exclude.",
        )
        for name in names
        if not is_valid_name(name) or name.lower() in NO_VALUE
    ]
    return findings


def check_file_names(images: ImageSet) -> list[Finding]:
    """Return a finding about paths that are not UTF-8, which training would refuse."""
    wrong = [index for index, path in enumerate(images.table["path"]) if not is_utf8(path)]
    if not wrong:
        return []
    return [
        Finding(
            "name-not-utf-8",
            "error",
            "The name of 1 file is not UTF-8; training refuses it."
            if len(wrong) == 1
            else f"The names of {len(wrong):,} files are not UTF-8; training refuses them.",
            "Rename them, for example with: convmv -r -f latin1 -t utf8 --notest ROOT",
            tuple(Item((index,)) for index in wrong),
        )
    ]


def build_unreadable_findings(items: Sequence[Item]) -> list[Finding]:
    """Return findings about files that do not exist and files that can't be read.

    Args:
        items: One item per file; its detail is the reason.
    """
    missing = tuple(item for item in items if item.detail == NO_SUCH_FILE)
    unreadable = tuple(item for item in items if item.detail != NO_SUCH_FILE)
    return [
        Finding(
            "missing-file",
            "error",
            f"{format_count(len(missing), 'file does', 'files do')} not exist.",
            "Correct the paths in the table, copy the files there, or replace links whose target is gone.",
            missing,
        ),
        Finding(
            "unreadable",
            "error",
            f"{format_count(len(unreadable), 'file')} can't be read as an image: damaged, truncated or not an image at "
            "all.",
            "Copy them again from their source, or move them out of the class folders.",
            unreadable,
        ),
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


KINDS = {
    "patient": ("patient", "patients"),
    "file": ("pair of identical files", "pairs of identical files"),
    "pixels": ("pair with identical pixels", "pairs with identical pixels"),
    "near": ("pair of near copies", "pairs of near copies"),
}
"""Kinds of leaks, each with its singular and plural noun."""


@dataclass(frozen=True)
class Pair:
    """Two rows of a catalog that show the same patient or image.

    Attributes:
        kind: One of KINDS.
        first: Row of one image.
        second: Row of the other image.
        description: What they have in common, in words.
    """

    kind: str
    first: int
    second: int
    description: str


def find_leaks(table: pd.DataFrame, pairs: Sequence[Pair], *, grouped: bool) -> list[Pair]:
    """Find what is in more than one split: patients, if groups are patients, images and near copies of images.

    Each patient, each image that occurs in several files, and each pair of near copies counts once, as in the audit.

    Args:
        table: One row per image, with columns group and split.
        pairs: Copies as pairs of its rows.
        grouped: Whether groups are patients.
    """
    split = table["split"].to_numpy()
    exact_pairs = [pair for pair in pairs if pair.kind != "near"]
    links = np.array([[pair.first, pair.second] for pair in exact_pairs], dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(links)), (links[:, 0], links[:, 1])), shape=(len(table), len(table)))
    _, image = connected_components(graph, directed=False)
    first_rows: dict[int, dict[str, int]] = defaultdict(dict)
    for row in np.unique(links).tolist():
        first_rows[image[row]].setdefault(split[row], row)
    leaks: dict[int, Pair] = {}
    for pair in exact_pairs:
        if image[pair.first] not in leaks and split[pair.first] != split[pair.second]:
            leaks[image[pair.first]] = pair
    for pair in pairs:
        if pair.kind == "near":
            ends = product(
                *(first_rows.get(image[row], {split[row]: row}).values() for row in (pair.first, pair.second))
            )
            crossing = next(((first, second) for first, second in ends if split[first] != split[second]), None)
            if crossing is not None:
                leaks[len(table) + len(leaks)] = replace(pair, first=crossing[0], second=crossing[1])
    leaked_groups = list(_find_leaked_groups(table)) if grouped else []
    return leaked_groups + list(leaks.values())


def format_leaks(table: pd.DataFrame, found_leaks: Sequence[Pair]) -> str:
    """Format the error message about leaks: how many of each kind, and the first pairs by name."""
    path = table["path"].to_numpy()
    counts = count_leaks(found_leaks)
    summary = ", ".join(f"{count} {KINDS[kind][count > 1]}" for kind, count in counts.items() if count)
    lines = [f"{path[pair.first]} and {path[pair.second]}: {pair.description}" for pair in found_leaks]
    return (
        f"Found in more than one split: {summary}.\n{format_name_list(lines)}\n"
        "Performance measured on this split would not be valid. Move each pair to one split, remove one of each pair, "
        "let Pylorus make the split (it keeps copies together), or accept the leaks with data.accept_leaks=true: the "
        "report then states them."
    )


def count_leaks(found_leaks: Sequence[Pair]) -> dict[str, int]:
    """Count the leaks of each kind."""
    return {kind: sum(pair.kind == kind for pair in found_leaks) for kind in KINDS}


def _find_leaked_groups(table: pd.DataFrame) -> Iterator[Pair]:
    """Yield a pair for each group in several splits: its first rows in the first two of them."""
    firsts = table.reset_index(drop=True).drop_duplicates(["group", "split"])
    leaked = firsts[firsts["group"].duplicated(keep=False)]
    for group, rows in leaked.groupby("group").groups.items():
        yield Pair("patient", int(rows[0]), int(rows[1]), f"patient {group}")
