"""Which images are tested on where the user says so: those of a fold, of a column's values, or another run's."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.columns import ABOUT
from pylorus.config import DataConfig
from pylorus.data.catalog import Catalog
from pylorus.data.leaks import KINDS, Pair, counted, leaks
from pylorus.errors import PylorusError, did_you_mean, listing


def by_column(catalog: Catalog, data: DataConfig) -> NDArray[np.bool_]:
    """Whether each image is tested on, by `data.test_column` and its values.

    Raises:
        PylorusError: If there is no such column or value, or a value is missing where an order is asked for.
    """
    name = str(data.test_column)
    values = _column(catalog, name, key="data.test_column")
    if data.test_values is not None:
        for wanted in data.test_values:
            if not (values == wanted).any():
                raise PylorusError(
                    f'data.test_values: no image has "{wanted}" in column {name}.'
                    f"{did_you_mean(wanted, sorted(set(values)))}\n"
                    f"Found:\n{listing(sorted(set(values) - {''}), most=30)}"
                )
        return np.asarray(values.isin(data.test_values))
    empty = catalog.table["path"][values == ""]
    if len(empty):
        raise PylorusError(f"data.test_from: {len(empty)} images have no value in column {name}:\n{listing(empty)}")
    return _from(values, str(data.test_from))


def read_fold_values(catalog: Catalog, data: DataConfig) -> pd.Series:
    """The value of `data.fold_column` of each image, as text; each distinct one is a fold.

    Raises:
        PylorusError: If there is no such column, if it has one value alone, or if an image has none.
    """
    name = str(data.fold_column)
    values = _column(catalog, name, key="data.fold_column")
    empty = catalog.table["path"][values == ""]
    if len(empty):
        raise PylorusError(
            f"data.fold_column: {len(empty)} images have no value in column {name}:\n{listing(empty)}\n"
            "Whether they belong to the tested value can't be known: state it in the manifest, or take them out."
        )
    if values.nunique() < 2:
        raise PylorusError(
            f'data.fold_column: all images have "{values.iloc[0]}" in column {name}, expected two values or more.'
        )
    return values


def by_fold_column(catalog: Catalog, data: DataConfig, pairs: Sequence[Pair]) -> NDArray[np.bool_]:
    """Whether each image is tested on, because it has the value `data.fold` of `data.fold_column`.

    Args:
        catalog: The image set.
        data: Column, value, and whether leaks are accepted.
        pairs: Copies. A copy or a patient under two values is refused in every fold, also where it would not be torn.

    Raises:
        PylorusError: If there is no such column or value, or a patient or a copy has images under two values.
    """
    values = read_fold_values(catalog, data)
    column, known = str(data.fold_column), sorted(set(values))
    wanted = _find_value(str(data.fold), known)
    if wanted is None:
        raise PylorusError(
            f'data.fold: no image has "{data.fold}" in column {column}.{did_you_mean(str(data.fold), known)}\n'
            f"Found:\n{listing(known, most=30)}\n"
            f"To test on each in turn: -m {_override('data.fold', known)} {_override('data.fold_column', [column])}"
        )
    torn = leaks(catalog.table.assign(split=values), pairs, grouped=catalog.grouped)
    if torn and not data.accept_leaks:
        path = catalog.table["path"].to_numpy()
        head = ", ".join(f"{count} {KINDS[kind][count > 1]}" for kind, count in counted(torn).items() if count)
        lines = [
            f"{path[pair.first]} ({values.iloc[pair.first]}) and {path[pair.second]} ({values.iloc[pair.second]}): "
            f"{pair.told}"
            for pair in torn
        ]
        raise PylorusError(
            f"data.fold_column: under two values of column {column} lie {head}:\n{listing(lines)}\n"
            "Tested on one value, a model would have learned from the other. Correct the manifest, take one of each "
            "two away, or accept it with data.accept_leaks=true, which the report then says."
        )
    return np.asarray(values == wanted)


def _override(key: str, values: Sequence[str]) -> str:
    """A word of the command line, in quotes where Hydra or a shell would not take the values for plain text."""
    plain = all(
        re.fullmatch(r"[A-Za-z_][\w.-]*|\d+", value) and value.lower() not in ("true", "false", "null", "nan", "inf")
        for value in values
    )
    return f"{key}={','.join(values)}" if plain else "'" + f"{key}=" + ",".join(f'"{value}"' for value in values) + "'"


def _find_value(wanted: str, known: Sequence[str]) -> str | None:
    """The known value that is meant: the same text, else the one of the same number, as 1 for 1.0 or 01."""
    if wanted in known:
        return wanted
    number = re.compile(r"[+-]?\d+(\.\d+)?")
    alike = [value for value in known if number.fullmatch(value) and number.fullmatch(wanted)]
    same = [value for value in alike if float(value) == float(wanted)]
    return same[0] if len(same) == 1 else None


def _column(catalog: Catalog, name: str, *, key: str) -> pd.Series:
    """A further column of the manifest.

    Raises:
        PylorusError: If there is none of this name; names the key and the columns that there are.
    """
    known = [column.removeprefix(ABOUT) for column in catalog.table.columns if column.startswith(ABOUT)]
    if name not in known:
        raise PylorusError(
            f'{key}: the manifest has no further column "{name}".{did_you_mean(name, known)} '
            f"Found: {', '.join(known) or 'none'}."
        )
    return catalog.table[ABOUT + name]


def _from(values: pd.Series, first: str) -> NDArray[np.bool_]:
    """Values from `first` on: as numbers where all of them are, else as text, which puts ISO dates in order."""
    number = re.compile(r"-?\d+(\.\d+)?")
    if number.fullmatch(first) and values.str.fullmatch(number.pattern).all():
        return np.asarray(values.astype(float) >= float(first))
    return np.asarray(values >= first)


def by_file(catalog: Catalog, path: Path) -> Sequence[str]:
    """The part of each image as another run's split.csv says.

    Raises:
        PylorusError: If the file is none, or an image is not in it, has another class, group or content, or is gone.
    """
    try:
        said = pd.read_csv(path, dtype=str, keep_default_na=False).set_index("path")
        said = said[["class", "group", "split", "sha256"]]
    except (OSError, ValueError, KeyError) as error:
        raise PylorusError(f"data.split_file: {path} can't be read as a split.csv of Pylorus: {error}") from error
    table = catalog.table.set_index("path")
    for what, paths in (
        ("are not in it", table.index.difference(said.index)),
        ("stand in it and are gone", said.index.difference(table.index)),
    ):
        if len(paths):
            raise PylorusError(f"data.split_file: {path}: {len(paths)} images {what}:\n{listing(paths)}")
    said = said.loc[table.index]
    ours = {
        "content": ("sha256", table["sha256"]),
        "class": ("class", table["label"].map(dict(enumerate(catalog.classes)))),
        "group": ("group", table["group"]),
    }
    for what, (column, values) in ours.items():
        differs = table.index[np.asarray(said[column] != values)]
        if len(differs):
            raise PylorusError(
                f"data.split_file: {path}: {len(differs)} images have another {what} than when the split was made:\n"
                f"{listing(differs)}"
            )
    return list(said["split"])
