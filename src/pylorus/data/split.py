"""Training, validation and test images: by patient, stratified by class, frozen to a file with hashes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from pylorus.chance import derived_seed
from pylorus.config import DataConfig
from pylorus.data.catalog import Catalog
from pylorus.data.test_set import by_column, by_file
from pylorus.errors import PylorusError, listing
from pylorus.files import whole

SPLITS = ("train", "val", "test")
COLUMNS = ["sample_id", "path", "class", "group", "split", "sha256"]
FINEST = 20
"""A part is cut as a number of folds out of at most so many."""


def split(catalog: Catalog, data: DataConfig, *, seed: int = 0) -> pd.DataFrame:
    """The catalog's table with every row in train, val or test.

    What folders, a manifest or another run's split say stands. The test set is otherwise a fold, the images of a
    column's values, or cut from all images; the validation set is cut from the training images. A group is never cut
    in two.

    Args:
        catalog: The image set.
        data: Which of these, and the shares.
        seed: Of the cuts. Folds of one seed are parts of one whole.

    Raises:
        PylorusError: If a class is missing from a part, or a group or an image lies in two; the message names it.
    """
    table, validation = catalog.table.copy(), data.validation
    chosen = _chosen_parts(catalog, data)
    if chosen is not None:
        table["split"] = chosen
    elif (table["split"] == "").all():
        table["split"] = "train"
        if data.fold is not None:
            _hold_out(table, data.fold, data.folds, seed=derived_seed(seed, "split", "folds"), catalog=catalog)
        else:
            _cut(table, "test", share=data.test_fraction, seed=derived_seed(seed, "split", "test"), catalog=catalog)
    elif data.fold is not None:
        raise PylorusError(
            f"data.fold: found {data.fold}, but {catalog.root} gives train and test itself. Leave one of the two out."
        )
    if validation == "cut" and not (table["split"] == "val").any():
        _cut(table, "val", share=data.val_fraction, seed=derived_seed(seed, "split", "val"), catalog=catalog)
    if validation == "test" and (table["split"] == "val").any():
        raise PylorusError(
            f"data.validation: found test, but {catalog.root} has a val folder. Leave data.validation out to "
            "validate on it, or move its images to train."
        )
    _check_classes(table, catalog, parts=("train", "test") if validation == "test" else SPLITS)
    if not data.accept_leaks:
        _check_leaks(table, catalog.grouped)
    return table


def _chosen_parts(catalog: Catalog, data: DataConfig) -> Sequence[str] | None:
    if data.split_file is not None:
        return by_file(catalog, Path(data.split_file))
    if data.test_column is not None:
        return list(np.where(by_column(catalog, data), "test", "train"))
    return None


def _hold_out(table: pd.DataFrame, fold: int, folds: int, *, seed: int, catalog: Catalog) -> None:
    counts = table.groupby("label")["group"].nunique()
    if counts.min() < folds:
        raise PylorusError(
            f'data.folds: found {folds}, but class "{catalog.classes[int(counts.to_numpy().argmin())]}" has only '
            f"{counts.min()} {_groups_word(catalog)}: expected at least one for each fold."
        )
    held = _folds(table["label"].to_numpy(), table["group"].to_numpy(), folds=folds, seed=seed) == fold
    table.loc[held, "split"] = "test"


def write_split(table: pd.DataFrame, classes: tuple[str, ...], path: Path) -> str:
    """Writes split.csv and gives its hash, by which tables cite the split."""
    table = table.assign(**{"class": [classes[label] for label in table["label"]]})
    with whole(path) as temporary:
        table[COLUMNS].sort_values("path").to_csv(temporary, index=False, lineterminator="\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _cut(table: pd.DataFrame, part: str, *, share: float, seed: int, catalog: Catalog) -> None:
    """Moves about `share` of the training rows to `part`, whole groups, stratified by class."""
    train = table.index[table["split"] == "train"].to_numpy()
    labels, groups = table["label"].to_numpy()[train], table["group"].to_numpy()[train]
    counts = table.loc[train].groupby("label")["group"].nunique()
    rarest = str(catalog.classes[int(counts.to_numpy().argmin())])
    parts_left = 3 if part == "test" else 2
    if counts.min() < parts_left:
        raise PylorusError(
            f'class "{rarest}" has {counts.min()} {_groups_word(catalog)} to cut {part} from, '
            f"expected at least {parts_left}: more images, or give the split in folders train, val and test."
        )
    folds = int(min(FINEST, counts.min()))
    taken = max(1, round(share * folds))
    chosen = _folds(labels, groups, folds=folds, seed=seed) < taken
    table.loc[train[chosen], "split"] = part


def _folds(labels: NDArray[np.int64], groups: NDArray[np.str_], *, folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each row: groups whole, classes spread evenly."""
    fold = np.empty(len(labels), dtype=np.int64)
    cutter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed % (1 << 32))
    for number, (_, held_out) in enumerate(cutter.split(np.zeros(len(labels)), labels, groups)):
        fold[held_out] = number
    return fold


def _check_classes(table: pd.DataFrame, catalog: Catalog, *, parts: tuple[str, ...]) -> None:
    for part in parts:
        present = set(table.loc[table["split"] == part, "label"])
        missing = [name for label, name in enumerate(catalog.classes) if label not in present]
        if missing:
            raise PylorusError(
                f'class "{missing[0]}" has no image in {part}. Add some to its '
                f"{(table['label'] == catalog.classes.index(missing[0])).sum()}, choose another seed, or "
                "give the split in folders train, val and test."
            )


def _check_leaks(table: pd.DataFrame, grouped: bool) -> None:
    for column, what in (("group", "patients"), ("sha256", "images, by content,")):
        if column == "group" and not grouped:
            continue
        parts = table.groupby(column)["split"].nunique()
        leaking = table[table[column].isin(parts.index[parts > 1])].sort_values([column, "split"])
        if len(leaking):
            count = leaking[column].nunique()
            raise PylorusError(
                f"{count} {what} lie in two parts of the split:\n{listing(leaking['path'])}\n"
                "The test would be no test. Move them to one side, or accept it with data.accept_leaks=true."
            )


def _groups_word(catalog: Catalog) -> str:
    return "patients" if catalog.grouped else "images"
