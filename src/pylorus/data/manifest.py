"""A CSV or Parquet file with a row an image, as a catalog.

Columns of the file:

=======  ==========================================================================================
path     below data.root, or below the manifest's own folder; required
label    name of the class; required
group    the patient, or what stands in for one; data.group finds it in the path instead
split    train, val or test, in every row or in none
others   kept under their names, for splits by a column and for subgroup tables: device, site, age …
=======  ==========================================================================================
"""

from pathlib import Path

import pandas as pd

from pylorus.columns import ABOUT
from pylorus.data.catalog import SPLIT_FOLDERS, Catalog, completed, groups_of
from pylorus.data.reading import AS_THEY_ARE, Reading
from pylorus.errors import PylorusError, did_you_mean, listing

REQUIRED = ("path", "label")
KNOWN = (*REQUIRED, "group", "split")


def read_manifest(
    manifest: Path,
    *,
    root: Path | None = None,
    classes: list[str] | None = None,
    short_names: list[str] | None = None,
    group: str | None = None,
    reading: Reading = AS_THEY_ARE,
) -> Catalog:
    """The catalog of a manifest.

    Args:
        manifest: The file, .csv or .parquet.
        root: Folder below which its paths lie; None: the manifest's own.
        classes: Names of the classes in the order of the labels; None: those found, sorted.
        short_names: One a class; None: the classes' names.
        group: Regular expression that finds the patient in a path; None: the column group, where there is one.
        reading: What is kept of the files, and what becomes of those that can't be read.

    Raises:
        PylorusError: If the file or an image is missing, unreadable or not as said above; the message names it.
    """
    table = manifest_rows(manifest)
    place = root if root is not None else manifest.parent
    names = _settled_classes(table["class"], classes, manifest)
    absent = [path for path in table["path"] if not (place / path).is_file()]
    if absent and (reading.on_error == "fail" or len(absent) == len(table)):
        raise PylorusError(
            f"{manifest}: {len(absent)} of {len(table)} files are not below {place}:\n{listing(absent)}\n"
            "Set data.root to the folder below which the paths lie."
        )
    grouped = group is not None or "group" in table
    if group is not None or not grouped:
        table["group"] = groups_of(list(table["path"]), group)
    return completed(table, place, names, short_names=short_names, grouped=grouped, reading=reading)


def manifest_rows(manifest: Path) -> pd.DataFrame:
    """The rows of a manifest: path, class, split, group where there is such a column, and about/…; no file is opened.

    Raises:
        PylorusError: If the table itself is missing, unreadable or not as said above; the message names it.
    """
    rows = _read(manifest)
    _check_columns(rows, manifest)
    table = pd.DataFrame({"path": rows["path"], "class": rows["label"], "split": _splits(rows, manifest)})
    if "group" in rows:
        table["group"] = rows["group"]
    for name in rows.columns:
        if name not in KNOWN:
            table[ABOUT + name] = rows[name]
    return table


def _read(manifest: Path) -> pd.DataFrame:
    """The file as text, empty where it holds nothing."""
    if not manifest.is_file():
        raise PylorusError(f"data.manifest: found {manifest}, expected a file that exists.")
    try:
        if manifest.suffix.lower() == ".parquet":
            found = pd.read_parquet(manifest)
        elif manifest.suffix.lower() == ".csv":
            found = pd.read_csv(manifest, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        else:
            raise PylorusError(f"data.manifest: found {manifest.name}, expected a file that ends in .csv or .parquet.")
    except (ValueError, OSError) as error:  # pandas' and pyarrow's errors derive from these
        raise PylorusError(f"{manifest}: can't be read as a table: {error}") from error
    text = found.astype(object).where(found.notna(), "").astype(str)
    return pd.DataFrame({name: text[name].str.strip() for name in text.columns})


def _check_columns(rows: pd.DataFrame, manifest: Path) -> None:
    for name in REQUIRED:
        if name not in rows.columns:
            raise PylorusError(
                f'{manifest}: there is no column "{name}".{did_you_mean(name, [str(other) for other in rows.columns])} '
                f"Found: {', '.join(map(str, rows.columns))}."
            )
    if rows.empty:
        raise PylorusError(f"{manifest}: holds no row, expected one an image.")
    for name in [name for name in KNOWN if name in rows and name != "split"]:
        empty = rows.index[rows[name] == ""]
        if len(empty):
            # A spreadsheet counts its header as row 1.
            raise PylorusError(
                f'{manifest}: column "{name}" is empty in {len(empty)} rows, the first is {empty[0] + 2}.'
            )
    twice = rows["path"][rows["path"].duplicated()]
    if len(twice):
        raise PylorusError(f"{manifest}: {twice.nunique()} paths stand in several rows:\n{listing(twice.unique())}")


def _settled_classes(labels: pd.Series, wanted: list[str] | None, manifest: Path) -> tuple[str, ...]:
    found = sorted(set(labels))
    names = wanted if wanted is not None else found
    if len(names) < 2:
        raise PylorusError(f'{manifest}: column "label" names {len(names)} class, expected at least two.')
    for unknown in [name for name in found if name not in names]:
        raise PylorusError(
            f'{manifest}: label "{unknown}" is not among data.classes ({", ".join(names)}).'
            f"{did_you_mean(unknown, names)}"
        )
    for missing in [name for name in names if name not in found]:
        raise PylorusError(
            f'{manifest}: no row has label "{missing}".{did_you_mean(missing, found)} Found: {", ".join(found)}.'
        )
    return tuple(names)


def _splits(rows: pd.DataFrame, manifest: Path) -> pd.Series:
    if "split" not in rows or (rows["split"] == "").all():
        return pd.Series("", index=rows.index)
    found = rows["split"].str.lower().map(SPLIT_FOLDERS)
    unknown = rows["split"][found.isna()]
    if len(unknown):
        raise PylorusError(
            f'{manifest}: column "split" holds "{unknown.iloc[0]}" in row {unknown.index[0] + 2}, '
            "expected train, val or test in every row, or in none."
        )
    absent = {"train", "test"} - set(found)
    if absent:
        raise PylorusError(f'{manifest}: column "split" names no image of {" and ".join(sorted(absent))}.')
    return found
