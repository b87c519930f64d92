"""Build the catalog of an image set, a table with one row per image; leave out files that can't be read, and list them.

Columns of the table:

===========  =====================================================================
sample_id    16 hexadecimal digits from path and content; names the image outside this machine
path         relative to the root, with / between folders
label        index into the classes
group        the patient, or a stand-in for one
split        train, val or test if the folders or the manifest define it, else empty
width        in pixels, of the upright image
height       in pixels, of the upright image
sha256       of the file's content
about/…      further columns of a manifest, as text
===========  =====================================================================
"""

import dataclasses
import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pylorus.core.errors import (
    MAX_CLASSES,
    MAX_NAME_LENGTH,
    PylorusError,
    find_look_alikes,
    format_name_list,
    format_path,
    format_suggestion,
    is_valid_name,
    normalize_name,
)
from pylorus.core.formatting import defuse_formulas
from pylorus.core.io import write_atomically
from pylorus.core.privacy import MANIFEST_PREFIX
from pylorus.data.dicom import read_patient_pseudonyms
from pylorus.data.fact_store import FactTable, KnownFiles
from pylorus.data.files import Root, check_names
from pylorus.data.image_facts import PreparedImages, find_fact_folder, load_or_compute_facts
from pylorus.data.walk import (
    MAX_NAMED_FILES,
    PROBLEM,
    IgnoredFile,
    IgnoredFiles,
    list_class_images,
    list_folders,
)


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading image files.

    Attributes:
        store: Folder of the cache of image facts; None: nothing is cached.
        on_error: `fail`: a file that can't be read is an error; `quarantine`: it is left out and listed.
        verify: `time`: a file with the size and times of an earlier pass has the same content; `content`: every file is
            read, to compare its SHA-256.
        images: Receives the network's input of files that are decoded; None: nothing does.
        salt: Secret for hashing the patients in DICOM files, which then are the groups; None: groups come from paths
            or a manifest.
    """

    store: Path | None = None
    on_error: str = "fail"
    verify: str = "time"
    images: PreparedImages | None = None
    salt: str | None = None


DEFAULT_READ_OPTIONS = ReadOptions()
"""Default options: nothing is cached, and an unreadable file is an error."""


def read_files(files: pd.DataFrame, root: Root, reading: ReadOptions) -> tuple[pd.DataFrame, FactTable, list[str]]:
    """Read every file once.

    Args:
        files: One row per file, with path and group, and with sha256 if contents are on record.
        root: What the paths are relative to.
        reading: Cache, handling of unreadable files, and salt.

    Returns:
        The files with sample_id, width, height and sha256; the facts of each; and why each is unreadable, empty if it
        is readable.

    Raises:
        PylorusError: If files can't be read and may not be left out; the message names them.
    """
    paths = list(files["path"])
    digests = list(files["sha256"]) if "sha256" in files else None
    facts = load_or_compute_facts(
        root, paths, store=reading.store, digests=digests, verify=reading.verify, images=reading.images
    )
    reasons: list[str] = list(facts.get_column("problem"))
    unreadable = [f"{format_path(Path(path))}: {reason}" for path, reason in zip(paths, reasons, strict=True) if reason]
    if unreadable and reading.on_error == "fail":
        raise PylorusError(
            f"{root}: {len(unreadable)} of {len(paths)} images can't be read:\n{format_name_list(unreadable)}\n"
            "Replace them, move them out of the class folders, or leave them out with data.on_error=quarantine, which "
            "lists them in quarantine.csv."
        )
    if reading.salt is not None:
        files = files.assign(group=read_patient_pseudonyms(root, paths, reasons, salt=reading.salt))
    hashes = facts.get_column("sha256")
    described = files.assign(
        sample_id=[compute_sample_id(path, digest) for path, digest in zip(paths, hashes, strict=True)],
        width=facts.get_column("width"),
        height=facts.get_column("height"),
        sha256=hashes,
    )
    return described, facts, reasons


def compute_sample_id(path: str, sha256: str) -> str:
    """Compute the id of an image: 16 hexadecimal digits from its path and its content.

    It identifies the image where file names must not appear. It can't be computed from a guessed file name alone. It
    does not depend on the Unicode form of the path, which a copy to another system may change.
    """
    return hashlib.sha256(os.fsencode(f"{normalize_name(path)}\0{sha256}")).hexdigest()[:16]


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Catalog:
    """An image set.

    Attributes:
        root: What the paths are relative to: a folder, or shards.
        table: One row per image; see the module docstring.
        classes: Class names, in the order of the labels.
        short_names: One per class, for metrics and tables.
        grouped: Whether groups are patients; else every image is its own group.
        hashed: Whether groups are salted hashes, so that nothing may depend on their names.
        facts: Facts of every file, including unreadable ones, in the order of their paths.
        fact_indices: Index into `facts` of each row, of shape (rows,).
        unreadable: Files that were left out: path, class, group, split and reason.
        ignored: Files and folders below the root that are not used.
        excluded: Number of images of each class that was left out on purpose.
    """

    root: Root
    table: pd.DataFrame
    classes: tuple[str, ...]
    short_names: tuple[str, ...]
    grouped: bool
    hashed: bool
    facts: FactTable
    fact_indices: NDArray[np.int64]
    unreadable: pd.DataFrame
    ignored: Sequence[IgnoredFile] = ()
    excluded: Mapping[str, int] = field(default_factory=dict)

    def copy_without_facts(self) -> "Catalog":
        """Return the same catalog without its facts, which take 1.3 GiB for a million files."""
        return dataclasses.replace(self, facts=FactTable(0), fact_indices=np.zeros(0, dtype=np.int64))


def read_folders(
    root: Path,
    *,
    classes: list[str] | None = None,
    short_names: list[str] | None = None,
    exclude: list[str] | None = None,
    group: str | None = None,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
) -> Catalog:
    """Build the catalog of class folders; `list_class_images` says which structures they may have.

    Args:
        root: Folder of the image set.
        classes: Names of the class folders in the order of the labels; None: all folders found, sorted.
        short_names: One per class; None: the class names.
        exclude: Names of class folders that are left out.
        group: Regular expression that matches the patient in the path relative to the root; None: each image is its
            own group.
        reading: Where facts are cached, and what to do with files that can't be read.

    Raises:
        PylorusError: If the root, a class or an image is missing, unknown, empty or unreadable; the message names it.
    """
    check_root(root)
    ignored = IgnoredFiles()
    is_known = None if reading.store is None else KnownFiles(find_fact_folder(reading.store), root).is_unchanged
    rows, folders_by_split = list_class_images(root, ignored, exclude=exclude or (), is_known=is_known)
    check_names((path for path, *_ in rows), root)
    if reading.on_error == "fail":
        check_all_listed(root, ignored, remedy="or leave them out with data.on_error=quarantine")
    table = pd.DataFrame(rows, columns=["path", "class", "split"])
    folder_names = set().union(*folders_by_split.values())
    table, excluded = drop_excluded_classes(table, exclude, where=str(root), empty=folder_names)
    present = {split: names - set(excluded) for split, names in folders_by_split.items()}
    class_names = _resolve_folder_classes(root, present, classes)
    table["group"] = extract_groups(list(table["path"]), group)
    catalog = build_catalog(
        table, root, class_names, short_names=short_names, grouped=group is not None, reading=reading
    )
    return dataclasses.replace(catalog, ignored=ignored.files, excluded=excluded)


def check_all_listed(root: Path, ignored: IgnoredFiles, *, remedy: str = "") -> None:
    """Check that the system let the walk through an image set list all folders, and open what may be an image.

    Raises:
        PylorusError: If it did not: images may be missing.
    """
    problems = [f"{format_path(each.path)}: {each.reason}" for each in ignored.files if each.reason.startswith(PROBLEM)]
    if problems:
        raise PylorusError(
            f"{root}: it can't be seen whether images are missing:\n{format_name_list(problems)}\n"
            f"Make them readable, {remedy and 'remove them, '}{remedy or 'or remove them'}."
        )


def format_exclusion(name: str) -> str:
    """Return how to leave a class out, as it is typed in a shell.

    Example:
        >>> print(format_exclusion("basophil"), format_exclusion("left out"))
        'data.exclude=[basophil]' "data.exclude=['left out']"
    """
    is_plain = re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII) and name.lower() not in (
        "nan",
        "null",
        "true",
        "false",
    )
    return f"'data.exclude=[{name}]'" if is_plain else f"\"data.exclude=['{name}']\""


def drop_excluded_classes(
    rows: pd.DataFrame, exclude: list[str] | None, *, where: str, empty: Collection[str] = ()
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Drop the images of classes that `data.exclude` leaves out.

    Args:
        rows: One row per image, with the column class.
        exclude: Names of classes.
        where: Image set, for the message.
        empty: Names of classes that may have no images, as there are folders for them.

    Returns:
        The other rows, and the number of dropped ones of each class.

    Raises:
        PylorusError: If there is no such class.
    """
    if not exclude:
        return rows, {}
    labels = rows["class"]
    counts = {name: int((labels == name).sum()) for name in map(normalize_name, exclude)}
    for name, count in counts.items():
        if not count and name not in empty:
            found = sorted(set(labels))
            raise PylorusError(
                f'{where}: data.exclude names "{name}", but no image has this class.'
                f"{format_suggestion(name, found)} Found: {', '.join(found) or 'none'}."
            )
    return rows[~labels.isin(list(counts))].reset_index(drop=True), counts


