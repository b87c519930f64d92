"""Read an image set that is listed in a manifest or packed in shards as a catalog, and pack one into shards.

Class folders and the shards that `pylorus pack` creates from them have the same paths, and therefore the same sample
IDs, groups, splits, order and augmentations: a run gives the same result on either.
"""

import dataclasses
import io
import json
import os
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pylorus.config.instantiation import get_target, instantiate
from pylorus.config.schema import Config, DataConfig
from pylorus.core.distributed import compute_seed
from pylorus.core.errors import (
    PylorusError,
    UnreadableImageError,
    format_name_list,
    format_path,
    format_suggestion,
    normalize_name,
)
from pylorus.core.io import check_new_folder, write_atomically
from pylorus.core.privacy import MANIFEST_PREFIX
from pylorus.data.audit_findings import ImageSet, Thresholds
from pylorus.data.catalog import (
    DEFAULT_READ_OPTIONS,
    Catalog,
    ReadOptions,
    build_catalog,
    check_all_listed,
    check_class_names,
    drop_excluded_classes,
    extract_groups,
    format_exclusion,
    get_matched_group,
    parse_group_pattern,
    read_folders,
)
from pylorus.data.dicom import ensure_salt
from pylorus.data.files import HEAD_BYTES, SUFFIXES, check_names, identify_format, read_image_bytes
from pylorus.data.input_format import ImageWriter, guess_input_format
from pylorus.data.manifest import (
    explain_missing_files,
    read_manifest_rows,
    warn_of_split_folders,
    warn_of_unused_columns,
)
from pylorus.data.shards import Shards, find_shards, load_shard_index
from pylorus.data.walk import (
    IGNORED_FILE,
    SPLIT_FOLDERS,
    IgnoredFiles,
    list_class_images,
    log_ignored,
    write_ignored,
)


def list_folder_files(root: Path, *, group: str | None = None) -> ImageSet:
    """Find the files in class folders, by the same rules as the catalog; none is opened.

    Args:
        root: Folder with the structure ROOT/CLASS/… or ROOT/SPLIT/CLASS/…
        group: Regular expression that matches the patient in the path relative to the root.

    Raises:
        PylorusError: If the folders don't have this structure, or `group` is not a regular expression.
    """
    _check_folder(root)
    ignored = IgnoredFiles()
    rows, _ = list_class_images(root, ignored)
    if not rows:
        raise PylorusError(
            f"{root}: found no class folder, expected images as in {root / 'CLASS' / 'image.jpg'} or "
            f"{root / 'train' / 'CLASS' / 'image.jpg'}."
        )
    paths, classes, splits = zip(*sorted(rows), strict=True)
    table = pd.DataFrame(
        {
            # A path may contain bytes that are not UTF-8, which pandas' text columns reject: use objects.
            "path": pd.Series(paths, dtype=object),
            "class": [format_path(Path(name)) for name in classes],
            "split": splits,
            "group": [format_path(Path(name)) if name else "" for name in _match_groups(list(paths), group)],
        }
    )
    return ImageSet(root, table, grouped=group is not None, ignored=ignored.files)


def list_manifest_files(manifest: Path, root: Path, *, group: str | None = None) -> ImageSet:
    """Return the files that a manifest lists, whether they exist or not; none is opened.

    Args:
        manifest: A table in the format that this module documents.
        root: Folder that its paths are relative to.
        group: Regular expression that matches the patient in the path; None: the column group, if there is one.

    Raises:
        PylorusError: If the manifest is not such a table, or `group` is not a regular expression.
    """
    _check_folder(root)
    rows = read_manifest_rows(manifest, root)
    table = rows[["path", "class", "split"]].reset_index(drop=True)
    has_groups = group is None and "group" in rows
    groups = list(rows["group"]) if has_groups else _match_groups(list(rows["path"]), group)
    return ImageSet(root, table.assign(group=groups), grouped=has_groups or group is not None)


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise PylorusError(f"{root} is not a folder; expected the folder of an image set.")


def _match_groups(paths: list[str], pattern: str | None) -> list[str]:
    """Return the group of each path, empty if the expression does not match: the audit reports all these paths."""
    if pattern is None:
        return paths
    expression = parse_group_pattern(pattern, key="--group")
    matches = [expression.search(normalize_name(path)) for path in paths]
    return ["" if match is None else get_matched_group(match) for match in matches]


