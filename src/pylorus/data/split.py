"""Split a catalog into training, validation and test images: grouped by patient and copies, stratified by class.

The user may name the test images: those of a fold, of a column's values, or of another run. A resumed run gets its
split back, after a check that its images are unchanged.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.config.schema import DataConfig
from pylorus.core.distributed import compute_seed
from pylorus.core.errors import PylorusError, format_name_list, format_suggestion, normalize_name
from pylorus.core.formatting import format_count
from pylorus.core.io import check_digest, write_atomically, write_digest
from pylorus.core.privacy import MANIFEST_PREFIX
from pylorus.data.audit_findings import KINDS, Pair, Thresholds, count_leaks, find_leaks, format_leaks
from pylorus.data.catalog import Catalog, format_exclusion
from pylorus.data.leakage import (
    Copies,
    check_labels,
    collect_copy_pairs,
    find_copies,
    merge_linked_groups,
)
from pylorus.data.stratification import draw_part, explain_split, get_requested_fractions, stratified_folds

RESUME_HINT = "To resume this run, restore the images as they were; else start a new run."

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
        is_random: Whether the split seed has an effect: test or validation images, or the folds, are drawn with it.
    """

    table: pd.DataFrame
    leaks: tuple[Pair, ...]
    asked: Mapping[str, float]
    joined: int
    is_random: bool

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
    is_val_drawn = validation == "cut" and not (table["split"] == "val").any()
    if is_val_drawn:
        _draw_rows(table, "val", share=data.val_fraction, later=0.0, split_seed=data.split_seed, catalog=catalog)
    if validation == "test" and (table["split"] == "val").any():
        raise PylorusError(
            f"data.validation: found test, but {catalog.root} has a val folder. Remove data.validation to "
            "validate on that folder, or move its images to train."
        )
    _check_split_classes(table, catalog.classes, data)
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
    is_test_given = bool(given_splits) or any((data.test_column, data.fold_column, data.split_file))
    return Split(table.drop(columns="bundle"), tuple(found_leaks), requested, joined, is_val_drawn or not is_test_given)


def _select_test(table: pd.DataFrame, catalog: Catalog, data: DataConfig, pairs: Sequence[Pair]) -> None:
    """Assign each row to test or train, unless folders or a manifest define the split."""
    if data.split_file is not None:
        table["split"] = read_split_file(catalog, Path(data.split_file))
    elif data.test_column is not None:
        table["split"] = np.where(select_by_column(catalog.table, data), "test", "train")
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
            f"{counts.min()} {_get_group_noun(catalog)}: expected at least one per fold. Add some, use fewer folds, or "
            f"leave the class out with data.exclude."
        )
    seed = compute_seed(data.split_seed, "split", "folds") % (1 << 32)
    fold = stratified_folds(table["label"].to_numpy(), table["bundle"].to_numpy(), folds=data.folds, seed=seed)
    return np.asarray(fold == data.fold)