NO_VALUE = frozenset(("nan", "null", "<na>", "#n/a", "n/a", "nat", "#ref!", "#name?", "#value!"))
"""What programs write where there is no value, in lower case."""


def check_class_names(names: Iterable[str], configured: list[str] | None, *, where: str) -> None:
    """Check that a model can have these classes: no names that only look alike or stand for a missing value.

    Args:
        names: Names of folders, or labels.
        configured: `data.classes`: what stands there is a class, also if it is called "nan".
        where: Folder or file, for the message.

    Raises:
        PylorusError: If there are such names; the message gives both spellings. If a name is too long or contains a
            character that can't be seen, or if there are too many.
    """
    present = set(names)
    if len(present) > MAX_CLASSES:
        raise PylorusError(f"{where}: found {len(present):,} classes, expected at most {MAX_CLASSES:,}.")
    for name in sorted(present):
        if len(name) > MAX_NAME_LENGTH:
            raise PylorusError(
                f'{where}: class "{name[:40]}…": found {len(name)} characters, expected at most {MAX_NAME_LENGTH}. '
                "Give it a shorter name."
            )
    alike = find_look_alikes(present)
    if alike is not None:
        first, second = map(_format_spelling, alike)
        raise PylorusError(
            f'{where}: classes "{first}" and "{second}" differ only in capitals, spaces or the way in which they are '
            "written. If they are one class, give all images one spelling; else choose names that differ."
        )
    for name in sorted(present):
        if not is_valid_name(name):
            raise PylorusError(
                f'{where}: class "{_format_spelling(name)}" contains a character that can\'t be seen, such as a tab or '
                "a space that does not break; it is written as an escape here. Rename the class."
            )
        if name.lower() in NO_VALUE and name not in (configured or ()):
            raise PylorusError(
                f'{where}: found a class "{name}", which programs write where a label is missing. Leave it out with '
                f"{format_exclusion(name)}, or name it in data.classes if it is a class."
            )


