"""Shards as a catalog: the columns are those of a manifest, the paths those of the members.

A set of class folders and the shards that `pylorus pack` makes of it have the same paths, and with them the same
sample ids, groups, splits, order and augmentations: the run on the one is the run on the other.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from pylorus.columns import ABOUT
from pylorus.data.catalog import SPLIT_FOLDERS, Catalog, completed, groups_of
from pylorus.data.reading import AS_THEY_ARE, Reading
from pylorus.data.shards import Shards
from pylorus.data.shards_index import index_of
from pylorus.data.shards_places import find_shards
from pylorus.data.unreadable import shown
from pylorus.errors import PylorusError, did_you_mean


def read_shards(
    root: str,
    *,
    index: Path,
    classes: list[str] | None = None,
    short_names: list[str] | None = None,
    group: str | None = None,
    reading: Reading = AS_THEY_ARE,
) -> Catalog:
    """The catalog of shards.

    Args:
        root: A folder, a pattern of files or of URLs; see `shards_places`.
        index: Folder where indices are kept: a shard that is known there is not read.
        classes: Names of the classes in the order of the labels; None: those found, sorted.
        short_names: One a class; None: the classes' names.
        group: Regular expression that finds the patient in a member's path; None: what the shards say.
        reading: What is kept of the images, and what becomes of those that can't be read.

    Raises:
        PylorusError: If a shard or an image can't be used as it is; names the shard and the key.
    """
    shards = find_shards(root)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        tables = list(pool.map(lambda shard: index_of(shard, index), shards))
    rows = pd.concat([table.assign(shard=number) for number, table in enumerate(tables)], ignore_index=True)
    names = [shard.name for shard in shards]
    _refuse_twice(rows, names)
    rows["class"], settled = _classes(rows, classes, names)
    rows["split"] = _splits(rows, names)
    grouped = group is not None or "group" in rows
    if group is not None or not grouped:
        rows["group"] = groups_of(list(rows["path"]), group)
    _refuse_first(rows, rows["group"].isin([""]) | rows["group"].isna(), names, "has no group, others have one.")
    about = [str(name) for name in rows.columns if str(name).startswith(ABOUT)]
    for name in about:
        rows[name] = rows[name].fillna("")
    catalogued = rows[["path", "class", "group", "split", "sha256", *about]]
    members = Shards(root, shards, rows[["path", "shard", "offset", "size", "sha256"]])
    return completed(catalogued, members, settled, short_names=short_names, grouped=grouped, reading=reading)


def _first(wrong: pd.Series) -> int:
    return int(wrong.to_numpy().argmax())


def _refuse_first(rows: pd.DataFrame, wrong: pd.Series, names: list[str], what: str) -> None:
    if wrong.any():
        first = rows.iloc[_first(wrong)]
        place = f"shard {names[int(first['shard'])]}, {shown(first['path'])}"
        raise PylorusError(f"{place}: {what} ({wrong.sum()} of {len(rows)} images)")


def _refuse_twice(rows: pd.DataFrame, names: list[str]) -> None:
    twice = rows["path"].duplicated()
    if twice.any():
        path = str(rows["path"].iloc[_first(twice)])
        both = " and ".join(names[number] for number in rows.loc[rows["path"] == path, "shard"])
        raise PylorusError(
            f"key {shown(path)} stands in shards {both}: {twice.sum()} images would have one name. Keys must differ "
            "among all shards, for instance by the shard's number in front."
        )


def _classes(rows: pd.DataFrame, wanted: list[str] | None, names: list[str]) -> tuple[pd.Series, tuple[str, ...]]:
    """The class of each row, and all classes; numbers as in KEY.cls count the classes where these are named."""
    labels = rows["label"]
    if wanted is not None:
        numbers = {str(number): name for number, name in enumerate(wanted) if str(number) not in wanted}
        labels = labels.replace(numbers)
    settled = wanted if wanted is not None else sorted(set(labels))
    unknown = ~labels.isin(settled)
    if unknown.any():
        found = str(labels.iloc[_first(unknown)])
        among = f'label "{found}" is not among data.classes ({", ".join(settled)}).{did_you_mean(found, settled)}'
        _refuse_first(rows, unknown, names, among)
    missing = [name for name in settled if name not in set(labels)]
    if missing or len(settled) < 2:
        raise PylorusError(
            f"data.classes: found {', '.join(sorted(set(labels)))} in the shards, expected at least two classes"
            + (f", and {missing[0]}." if missing else ".")
        )
    return labels, tuple(settled)


def _splits(rows: pd.DataFrame, names: list[str]) -> pd.Series:
    given = rows["split"].fillna("") if "split" in rows else pd.Series("", index=rows.index)
    if (given == "").all():
        return given
    found = given.str.lower().map(SPLIT_FOLDERS)
    _refuse_first(rows, found.isna(), names, "its split is not train, val or test, in every image or in none.")
    absent = sorted({"train", "test"} - set(np.unique(found.astype(str))))
    if absent:
        raise PylorusError(f"{names[0]} …: no image of the shards is in {' and '.join(absent)}.")
    return found
