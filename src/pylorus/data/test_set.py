"""Select the test images that the user specifies: those of a fold, of a column's values, or of another run."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.columns import ABOUT
from pylorus.config import DataConfig
from pylorus.data.catalog import Catalog
from pylorus.data.leaks import KINDS, Pair, count_leaks, find_leaks
from pylorus.errors import PylorusError, format_name_list, format_suggestion


def select_by_column(catalog: Catalog, data: DataConfig) -> NDArray[np.bool_]:
    """Return whether each image is a test image according to `data.test_column` and its values.

    Raises:
        PylorusError: If there is no such column or value, or `data.test_from` is set and an image has no value.
    """
    name = str(data.test_column)
    values = _get_manifest_column(catalog, name, key="data.test_column")
    if data.test_values is not None:
        for wanted in data.test_values:
            if not (values == wanted).any():
                raise PylorusError(
                    f'data.test_values: no image has "{wanted}" in column {name}.'
                    f"{format_suggestion(wanted, sorted(set(values)))}\n"
                    f"Found:\n{format_name_list(sorted(set(values) - {''}), most=30)}"
                )
        return np.asarray(values.isin(data.test_values))
    empty = catalog.table["path"][values == ""]
    if len(empty):
        raise PylorusError(
            f"data.test_from: no value in column {name} for {_format_image_count(len(empty))}:\n{format_name_list(empty)}"
        )
    return _is_at_least(values, str(data.test_from))


def read_fold_values(catalog: Catalog, data: DataConfig) -> pd.Series:
    """Return the value of `data.fold_column` of each image, as text; each distinct value is a fold.

    Raises:
        PylorusError: If there is no such column, all images have the same value, or an image has none.
    """
    name = str(data.fold_column)
    values = _get_manifest_column(catalog, name, key="data.fold_column")
    empty = catalog.table["path"][values == ""]
    if len(empty):
        raise PylorusError(
            f"data.fold_column: no value in column {name} for {_format_image_count(len(empty))}:\n{format_name_list(empty)}\n"
            "It is unknown whether they belong to the test set. Add their values to the manifest, or remove them."
        )
    if values.nunique() < 2:
        raise PylorusError(
            f'data.fold_column: all images have "{values.iloc[0]}" in column {name}, expected at least two values.'
        )
    return values


def select_by_fold_column(catalog: Catalog, data: DataConfig, pairs: Sequence[Pair]) -> NDArray[np.bool_]:
    """Return whether each image is a test image: whether its value of `data.fold_column` is `data.fold`.

    Args:
        catalog: The image set.
        data: Column, value, and whether leaks are accepted.
        pairs: Copies. A copy or a patient under two values is an error in every fold, even where it is not divided.

    Raises:
        PylorusError: If there is no such column or value, or a patient or a copy has images under two values.
    """
    values = read_fold_values(catalog, data)
    column, known_values = str(data.fold_column), sorted(set(values))
    wanted = _find_value(str(data.fold), known_values)
    if wanted is None:
        raise PylorusError(
            f'data.fold: no image has "{data.fold}" in column {column}.{format_suggestion(str(data.fold), known_values)}\n'
            f"Found:\n{format_name_list(known_values, most=30)}\n"
            f"To test on each value in turn: -m {_format_override('data.fold', known_values)} "
            f"{_format_override('data.fold_column', [column])}"
        )
    found_leaks = find_leaks(catalog.table.assign(split=values), pairs, grouped=catalog.grouped)
    if found_leaks and not data.accept_leaks:
        path = catalog.table["path"].to_numpy()
        summary = ", ".join(
            f"{count} {KINDS[kind][count > 1]}" for kind, count in count_leaks(found_leaks).items() if count
        )
        lines = [
            f"{path[pair.first]} ({values.iloc[pair.first]}) and {path[pair.second]} ({values.iloc[pair.second]}): "
            f"{pair.told}"
            for pair in found_leaks
        ]
        raise PylorusError(
            f"data.fold_column: found under more than one value of column {column}: {summary}.\n{format_name_list(lines)}\n"
            "A model tested on one value would have been trained on the other. Correct the manifest, remove one of "
            "each pair, or accept the leaks with data.accept_leaks=true: the report then states them."
        )
    return np.asarray(values == wanted)


def _format_override(key: str, values: Sequence[str]) -> str:
    """Format a command-line override, quoted if Hydra or a shell would not read the values as plain text."""
    is_plain = all(
        re.fullmatch(r"[A-Za-z_][\w.-]*|\d+", value) and value.lower() not in ("true", "false", "null", "nan", "inf")
        for value in values
    )
    return (
        f"{key}={','.join(values)}" if is_plain else "'" + f"{key}=" + ",".join(f'"{value}"' for value in values) + "'"
    )


def _find_value(wanted: str, known: Sequence[str]) -> str | None:
    """Return the known value with the same text or else the same number, as 1 for 1.0 or 01; None if there is none."""
    if wanted in known:
        return wanted
    number = re.compile(r"[+-]?\d+(\.\d+)?")
    numeric = [value for value in known if number.fullmatch(value) and number.fullmatch(wanted)]
    equal = [value for value in numeric if float(value) == float(wanted)]
    return equal[0] if len(equal) == 1 else None


def _get_manifest_column(catalog: Catalog, name: str, *, key: str) -> pd.Series:
    """Return an additional column of the manifest.

    Raises:
        PylorusError: If there is no such column; the message names the key and the columns that exist.
    """
    known = [column.removeprefix(ABOUT) for column in catalog.table.columns if column.startswith(ABOUT)]
    if name not in known:
        raise PylorusError(
            f'{key}: the manifest has no additional column "{name}".{format_suggestion(name, known)} '
            f"Found: {', '.join(known) or 'none'}."
        )
    return catalog.table[ABOUT + name]


def _is_at_least(values: pd.Series, first: str) -> NDArray[np.bool_]:
    """Return which values are at least `first`: compared as numbers if all are, else as text, as for ISO dates."""
    number = re.compile(r"-?\d+(\.\d+)?")
    if number.fullmatch(first) and values.str.fullmatch(number.pattern).all():
        return np.asarray(values.astype(float) >= float(first))
    return np.asarray(values >= first)


def read_split_file(catalog: Catalog, path: Path) -> Sequence[str]:
    """Return the split of each image from another run's split.csv.

    Raises:
        PylorusError: If the file is not a split.csv, or images were added, removed, or have another class, group or
            content.
    """
    try:
        saved = pd.read_csv(path, dtype=str, keep_default_na=False).set_index("path")
        saved = saved[["class", "group", "split", "sha256"]]
    except (OSError, ValueError, KeyError) as error:
        raise PylorusError(f"data.split_file: can't read {path} as a split.csv of Pylorus: {error}") from error
    table = catalog.table.set_index("path")
    for difference, paths in (
        ("missing from the file", table.index.difference(saved.index)),
        ("in the file but missing from the image set", saved.index.difference(table.index)),
    ):
        if len(paths):
            raise PylorusError(
                f"data.split_file: {path}: {_format_image_count(len(paths))} {difference}:\n{format_name_list(paths)}"
            )
    saved = saved.loc[table.index]
    current = {
        "content": ("sha256", table["sha256"]),
        "class": ("class", table["label"].map(dict(enumerate(catalog.classes)))),
        "group": ("group", table["group"]),
    }
    for difference, (column, values) in current.items():
        differs = table.index[np.asarray(saved[column] != values)]
        if len(differs):
            raise PylorusError(
                f"data.split_file: {path}: the {difference} of {_format_image_count(len(differs))} differs from "
                f"the file:\n{format_name_list(differs)}"
            )
    return list(saved["split"])


def _format_image_count(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
