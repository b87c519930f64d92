"""Write class folders or a manifest's images as shards: tar files in WebDataset's layout, readable by its tools."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from pylorus.chance import compute_seed
from pylorus.columns import ABOUT
from pylorus.data.catalog import extract_groups, list_class_images
from pylorus.data.content import read_image_bytes
from pylorus.data.manifest import read_manifest_rows
from pylorus.data.unreadable import UnreadableImageError, format_path
from pylorus.errors import PylorusError
from pylorus.files import write_atomically


def pack_shards(root: Path, output: Path, *, group: str | None = None, per_shard: int = 1000) -> list[Path]:
    """Write images to shards; the same images give the same bytes, and no shard is left incomplete.

    Images are assigned to shards at random, so that each shard is a sample of all classes. Since a dot in a file's name
    would end WebDataset's key, it is written as %2E.

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
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PylorusError(f"{output}: already exists, expected a new or empty folder.")
    folder, rows = _read_rows(root, group)
    members = _build_member_names(list(rows["path"]))
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
    return written


def _read_rows(root: Path, group: str | None) -> tuple[Path, pd.DataFrame]:
    if root.is_file():
        folder, rows = root.parent, read_manifest_rows(root)
    elif root.is_dir():
        folder, rows = root, pd.DataFrame(list_class_images(root)[0], columns=["path", "class", "split"])
    else:
        raise PylorusError(f"{root}: expected a folder of class folders, or a manifest file.")
    if group is not None:
        rows["group"] = extract_groups(list(rows["path"]), group)
    if rows.empty:
        raise PylorusError(f"{root}: contains no images.")
    return folder, rows.sort_values("path", ignore_index=True)


def _build_member_names(paths: list[str]) -> list[str]:
    """Return the member name of each path.

    Raises:
        PylorusError: If two paths would have the same key.
    """
    keys: dict[str, str] = {}
    members = []
    for path in paths:
        folder, slash, name = path.rpartition("/")
        stem, dot, ending = name.rpartition(".")
        key = folder + slash + stem.replace(".", "%2E")
        if key in keys:
            raise PylorusError(
                f"{format_path(path)} and {format_path(keys[key])} would share the key {format_path(key)}. Rename one."
            )
        keys[key] = path
        members.append(key + dot + ending)
    return members


def _build_metadata(row: Mapping[str, object]) -> dict[str, str]:
    """Return the content of KEY.json."""
    columns = {"label": row["class"], "group": row.get("group", ""), "split": row["split"]}
    metadata = {name.removeprefix(ABOUT): value for name, value in row.items() if name.startswith(ABOUT)}
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