def read_manifest(
    manifest: Path,
    *,
    root: Path | None = None,
    classes: list[str] | None = None,
    short_names: list[str] | None = None,
    exclude: list[str] | None = None,
    group: str | None = None,
    columns: Mapping[str, object] | None = None,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
) -> Catalog:
    """Build the catalog of a manifest.

    Args:
        manifest: The file, .csv or .parquet.
        root: Folder that its paths are relative to; None: the manifest's own folder.
        classes: Names of the classes in the order of the labels; None: all labels found, sorted.
        short_names: One per class; None: the class names.
        exclude: Names of classes that are left out.
        group: Regular expression that matches the patient in a path; None: the column group, if there is one.
        columns: Names of the columns for path, label, group and split where they are others.
        reading: Where facts are cached, and what to do with files that can't be read.

    Raises:
        PylorusError: If the manifest or an image is missing, unreadable or not as described above; it is named.
    """
    folder = root if root is not None else manifest.parent
    table = read_manifest_rows(manifest, folder, columns=columns)
    table, excluded = drop_excluded_classes(table, exclude, where=str(manifest))
    class_names = _resolve_manifest_classes(table["class"], classes, manifest)
    missing = list(table.loc[~table.pop("exists"), "path"])
    if missing and (reading.on_error == "fail" or len(missing) == len(table)):
        raise PylorusError(explain_missing_files(missing, len(table), folder, manifest))
    grouped = group is not None or "group" in table
    if not grouped:
        warn_of_unused_columns(table, manifest)
    warn_of_split_folders(table, manifest)
    if group is not None or not grouped:
        table["group"] = extract_groups(list(table["path"]), group)
    catalog = build_catalog(table, folder, class_names, short_names=short_names, grouped=grouped, reading=reading)
    return dataclasses.replace(catalog, excluded=excluded)


def write_source_table(rows: object, manifest: Path, *, root: Path | None) -> Path:
    """Write what an image source of the user's own returned as a manifest.

    Args:
        rows: A table with the columns path and label and, where known, group, split and others; paths are absolute, or
            relative to the root.
        manifest: The file to write.
        root: Folder that the paths are relative to; None: the innermost folder that contains all of them.

    Returns:
        The root.

    Raises:
        PylorusError: If it is not such a table, or relative paths have no root.
    """
    if not isinstance(rows, pd.DataFrame) or not {"path", "label"} <= set(rows.columns) or rows.empty:
        found = f"{len(rows)} rows of {list(rows.columns)}" if isinstance(rows, pd.DataFrame) else type(rows).__name__
        raise PylorusError(
            f"data._target_: found {found}, expected a pandas.DataFrame with the columns path and label, one row "
            "per image."
        )
    paths = [Path(str(path)) for path in rows["path"]]
    if root is None:
        if not all(path.is_absolute() for path in paths):
            raise PylorusError("data._target_: found relative paths. Add data.root=DIR, or return absolute paths.")
        root = Path(os.path.commonpath([path.parent for path in paths]))
    outside = [str(path) for path in paths if path.is_absolute() and not path.is_relative_to(root)]
    if outside:
        raise PylorusError(f"data._target_: found paths outside data.root {root}:\n{format_name_list(outside)}")
    relative = [str(path.relative_to(root)) if path.is_absolute() else str(path) for path in paths]
    with write_atomically(manifest) as temporary:
        rows.assign(path=relative).to_csv(temporary, index=False)
    return root


def _resolve_manifest_classes(labels: pd.Series, configured: list[str] | None, manifest: Path) -> tuple[str, ...]:
    labels_found = sorted(set(labels))
    check_class_names(labels_found, configured, where=str(manifest))
    names = list(map(normalize_name, configured)) if configured is not None else labels_found
    if len(names) < 2:
        count = "1 class" if names else "no class"
        raise PylorusError(f'{manifest}: found {count} in column "label", expected at least two.')
    for unknown in [name for name in labels_found if name not in names]:
        raise PylorusError(
            f'{manifest}: label "{unknown}" is not among data.classes ({", ".join(names)}).'
            f"{format_suggestion(unknown, names)} To leave its images out, add {format_exclusion(unknown)}."
        )
    for missing in [name for name in names if name not in labels_found]:
        raise PylorusError(
            f'{manifest}: no row has label "{missing}".{format_suggestion(missing, labels_found)} '
            f"Found: {', '.join(labels_found)}."
        )
    return tuple(names)


