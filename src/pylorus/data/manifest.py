"""Read a manifest: a table that lists images, as people and programs save tables, and find the files that it means.

Columns, in a CSV or Parquet file with one row per image:

=======  ==========================================================================================
path     relative to data.root, or to the manifest's own folder; required
label    name of the class; required
group    the patient, or a stand-in for one; or data.group extracts it from the path
split    train, val or test, in every row or in none
others   stored under their names, for splits by a column and for subgroup tables: device, site, age …
=======  ==========================================================================================

A CSV file may be separated by commas, semicolons, tabs or bars, in UTF-8, UTF-16 or Windows-1252, with a first line
`sep=;` or not. Paths may have backslashes, lack their suffix, or differ from the file's name in capitals or Unicode
form, if exactly one file is meant. What could be read in two ways is refused.
"""

import codecs
import csv
import io
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from pylorus.core.errors import (
    PylorusError,
    fold_name,
    format_name_list,
    format_path,
    format_suggestion,
    normalize_name,
)
from pylorus.core.formatting import format_command, format_count
from pylorus.core.io import PARQUET_OPTIONS
from pylorus.core.privacy import MANIFEST_PREFIX
from pylorus.data.catalog import NO_VALUE
from pylorus.data.files import SUFFIXES
from pylorus.data.walk import SPLIT_FOLDERS, IgnoredFiles, walk_images

log = logging.getLogger(__name__)

REQUIRED_COLUMNS = ("path", "label")
KNOWN_COLUMNS = (*REQUIRED_COLUMNS, "group", "split")
COLUMN_SYNONYMS = {
    "path": (
        "file",
        "filename",
        "file name",
        "filepath",
        "file path",
        "image",
        "image path",
        "image name",
        "img",
        "name",
    ),
    "label": ("class", "class name", "category", "diagnosis", "target", "finding", "labels"),
    "group": ("patient", "patient id", "patientid", "subject", "subject id", "case", "case id", "pid"),
}
"""What others call these columns, in lower case and with spaces for underscores."""
TEXT_SUFFIXES = (".csv", ".tsv", ".txt")
SAVE_AS_CSV = 'open it and save it as "CSV UTF-8"'
_SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def read_manifest_rows(
    manifest: Path, root: Path | None = None, *, columns: Mapping[str, Any] | None = None, for_training: bool = True
) -> pd.DataFrame:
    """Read the rows of a manifest: path, exists, class, split, about/… and, if there is one, group. Opens no image.

    Args:
        manifest: The file.
        root: Folder that the paths are relative to; None: the manifest's own folder.
        columns: Names of the table's columns for path, label, group and split where they are others.
        for_training: Whether a split must be complete, and error messages may suggest keys of a configuration.

    Returns:
        The rows. A path that leads to no file is left as it is; `exists` is False for it.

    Raises:
        PylorusError: If the table itself is missing, unreadable or not as described above; the message names it.
    """
    rows = _rename_columns(_read_table(manifest), columns or {}, manifest)
    _check_columns(rows, manifest, for_training=for_training)
    table = pd.DataFrame(
        {
            "path": rows["path"],
            "class": rows["label"],
            "split": _parse_splits(rows, manifest, for_training=for_training),
        }
    )
    if "group" in rows:
        table["group"] = rows["group"]
    for name in rows.columns:
        if name not in KNOWN_COLUMNS:
            table[MANIFEST_PREFIX + name] = rows[name]
    folder = root if root is not None else manifest.parent
    table["path"], table["exists"] = _find_files(list(table["path"]), folder, manifest)
    duplicates = table["path"][table["path"].duplicated()]
    if len(duplicates):
        count = "1 path occurs" if duplicates.nunique() == 1 else f"{duplicates.nunique()} paths occur"
        raise PylorusError(
            f"{manifest}: {count} in several rows:\n{format_name_list(duplicates.unique())}\nKeep one row of each."
        )
    return table.reset_index(drop=True)


