"""An image set as a table: one row an image, with its label, its patient and what its content is.

Columns of the table:

===========  =====================================================================
sample_id    16 hexadecimal digits from path and content: what leaves this machine
path         below the root, with / between folders
label        index into the classes
group        the patient, or what stands in for one
split        train, val or test where folders say so, else empty
width        pixels of the upright image
height       pixels of the upright image
sha256       of the file's content
about/…      further columns of a manifest, as text
===========  =====================================================================
"""

import dataclasses
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.columns import ABOUT
from pylorus.data.content import Root
from pylorus.data.facts import FactTable
from pylorus.data.image import SUFFIXES
from pylorus.data.reading import AS_THEY_ARE, Reading, read_files
from pylorus.errors import PylorusError, did_you_mean, listing

log = logging.getLogger(__name__)

SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What a folder of a given split may be called, in any case."""


@dataclass(frozen=True)
class Catalog:
    """An image set.

    Attributes:
        root: What the paths lie below: a folder, or shards.
        table: One row an image; see the module.
        classes: Names of the class folders, in the order of the labels.
        short_names: One a class, for metrics and tables.
        grouped: Whether groups are patients; else every image is its own group.
        hashed: Whether groups are salted hashes, so that their names must decide nothing.
        facts: What each file is, also those that can't be read, in the order of their paths.
        places: Which of the facts are those of each row, of shape (rows,).
        unreadable: What was left out: path, class, group, split and reason.
    """

    root: Root
    table: pd.DataFrame
    classes: tuple[str, ...]
    short_names: tuple[str, ...]
    grouped: bool
    hashed: bool
    facts: FactTable
    places: NDArray[np.int64]
    unreadable: pd.DataFrame

    def without_facts(self) -> "Catalog":
        """The same image set once all that is to be known of its files is known: a million of them hold 1.3 GiB."""
        return dataclasses.replace(self, facts=FactTable(0), places=np.zeros(0, dtype=np.int64))


def read_folders(
    root: Path,
    *,
    classes: list[str] | None = None,
    short_names: list[str] | None = None,
    group: str | None = None,
    reading: Reading = AS_THEY_ARE,
) -> Catalog:
    """The catalog of class folders: ROOT/CLASS/…, or ROOT/SPLIT/CLASS/… with train, test and perhaps val.

    Folders and files whose name begins with a dot are passed over, images may lie in folders below the class's.

    Args:
        root: Folder of the image set.
        classes: Names of the class folders in the order of the labels; None: those found, sorted.
        short_names: One a class; None: the classes' names.
        group: Regular expression that finds the patient in the path below the root.
        reading: What is kept of the files, and what becomes of those that can't be read.

    Raises:
        PylorusError: If root, a class or an image is missing, unknown, empty or unreadable; the message names it.
    """
    if not root.is_dir():
        raise PylorusError(f"data.root: found {root}, expected a folder that exists.")
    rows, found = scan_folders(root)
    names = _settled_classes(root, found, classes)
    table = pd.DataFrame(rows, columns=["path", "class", "split"])
    table["group"] = groups_of(list(table["path"]), group)
    grouped = group is not None
    return completed(table, root, names, short_names=short_names, grouped=grouped, reading=reading)


def completed(
    rows: pd.DataFrame,
    root: Root,
    classes: tuple[str, ...],
    *,
    short_names: list[str] | None,
    grouped: bool,
    reading: Reading,
) -> Catalog:
    """The catalog of rows with path, class, group, split and about/…: each file is read once.

    Raises:
        PylorusError: If an image can't be read, names it; or if none is left of a class.
    """
    files = rows.sort_values("path", ignore_index=True)
    files, facts, reasons = read_files(files, root, reading)
    left_out = np.array([reason != "" for reason in reasons], dtype=np.bool_)
    table = files[~left_out].reset_index(drop=True)
    table["label"] = table["class"].map({name: index for index, name in enumerate(classes)})
    emptied = [name for label, name in enumerate(classes) if not (table["label"] == label).any()]
    if emptied:
        raise PylorusError(f'{root}: none of the images of class "{emptied[0]}" can be read. Mend them.')
    columns = ["sample_id", "path", "label", "group", "split", "width", "height", "sha256"]
    unreadable = files.loc[left_out, ["path", "class", "group", "split"]].assign(
        reason=[reason for reason in reasons if reason]
    )
    return Catalog(
        root=root,
        table=table[[*columns, *(name for name in table.columns if name.startswith(ABOUT))]],
        classes=classes,
        short_names=tuple(short_names) if short_names is not None else classes,
        grouped=grouped or reading.salt is not None,
        hashed=reading.salt is not None,
        facts=facts,
        places=np.flatnonzero(~left_out),
        unreadable=unreadable.reset_index(drop=True),
    )


def scan_folders(root: Path) -> tuple[list[tuple[str, str, str]], dict[str, set[str]]]:
    """Rows (path, class, split), and the class folders found in each split ("" where folders give none).

    No file is opened.

    Raises:
        PylorusError: If these are no class folders; says why.
    """
    folders = _visible_folders(root)
    splits = {folder: SPLIT_FOLDERS.get(folder.name.lower(), "") for folder in folders}
    given = {split for split in splits.values() if split}
    if given and not all(splits.values()):
        others = [folder.name for folder, split in splits.items() if not split]
        raise PylorusError(
            f"{root}: holds both split folders ({', '.join(sorted(given))}) and others:\n{listing(others)}\n"
            "Expected either class folders or train, val and test, which hold class folders."
        )
    if given and not {"train", "test"} <= given:
        absent = " and ".join(sorted({"train", "test"} - given))
        raise PylorusError(f"{root}: there is no folder {absent} beside {', '.join(sorted(given))}.")
    if len(set(splits.values())) < len(folders) and given:
        raise PylorusError(f"{root}: two folders for one split:\n{listing(folder.name for folder in folders)}")
    rows: list[tuple[str, str, str]] = []
    found: dict[str, set[str]] = {}
    for place, split in splits.items() if given else [(root, "")]:
        stray = [path for path in place.iterdir() if _is_image(path)]
        if stray:
            raise PylorusError(f"{place}: {len(stray)} images lie in no class folder:\n{listing(sorted(stray))}")
        for folder in _visible_folders(place):
            found.setdefault(split, set()).add(folder.name)
            rows += [(path.relative_to(root).as_posix(), folder.name, split) for path in _images(folder)]
        found.setdefault(split, set())
    return rows, found


def _settled_classes(root: Path, found: dict[str, set[str]], wanted: list[str] | None) -> tuple[str, ...]:
    names = wanted if wanted is not None else sorted(set().union(*found.values()))
    if len(names) < 2:
        raise PylorusError(
            f"{root}: found {len(names)} class folders, expected at least two, as in {root / 'CLASS' / 'image.jpg'}."
        )
    for split, present in found.items():
        place = root / split if split else root
        for missing in [name for name in names if name not in present]:
            raise PylorusError(
                f'{place}: there is no folder for class "{missing}".{did_you_mean(missing, present)} '
                f"Found: {', '.join(sorted(present)) or 'none'}."
            )
        for unknown in sorted(present - set(names)):
            raise PylorusError(
                f'{place}: folder "{unknown}" is not among data.classes ({", ".join(names)}).'
                f"{did_you_mean(unknown, names)} Move it away or add it to data.classes."
            )
    return tuple(names)


def groups_of(paths: list[str], pattern: str | None) -> list[str]:
    """The group of each path, found by a regular expression; without one the path itself.

    Raises:
        PylorusError: If the expression is none, or finds nothing in a path.
    """
    if pattern is None:
        return paths
    finder = group_finder(pattern, key="data.group")
    found = [finder.search(path) for path in paths]
    lost = [path for path, match in zip(paths, found, strict=True) if match is None or not group_in(match)]
    if lost:
        raise PylorusError(
            f"data.group: {pattern!r} finds no patient in {len(lost)} of {len(paths)} paths:\n{listing(lost)}"
        )
    return [group_in(match) for match in found if match is not None]


def group_finder(pattern: str, *, key: str) -> re.Pattern[str]:
    """The expression that finds groups in paths; `key` is what its user calls it.

    Raises:
        PylorusError: If it is no regular expression.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise PylorusError(f"{key}: {pattern!r} is not a regular expression: {error}.") from error


def group_in(match: re.Match[str]) -> str:
    """The group that an expression found: its first parentheses, or all that it matched."""
    return str(match.group(1) or "") if match.re.groups else match.group(0)


def _images(folder: Path) -> list[Path]:
    """The images of a class, also in folders below it.

    Raises:
        PylorusError: If there is none.
    """
    images: list[Path] = []
    ignored: list[Path] = []
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or path.is_dir():
            continue
        (images if _is_image(path) else ignored).append(path)
    if ignored:
        log.info(
            "%s: %d files are no images and are passed over, such as %s",
            folder,
            len(ignored),
            ignored[0].name,
        )
    if not images:
        raise PylorusError(f"{folder}: there is no image in this class folder ({', '.join(SUFFIXES)}).")
    return images


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
