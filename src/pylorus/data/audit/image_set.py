"""The files that an audit looks at, readable or not, with their class, group and split."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pylorus.data.catalog import group_finder, group_in, scan_folders
from pylorus.data.content import Root
from pylorus.data.manifest import manifest_rows
from pylorus.data.unreadable import shown
from pylorus.errors import PylorusError


@dataclass(frozen=True)
class ImageSet:
    """Files of an image set.

    Attributes:
        root: What the paths lie below.
        table: One row a file: path, class, split (train, val, test or empty), group (empty where none was found);
            its index counts from 0.
        grouped: Whether groups are patients; else every image is its own group.
    """

    root: Root
    table: pd.DataFrame
    grouped: bool

    @property
    def given_split(self) -> bool:
        """Whether files are in train, val and test."""
        return bool((self.table["split"] != "").any())


def find_files(root: Path, *, group: str | None = None) -> ImageSet:
    """The files of class folders, by the catalog's rules; none is opened.

    Args:
        root: ROOT/CLASS/… or ROOT/SPLIT/CLASS/…
        group: Regular expression that finds the patient in the path below the root.

    Raises:
        PylorusError: If the folders are no class folders, or the expression is none.
    """
    _expect_folder(root)
    rows, _ = scan_folders(root)
    if not rows:
        raise PylorusError(
            f"{root}: found no class folder, expected images as in {root / 'CLASS' / 'image.jpg'} or "
            f"{root / 'train' / 'CLASS' / 'image.jpg'}."
        )
    paths, classes, splits = zip(*sorted(rows), strict=True)
    table = pd.DataFrame(
        {
            # A name may hold bytes that are no UTF-8, which pandas' text columns refuse: paths stay as they are.
            "path": pd.Series(paths, dtype=object),
            "class": [shown(Path(name)) for name in classes],
            "split": splits,
            "group": [shown(Path(name)) if name else "" for name in _groups(list(paths), group)],
        }
    )
    return ImageSet(root, table, grouped=group is not None)


def listed_files(manifest: Path, root: Path, *, group: str | None = None) -> ImageSet:
    """The files that a manifest lists, whether they are there or not; none is opened.

    Args:
        manifest: A table as `manifest.py` reads it.
        root: Folder that its paths lie below.
        group: Regular expression that finds the patient in the path; None: the column group, where there is one.

    Raises:
        PylorusError: If the manifest is no such table, or the expression is none.
    """
    _expect_folder(root)
    rows = manifest_rows(manifest)
    table = rows[["path", "class", "split"]].reset_index(drop=True)
    listed = group is None and "group" in rows
    groups = list(rows["group"]) if listed else _groups(list(rows["path"]), group)
    return ImageSet(root, table.assign(group=groups), grouped=listed or group is not None)


def _expect_folder(root: Path) -> None:
    if not root.is_dir():
        raise PylorusError(f"{root} is no folder; expected the folder of an image set.")


def _groups(paths: list[str], pattern: str | None) -> list[str]:
    """The group of each path; empty where the expression finds none: the audit tells it of all of them."""
    if pattern is None:
        return paths
    finder = group_finder(pattern, key="--group")
    found = [finder.search(path) for path in paths]
    return ["" if match is None else group_in(match) for match in found]
