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
from pylorus.errors import PylorusError, did_you_mean, listing


def by_column(catalog: Catalog, data: DataConfig) -> NDArray[np.bool_]:
    """Whether each image is tested on, by `data.test_column` and its values.

    Raises:
        PylorusError: If there is no such column or value, or a value is missing where an order is asked for.
    """
    known = [name.removeprefix(ABOUT) for name in catalog.table.columns if name.startswith(ABOUT)]
    name = str(data.test_column)
    if name not in known:
        raise PylorusError(
            f'data.test_column: the manifest has no further column "{name}".{did_you_mean(name, known)} '
            f"Found: {', '.join(known) or 'none'}."
        )
    values = catalog.table[ABOUT + name]
    if data.test_values is not None:
        for wanted in data.test_values:
            if not (values == wanted).any():
                raise PylorusError(
                    f'data.test_values: no image has "{wanted}" in column {name}.'
                    f"{did_you_mean(wanted, sorted(set(values)))}"
                )
        return np.asarray(values.isin(data.test_values))
    empty = catalog.table["path"][values == ""]
    if len(empty):
        raise PylorusError(f"data.test_from: {len(empty)} images have no value in column {name}:\n{listing(empty)}")
    return _from(values, str(data.test_from))


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