def check_root(root: Path) -> None:
    """Check that the root of an image set exists.

    Raises:
        PylorusError: If it is not a folder.
    """
    if not root.is_dir():
        raise PylorusError(f"data.root: found {root}, expected an existing folder.")


def build_catalog(
    rows: pd.DataFrame,
    root: Root,
    classes: tuple[str, ...],
    *,
    short_names: list[str] | None,
    grouped: bool,
    reading: ReadOptions,
) -> Catalog:
    """Build a catalog from rows with path, class, group, split and about/…. Each file is read once.

    Raises:
        PylorusError: If an image can't be read and may not be left out, or a class has no readable image.
    """
    files = rows.sort_values("path", ignore_index=True)
    files, facts, reasons = read_files(files, root, reading)
    is_unreadable = facts.get_column("problem") != ""
    table = files[~is_unreadable].reset_index(drop=True)
    table["label"] = table["class"].map({name: index for index, name in enumerate(classes)})
    empty_classes = [name for label, name in enumerate(classes) if not (table["label"] == label).any()]
    if empty_classes:
        raise PylorusError(
            f'{root}: none of the images of class "{empty_classes[0]}" can be read. Replace these files.'
        )
    columns = ["sample_id", "path", "label", "group", "split", "width", "height", "sha256"]
    unreadable = files.loc[is_unreadable, ["path", "class", "group", "split"]].assign(
        reason=[reason for reason in reasons if reason]
    )
    return Catalog(
        root=root,
        table=table[[*columns, *(name for name in table.columns if name.startswith(MANIFEST_PREFIX))]],
        classes=classes,
        short_names=tuple(short_names) if short_names is not None else classes,
        grouped=grouped or reading.salt is not None,
        hashed=reading.salt is not None,
        facts=facts,
        fact_indices=np.flatnonzero(~is_unreadable),
        unreadable=unreadable.reset_index(drop=True),
    )


def _format_spelling(name: str) -> str:
    """Return a name with escapes for characters that look like others, such as spaces of another width."""
    return "".join(
        letter if letter.isprintable() and unicodedata.normalize("NFKC", letter) == letter else f"\\u{ord(letter):04x}"
        for letter in name
    )


