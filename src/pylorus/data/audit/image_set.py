"""The files of an audit, readable or not, with their class, group and split."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pylorus.data.catalog import get_matched_group, list_class_images, parse_group_pattern
from pylorus.data.content import Root
from pylorus.data.manifest import read_manifest_rows
from pylorus.data.unreadable import format_path
from pylorus.errors import PylorusError


@dataclass(frozen=True)
class ImageSet:
    """Files of an image set.

    Attributes:
        root: What the paths are relative to.
        table: One row per file: path, class, split (train, val, test or empty), group (empty if none was found);
            its index counts from 0.
        grouped: Whether groups are patients; else every image is its own group.
    """

    root: Root
    table: pd.DataFrame
    grouped: bool

    @property
    def has_split(self) -> bool:
        """Whether folders or a manifest define a split."""
        return bool((self.table["split"] != "").any())


def list_folder_files(root: Path, *, group: str | None = None) -> ImageSet:
    """Find the files in class folders, by the same rules as the catalog; none is opened.

    Args:
        root: Folder with the structure ROOT/CLASS/… or ROOT/SPLIT/CLASS/…
        group: Regular expression that matches the patient in the path relative to the root.

    Raises:
        PylorusError: If the folders don't have this structure, or `group` is not a regular expression.
    """
    _check_folder(root)
    rows, _ = list_class_images(root)
    if not rows:
        raise PylorusError(
            f"{root}: found no class folder, expected images as in {root / 'CLASS' / 'image.jpg'} or "
            f"{root / 'train' / 'CLASS' / 'image.jpg'}."
        )
    paths, classes, splits = zip(*sorted(rows), strict=True)
    table = pd.DataFrame(
        {
            # A path may contain bytes that are not UTF-8, which pandas' text columns reject: use objects.
            "path": pd.Series(paths, dtype=object),
            "class": [format_path(Path(name)) for name in classes],
            "split": splits,
            "group": [format_path(Path(name)) if name else "" for name in _match_groups(list(paths), group)],
        }
    )
    return ImageSet(root, table, grouped=group is not None)


def list_manifest_files(manifest: Path, root: Path, *, group: str | None = None) -> ImageSet:
    """Return the files that a manifest lists, whether they exist or not; none is opened.

    Args:
        manifest: A table in the format that `manifest.py` documents.
        root: Folder that its paths are relative to.
        group: Regular expression that matches the patient in the path; None: the column group, if there is one.

    Raises:
        PylorusError: If the manifest is not such a table, or `group` is not a regular expression.
    """
    _check_folder(root)
    rows = read_manifest_rows(manifest)
    table = rows[["path", "class", "split"]].reset_index(drop=True)
    has_groups = group is None and "group" in rows
    groups = list(rows["group"]) if has_groups else _match_groups(list(rows["path"]), group)
    return ImageSet(root, table.assign(group=groups), grouped=has_groups or group is not None)


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise PylorusError(f"{root} is not a folder; expected the folder of an image set.")


def _match_groups(paths: list[str], pattern: str | None) -> list[str]:
    """Return the group of each path, empty if the expression does not match: the audit reports all these paths."""
    if pattern is None:
        return paths
    expression = parse_group_pattern(pattern, key="--group")
    matches = [expression.search(path) for path in paths]
    return ["" if match is None else get_matched_group(match) for match in matches]