def _read_table(manifest: Path) -> pd.DataFrame:
    """Read the file as a table of stripped text in composed Unicode; empty cells become empty strings.

    The index is the row in a spreadsheet, whose header is row 1, minus 2.
    """
    if not manifest.is_file():
        raise PylorusError(f"data.manifest: found {manifest}, expected an existing file.")
    suffix = manifest.suffix.lower()
    if suffix in _SPREADSHEETS:
        raise PylorusError(
            f"data.manifest: found {manifest.name}, a spreadsheet, expected a name that ends in .csv or .parquet: "
            f"{SAVE_AS_CSV}."
        )
    if suffix not in (*TEXT_SUFFIXES, ".parquet"):
        raise PylorusError(f"data.manifest: found {manifest.name}, expected a name that ends in .csv or .parquet.")
    try:
        with manifest.open("rb") as file:
            is_parquet = suffix == ".parquet" or file.read(4) == b"PAR1"
        table = _read_parquet(manifest) if is_parquet else _parse_text(manifest.read_bytes(), manifest)
        as_text = table.astype(object).where(table.notna(), "").astype(str)
    except (ValueError, OSError, csv.Error) as error:  # base classes of pandas' and pyarrow's errors
        raise PylorusError(f"{manifest}: can't be read as a table: {error}") from error
    names = [_clean_column_name(name) for name in as_text.columns]
    for position, name in enumerate(names, start=1):
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise PylorusError(
                f'{manifest}: column {position} is called "{format_path(name)[:100]}", with a control character. '
                "Rename it."
            )
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        positions = " and ".join(str(position) for position, name in enumerate(names, start=1) if name == doubled[0])
        raise PylorusError(f'{manifest}: columns {positions} are both called "{doubled[0]}". Remove or rename one.')
    as_text.columns = pd.Index(names)
    return pd.DataFrame({name: as_text[name].str.strip().map(normalize_name) for name in names})


MAX_ROWS, MAX_COLUMNS, MAX_HEADER_LENGTH = 20_000_000, 1_000, 100_000
"""Rows and columns of a table, and characters of the first line of a text: a few bytes of Parquet can hold billions."""


def _read_parquet(manifest: Path) -> pd.DataFrame:
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(manifest)
    _check_column_count(metadata.num_columns, manifest)
    if metadata.num_rows > MAX_ROWS:
        raise PylorusError(f"{manifest}: has {metadata.num_rows:,} rows, expected {MAX_ROWS:,} at most.")
    return pd.read_parquet(manifest, **PARQUET_OPTIONS)


def _check_column_count(count: int, manifest: Path) -> None:
    if count > MAX_COLUMNS:
        raise PylorusError(
            f"{manifest}: has {count:,} columns, expected {MAX_COLUMNS:,} at most. Keep path, label, group, split and "
            "what you compare results by."
        )


def _rename_columns(table: pd.DataFrame, columns: Mapping[str, Any], manifest: Path) -> pd.DataFrame:
    """Give columns the names path, label, group and split; a column that has such a name already is left out."""
    found = [str(name) for name in table.columns]
    for name, column in columns.items():
        if name not in KNOWN_COLUMNS:
            raise PylorusError(
                f"data.columns.{name}: found {name}, expected one of {', '.join(KNOWN_COLUMNS)}."
                f"{format_suggestion(name, KNOWN_COLUMNS)}"
            )
        if _clean_column_name(column) not in found:
            raise PylorusError(
                f"data.columns.{name}: found {column}, but {manifest} has no such column."
                f"{format_suggestion(str(column), found)} Found: {', '.join(found)}."
            )
    sources = {_clean_column_name(column): name for name, column in columns.items()}
    return table[[column for column in found if column in sources or column not in columns]].rename(columns=sources)


def _clean_column_name(name: object) -> str:
    plain = normalize_name(" ".join(str(name).replace("\ufeff", "").split()))
    return plain.lower() if plain.lower() in KNOWN_COLUMNS else plain


