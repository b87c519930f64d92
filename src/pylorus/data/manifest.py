"""Read a manifest, a CSV or Parquet file with one row per image, as a catalog.

Columns of the file:

=======  ==========================================================================================
path     relative to data.root, or to the manifest's own folder; required
label    name of the class; required
group    the patient, or a stand-in for one; or data.group extracts it from the path
split    train, val or test, in every row or in none
others   stored under their names, for splits by a column and for subgroup tables: device, site, age …
=======  ==========================================================================================
"""

from pathlib import Path

import pandas as pd

from pylorus.columns import ABOUT
from pylorus.data.catalog import SPLIT_FOLDERS, Catalog, build_catalog, extract_groups
from pylorus.data.reading import DEFAULT_READ_OPTIONS, ReadOptions
from pylorus.errors import PylorusError, format_name_list, format_suggestion

REQUIRED = ("path", "label")
KNOWN = (*REQUIRED, "group", "split")


def read_manifest(
    manifest: Path,
    *,
    root: Path | None = None,
    classes: list[str] | None = None,
    short_names: list[str] | None = None,
    group: str | None = None,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
) -> Catalog:
    """Build the catalog of a manifest.

    Args:
        manifest: The file, .csv or .parquet.
        root: Folder that its paths are relative to; None: the manifest's own folder.
        classes: Names of the classes in the order of the labels; None: all labels found, sorted.
        short_names: One per class; None: the class names.
        group: Regular expression that matches the patient in a path; None: the column group, if there is one.
        reading: Where facts are cached, and what to do with files that can't be read.

    Raises:
        PylorusError: If the manifest or an image is missing, unreadable or not as described above; it is named.
    """
    table = read_manifest_rows(manifest)
    folder = root if root is not None else manifest.parent
    class_names = _resolve_manifest_classes(table["class"], classes, manifest)
    missing = [path for path in table["path"] if not (folder / path).is_file()]
    if missing and (reading.on_error == "fail" or len(missing) == len(table)):
        raise PylorusError(
            f"{manifest}: {len(missing)} of {len(table)} files do not exist below {folder}:\n{format_name_list(missing)}\n"
            "Set data.root to the folder that the paths are relative to."
        )
    grouped = group is not None or "group" in table
    if group is not None or not grouped:
        table["group"] = extract_groups(list(table["path"]), group)
    return build_catalog(table, folder, class_names, short_names=short_names, grouped=grouped, reading=reading)


def read_manifest_rows(manifest: Path) -> pd.DataFrame:
    """Read the rows of a manifest: path, class, split, about/… and, if there is such a column, group. Opens no image.

    Raises:
        PylorusError: If the table itself is missing, unreadable or not as described above; the message names it.
    """
    rows = _read_manifest_table(manifest)
    _check_manifest_columns(rows, manifest)
    table = pd.DataFrame(
        {"path": rows["path"], "class": rows["label"], "split": _parse_manifest_splits(rows, manifest)}
    )
    if "group" in rows:
        table["group"] = rows["group"]
    for name in rows.columns:
        if name not in KNOWN:
            table[ABOUT + name] = rows[name]
    return table


def _read_manifest_table(manifest: Path) -> pd.DataFrame:
    """Read the file as a table of stripped text; empty cells become empty strings."""
    if not manifest.is_file():
        raise PylorusError(f"data.manifest: found {manifest}, expected an existing file.")
    try:
        if manifest.suffix.lower() == ".parquet":
            table = pd.read_parquet(manifest)
        elif manifest.suffix.lower() == ".csv":
            table = pd.read_csv(manifest, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        else:
            raise PylorusError(f"data.manifest: found {manifest.name}, expected a name that ends in .csv or .parquet.")
    except (ValueError, OSError) as error:  # base classes of pandas' and pyarrow's errors
        raise PylorusError(f"{manifest}: can't be read as a table: {error}") from error
    as_text = table.astype(object).where(table.notna(), "").astype(str)
    return pd.DataFrame({name: as_text[name].str.strip() for name in as_text.columns})


def _check_manifest_columns(rows: pd.DataFrame, manifest: Path) -> None:
    for name in REQUIRED:
        if name not in rows.columns:
            raise PylorusError(
                f'{manifest}: there is no column "{name}".'
                f"{format_suggestion(name, [str(column) for column in rows.columns])} "
                f"Found: {', '.join(map(str, rows.columns))}."
            )
    if rows.empty:
        raise PylorusError(f"{manifest}: the table is empty, expected one row per image.")
    for name in [name for name in KNOWN if name in rows and name != "split"]:
        empty = rows.index[rows[name] == ""]
        if len(empty):
            count = "1 row" if len(empty) == 1 else f"{len(empty)} rows"
            # Row numbers are those of a spreadsheet, whose header is row 1.
            raise PylorusError(f'{manifest}: column "{name}" is empty in {count}, first in row {empty[0] + 2}.')
    duplicates = rows["path"][rows["path"].duplicated()]
    if len(duplicates):
        count = "1 path occurs" if duplicates.nunique() == 1 else f"{duplicates.nunique()} paths occur"
        raise PylorusError(f"{manifest}: {count} in several rows:\n{format_name_list(duplicates.unique())}")


def _resolve_manifest_classes(labels: pd.Series, configured: list[str] | None, manifest: Path) -> tuple[str, ...]:
    labels_found = sorted(set(labels))
    names = configured if configured is not None else labels_found
    if len(names) < 2:
        count = "1 class" if names else "no class"
        raise PylorusError(f'{manifest}: found {count} in column "label", expected at least two.')
    for unknown in [name for name in labels_found if name not in names]:
        raise PylorusError(
            f'{manifest}: label "{unknown}" is not among data.classes ({", ".join(names)}).'
            f"{format_suggestion(unknown, names)}"
        )
    for missing in [name for name in names if name not in labels_found]:
        raise PylorusError(
            f'{manifest}: no row has label "{missing}".{format_suggestion(missing, labels_found)} '
            f"Found: {', '.join(labels_found)}."
        )
    return tuple(names)


def _parse_manifest_splits(rows: pd.DataFrame, manifest: Path) -> pd.Series:
    if "split" not in rows or (rows["split"] == "").all():
        return pd.Series("", index=rows.index)
    splits = rows["split"].str.lower().map(SPLIT_FOLDERS)
    unknown = rows["split"][splits.isna()]
    if len(unknown):
        raise PylorusError(
            f'{manifest}: column "split" contains "{unknown.iloc[0]}" in row {unknown.index[0] + 2}, '
            "expected train, val or test in every row, or in none."
        )
    missing = {"train", "test"} - set(splits)
    if missing:
        raise PylorusError(f'{manifest}: column "split" has no image in {" and ".join(sorted(missing))}.')
    return splits
