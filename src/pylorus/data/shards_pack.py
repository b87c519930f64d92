"""Class folders or a manifest as shards: tar files in WebDataset's layout, which its readers take too."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from pylorus.chance import derived_seed
from pylorus.columns import ABOUT
from pylorus.data.catalog import groups_of, scan_folders
from pylorus.data.content import contents
from pylorus.data.manifest import manifest_rows
from pylorus.data.unreadable import UnreadableImageError, shown
from pylorus.errors import PylorusError
from pylorus.files import whole


def pack(root: Path, output: Path, *, group: str | None = None, per_shard: int = 1000) -> list[Path]:
    """Writes shards; each is there whole or not at all, and the same images give the same bytes.

    Images are spread over the shards by chance, so that each is a sample of all classes. A dot in a file's name would
    end WebDataset's key: it is written as %2E.

    Args:
        root: Folder of class folders, or a manifest beside its images.
        output: A folder that does not exist yet, or is empty.
        group: Regular expression that finds the patient in the path; None: what a manifest says.
        per_shard: Images of a shard.

    Raises:
        PylorusError: If the images or the folder can't be used; names them.
    """
    if per_shard < 1:
        raise PylorusError(f"--per-shard: found {per_shard}, expected at least 1.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PylorusError(f"{output}: is there already, expected a new or empty folder.")
    folder, rows = _rows(root, group)
    members = _members(list(rows["path"]))
    order = np.random.default_rng(derived_seed(0, "pack")).permutation(len(rows))
    written = []
    for number, start in enumerate(range(0, len(rows), per_shard)):
        path = output / f"shard-{number:06d}.tar"
        with whole(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for place in order[start : start + per_shard]:
                row = rows.iloc[int(place)]
                _add(
                    tar,
                    folder / str(row["path"]),
                    members[int(place)],
                    _beside({str(name): value for name, value in row.items()}),
                )
        written.append(path)
    return written


def _rows(root: Path, group: str | None) -> tuple[Path, pd.DataFrame]:
    if root.is_file():
        folder, rows = root.parent, manifest_rows(root)
    elif root.is_dir():
        folder, rows = root, pd.DataFrame(scan_folders(root)[0], columns=["path", "class", "split"])
    else:
        raise PylorusError(f"{root}: expected a folder of class folders, or a manifest.")
    if group is not None:
        rows["group"] = groups_of(list(rows["path"]), group)
    if rows.empty:
        raise PylorusError(f"{root}: holds no image.")
    return folder, rows.sort_values("path", ignore_index=True)


def _members(paths: list[str]) -> list[str]:
    """The member of each path.

    Raises:
        PylorusError: If two would share a key.
    """
    keys: dict[str, str] = {}
    members = []
    for path in paths:
        folder, slash, name = path.rpartition("/")
        stem, dot, ending = name.rpartition(".")
        key = folder + slash + stem.replace(".", "%2E")
        if key in keys:
            raise PylorusError(f"{shown(path)} and {shown(keys[key])}: would share the key {shown(key)}. Rename one.")
        keys[key] = path
        members.append(key + dot + ending)
    return members


def _beside(row: Mapping[str, object]) -> dict[str, str]:
    """What KEY.json says."""
    named = {"label": row["class"], "group": row.get("group", ""), "split": row["split"]}
    about = {name.removeprefix(ABOUT): value for name, value in row.items() if name.startswith(ABOUT)}
    return {name: str(value) for name, value in {**about, **named}.items() if value != ""}


def _add(tar: tarfile.TarFile, path: Path, member: str, beside: dict[str, str]) -> None:
    try:
        image = contents(path)
    except UnreadableImageError as error:
        raise PylorusError(f"{shown(path)}: {error}") from error
    key = member.rpartition(".")[0]
    text = json.dumps(beside, sort_keys=True, ensure_ascii=False).encode()
    for name, content in ((member, image), (f"{key}.json", text)):
        entry = tarfile.TarInfo(name)  # without owner and time: neither belongs to the image
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