def read_shard_catalog(
    root: str,
    *,
    index: Path,
    classes: list[str] | None = None,
    short_names: list[str] | None = None,
    exclude: list[str] | None = None,
    group: str | None = None,
    reading: ReadOptions = DEFAULT_READ_OPTIONS,
) -> Catalog:
    """Read the catalog of shards.

    Args:
        root: A folder, or a pattern of files or URLs; see `shards_places`.
        index: Folder of cached indices: a shard with an index there is not read.
        classes: Class names in the order of the labels; None: those found, sorted.
        short_names: One per class; None: the class names.
        exclude: Names of classes that are left out.
        group: Regular expression that extracts the patient from a member's path; None: the group given in the shards.
        reading: Which facts of the images are stored, and how unreadable images are handled.

    Returns:
        The catalog, whose root is a `Shards`.

    Raises:
        PylorusError: If a shard or an image can't be used; names the shard and the key.
    """
    shards = find_shards(root)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        tables = list(pool.map(lambda shard: load_shard_index(shard, index), shards))
    rows = pd.concat([table.assign(shard=number) for number, table in enumerate(tables)], ignore_index=True)
    shard_names = [shard.name for shard in shards]
    _check_unique_paths(rows, shard_names)
    rows["class"] = _name_labels(rows["label"], classes)
    rows, excluded = drop_excluded_classes(rows, exclude, where=root)
    class_names = _resolve_classes(rows, classes, shard_names)
    rows["split"] = _parse_splits(rows, shard_names)
    has_groups = group is not None or "group" in rows
    if group is not None or not has_groups:
        rows["group"] = extract_groups(list(rows["path"]), group)
    _raise_for_first(
        rows, rows["group"].isin([""]) | rows["group"].isna(), shard_names, "has no group, but other images have one."
    )
    metadata = [str(name) for name in rows.columns if str(name).startswith(MANIFEST_PREFIX)]
    for name in metadata:
        rows[name] = rows[name].fillna("")
    catalog_rows = rows[["path", "class", "group", "split", "sha256", *metadata]]
    members = Shards(root, shards, rows[["path", "shard", "offset", "size", "sha256"]])
    catalog = build_catalog(
        catalog_rows, members, class_names, short_names=short_names, grouped=has_groups, reading=reading
    )
    return dataclasses.replace(catalog, excluded=excluded)


def _find_first(is_wrong: pd.Series) -> int:
    return int(is_wrong.to_numpy().argmax())


def _raise_for_first(rows: pd.DataFrame, is_wrong: pd.Series, shard_names: list[str], problem: str) -> None:
    if is_wrong.any():
        first = rows.iloc[_find_first(is_wrong)]
        location = f"shard {shard_names[int(first['shard'])]}, {format_path(first['path'])}"
        raise PylorusError(f"{location}: {problem} ({is_wrong.sum()} of {len(rows)} images)")


def _check_unique_paths(rows: pd.DataFrame, shard_names: list[str]) -> None:
    is_duplicate = rows["path"].duplicated()
    if is_duplicate.any():
        path = str(rows["path"].iloc[_find_first(is_duplicate)])
        holders = " and ".join(shard_names[number] for number in rows.loc[rows["path"] == path, "shard"])
        raise PylorusError(
            f"key {format_path(path)} is in shards {holders}: {is_duplicate.sum()} images would share a name. Keys "
            f"must be unique over all shards: prefix them with the number of the shard, for instance."
        )


def _name_labels(labels: pd.Series, configured: list[str] | None) -> pd.Series:
    """Return the class of each label: a number in KEY.cls is an index into `data.classes` if these are given."""
    labels = labels.map(normalize_name)
    if configured is None:
        return labels
    return labels.replace(
        {str(number): name for number, name in enumerate(configured) if str(number) not in configured}
    )