def _draw_rows(
    table: pd.DataFrame, part: str, *, share: float, later: float, split_seed: int, catalog: Catalog
) -> None:
    """Move whole groups from train to `part`: about `share` of the training rows of each class."""
    train = table.index[table["split"] == "train"].to_numpy()
    counts = table.loc[train].groupby("label")["bundle"].nunique()
    needed = 3 if later else 2
    if counts.min() < needed:
        noun = "patient" if catalog.grouped else "image"
        rarest = catalog.classes[int(counts.index.to_numpy()[counts.to_numpy().argmin()])]
        raise PylorusError(
            f'class "{rarest}" has {format_count(counts.min(), noun)} to draw {part} from, expected at least '
            f"{needed}. {_explain_rare_class(catalog, rarest, needed)}"
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


def _explain_rare_class(catalog: Catalog, name: str, needed: int) -> str:
    """Say what to do about a class of too few patients, and what may be the cause."""
    rows = catalog.table[catalog.table["label"] == catalog.classes.index(name)]
    cause = ""
    if catalog.grouped and len(rows) >= needed and rows["group"].nunique() < needed:
        cause = (
            f"All its {len(rows)} images count as {', '.join(sorted(set(rows['group'])))}: check that data.group "
            "or the column group tells patients apart. "
            if not catalog.hashed
            else ""
        )
    splits = "training, validation and test" if needed == 3 else "training and test"
    return (
        f"{cause}One patient's images can't be in two splits, and each of {splits} needs the class. Add "
        "some, or define the split by folders train, val and test. To go on without the class, type "
        f"{format_exclusion(name)}; to make it part of another one, move its images there."
    )


def _check_split_classes(table: pd.DataFrame, classes: Sequence[str], data: DataConfig) -> None:
    for part in ("train", "test") if data.validation == "test" else SPLITS:
        present = set(table.loc[table["split"] == part, "label"])
        missing = [name for label, name in enumerate(classes) if label not in present]
        if not missing:
            continue
        count = int((table["label"] == classes.index(missing[0])).sum())
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
    if table["bundle"].nunique() == table["group"].nunique():  # each bundle is one group
        return 0
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


@dataclass(frozen=True)
class RunImages:
    """The images of a run.

    Attributes:
        catalog: All images, with class names and short names.
        table: The catalog's rows, each with a split: train, val or test.
        split_hash: SHA-256 of split.csv, by which tables cite the split.
        validation: Split to validate on: val, or test in the original study's protocol.
    """

    catalog: Catalog
    table: pd.DataFrame
    split_hash: str
    validation: str

    def count_by_class(self, part: str) -> list[int]:
        """Count the images of each class in a split."""
        labels = self.table.loc[self.table["split"] == part, "label"]
        return [int((labels == label).sum()) for label in range(len(self.catalog.classes))]


def write_split(table: pd.DataFrame, classes: tuple[str, ...], path: Path) -> str:
    """Write split.csv and return its SHA-256, by which tables cite the split."""
    table = _add_class_names(table, classes)
    with write_atomically(path) as temporary:
        table[COLUMNS].sort_values("path").to_csv(temporary, index=False, lineterminator="\n")
    return write_digest(path)


def read_initial_split(table: pd.DataFrame, path: Path) -> list[str] | None:
    """Return the split of each image as a run wrote it at its start.

    A resumed run continues with this split, even if another version of Pylorus would draw a different one.

    Args:
        table: Rows with path, the same images as in split.csv.
        path: The run's split.csv.

    Returns:
        train, val or test for each row; None if the run had not written its split yet.
    """
    return list(_read_split_table(path).loc[table["path"].map(normalize_name), "split"]) if path.is_file() else None


def check_images_unchanged(table: pd.DataFrame, path: Path) -> None:
    """Check that the images are those in the split.csv that a run wrote at its start, if there is one.

    Args:
        table: Rows with path and sha256.
        path: The run's split.csv.

    Raises:
        PylorusError: If images are gone, new or changed; the message names them.
    """
    if not path.is_file():
        return
    initial = _read_split_table(path)
    current = table.set_index(table["path"].map(normalize_name))
    common = initial.index.intersection(current.index)
    differences = {
        "gone": initial.index.difference(current.index),
        "new": current.index.difference(initial.index),
        "changed": common[initial.loc[common, "sha256"].to_numpy() != current.loc[common, "sha256"].to_numpy()],
    }
    lines = [f"{name}: {change}" for change, names in differences.items() for name in names]
    if lines:
        raise PylorusError(
            f"{path.parent}: the images are not those that this run started with:\n{format_name_list(lines)}\n"
            f"{RESUME_HINT}"
        )


def _read_split_table(path: Path) -> pd.DataFrame:
    """Read a split.csv by path, in Unicode's composed form: a copy to another system may change the form of names."""
    check_digest(path)
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    return table.set_index(table["path"].map(normalize_name))


def read_split_file(catalog: Catalog, path: Path) -> Sequence[str]:
    """Return the split of each image from another run's split.csv.

    Raises:
        PylorusError: If the file is not a split.csv, or images were added, removed, or have another class, group or
            content.
    """
    try:
        saved = _read_split_table(path)[["class", "group", "split", "sha256"]]
    except (OSError, ValueError, KeyError) as error:
        raise PylorusError(f"data.split_file: can't read {path} as a split.csv of Pylorus: {error}") from error
    table = catalog.table.set_index(catalog.table["path"].map(normalize_name))
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


def select_by_column(table: pd.DataFrame, data: DataConfig) -> NDArray[np.bool_]:
    """Return whether each image is a test image according to `data.test_column` and its values.

    Raises:
        PylorusError: If there is no such column or value, or `data.test_from` is set and an image has no value.
    """
    name = str(data.test_column)
    values = _get_manifest_column(table, name, key="data.test_column")
    if data.test_values is not None:
        for wanted in data.test_values:
            if not (values == wanted).any():
                raise PylorusError(
                    f'data.test_values: no image has "{wanted}" in column {name}.'
                    f"{format_suggestion(wanted, sorted(set(values)))}\n"
                    f"Found:\n{format_name_list(sorted(set(values) - {''}), most=30)}"
                )
        return np.asarray(values.isin(data.test_values))
    empty = table["path"][values == ""]
    if len(empty):
        raise PylorusError(
            f"data.test_from: no value in column {name} for "
            f"{_format_image_count(len(empty))}:\n{format_name_list(empty)}"
        )
    return _is_at_least(values, str(data.test_from))


def read_fold_values(table: pd.DataFrame, column: str) -> pd.Series:
    """Return each image's value of `data.fold_column`, a column of the catalog, as text; each distinct value is a fold.

    Raises:
        PylorusError: If there is no such column, all images have the same value, or an image has none.
    """
    values = _get_manifest_column(table, column, key="data.fold_column")
    empty = table["path"][values == ""]
    if len(empty):
        raise PylorusError(
            f"data.fold_column: no value in column {column} for "
            f"{_format_image_count(len(empty))}:\n{format_name_list(empty)}\nIt is unknown whether they belong to the "
            f"test set. Add their values to the manifest, or remove them."
        )
    if values.nunique() < 2:
        raise PylorusError(
            f'data.fold_column: all images have "{values.iloc[0]}" in column {column}, expected at least two values.'
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
    column = str(data.fold_column)
    values = read_fold_values(catalog.table, column)
    known_values = sorted(set(values))
    wanted = _find_value(str(data.fold), known_values)
    if wanted is None:
        raise PylorusError(
            f'data.fold: no image has "{data.fold}" in column {column}.'
            f"{format_suggestion(str(data.fold), known_values)}\n"
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
            f"{pair.description}"
            for pair in found_leaks
        ]
        raise PylorusError(
            f"data.fold_column: found under more than one value of column {column}: {summary}.\n"
            f"{format_name_list(lines)}\n"
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


def _get_manifest_column(table: pd.DataFrame, name: str, *, key: str) -> pd.Series:
    """Return an additional column of the manifest from the catalog's table.

    Raises:
        PylorusError: If there is no such column; the message names the key and the columns that exist.
    """
    known = [column.removeprefix(MANIFEST_PREFIX) for column in table.columns if column.startswith(MANIFEST_PREFIX)]
    if name not in known:
        raise PylorusError(
            f'{key}: the manifest has no additional column "{name}".{format_suggestion(name, known)} '
            f"Found: {', '.join(known) or 'none'}."
        )
    return table[MANIFEST_PREFIX + name]


def _is_at_least(values: pd.Series, first: str) -> NDArray[np.bool_]:
    """Return which values are at least `first`: compared as numbers if all are, else as text, as for ISO dates."""
    number = re.compile(r"-?\d+(\.\d+)?")
    if number.fullmatch(first) and values.str.fullmatch(number.pattern).all():
        return np.asarray(values.astype(float) >= float(first))
    return np.asarray(values >= first)