def _parse_text(content: bytes, manifest: Path) -> pd.DataFrame:
    text = _decode_text(content, manifest)
    if text.lstrip().startswith("<"):
        raise PylorusError(f"{manifest}: is a web page or XML, not CSV: {SAVE_AS_CSV}.")
    if text.startswith("version https://git-lfs"):
        raise PylorusError(f"{manifest}: is a pointer of Git LFS, not the table. Fetch the table: git lfs pull")
    declared = re.match(r'"?sep=(.)"?[^\r\n]*(\r\n|\r|\n|$)', text, re.IGNORECASE)
    delimiter = declared[1] if declared is not None else _guess_delimiter(text)
    first_row = 1
    if declared is not None:
        text, first_row = text[declared.end() :], 2
    rows = _split_rows(text, delimiter, first_row, manifest)
    if rows and len(rows[0][1]) == 1 and _guess_delimiter(rows[0][1][0]) and len(_split_line(rows[0][1][0])) > 1:
        # Each line was put in quotation marks as a whole.
        lines = "\n".join(cells[0] for _, cells in rows)
        delimiter = _guess_delimiter(lines)
        rows = _split_rows(lines, delimiter, first_row, manifest)
    if not rows:
        raise PylorusError(f"{manifest}: the table is empty, expected one row per image.")
    return _build_table(rows[0][1], rows[1:], delimiter, manifest)


def _decode_text(content: bytes, manifest: Path) -> str:
    if content[:4] == b"PK\3\4" or content[:8] == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":
        raise PylorusError(f"{manifest}: is a spreadsheet with the suffix of a CSV file: {SAVE_AS_CSV}.")
    encoding = "utf-8-sig"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in content[:64]:
        encoding = "utf-16-be" if content[:1] == b"\0" else "utf-16-le"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise PylorusError(f"{manifest}: is not text in UTF-8 or UTF-16: {SAVE_AS_CSV}.") from error
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        text = ""
    special = [letter for letter in text if not letter.isascii()]
    if sum(map(str.isalpha, special)) < 0.7 * max(1, len(special)):  # letters of another alphabet in another encoding
        raise PylorusError(f"{manifest}: is neither UTF-8 nor Windows-1252: {SAVE_AS_CSV}.")
    words = [word for word in re.findall(r"[^\s,;\t|]+", text) if not word.isascii()]
    log.warning(
        "%s: is not UTF-8 and was read as Windows-1252; check %s. If that looks wrong, %s.",
        manifest,
        ", ".join(f'"{word}"' for word in dict.fromkeys(words[:3])),
        SAVE_AS_CSV.replace("it", "the table", 1),
    )
    return text


def _split_line(line: str) -> list[str]:
    cells = next(csv.reader([line], delimiter=_guess_delimiter(line), skipinitialspace=True), [])
    return [_clean_column_name(cell) for cell in cells]


def _guess_delimiter(text: str) -> str:
    """Return the delimiter that gives the most columns, known ones first, in the first line."""
    line = next((line for line in text.splitlines() if line.strip()), "")[:MAX_HEADER_LENGTH]

    def rate(delimiter: str) -> tuple[int, int]:
        cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
        return sum(_clean_column_name(cell) in KNOWN_COLUMNS for cell in cells), len(cells)

    return max(_DELIMITERS, key=rate)