def _resolve_classes(rows: pd.DataFrame, configured: list[str] | None, shard_names: list[str]) -> tuple[str, ...]:
    labels = rows["class"]
    check_class_names(labels, configured, where=f"shard {shard_names[0]} …")
    class_names = list(map(normalize_name, configured)) if configured is not None else sorted(set(labels))
    is_unknown = ~labels.isin(class_names)
    if is_unknown.any():
        label = str(labels.iloc[_find_first(is_unknown)])
        hint = format_suggestion(label, class_names)
        problem = f'label "{label}" is not among data.classes ({", ".join(class_names)}).{hint}'
        _raise_for_first(rows, is_unknown, shard_names, problem)
    missing = [name for name in class_names if name not in set(labels)]
    if missing or len(class_names) < 2:
        raise PylorusError(
            f"data.classes: found {', '.join(sorted(set(labels)))} in the shards, expected at least two classes"
            + (f", including {missing[0]}." if missing else ".")
        )
    return tuple(class_names)


def _parse_splits(rows: pd.DataFrame, shard_names: list[str]) -> pd.Series:
    values = rows["split"].fillna("") if "split" in rows else pd.Series("", index=rows.index)
    if (values == "").all():
        return values
    splits = values.str.lower().map(SPLIT_FOLDERS)
    _raise_for_first(
        rows, splits.isna(), shard_names, "its split is not train, val or test: give all images one, or none."
    )
    absent = sorted({"train", "test"} - set(np.unique(splits.astype(str))))
    if absent:
        raise PylorusError(f"{shard_names[0]} …: no image of the shards has split {' or '.join(absent)}.")
    return splits


def pack_shards(root: Path, output: Path, *, group: str | None = None, per_shard: int = 1000) -> list[Path]:
    """Write images to shards; the same images give the same bytes, and no shard is left incomplete.

    Images are assigned to shards at random, so that each shard is a sample of all classes. Since a dot in a file's name
    would end WebDataset's key, it is written as %2E. Files beside the images that are not packed are listed in
    ignored.csv.

    Args:
        root: Folder of class folders, or a manifest beside its images.
        output: A folder that does not exist yet, or is empty.
        group: Regular expression that extracts the patient from the path; None: the group given in a manifest.
        per_shard: Images per shard.

    Returns:
        The paths of the shards.

    Raises:
        PylorusError: If the images or the folder can't be used; names them.
    """
    if per_shard < 1:
        raise PylorusError(f"--per-shard: found {per_shard}, expected at least 1.")
    check_new_folder(output)
    folder, rows, ignored = _read_rows(root, group)
    members = _build_member_names(list(rows["path"]), folder)
    order = np.random.default_rng(compute_seed(0, "pack")).permutation(len(rows))
    written = []
    for number, start in enumerate(range(0, len(rows), per_shard)):
        path = output / f"shard-{number:06d}.tar"
        with write_atomically(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for index in order[start : start + per_shard]:
                row = rows.iloc[int(index)]
                _add_image(
                    tar,
                    folder / str(row["path"]),
                    members[int(index)],
                    _build_metadata({str(name): value for name, value in row.items()}),
                )
        written.append(path)
    write_ignored(ignored.files, output)
    log_ignored(ignored.files, listed_in=str(output / IGNORED_FILE))
    return written


def _read_rows(root: Path, group: str | None) -> tuple[Path, pd.DataFrame, IgnoredFiles]:
    ignored = IgnoredFiles()
    if root.is_file():
        folder, rows = root.parent, read_manifest_rows(root)
    elif root.is_dir():
        found = list_class_images(root, ignored)[0]
        check_names((path for path, *_ in found), root)
        check_all_listed(root, ignored)
        folder, rows = root, pd.DataFrame(found, columns=["path", "class", "split"])
    else:
        raise PylorusError(f"{root}: expected a folder of class folders, or a manifest file.")
    if group is not None:
        rows["group"] = extract_groups(list(rows["path"]), group)
    if rows.empty:
        raise PylorusError(f"{root}: contains no images.")
    check_class_names(rows["class"], None, where=str(root))
    return folder, rows.sort_values("path", ignore_index=True), ignored


def _build_member_names(paths: list[str], folder: Path) -> list[str]:
    """Return the member name of each path; a file without an image's suffix gets that of its content.

    Raises:
        PylorusError: If two paths would have the same key.
    """
    keys: dict[str, str] = {}
    members = []
    for path in paths:
        parent, slash, name = path.rpartition("/")
        stem, _, ending = name.rpartition(".")
        if not name.lower().endswith(SUFFIXES):
            stem, ending = name, _identify_ending(folder / path)
        key = parent + slash + stem.replace(".", "%2E")
        if key in keys:
            raise PylorusError(
                f"{format_path(path)} and {format_path(keys[key])} would share the key {format_path(key)}. Rename one."
            )
        keys[key] = path
        members.append(f"{key}.{ending}")
    return members


def _identify_ending(path: Path) -> str:
    try:
        kind = identify_format(read_image_bytes(path)[:HEAD_BYTES])
    except UnreadableImageError as error:
        raise PylorusError(f"{format_path(path)}: {error}") from error
    return {"JPEG": "jpg", "TIFF": "tif", "DICOM": "dcm"}.get(kind, kind.lower())


def _build_metadata(row: Mapping[str, object]) -> dict[str, str]:
    """Return the content of KEY.json."""
    columns = {"label": row["class"], "group": row.get("group", ""), "split": row["split"]}
    metadata = {
        name.removeprefix(MANIFEST_PREFIX): value for name, value in row.items() if name.startswith(MANIFEST_PREFIX)
    }
    return {name: str(value) for name, value in {**metadata, **columns}.items() if value != ""}


def _add_image(tar: tarfile.TarFile, path: Path, member: str, metadata: dict[str, str]) -> None:
    try:
        image = read_image_bytes(path)
    except UnreadableImageError as error:
        raise PylorusError(f"{format_path(path)}: {error}") from error
    key = member.rpartition(".")[0]
    encoded_metadata = json.dumps(metadata, sort_keys=True, ensure_ascii=False).encode()
    for name, content in ((member, image), (f"{key}.json", encoded_metadata)):
        entry = tarfile.TarInfo(name)  # without owner and time, so that the same images give the same bytes
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))


