"""Read shards as a catalog, with the columns of a manifest and the paths of the members.

Class folders and the shards that `pylorus pack` creates from them have the same paths, and therefore the same sample
IDs, groups, splits, order and augmentations: a run gives the same result on either.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from pylorus.columns import ABOUT
from pylorus.data.catalog import SPLIT_FOLDERS, Catalog, build_catalog, extract_groups
from pylorus.data.reading import DEFAULT_READ_OPTIONS, ReadOptions
from pylorus.data.shards import Shards
from pylorus.data.shards_index import load_shard_index
from pylorus.data.shards_places import find_shards
from pylorus.data.unreadable import format_path
from pylorus.errors import PylorusError, format_suggestion


def read_shard_catalog(
    root: str,
    *,
    index: Path,
    classes: list[str] | None = None,
    short_names: list[str] | None = None,
    group: str | None = None,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
) -> Catalog:
    """Read the catalog of shards.

    Args:
        root: A folder, or a pattern of files or URLs; see `shards_places`.
        index: Folder of cached indices: a shard with an index there is not read.
        classes: Class names in the order of the labels; None: those found, sorted.
        short_names: One per class; None: the class names.
        group: Regular expression that extracts the patient from a member's path; None: the group given in the shards.
        reading: Which facts of the images are stored, and how unreadable images are handled.

    Returns:
        The catalog, whose root is a `Shards`.

    Raises:
        PylorusError: If a shard or an image can't be used; names the shard and the key.
    """
    shards = find_shards(root)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        tables = list(pool.map(lambda shard: load_shard_index(shard, index), shards))
    rows = pd.concat([table.assign(shard=number) for number, table in enumerate(tables)], ignore_index=True)
    shard_names = [shard.name for shard in shards]
    _check_unique_paths(rows, shard_names)
    rows["class"], class_names = _resolve_classes(rows, classes, shard_names)
    rows["split"] = _parse_splits(rows, shard_names)
    has_groups = group is not None or "group" in rows
    if group is not None or not has_groups:
        rows["group"] = extract_groups(list(rows["path"]), group)
    _raise_for_first(
        rows, rows["group"].isin([""]) | rows["group"].isna(), shard_names, "has no group, but other images have one."
    )
    metadata = [str(name) for name in rows.columns if str(name).startswith(ABOUT)]
    for name in metadata:
        rows[name] = rows[name].fillna("")
    catalog_rows = rows[["path", "class", "group", "split", "sha256", *metadata]]
    members = Shards(root, shards, rows[["path", "shard", "offset", "size", "sha256"]])
    return build_catalog(
        catalog_rows, members, class_names, short_names=short_names, grouped=has_groups, reading=reading
    )


def _find_first(is_wrong: pd.Series) -> int:
    return int(is_wrong.to_numpy().argmax())


def _raise_for_first(rows: pd.DataFrame, is_wrong: pd.Series, shard_names: list[str], problem: str) -> None:
    if is_wrong.any():
        first = rows.iloc[_find_first(is_wrong)]
        location = f"shard {shard_names[int(first['shard'])]}, {format_path(first['path'])}"
        raise PylorusError(f"{location}: {problem} ({is_wrong.sum()} of {len(rows)} images)")


def _check_unique_paths(rows: pd.DataFrame, shard_names: list[str]) -> None:
    is_duplicate = rows["path"].duplicated()
    if is_duplicate.any():
        path = str(rows["path"].iloc[_find_first(is_duplicate)])
        holders = " and ".join(shard_names[number] for number in rows.loc[rows["path"] == path, "shard"])
        raise PylorusError(
            f"key {format_path(path)} is in shards {holders}: {is_duplicate.sum()} images would share a name. Keys must be "
            "unique over all shards: prefix them with the number of the shard, for instance."
        )


def _resolve_classes(
    rows: pd.DataFrame, configured: list[str] | None, shard_names: list[str]
) -> tuple[pd.Series, tuple[str, ...]]:
    """Resolve the class of each row, and all classes.

    A number in KEY.cls is an index into `data.classes` if these are given.
    """
    labels = rows["label"]
    if configured is not None:
        numbers = {str(number): name for number, name in enumerate(configured) if str(number) not in configured}
        labels = labels.replace(numbers)
    class_names = configured if configured is not None else sorted(set(labels))
    is_unknown = ~labels.isin(class_names)
    if is_unknown.any():
        label = str(labels.iloc[_find_first(is_unknown)])
        hint = format_suggestion(label, class_names)
        problem = f'label "{label}" is not among data.classes ({", ".join(class_names)}).{hint}'
        _raise_for_first(rows, is_unknown, shard_names, problem)
    missing = [name for name in class_names if name not in set(labels)]
    if missing or len(class_names) < 2:
        raise PylorusError(
            f"data.classes: found {', '.join(sorted(set(labels)))} in the shards, expected at least two classes"
            + (f", including {missing[0]}." if missing else ".")
        )
    return labels, tuple(class_names)


def _parse_splits(rows: pd.DataFrame, shard_names: list[str]) -> pd.Series:
    values = rows["split"].fillna("") if "split" in rows else pd.Series("", index=rows.index)
    if (values == "").all():
        return values
    splits = values.str.lower().map(SPLIT_FOLDERS)
    _raise_for_first(
        rows, splits.isna(), shard_names, "its split is not train, val or test: give all images one, or none."
    )
    absent = sorted({"train", "test"} - set(np.unique(splits.astype(str))))
    if absent:
        raise PylorusError(f"{shard_names[0]} …: no image of the shards has split {' or '.join(absent)}.")
    return splits
