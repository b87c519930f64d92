"""Find the images on which an export is verified: the user's, or those of the bundle's run."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import OmegaConf

from pylorus.data.catalog import get_matched_group, parse_group_pattern
from pylorus.data.input import InputFormat
from pylorus.data.unreadable import UnreadableImageError
from pylorus.deploy.description import Description
from pylorus.deploy.sources import Sources
from pylorus.errors import PylorusError

READ_AT_ONCE = 32
UNKNOWN = -1
ASK = "Choose images with --images DIR."


@dataclass(frozen=True, eq=False)
class TrialImages:
    """Image files, not read yet.

    Attributes:
        files: In any order.
        labels: Class index of each file in the bundle's class order, or `UNKNOWN`; int64 of shape (files,).
        groups: Group (patient) of each file; shape (files,).
        source: Where they come from, as text.
    """

    files: tuple[Path, ...]
    labels: NDArray[np.int64]
    groups: NDArray[np.str_]
    source: str

    def __len__(self) -> int:
        return len(self.files)

    def select_files(self, indices: NDArray[np.int64]) -> "TrialImages":
        """Return the files at the given indices."""
        return TrialImages(
            tuple(self.files[index] for index in indices), self.labels[indices], self.groups[indices], self.source
        )

    def read_blocks(self, input_format: InputFormat) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Yield indices and pixels (n, size, size, 3), block by block; files that can't be read are skipped."""
        for start in range(0, len(self.files), READ_AT_ONCE):
            indices, images = [], []
            for index in range(start, min(start + READ_AT_ONCE, len(self.files))):
                try:
                    images.append(input_format.load_image(self.files[index]))
                    indices.append(index)
                except UnreadableImageError:
                    continue
            if images:
                yield np.array(indices, dtype=np.int64), np.stack(images)


def select_evenly(images: TrialImages, count: int) -> TrialImages:
    """Return at most `count` of the images, evenly spaced."""
    indices = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(np.int64)
    return images.select_files(indices)


def find_user_images(folder: Path, description: Description, *, group: str | None) -> TrialImages:
    """Find the images below a folder; a folder named after a class labels its images.

    Args:
        folder: Folder from --images.
        description: The bundle's description.
        group: Regular expression that finds the patient in a path; None to make each image its own group.

    Raises:
        PylorusError: If it is not a folder, holds no image, or a path matches no patient.
    """
    if not folder.is_dir():
        raise PylorusError(f"--images: found {folder}, expected a folder of images.")
    class_names = tuple(zip(description.classes, description.short_names, strict=True))
    items = [item for item in Sources((str(folder),), class_names, None).iter_items() if isinstance(item.source, Path)]
    if not items:
        raise PylorusError(f"--images: {folder} holds no images.")
    groups = [item.path for item in items]
    if group is not None:
        finder = parse_group_pattern(group, key="--group")
        matches = [finder.search(item.path) for item in items]
        missing = next((item.path for item, match in zip(items, matches, strict=True) if not match), None)
        if missing is not None:
            raise PylorusError(f"--group: {group!r} finds no patient in {missing}.")
        groups = [get_matched_group(match) for match in matches if match]
    return TrialImages(
        tuple(Path(str(item.source)) for item in items),
        np.array([UNKNOWN if item.label is None else item.label for item in items], dtype=np.int64),
        np.array(groups, dtype=np.str_),
        "--images",
    )


def find_run_images(bundle: Path, description: Description, split: str | None = None) -> TrialImages:
    """Find the images of a bundle's run.

    Args:
        bundle: The folder `model` of a run.
        description: The bundle's description.
        split: Split (train, val or test); None for all.

    Raises:
        PylorusError: If it is not in a run, or the run's images are missing; the message asks for --images.
    """
    run = bundle.absolute().parent
    try:
        table = pd.read_csv(run / "split.csv", dtype=str)
        config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"), resolve=False)
        source, root = (config["data"][key] for key in ("kind", "root"))  # type: ignore[index, call-overload]
        rows = table if split is None else table[table["split"] == split]
        labels = [description.classes.index(name) for name in rows["class"]]
        paths, groups = list(rows["path"]), rows["group"].to_numpy(dtype=np.str_)
    except Exception:  # errors of pandas or YAML: the files are not those of a run
        raise PylorusError(
            f"{bundle}: an export is verified on real images, but this bundle is not in a run with images. {ASK}"
        ) from None
    if source == "shards":
        raise PylorusError(f"{run}: its images are in shards, which export can't read. {ASK}")
    folder = run / "images" if source == "synthetic" else Path(str(root))
    files = tuple(folder / path for path in paths)
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise PylorusError(
            f"{missing}: this image of the run no longer exists, but the export is verified on it. {ASK}"
        )
    note = " (synthetic, not real)" if source == "synthetic" else ""
    return TrialImages(
        files, np.array(labels, dtype=np.int64), groups, f"the run's own {f'{split} ' if split else ''}images{note}"
    )
