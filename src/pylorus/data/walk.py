"""Walk through the folders of an image set: which files are images, and why others are not used.

`walk_images` is the only walk: training, audit, pack, predict and explain find the same files. What it passes over, it
lists with a reason.
"""

import csv
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path

from pylorus.core.errors import (
    PylorusError,
    UnreadableImageError,
    format_name_list,
    format_path,
    normalize_name,
)
from pylorus.core.formatting import defuse_formula, format_count
from pylorus.core.io import write_atomically
from pylorus.data.files import DECODED_FORMATS, SUFFIXES, identify_format, read_head

log = logging.getLogger(__name__)

_THUMBNAILS, _RECYCLE_BIN, _SYSTEM = "thumbnails", "a recycle bin", "left by an operating system"
_THUMBNAIL_FOLDER = "a folder of thumbnails by its name: rename it if these are images of their own"
_BACKUP, _INCOMPLETE = "a backup copy", "an incomplete copy or download"
PROBLEM = "can't be"
"""How the reason of an ignored file or folder begins that the system does not let us read."""
SYSTEM_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("@eadir", ".@__thumb", "previews.lrdata", "thumbs.db", "ehthumbs.db"), _THUMBNAILS),
    **dict.fromkeys(("ehthumbs_vista.db", "zbthumbnail.info", "pspbrwse.jbf"), _THUMBNAILS),
    **dict.fromkeys(("previews", "thumbnails", "thumbs"), _THUMBNAIL_FOLDER),
    **dict.fromkeys(("$recycle.bin", "recycler", "recycled", "#recycle", "@recycle"), _RECYCLE_BIN),
    **dict.fromkeys((".trash", ".trashes", "network trash folder"), _RECYCLE_BIN),
    **dict.fromkeys(("lost+found", "system volume information", "temporary items", "__macosx"), _SYSTEM),
    **dict.fromkeys(("#snapshot", "@tmp", "@sharebin", "desktop.ini", ".ds_store", "icon\r"), _SYSTEM),
    **dict.fromkeys((".git", ".svn", ".hg", ".ipynb_checkpoints", "__pycache__"), "left by a program"),
    "dicomdir": "the index of a DICOM medium",
}
"""Names, in lower case, of files and folders that systems and programs leave beside images, and what they are."""
_SYSTEM_PREFIXES = {
    "._": "a macOS resource fork",
    ".trash-": _RECYCLE_BIN,
    ".": "hidden: its name begins with a dot",
    "~$": "the lock file of an office program",
    "synofile_thumb_": _THUMBNAILS,
    "synophoto_thumb_": _THUMBNAILS,
}
_SYSTEM_SUFFIXES = {
    **dict.fromkeys(("~", ".bak", ".orig", ".swp", *(f"{suffix}_original" for suffix in SUFFIXES)), _BACKUP),
    **dict.fromkeys((".part", ".partial", ".crdownload", ".download", ".tmp"), _INCOMPLETE),
    ":zone.identifier": _SYSTEM,
}
_LEFTOVER_ENDINGS = tuple(_SYSTEM_SUFFIXES)
_MAY_BE_IMAGES = frozenset((_THUMBNAIL_FOLDER, _BACKUP, _INCOMPLETE))
_OTHER_SUFFIXES = frozenset(
    (
        *(".csv", ".tsv", ".txt", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".ini", ".log", ".md", ".rtf"),
        *(".xls", ".xlsx", ".ods", ".odt", ".doc", ".docx", ".ppt", ".pptx", ".htm", ".html", ".db", ".parquet"),
        *(".npy", ".npz", ".pkl", ".pickle", ".pt", ".pth", ".safetensors", ".py", ".ipynb", ".sh", ".cls"),
        *(".zip", ".gz", ".tar", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"),
    )
)
"""Suffixes of files that are not opened to see whether they are images; there may be one beside each image."""
_RAW_SUFFIXES = frozenset([".3fr", ".arw", ".cr2", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw"])


@dataclass(frozen=True, slots=True)
class IgnoredFile:
    """A file or folder that is not used.

    Attributes:
        path: Relative to the root, with / between folders; that of a folder ends in /.
        reason: Why it is not used.
        may_be_image: Whether it may be, or contain, an image that the user expects to be used.
    """

    path: str
    reason: str
    may_be_image: bool


@dataclass
class IgnoredFiles:
    """Collects what a walk passes over.

    Attributes:
        write: Called with each one instead of keeping it, where there may be more than fit in memory.
        files: Those that were kept.
        counts: Number of each reason.
    """

    write: Callable[[IgnoredFile], None] | None = None
    files: list[IgnoredFile] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, path: str, reason: str, *, may_be_image: bool = False) -> None:
        """Add a file, or a folder whose path ends in /."""
        self.counts[reason] += 1
        ignored = IgnoredFile(path, reason, may_be_image)
        if self.write is None:
            self.files.append(ignored)
        else:
            self.write(ignored)


MAX_SORTED_FILES = 10_000
"""A folder with more files is read in the order of the file system: sorting would need all names in memory."""


def walk_images(
    root: str,
    ignored: IgnoredFiles,
    *,
    prefix: str = "",
    suffixes: tuple[str, ...] = (),
    is_known: Callable[[str], bool] | None = None,
) -> Iterator[str]:
    """Yield the path of each image in a folder and its subfolders; small folders are sorted.

    A file with an image's suffix is an image. Of other files the first bytes decide, unless the suffix is that of
    another common kind (`.txt`, `.json`, …). Links to folders are followed after all other folders, each folder once;
    a link to a folder that contains it is not followed.

    Args:
        root: The folder that paths are relative to.
        ignored: Receives all other files, with reasons.
        prefix: Folder below the root to walk through, as in `class/`; empty: the root.
        suffixes: Suffixes of further files to yield.
        is_known: Whether a path without an image's suffix is known to be an image, without opening it.

    Yields:
        Paths relative to the root, with / between folders.

    Raises:
        OSError: If the folder itself can't be listed. Subfolders that can't be listed are ignored with the reason.
    """
    start = os.path.join(root, prefix) if prefix else root  # noqa: PTH118 Path takes ten times as long, 40 µs a file
    accepted = SUFFIXES + suffixes
    above = [os.path.realpath(root), os.path.realpath(start)]
    visited = {_identify_folder(start)}
    links: list[tuple[str, str]] = []
    folder = prefix
    stack: list[tuple[str, Iterator[os.DirEntry[str]]]] = [(prefix, iter_folder(start))]
    while stack or links:
        if not stack:
            links.sort(reverse=True)
            folder, path = links.pop()
            if _is_new_link(path, above, visited, folder, ignored):
                stack.append((folder, iter_folder(path)))
            continue
        folder, entries = stack[-1]
        try:
            entry = next(entries, None)
        except OSError as error:
            if folder == prefix:
                raise
            ignored.add(folder, f"{PROBLEM} listed: {error.strerror or error}", may_be_image=True)
            entry = None
        if entry is None:
            stack.pop()
            continue
        path, is_folder = folder + entry.name, is_directory(entry)
        if is_ignored_by_name(entry.name, path, ignored, is_folder=is_folder):
            continue
        if not is_folder:
            if entry.name.lower().endswith(accepted) or is_image_by_content(entry, path, ignored, is_known):
                yield path
        elif entry.is_symlink():
            links.append((f"{path}/", entry.path))
        elif (identity := _identify_folder(entry.path)) in visited:  # a link led to it
            ignored.add(f"{path}/", "a folder that is read already, by a link", may_be_image=True)
        else:
            visited.add(identity)
            stack.append((f"{path}/", iter_folder(entry.path)))


def iter_folder(folder: str) -> Iterator[os.DirEntry[str]]:
    """Iterate over the entries of a folder, sorted by name if they are not more than `MAX_SORTED_FILES`."""
    with os.scandir(folder) as entries:
        first = list(islice(entries, MAX_SORTED_FILES))
        following = next(entries, None)
        if following is None:
            yield from sorted(first, key=attrgetter("name"))
        else:
            yield from chain(first, [following], entries)


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one; False for a link that leads nowhere or in a circle."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_ignored_by_name(name: str, path: str, ignored: IgnoredFiles, *, is_folder: bool) -> bool:
    """Return whether a file or folder is one that systems and programs leave beside images, and add it to `ignored`."""
    lower = name.lower()
    reason = SYSTEM_NAMES.get(lower) or _find_affix_reason(lower)
    # A file may have the name of a folder of thumbnails, and a folder that of a backup copy.
    if not reason or (reason in _MAY_BE_IMAGES and (reason == _THUMBNAIL_FOLDER) != is_folder):
        return False
    ignored.add(f"{path}/" if is_folder else path, reason, may_be_image=reason in _MAY_BE_IMAGES)
    return True


def is_left_by_system(path: str) -> bool:
    """Return whether a path, as in an archive, is or lies in something that systems leave beside images."""
    parts = path.lower().split("/")
    return parts[-1].startswith("._") or any(
        SYSTEM_NAMES.get(part, _THUMBNAIL_FOLDER) != _THUMBNAIL_FOLDER for part in parts
    )


def _find_affix_reason(lower: str) -> str:
    if lower.startswith((".", "~$", "syno")):
        for prefix, reason in _SYSTEM_PREFIXES.items():
            if lower.startswith(prefix):
                return reason
    if lower.endswith(_LEFTOVER_ENDINGS):
        for suffix, reason in _SYSTEM_SUFFIXES.items():
            if lower.endswith(suffix):
                return reason
    return ""


def _identify_folder(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return -1, hash(path)  # it can't be listed either
    return status.st_dev, status.st_ino


def _is_new_link(
    path: str, above: Iterable[str], visited: set[tuple[int, int]], shown: str, ignored: IgnoredFiles
) -> bool:
    """Return whether to walk through the folder that a link leads to; else add the link to `ignored`."""
    target = os.path.realpath(path)
    parents = [*above, os.path.realpath(os.path.dirname(path))]  # noqa: PTH120
    identity = _identify_folder(target)
    if any(os.path.commonpath([target, parent]) == target for parent in parents):
        ignored.add(shown, "a link to a folder that contains it", may_be_image=True)
    elif identity in visited:
        ignored.add(shown, "a link to a folder that is read already", may_be_image=True)
    else:
        visited.add(identity)
        return True
    return False


def is_image_by_content(
    entry: os.DirEntry[str], path: str, ignored: IgnoredFiles, is_known: Callable[[str], bool] | None = None
) -> bool:
    """Return whether a file without an image's suffix is an image; else add it to `ignored`."""
    suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
    if suffix in _OTHER_SUFFIXES:
        ignored.add(path, f"not an image ({suffix})")
        return False
    if is_known is not None and is_known(path):
        return True
    try:
        head = read_head(entry.path)
    except UnreadableImageError as error:
        ignored.add(path, str(error))
        return False
    except OSError as error:
        ignored.add(path, f"{PROBLEM} read: {error.strerror or error}", may_be_image=True)
        return False
    kind = "a camera's raw format" if suffix in _RAW_SUFFIXES else identify_format(head)
    if kind in DECODED_FORMATS:
        return True
    if kind:
        ignored.add(path, f"{kind}, which is not read: save it as JPEG or PNG", may_be_image=True)
    else:
        ignored.add(path, "not an image by its content" if head else "the file is empty")
    return False


SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Accepted names of split folders, in lower case, and the split that each stands for."""


def list_class_images(
    root: Path,
    ignored: IgnoredFiles | None = None,
    *,
    exclude: Sequence[str] = (),
    is_known: Callable[[str], bool] | None = None,
    for_training: bool = True,
) -> tuple[list[tuple[str, str, str]], dict[str, set[str]]]:
    """Return rows (path, class, split) and the class folders of each split ("" if there are no split folders).

    The structure is ROOT/CLASS/…, or with a given split ROOT/SPLIT/CLASS/… or ROOT/CLASS/SPLIT/…, where SPLIT is train,
    test and optionally val. Images may be in subfolders of a class folder; see `walk_images`. Class names are in
    Unicode's composed form.

    Args:
        root: Folder of the image set.
        ignored: Receives the files that are not used.
        exclude: Names of class folders that may be empty.
        is_known: See `walk_images`.
        for_training: Whether a split must have both train and test, and each class folder an image.

    Raises:
        PylorusError: If the folders don't have the expected structure; the message says what differs.
    """
    ignored = IgnoredFiles() if ignored is None else ignored
    folders = list_folders(root, "", ignored)
    splits = {folder: SPLIT_FOLDERS.get(folder.lower(), "") for folder in folders}
    split_names = {split for split in splits.values() if split}
    if split_names and not all(splits.values()):
        other_folders = [folder for folder, split in splits.items() if not split]
        raise PylorusError(
            f"{root}: contains both split folders ({', '.join(sorted(split_names))}) and other folders:\n"
            f"{format_name_list(other_folders)}\n"
            "Expected either class folders only, or train, val and test folders that contain class folders."
        )
    if for_training and split_names and not {"train", "test"} <= split_names:
        missing = " and ".join(sorted({"train", "test"} - split_names))
        raise PylorusError(f"{root}: there is no folder {missing} next to {', '.join(sorted(split_names))}.")
    if len(set(splits.values())) < len(folders) and split_names:
        raise PylorusError(f"{root}: several folders for the same split:\n{format_name_list(folders)}")
    rows: list[tuple[str, str, str]] = []
    folders_by_split: dict[str, set[str]] = {}
    for folder_of_split, split in splits.items() if split_names else [("", "")]:
        names = folders_by_split.setdefault(split, set())
        prefix = f"{folder_of_split}/" if folder_of_split else ""
        for folder in list_folders(root, prefix, ignored) if split_names else folders:
            name = normalize_name(folder)
            names.add(name)
            may_be_empty = name in exclude or not for_training
            paths = _list_images(root, f"{prefix}{folder}/", ignored, is_known, may_be_empty=may_be_empty)
            rows += [(path, name, split) for path in paths]
    _check_unicode_forms(root, rows)
    if split_names:
        return rows, folders_by_split
    return _find_splits_of_classes(root, rows, folders_by_split, exclude, for_training=for_training)


def _check_unicode_forms(root: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Check that no two paths are the same name in two Unicode forms."""
    forms: dict[str, str] = {}
    for path, _, _ in rows:
        if not path.isascii():
            other = forms.setdefault(normalize_name(path), path)
            if other != path:
                raise PylorusError(
                    f"{root}: {format_path(path)} exists twice, with its accents composed and decomposed (as a Mac "
                    "does): the set was copied twice. Remove one of the two folders."
                )


def _find_splits_of_classes(
    root: Path,
    rows: list[tuple[str, str, str]],
    folders_by_split: dict[str, set[str]],
    exclude: Sequence[str],
    *,
    for_training: bool,
) -> tuple[list[tuple[str, str, str]], dict[str, set[str]]]:
    """Return the rows and folders with the split of ROOT/CLASS/SPLIT/…, if the classes have such folders.

    Raises:
        PylorusError: If only some images are in such folders, so that the split that somebody made would be lost.
    """
    subfolders: dict[str, set[str]] = {}
    deeper: set[str] = set()
    for folder, name in {(path.rpartition("/")[0], name) for path, name, _ in rows if name not in exclude}:
        parts = folder.lower().split("/")
        subfolders.setdefault(name, set()).add(parts[1] if len(parts) > 1 else "")
        deeper.update(SPLIT_FOLDERS.get(part, "") for part in parts[2:])
    found = sorted(set().union(*subfolders.values()) & set(SPLIT_FOLDERS))
    if not found and not {"train", "test"} <= deeper:
        return rows, folders_by_split
    if found and all(
        names <= set(SPLIT_FOLDERS) and {"train", "test"} <= {SPLIT_FOLDERS[each] for each in names}
        for names in subfolders.values()
    ):
        rows = [(path, name, SPLIT_FOLDERS.get(path.split("/")[1].lower(), "")) for path, name, _ in rows]
        by_split: dict[str, set[str]] = {}
        for _, name, split in rows:
            by_split.setdefault(split, set()).add(name)
        return rows, by_split
    if not for_training:
        return rows, folders_by_split
    differing = [f"{name}/{each or '(images)'}" for name, names in sorted(subfolders.items()) for each in sorted(names)]
    named = " and ".join(found) or "train and test"
    raise PylorusError(
        f"{root}: folders called {named} are below class folders, but not as CLASS/train/… and CLASS/test/… of every "
        f"class:\n{format_name_list(differing)}\nTo use them as the split, arrange the images as ROOT/CLASS/train/… "
        "and ROOT/CLASS/test/…, or as ROOT/train/CLASS/… and ROOT/test/CLASS/…. To have a split drawn, rename these "
        "folders."
    )


def _list_images(
    root: Path, prefix: str, ignored: IgnoredFiles, is_known: Callable[[str], bool] | None, *, may_be_empty: bool
) -> list[str]:
    """Return the paths, relative to the root, of the images in a class folder and its subfolders, sorted.

    Raises:
        PylorusError: If there is no image, or the folder can't be listed.
    """
    before = len(ignored.files)
    try:
        images = sorted(walk_images(str(root), ignored, prefix=prefix, is_known=is_known))
    except OSError as error:
        raise PylorusError(f"{root / prefix}: can't be listed: {error.strerror or error}") from error
    if not images and not may_be_empty:
        others = [f"{format_path(each.path)}: {each.reason}" for each in ignored.files[before:]]
        raise PylorusError(
            f"{root / prefix}: there is no image in this class folder (expected {', '.join(SUFFIXES)}). Remove the "
            "folder, or leave the class out of training with data.exclude."
            + (f" Found:\n{format_name_list(others)}" if others else "")
        )
    return images


def list_folders(root: Path, prefix: str, ignored: IgnoredFiles, *, allow_images: bool = False) -> list[str]:
    """Return the names of the folders directly below `root / prefix`, sorted, where no images are expected.

    Raises:
        PylorusError: If there are images beside the folders.
    """
    folders, stray = [], []
    for entry in iter_folder(str(root / prefix)):
        is_folder, path = is_directory(entry), prefix + entry.name
        if is_ignored_by_name(entry.name, path, ignored, is_folder=is_folder):
            continue
        if not is_folder:
            if entry.name.lower().endswith(SUFFIXES) or is_image_by_content(entry, path, ignored):
                stray.append(path)
        elif entry.name.startswith("__"):
            ignored.add(f"{path}/", "no class: its name begins with two underscores", may_be_image=True)
        else:
            folders.append(entry.name)
    if stray and not allow_images:
        count = "1 image is" if len(stray) == 1 else f"{len(stray)} images are"
        names = format_name_list(root / path for path in sorted(stray))
        raise PylorusError(
            f"{root / prefix}: {count} outside the class folders:\n{names}\nMove each into the folder of "
            f"its class, as in {root / prefix / 'CLASS' / 'image.jpg'}."
        )
    return sorted(folders)


IGNORED_FILE = "ignored.csv"
MAX_NAMED_FILES = 5
"""Number of files named on the terminal."""


def write_ignored(ignored: Sequence[IgnoredFile], folder: Path) -> None:
    """Write ignored.csv, the files and folders of the image set that are not used, if there are any."""
    if not ignored:
        return
    with (
        write_atomically(folder / IGNORED_FILE) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "reason"))
        writer.writerows(
            (defuse_formula(format_path(each.path)), each.reason) for each in sorted(ignored, key=attrgetter("path"))
        )


def log_ignored(ignored: Sequence[IgnoredFile], *, listed_in: str = IGNORED_FILE) -> None:
    """Log how many files are not used and why; warn about those that may be images, and name the first of them."""
    others = Counter(each.reason for each in ignored if not each.may_be_image)
    if others:
        counts = ", ".join(f"{count} {reason}" for reason, count in others.most_common(MAX_NAMED_FILES))
        total = format_count(others.total(), "file or folder", "files and folders")
        log.info("ignored  %s%s: %s", total, listed_in and f"; {listed_in} lists all", counts)
    notable = [f"{format_path(each.path)}: {each.reason}" for each in ignored if each.may_be_image]
    if notable:
        noun = "file that may be an image is" if len(notable) == 1 else "files or folders that may be images are"
        log.warning(
            "ignored  %d %s not used%s:\n%s",
            len(notable),
            noun,
            listed_in and f"; {listed_in} lists all",
            format_name_list(notable, most=MAX_NAMED_FILES),
        )
