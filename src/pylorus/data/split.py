"""Training, validation and test images: by patient, copies together, each class in its share, frozen to a file."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
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
from pylorus.data.draw import draw_part
from pylorus.data.folds import stratified_folds
from pylorus.data.leaks import Pair, bundles, check_labels, leaks, leaks_said, pairs_of
from pylorus.data.shares import describe_split, find_asked_shares
from pylorus.data.test_set import by_column, by_file, by_fold_column
from pylorus.errors import PylorusError
from pylorus.files import whole

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
COLUMNS = ["sample_id", "path", "class", "group", "split", "sha256"]
MUCH = 0.2
"""A share of all images that hangs together by copies, from which on the user is warned."""


@dataclass(frozen=True)
class Split:
    """Which image lies where.

    Attributes:
        table: The catalog's rows, each in train, val or test.
        leaks: What lies in two parts all the same: only where the user accepts it.
        asked: The share that each part drawn by chance was to hold.
        joined: Groups that are kept together with others because they hold copies of each other's images.
    """

    table: pd.DataFrame
    leaks: tuple[Pair, ...]
    asked: Mapping[str, float]
    joined: int

    def describe(self, classes: tuple[str, ...], *, grouped: bool) -> tuple[str, ...]:
        """Sentences about shares that are not those asked for and about parts with few groups of a class."""
        return describe_split(_with_class_names(self.table, classes), self.asked, grouped=grouped, joined=self.joined)


def split(
    catalog: Catalog, data: DataConfig, *, copies: Copies | None = None, parts: Sequence[str] | None = None
) -> Split:
    """Puts every row of the catalog in train, val or test.

    What folders, a manifest or another run's split say stands. The test set is otherwise a fold, the images of a
    column's values, or drawn from all images; the validation set is drawn from the training images. What is drawn here
    keeps a group in one part, and with it all groups that hold copies of its images.

    Args:
        catalog: The image set.
        data: Which of these, the shares and the seed. Folds of one seed are parts of one whole.
        copies: What the catalog's files hold twice; None: it is looked for.
        parts: The part of each row, where a run goes on with the split that it began with.

    Raises:
        PylorusError: If a class is missing from a part, a group or a copy lies in two, or one content has two labels;
            the message names it.
    """
    table, validation = catalog.table.copy(), data.validation
    given = set(table["split"]) - {""}
    pairs = pairs_of(catalog, find_copies(catalog.facts, Thresholds()) if copies is None else copies)
    check_labels(catalog, pairs)
    table["bundle"] = bundles(catalog, pairs)
    joined = _count_joined(table, catalog)
    if parts is not None:
        table["split"] = list(parts)
    else:
        _assign_test(table, catalog, data, pairs)
    if validation == "cut" and not (table["split"] == "val").any():
        _draw(table, "val", share=data.val_fraction, later=0.0, split_seed=data.split_seed, catalog=catalog)
    if validation == "test" and (table["split"] == "val").any():
        raise PylorusError(
            f"data.validation: found test, but {catalog.root} has a val folder. Leave data.validation out to "
            "validate on it, or move its images to train."
        )
    _check_classes(table, catalog, data)
    found = leaks(table, pairs, grouped=catalog.grouped)
    if found and not data.accept_leaks:
        raise PylorusError(leaks_said(table, found))
    asked = find_asked_shares(
        given=given,
        chosen=data.fold is not None or data.test_column is not None,
        fixed=data.split_file is not None,
        validation=validation,
        test_fraction=data.test_fraction,
        val_fraction=data.val_fraction,
    )
    return Split(table.drop(columns="bundle"), tuple(found), asked, joined)


def _assign_test(table: pd.DataFrame, catalog: Catalog, data: DataConfig, pairs: Sequence[Pair]) -> None:
    """Puts each row in test or in train, unless the parts are given."""
    if data.split_file is not None:
        table["split"] = by_file(catalog, Path(data.split_file))
    elif data.test_column is not None:
        table["split"] = np.where(by_column(catalog, data), "test", "train")
    elif (table["split"] != "").any():
        if data.fold is not None:
            raise PylorusError(
                f"data.fold: found {data.fold}, but {catalog.root} gives train and test itself. Leave one of the two "
                "out."
            )
    elif data.fold_column is not None:
        table["split"] = np.where(by_fold_column(catalog, data, pairs), "test", "train")
    elif data.fold is not None:
        table["split"] = np.where(_is_in_fold(table, catalog, data), "test", "train")
    else:
        table["split"] = "train"
        later = data.val_fraction if data.validation == "cut" else 0.0
        _draw(table, "test", share=data.test_fraction, later=later, split_seed=data.split_seed, catalog=catalog)


def _is_in_fold(table: pd.DataFrame, catalog: Catalog, data: DataConfig) -> NDArray[np.bool_]:
    counts = table.groupby("label")["bundle"].nunique()
    if counts.min() < data.folds:
        raise PylorusError(
            f'data.folds: found {data.folds}, but class "{catalog.classes[int(counts.to_numpy().argmin())]}" has only '
            f"{counts.min()} {_groups_word(catalog)}: expected at least one for each fold."
        )
    seed = derived_seed(data.split_seed, "split", "folds") % (1 << 32)
    fold = stratified_folds(table["label"].to_numpy(), table["bundle"].to_numpy(), folds=data.folds, seed=seed)
    return np.asarray(fold == data.fold)


def write_split(table: pd.DataFrame, classes: tuple[str, ...], path: Path) -> str:
    """Writes split.csv and gives its hash, by which tables cite the split."""
    table = _with_class_names(table, classes)
    with whole(path) as temporary:
        table[COLUMNS].sort_values("path").to_csv(temporary, index=False, lineterminator="\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _draw(table: pd.DataFrame, part: str, *, share: float, later: float, split_seed: int, catalog: Catalog) -> None:
    """Moves about `share` of the training rows of each class to `part`, whole groups."""
    train = table.index[table["split"] == "train"].to_numpy()
    counts = table.loc[train].groupby("label")["bundle"].nunique()
    parts_left = 3 if later else 2
    if counts.min() < parts_left:
        rarest = catalog.classes[int(counts.index.to_numpy()[counts.to_numpy().argmin()])]
        raise PylorusError(
            f'class "{rarest}" has {counts.min()} {_groups_word(catalog)} to cut {part} from, '
            f"expected at least {parts_left}: more images, or give the split in folders train, val and test."
        )
    rows = table.loc[train]
    chosen = draw_part(
        rows["label"].to_numpy(),
        rows["bundle"].to_numpy(),
        share=share,
        later=later,
        seed=derived_seed(split_seed, "split", part) % (1 << 32),
    )
    table.loc[train[chosen], "split"] = part


def _check_classes(table: pd.DataFrame, catalog: Catalog, data: DataConfig) -> None:
    for part in ("train", "test") if data.validation == "test" else SPLITS:
        present = set(table.loc[table["split"] == part, "label"])
        missing = [name for label, name in enumerate(catalog.classes) if label not in present]
        if not missing:
            continue
        count = int((table["label"] == catalog.classes.index(missing[0])).sum())
        if data.fold_column is not None and part == "test":
            remedy = "Leave this value out of data.fold: the class can't be measured on it."
        elif data.fold_column is not None and part == "train":
            remedy = (
                f"All of its {count} images have {data.fold_column}={data.fold}: leave this value out of data.fold."
            )
        elif data.fold is not None and data.fold_column is None:
            remedy = f"Add some to its {count}, or choose another data.split_seed or fewer data.folds."
        else:
            remedy = f"Add some to its {count}, or give the split in folders train, val and test."
        raise PylorusError(f'class "{missing[0]}" has no image in {part}. {remedy}')


def _count_joined(table: pd.DataFrame, catalog: Catalog) -> int:
    """How many groups copies tie to others; says so, and warns where so many hang together that no cut can be even."""
    sizes = table.groupby("bundle").agg(images=("group", "size"), groups=("group", "nunique"))
    joined = sizes[sizes["groups"] > 1]
    if joined.empty:
        return 0
    what = _groups_word(catalog)
    log.info("copies   tie %d %s together to %d, each cut as one", joined["groups"].sum(), what, len(joined))
    if joined["images"].max() > MUCH * len(table):
        log.warning(
            "copies   %.0f %% of all images hang together by copies and can only lie in one part: %s",
            100 * joined["images"].max() / len(table),
            "look at them with pylorus audit",
        )
    return int(joined["groups"].sum())


def _with_class_names(table: pd.DataFrame, classes: tuple[str, ...]) -> pd.DataFrame:
    return table.assign(**{"class": np.array(classes, dtype=object)[table["label"]]})


def _groups_word(catalog: Catalog) -> str:
    return "patients" if catalog.grouped else "images"
