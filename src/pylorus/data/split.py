"""Training, validation and test images: by patient, copies together, stratified by class, frozen to a file."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.chance import derived_seed
from pylorus.config import DataConfig
from pylorus.data.audit.duplicates import Copies, find_copies
from pylorus.data.audit.thresholds import Thresholds
from pylorus.data.catalog import Catalog
from pylorus.data.folds import stratified_folds
from pylorus.data.leaks import Pair, bundles, check_labels, leaks, leaks_said, pairs_of
from pylorus.data.test_set import by_column, by_file
from pylorus.errors import PylorusError
from pylorus.files import whole

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
COLUMNS = ["sample_id", "path", "class", "group", "split", "sha256"]
MUCH = 0.2
"""A share of all images that hangs together by copies, from which on the user is warned."""
FINEST = 20
"""A part is cut as a number of folds out of at most so many."""


@dataclass(frozen=True)
class Split:
    """Which image lies where.

    Attributes:
        table: The catalog's rows, each in train, val or test.
        leaks: What lies in two parts all the same: only where the user accepts it.
    """

    table: pd.DataFrame
    leaks: tuple[Pair, ...]


def split(catalog: Catalog, data: DataConfig, *, seed: int = 0, copies: Copies | None = None) -> Split:
    """Puts every row of the catalog in train, val or test.

    What folders, a manifest or another run's split say stands. The test set is otherwise a fold, the images of a
    column's values, or cut from all images; the validation set is cut from the training images. What is cut here keeps
    a group in one part, and with it all groups that hold copies of its images.

    Args:
        catalog: The image set.
        data: Which of these, and the shares.
        seed: Of the cuts. Folds of one seed are parts of one whole.
        copies: What the catalog's files hold twice; None: it is looked for.

    Raises:
        PylorusError: If a class is missing from a part, a group or a copy lies in two, or one content has two labels;
            the message names it.
    """
    table, validation = catalog.table.copy(), data.validation
    pairs = pairs_of(catalog, find_copies(catalog.facts, Thresholds()) if copies is None else copies)
    check_labels(catalog, pairs)
    table["bundle"] = bundles(catalog, pairs)
    _tell_joined(table, catalog)
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
    found = leaks(table, pairs, grouped=catalog.grouped)
    if found and not data.accept_leaks:
        raise PylorusError(leaks_said(table, found))
    return Split(table.drop(columns="bundle"), tuple(found))


def _chosen_parts(catalog: Catalog, data: DataConfig) -> Sequence[str] | None:
    if data.split_file is not None:
        return by_file(catalog, Path(data.split_file))
    if data.test_column is not None:
        return list(np.where(by_column(catalog, data), "test", "train"))
    return None


def _hold_out(table: pd.DataFrame, fold: int, folds: int, *, seed: int, catalog: Catalog) -> None:
    counts = table.groupby("label")["bundle"].nunique()
    if counts.min() < folds:
        raise PylorusError(
            f'data.folds: found {folds}, but class "{catalog.classes[int(counts.to_numpy().argmin())]}" has only '
            f"{counts.min()} {_groups_word(catalog)}: expected at least one for each fold."
        )
    held = _folds(table, folds=folds, seed=seed) == fold
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
    counts = table.loc[train].groupby("label")["bundle"].nunique()
    rarest = str(catalog.classes[int(counts.to_numpy().argmin())])
    parts_left = 3 if part == "test" else 2
    if counts.min() < parts_left:
        raise PylorusError(
            f'class "{rarest}" has {counts.min()} {_groups_word(catalog)} to cut {part} from, '
            f"expected at least {parts_left}: more images, or give the split in folders train, val and test."
        )
    folds = int(min(FINEST, counts.min()))
    taken = max(1, round(share * folds))
    chosen = _folds(table.loc[train], folds=folds, seed=seed) < taken
    table.loc[train[chosen], "split"] = part


def _folds(rows: pd.DataFrame, *, folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of each row: what must stay together stays together, classes are spread evenly."""
    return stratified_folds(rows["label"].to_numpy(), rows["bundle"].to_numpy(), folds=folds, seed=seed % (1 << 32))


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


def _tell_joined(table: pd.DataFrame, catalog: Catalog) -> None:
    """Says where copies tie groups together, and warns where so many hang together that a cut hardly can be even."""
    sizes = table.groupby("bundle").agg(images=("group", "size"), groups=("group", "nunique"))
    joined = sizes[sizes["groups"] > 1]
    if joined.empty:
        return
    what = _groups_word(catalog)
    log.info("copies   tie %d %s together to %d, each cut as one", joined["groups"].sum(), what, len(joined))
    if joined["images"].max() > MUCH * len(table):
        log.warning(
            "copies   %.0f %% of all images hang together by copies and can only lie in one part: %s",
            100 * joined["images"].max() / len(table),
            "look at them with pylorus audit",
        )


def _groups_word(catalog: Catalog) -> str:
    return "patients" if catalog.grouped else "images"
