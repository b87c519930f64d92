"""Split a catalog into training, validation and test images: grouped by patient and copies, stratified by class."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.chance import compute_seed
from pylorus.config import DataConfig
from pylorus.data.audit.duplicates import Copies, find_copies
from pylorus.data.audit.thresholds import Thresholds
from pylorus.data.catalog import Catalog
from pylorus.data.draw import draw_part
from pylorus.data.folds import stratified_folds
from pylorus.data.leaks import Pair, check_labels, collect_copy_pairs, find_leaks, format_leaks, merge_linked_groups
from pylorus.data.shares import explain_split, get_requested_fractions
from pylorus.data.test_set import read_split_file, select_by_column, select_by_fold_column
from pylorus.errors import PylorusError
from pylorus.files import write_atomically

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
COLUMNS = ["sample_id", "path", "class", "group", "split", "sha256"]
LARGE_UNIT = 0.2
"""Fraction of all images that copies link to one unit, above which the user is warned."""


@dataclass(frozen=True)
class Split:
    """Assignment of images to train, val and test.

    Attributes:
        table: The catalog's rows, each with its split.
        leaks: Patients and copies in more than one split; empty unless the user accepts leaks.
        asked: Requested fraction of each split that was drawn at random.
        joined: Number of groups that are kept together with others because of copies.
    """

    table: pd.DataFrame
    leaks: tuple[Pair, ...]
    asked: Mapping[str, float]
    joined: int

    def explain_deviations(self, classes: tuple[str, ...], *, grouped: bool) -> tuple[str, ...]:
        """Return sentences about splits that deviate from the requested fractions or have few groups of a class."""
        return explain_split(_add_class_names(self.table, classes), self.asked, grouped=grouped, joined=self.joined)


def split_catalog(
    catalog: Catalog, data: DataConfig, *, copies: Copies | None = None, parts: Sequence[str] | None = None
) -> Split:
    """Assign every row of the catalog to train, val or test.

    A split defined by folders, a manifest or another run is used as it is. Otherwise, the test set is a fold, the
    images with certain values of a column, or drawn from all images; the validation set is drawn from the training
    images. A drawn split keeps each group together, and with it all groups that contain copies of its images.

    Args:
        catalog: The image set.
        data: How to split, the fractions and the seed. Folds with the same seed partition the image set.
        copies: Copies among the catalog's files; None: they are searched for.
        parts: Split of each row, if a run resumes with the split that it started with.

    Raises:
        PylorusError: If a class is missing from a split, a group or a copy is in two splits, or one image has two
            labels; the message names it.
    """
    table, validation = catalog.table.copy(), data.validation
    given_splits = set(table["split"]) - {""}
    pairs = collect_copy_pairs(catalog, find_copies(catalog.facts, Thresholds()) if copies is None else copies)
    check_labels(catalog, pairs)
    table["bundle"] = merge_linked_groups(catalog, pairs)
    joined = _count_linked_groups(table, catalog)
    if parts is not None:
        table["split"] = list(parts)
    else:
        _select_test(table, catalog, data, pairs)
    if validation == "cut" and not (table["split"] == "val").any():
        _draw_rows(table, "val", share=data.val_fraction, later=0.0, split_seed=data.split_seed, catalog=catalog)
    if validation == "test" and (table["split"] == "val").any():
        raise PylorusError(
            f"data.validation: found test, but {catalog.root} has a val folder. Remove data.validation to "
            "validate on that folder, or move its images to train."
        )
    _check_split_classes(table, catalog, data)
    found_leaks = find_leaks(table, pairs, grouped=catalog.grouped)
    if found_leaks and not data.accept_leaks:
        raise PylorusError(format_leaks(table, found_leaks))
    requested = get_requested_fractions(
        given=given_splits,
        chosen=data.fold is not None or data.test_column is not None,
        fixed=data.split_file is not None,
        validation=validation,
        test_fraction=data.test_fraction,
        val_fraction=data.val_fraction,
    )
    return Split(table.drop(columns="bundle"), tuple(found_leaks), requested, joined)


def _select_test(table: pd.DataFrame, catalog: Catalog, data: DataConfig, pairs: Sequence[Pair]) -> None:
    """Assign each row to test or train, unless folders or a manifest define the split."""
    if data.split_file is not None:
        table["split"] = read_split_file(catalog, Path(data.split_file))
    elif data.test_column is not None:
        table["split"] = np.where(select_by_column(catalog, data), "test", "train")
    elif (table["split"] != "").any():
        if data.fold is not None:
            raise PylorusError(
                f"data.fold: found {data.fold}, but {catalog.root} has its own train and test split. Remove "
                "one of the two."
            )
    elif data.fold_column is not None:
        table["split"] = np.where(select_by_fold_column(catalog, data, pairs), "test", "train")
    elif data.fold is not None:
        table["split"] = np.where(_is_in_fold(table, catalog, data), "test", "train")
    else:
        table["split"] = "train"
        later = data.val_fraction if data.validation == "cut" else 0.0
        _draw_rows(table, "test", share=data.test_fraction, later=later, split_seed=data.split_seed, catalog=catalog)


def _is_in_fold(table: pd.DataFrame, catalog: Catalog, data: DataConfig) -> NDArray[np.bool_]:
    counts = table.groupby("label")["bundle"].nunique()
    if counts.min() < data.folds:
        raise PylorusError(
            f'data.folds: found {data.folds}, but class "{catalog.classes[int(counts.to_numpy().argmin())]}" has only '
            f"{counts.min()} {_get_group_noun(catalog)}: expected at least one per fold."
        )
    seed = compute_seed(data.split_seed, "split", "folds") % (1 << 32)
    fold = stratified_folds(table["label"].to_numpy(), table["bundle"].to_numpy(), folds=data.folds, seed=seed)
    return np.asarray(fold == data.fold)


def write_split(table: pd.DataFrame, classes: tuple[str, ...], path: Path) -> str:
    """Write split.csv and return its SHA-256, by which tables cite the split."""
    table = _add_class_names(table, classes)
    with write_atomically(path) as temporary:
        table[COLUMNS].sort_values("path").to_csv(temporary, index=False, lineterminator="\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _draw_rows(
    table: pd.DataFrame, part: str, *, share: float, later: float, split_seed: int, catalog: Catalog
) -> None:
    """Move whole groups from train to `part`: about `share` of the training rows of each class."""
    train = table.index[table["split"] == "train"].to_numpy()
    counts = table.loc[train].groupby("label")["bundle"].nunique()
    needed = 3 if later else 2
    if counts.min() < needed:
        rarest = catalog.classes[int(counts.index.to_numpy()[counts.to_numpy().argmin()])]
        raise PylorusError(
            f'class "{rarest}" has {counts.min()} {_get_group_noun(catalog)} to draw {part} from, expected at least '
            f"{needed}. Add some, or define the split by folders train, val and test."
        )
    rows = table.loc[train]
    drawn = draw_part(
        rows["label"].to_numpy(),
        rows["bundle"].to_numpy(),
        share=share,
        later=later,
        seed=compute_seed(split_seed, "split", part) % (1 << 32),
    )
    table.loc[train[drawn], "split"] = part


def _check_split_classes(table: pd.DataFrame, catalog: Catalog, data: DataConfig) -> None:
    for part in ("train", "test") if data.validation == "test" else SPLITS:
        present = set(table.loc[table["split"] == part, "label"])
        missing = [name for label, name in enumerate(catalog.classes) if label not in present]
        if not missing:
            continue
        count = int((table["label"] == catalog.classes.index(missing[0])).sum())
        if data.fold_column is not None and part == "test":
            remedy = "Remove this value from data.fold: performance on the class can't be measured with it."
        elif data.fold_column is not None and part == "train":
            remedy = f"All of its {count} images have {data.fold_column}={data.fold}: remove this value from data.fold."
        elif data.fold is not None and data.fold_column is None:
            remedy = f"Add images to its {count}, or choose another data.split_seed or fewer data.folds."
        else:
            remedy = f"Add images to its {count}, or define the split by folders train, val and test."
        raise PylorusError(f'class "{missing[0]}" has no image in {part}. {remedy}')


def _count_linked_groups(table: pd.DataFrame, catalog: Catalog) -> int:
    """Count and log the groups that copies link to others; warn if too many are linked for a balanced split."""
    units = table.groupby("bundle").agg(images=("group", "size"), groups=("group", "nunique"))
    linked = units[units["groups"] > 1]
    if linked.empty:
        return 0
    noun = _get_group_noun(catalog)
    log.info(
        "copies   link %d %s into %d %s, each kept in one split",
        linked["groups"].sum(),
        noun,
        len(linked),
        "unit" if len(linked) == 1 else "units",
    )
    if linked["images"].max() > LARGE_UNIT * len(table):
        log.warning(
            "copies   %.0f %% of all images are linked by copies and must be in the same split; %s",
            100 * linked["images"].max() / len(table),
            "inspect them with pylorus audit",
        )
    return int(linked["groups"].sum())


def _add_class_names(table: pd.DataFrame, classes: tuple[str, ...]) -> pd.DataFrame:
    return table.assign(**{"class": np.array(classes, dtype=object)[table["label"]]})


def _get_group_noun(catalog: Catalog) -> str:
    return "patients" if catalog.grouped else "images"