def _split_rows(text: str, delimiter: str, first_row: int, manifest: Path) -> list[tuple[int, list[str]]]:
    """Return the rows that are not empty, each with its number in a spreadsheet."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows: list[tuple[int, list[str]]] = []
    number = first_row - 1
    try:
        for number, cells in enumerate(reader, start=first_row):
            if any(cell and not cell.isspace() for cell in cells):
                rows.append((number, cells))
    except csv.Error as error:
        raise PylorusError(
            f"{manifest}: row {number + 1} can't be read ({error}). A quotation mark may not be closed there."
        ) from error
    return rows


def _build_table(header: list[str], rows: list[tuple[int, list[str]]], delimiter: str, manifest: Path) -> pd.DataFrame:
    while header and not header[-1].strip():  # a comma at the end of the line
        header = header[:-1]
    width = len(header)
    _check_column_count(width, manifest)
    for number, cells in rows:
        if len(cells) > width and any(cell.strip() for cell in cells[width:]):
            hint = (
                f" Fields are separated by {_DELIMITERS.get(delimiter, repr(delimiter))}: a field that contains "
                f"{'one' if delimiter in _DELIMITERS else 'it'} needs quotation marks, and each column needs a name."
            )
            if "path" not in map(_clean_column_name, header):
                hint = " The first row must contain the names of the columns, as in path,label."
            raise PylorusError(f"{manifest}: row {number} has {len(cells)} fields, the header {width}.{hint}")
    columns = {}
    padding = [""] * width
    values = list(zip(*((cells + padding)[:width] for _, cells in rows), strict=True)) or [()] * width
    for position, (name, column) in enumerate(zip(header, values, strict=True), start=1):
        if name.strip():
            columns[position] = [_strip_formula(cell) for cell in column]
            if delimiter != "," and _clean_column_name(name) not in KNOWN_COLUMNS:
                columns[position] = _convert_decimal_commas(columns[position])
        elif any(cell.strip() and not cell.strip().isdigit() for cell in column):
            raise PylorusError(f"{manifest}: column {position} has values but no name. Name it in the first row.")
    table = pd.DataFrame(columns, index=[number - 2 for number, _ in rows], dtype=object)
    return table.set_axis([header[position - 1] for position in columns], axis=1)


def _strip_formula(cell: str) -> str:
    """Return the text of a cell like `="007"`, which keeps Excel from reading a number."""
    return cell.strip()[2:-1] if cell.lstrip().startswith('="') and cell.rstrip().endswith('"') else cell


def _convert_decimal_commas(column: list[str]) -> list[str]:
    numbers = [cell.strip() for cell in column if cell.strip()]
    if any("," in number for number in numbers) and all(re.fullmatch(r"-?\d+(,\d+)?", number) for number in numbers):
        return [cell.replace(",", ".") for cell in column]
    return column


_COLUMN_CONTENTS = {"path": "names of the files", "label": "classes"}


def _check_columns(rows: pd.DataFrame, manifest: Path, *, for_training: bool) -> None:
    missing = [name for name in REQUIRED_COLUMNS if name not in rows.columns]
    if missing:
        found = [str(column) for column in rows.columns]
        explanation = _explain_missing_columns(missing, found, for_training=for_training)
        raise PylorusError(f"{manifest}: {explanation} Found: {', '.join(found)}.")
    if rows.empty:
        raise PylorusError(f"{manifest}: the table is empty, expected one row per image.")
    for name in [name for name in KNOWN_COLUMNS if name in rows and name != "split"]:
        empty = rows.index[rows[name] == ""]
        if len(empty):
            count = "1 row" if len(empty) == 1 else f"{len(empty)} rows"
            # Row numbers are those of a spreadsheet, whose header is row 1.
            raise PylorusError(
                f'{manifest}: column "{name}" is empty in {count}, first in row {empty[0] + 2}. Fill it in, or remove '
                "these rows."
            )
    if "group" in rows:
        _check_groups(rows["group"], manifest)


def _explain_missing_columns(missing: Sequence[str], found: Sequence[str], *, for_training: bool) -> str:
    """Say which columns a table lacks, which of its own may be meant, and the keys that rename them."""
    quoted = [f'"{name}"' for name in missing]
    problem = f"there is no column {' and no column '.join(quoted)}."
    if any(column.lower().endswith(SUFFIXES) for column in found):
        return f"{problem} The first row must contain the names of the columns, as in path,label."
    meant, hints = dict[str, str](), ""
    for name in missing:
        synonyms = [column for column in found if fold_name(column) in COLUMN_SYNONYMS[name]]
        suggestion = format_suggestion(name, found)
        if synonyms:
            meant[name] = synonyms[0]
            hints += f' Rename "{synonyms[0]}" to "{name}".'
        elif suggestion:
            meant[name] = suggestion.split('"')[1]
            hints += suggestion
    unclear = "".join(
        f' Rename the column that contains the {_COLUMN_CONTENTS[name]} to "{name}".'
        for name in missing
        if name not in meant
    )
    if not meant or not for_training:
        return f"{problem}{hints}{unclear}"
    words = format_command([f"data.columns.{name}={column}" for name, column in meant.items()])
    return f"{problem}{hints}{unclear} Or leave the table as it is, and add {words}"


def _check_groups(groups: pd.Series, manifest: Path) -> None:
    """Refuse values that many patients would share: they would count as one."""
    missing = groups.index[groups.str.lower().isin(list(NO_VALUE))]
    if len(missing):
        raise PylorusError(
            f'{manifest}: column "group" is "{groups[missing[0]]}" in row {missing[0] + 2}, which programs write where '
            "a value is missing. Give each row its patient, or remove these rows."
        )
    shortened = groups.index[groups.str.fullmatch(r"\d[.,]\d+E\+\d+")]
    if len(shortened):
        raise PylorusError(
            f'{manifest}: column "group" is "{groups[shortened[0]]}" in row {shortened[0] + 2}: a spreadsheet program '
            "has rounded a long number, so that several patients may have become one. Format the column as text "
            "before you fill it, and save it again."
        )


def _parse_splits(rows: pd.DataFrame, manifest: Path, *, for_training: bool) -> pd.Series:
    if "split" not in rows or (rows["split"] == "").all():
        return pd.Series("", index=rows.index)
    splits = rows["split"].str.lower().map(SPLIT_FOLDERS)
    if not for_training:
        return splits.fillna(rows["split"])
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


def warn_of_unused_columns(table: pd.DataFrame, manifest: Path) -> None:
    """Warn if a manifest without groups seems to name the patients, or a split, in another way."""
    columns = [name.removeprefix(MANIFEST_PREFIX) for name in table.columns if name.startswith(MANIFEST_PREFIX)]
    patients = [name for name in columns if fold_name(name) in COLUMN_SYNONYMS["group"]]
    if patients:
        log.warning(
            '%s: column "%s" is not used to keep the images of a patient together. If it names the patients, rename '
            'it to "group".',
            manifest,
            patients[0],
        )


def warn_of_split_folders(table: pd.DataFrame, manifest: Path) -> None:
    """Warn if paths lie in folders called train and test, but a split will be drawn."""
    folders = {part for path in set(table["path"].str.rpartition("/")[0]) for part in path.lower().split("/")}
    if (table["split"] == "").all() and {"train", "test"} <= {SPLIT_FOLDERS.get(part) for part in folders}:
        log.warning(
            '%s: paths lie in folders called train and test, but there is no column "split", so a split is drawn. To '
            "use the one of the folders, add this column.",
            manifest,
        )


def _find_files(paths: Sequence[str], root: Path, manifest: Path) -> tuple[list[str], list[bool]]:
    """Return the paths as the files are called, those of missing files as they are, and whether there is a file."""
    folder = str(root)
    found = [os.path.normpath(path) if "./" in path or "//" in path else path for path in paths]
    # A Path for each file would take longer than the question to the system.
    exists = [os.path.isfile(os.path.join(folder, path)) for path in found]  # noqa: PTH113, PTH118
    finder = _FileFinder(folder)
    for index in [index for index, is_there in enumerate(exists) if not is_there]:
        match = finder.find_file(found[index])
        if match is not None:
            found[index], exists[index] = match, True
    if finder.changes:
        changes = ", ".join(f"{change} ({format_count(count, 'path')})" for change, count in finder.changes.items())
        log.info("%s: the files were found, though paths differ from their names in: %s", manifest, changes)
    return found, exists


class _FileFinder:
    """Finds the only file that a path can mean.

    Attributes:
        changes: How many paths were changed in which way.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.changes: Counter[str] = Counter()
        self._listings: dict[str, dict[str, list[str]]] = {}

    def find_file(self, path: str) -> str | None:
        """Return the path of the file; None if there is none, or several could be meant."""
        parts = path.replace("\\", "/").split("/")
        parents: list[str] = []
        changes = {"separators"} if "\\" in path else set()
        for position, part in enumerate(parts):
            is_file = position == len(parts) - 1
            match, change = self._match("/".join(parents), part, is_file=is_file)
            if match is None:
                return None
            changes.update([change] if change else [])
            parents.append(match)
        found = "/".join(parents)
        if not os.path.isfile(os.path.join(self.root, found)):  # noqa: PTH113, PTH118
            return None
        self.changes.update(changes)
        return found

    def _match(self, folder: str, name: str, *, is_file: bool) -> tuple[str | None, str]:
        if folder not in self._listings:
            self._listings[folder] = self._list(folder)
        listing = self._listings[folder]
        for key, change in (
            (name, ""),
            (f"nfc:{normalize_name(name)}", "Unicode form"),
            (f"fold:{normalize_name(name).casefold()}", "capitals"),
            *([(f"stem:{normalize_name(name).casefold()}", "suffix")] if is_file else []),
        ):
            matches = listing.get(key, [])
            if matches:
                return (matches[0], change) if len(matches) == 1 else (None, "")
        return (name, "") if name in ("", ".", "..") else (None, "")

    def _list(self, folder: str) -> dict[str, list[str]]:
        listing: dict[str, list[str]] = {}
        try:
            names = os.listdir(os.path.join(self.root, folder) if folder else self.root)  # noqa: PTH118, PTH208
        except OSError:
            names = []
        for name in names:
            plain = normalize_name(name)
            stem, suffix = os.path.splitext(plain)  # noqa: PTH122
            for key in (name, f"nfc:{plain}", f"fold:{plain.casefold()}"):
                listing.setdefault(key, []).append(name)
            if suffix.lower() in SUFFIXES:
                listing.setdefault(f"stem:{stem.casefold()}", []).append(name)
        return listing