def _resolve_folder_classes(
    root: Path, folders_by_split: dict[str, set[str]], configured: list[str] | None
) -> tuple[str, ...]:
    every_name = set().union(*folders_by_split.values())
    check_class_names(every_name, configured, where=str(root))
    names = [normalize_name(name) for name in configured] if configured is not None else sorted(every_name)
    if len(names) < 2:
        count = "1 class folder" if len(names) == 1 else f"{len(names)} class folders"
        raise PylorusError(
            f"{root}: found {count}, expected at least two, as in {root / 'CLASS' / 'image.jpg'}."
            f"{_format_inner_root(root, names)}"
        )
    for split, present in folders_by_split.items():
        folder = root / split if split else root
        for missing in [name for name in names if name not in present]:
            raise PylorusError(
                f'{folder}: there is no folder for class "{missing}".{format_suggestion(missing, present)} '
                f"Found: {', '.join(sorted(present)) or 'none'}."
            )
        for unknown in sorted(present - set(names)):
            raise PylorusError(
                f'{folder}: folder "{unknown}" is not among data.classes ({", ".join(names)}).'
                f"{format_suggestion(unknown, names)} Move it elsewhere, add it to data.classes, or leave it out with "
                f"{format_exclusion(unknown)}."
            )
    return tuple(names)


def _format_inner_root(root: Path, names: Sequence[str]) -> str:
    """Return a sentence that names the only folder of a root, if that contains at least two folders itself."""
    if len(names) == 1 and (root / names[0]).is_dir():
        inner = list_folders(root / names[0], "", IgnoredFiles(), allow_images=True)
        if len(inner) > 1:
            return f" If its folders {', '.join(inner[:3])} … are the classes, type data.root={root / names[0]}."
    return ""


def extract_groups(paths: list[str], pattern: str | None, *, key: str = "data.group") -> list[str]:
    """Return the group of each path as matched by a regular expression; without a pattern, the path itself.

    `key` names the option in error messages.

    Raises:
        PylorusError: If the pattern is not a regular expression or does not match every path.
    """
    if pattern is None:
        return paths
    expression = parse_group_pattern(pattern, key=key)
    matches = [expression.search(normalize_name(path)) for path in paths]
    unmatched = [
        path for path, match in zip(paths, matches, strict=True) if match is None or not get_matched_group(match)
    ]
    if unmatched:
        raise PylorusError(
            f"{key}: '{pattern}' finds no patient in {len(unmatched)} of {len(paths)} paths:\n"
            f"{format_name_list(unmatched)}\n"
            "Write a pattern that finds one in these too, such as '(P\\d+|case_\\d+)', or move them out of the set."
        )
    return [get_matched_group(match) for match in matches if match is not None]


def parse_group_pattern(pattern: str, *, key: str) -> re.Pattern[str]:
    """Compile the pattern that matches groups in paths; `key` names the option in the error message.

    Raises:
        PylorusError: If the pattern is not a regular expression.
    """
    try:
        return re.compile(normalize_name(pattern))
    except re.error as error:
        raise PylorusError(f"{key}: '{pattern}' is not a regular expression: {error}.") from error


def get_matched_group(match: re.Match[str]) -> str:
    """Return the first capture group of a match, or the whole match if the pattern has none."""
    return str(match.group(1) or "") if match.re.groups else match.group(0)


QUARANTINE_FILE = "quarantine.csv"
COLUMNS = ["path", "class", "group", "split", "reason"]


def write_quarantine(unreadable: pd.DataFrame, folder: Path) -> None:
    """Write quarantine.csv if files were left out; its column split is the one that folders or a manifest define.

    If none were left out, a list that was written to the folder earlier is deleted.
    """
    if unreadable.empty:
        (folder / QUARANTINE_FILE).unlink(missing_ok=True)
        return
    with write_atomically(folder / QUARANTINE_FILE) as temporary:
        # Escape line breaks and control characters, which not every spreadsheet program can read.
        table = unreadable.assign(path=[format_path(Path(path)) for path in unreadable["path"]])
        defuse_formulas(table[COLUMNS]).to_csv(temporary, index=False, lineterminator="\n")


def log_unreadable(catalog: Catalog) -> None:
    """Log a warning about files that were left out, and name the first of them."""
    if catalog.unreadable.empty:
        return
    names = [
        f"{format_path(Path(path))}: {reason}"
        for path, reason in zip(catalog.unreadable["path"], catalog.unreadable["reason"], strict=True)
    ]
    log.warning(
        "left out  %d of %d files can't be read and %s not used (data.on_error=quarantine); %s lists all:\n%s",
        len(names),
        len(catalog.facts),
        "is" if len(names) == 1 else "are",
        QUARANTINE_FILE,
        format_name_list(names, most=MAX_NAMED_FILES),
    )


def count_unreadable(unreadable: pd.DataFrame) -> list[dict[str, object]]:
    """Count the files that were left out, by class and given split; the result contains no file names."""
    counts = Counter(zip(unreadable["class"], unreadable["split"], strict=True))
    return [
        {"class": str(name), "split": str(part) or "not given", "files": count}
        for (name, part), count in sorted(counts.items())
    ]