def read_run_catalog(
    data: DataConfig, root: Path | None, folder: Path, *, cache: Path, images: ImageWriter | None
) -> Catalog:
    """Read the catalog of a run's images from the configured source.

    Args:
        data: The section of the configuration.
        root: What paths are relative to; None: the manifest's folder.
        folder: The run's folder, for the table of a source of the user's own.
        cache: Folder of all caches.
        images: Receives the network's input of files that are decoded; None: nothing does.
    """
    salt = ensure_salt(cache) if data.patients == "dicom" else None
    reading = ReadOptions(store=cache / "facts", on_error=data.on_error, verify=data.verify, images=images, salt=salt)
    known: dict[str, Any] = {"classes": data.classes, "short_names": data.short_names, "exclude": data.exclude}
    source = get_target(data)
    if source is not None:
        manifest = folder / "source.csv"
        if not manifest.is_file():  # a resumed run trains on the images that it began with
            root = write_source_table(instantiate(source, key="data"), manifest, root=root)
        return read_manifest(manifest, root=root, **known, group=data.group, reading=reading)
    if data.kind == "manifest":
        return read_manifest(
            Path(str(data.manifest)), root=root, **known, group=data.group, columns=data.columns, reading=reading
        )
    if data.kind == "shards":
        index = cache / "shards"
        return read_shard_catalog(str(data.root), index=index, **known, group=data.group, reading=reading)
    return read_folders(Path(str(root)), **known, group=data.group, reading=reading)


def read_ahead(config: Config) -> None:
    """Read a run's files, and find copies among them, for the caches of the run; errors are left to the run."""
    data, cache = config.data, Path(config.cache.folder)
    # The process that imports timm saves the format of a model that is trained for the first time.
    images = ImageWriter(guess_input_format(config), config.cache, find_form=partial(guess_input_format, config))
    with suppress(PylorusError):
        root = Path(data.root) if data.root is not None else None
        catalog = read_run_catalog(data, root, Path(), cache=cache, images=images)
        from pylorus.data.leakage import find_copies  # here: SciPy would delay the reading

        find_copies(catalog.facts, Thresholds(), store=cache / "facts")