SEARCHED_FILES = 100_000
"""Files below the root among which a missing one is searched for, to say where it is."""


def explain_missing_files(
    missing: Sequence[str], total: int, root: Path, manifest: Path, *, for_training: bool = True
) -> str:
    """Return the message about paths of a manifest that lead to no file, and how to fix it."""
    message = f"{manifest}: {len(missing)} of {total} files do not exist below {root}:\n{format_name_list(missing)}\n"
    first = missing[0].replace("\\", "/")
    finder, parts = _FileFinder(str(root)), first.split("/")
    for count in range(1, len(parts)):
        rest, start = "/".join(parts[count:]), "/".join(parts[:count]) + "/"
        if finder.find_file(rest) is not None:
            given = missing[0][: len(start)]
            return (
                f'{message}Without "{given}" at the beginning of the path, {rest} is found: remove it from the column.'
            )
    names = islice(walk_images(str(root), IgnoredFiles()), SEARCHED_FILES) if root.is_dir() else ()
    name = fold_name(PurePosixPath(first).name)
    for path in names:
        below = PurePosixPath(path)
        if name in (fold_name(below.name), fold_name(below.stem)):
            return f"{message}{below.name} lies in {root / below.parent}: write {path} in its row, or move the file."
    if len(missing) < total:
        return (
            f"{message}The other files were found: correct these paths, copy the files there, or remove their rows."
            f"{' data.on_error=quarantine leaves them out.' if for_training else ''}"
        )
    option = "data.root" if for_training else "--root"
    return f"{message}Set {option} to the folder that the paths are relative to."
