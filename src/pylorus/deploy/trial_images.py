"""The images on which an export is tried: the user's, or those of the run that the bundle lies in."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import OmegaConf

from pylorus.data.catalog import group_finder, group_in
from pylorus.data.input import InputFormat
from pylorus.data.unreadable import UnreadableImageError
from pylorus.deploy.description import Description
from pylorus.deploy.sources import Sources
from pylorus.errors import PylorusError

READ_AT_ONCE = 32
UNKNOWN = -1
ASK = "Give some with --images DIR."


@dataclass(frozen=True, eq=False)
class TrialImages:
    """Files of images, not read yet.

    Attributes:
        files: In any order.
        labels: The class of each as a place in the bundle's classes, or `UNKNOWN`; of shape (files,).
        groups: What each belongs to (the patient), of shape (files,).
        source: In words.
    """

    files: tuple[Path, ...]
    labels: NDArray[np.int64]
    groups: NDArray[np.str_]
    source: str

    def __len__(self) -> int:
        return len(self.files)

    def taken(self, places: NDArray[np.int64]) -> "TrialImages":
        """Some of them."""
        return TrialImages(
            tuple(self.files[place] for place in places), self.labels[places], self.groups[places], self.source
        )

    def read(self, form: InputFormat) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Their places and pixels (n, size, size, 3), block by block; what can't be read is passed over."""
        for start in range(0, len(self.files), READ_AT_ONCE):
            places, images = [], []
            for place in range(start, min(start + READ_AT_ONCE, len(self.files))):
                try:
                    images.append(form.read(self.files[place]))
                    places.append(place)
                except UnreadableImageError:
                    continue
            if images:
                yield np.array(places, dtype=np.int64), np.stack(images)


def spread(images: TrialImages, count: int) -> TrialImages:
    """At most `count` of them, spread evenly."""
    places = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(np.int64)
    return images.taken(places)


def given_images(folder: Path, said: Description, *, group: str | None) -> TrialImages:
    """The images below a folder; those in folders that have the name of a class are of that class.

    Args:
        folder: As the user gave it.
        said: The bundle's description.
        group: Regular expression that finds the patient in a path; None: each image stands for itself.

    Raises:
        PylorusError: If it is no folder, holds no image, or no patient is found in a path.
    """
    if not folder.is_dir():
        raise PylorusError(f"--images: found {folder}, expected a folder of images.")
    named = tuple(zip(said.classes, said.short_names, strict=True))
    items = [item for item in Sources((str(folder),), named, None).items() if isinstance(item.source, Path)]
    if not items:
        raise PylorusError(f"--images: {folder} holds no image.")
    groups = [item.path for item in items]
    if group is not None:
        finder = group_finder(group, key="--group")
        found = [finder.search(item.path) for item in items]
        missing = next((item.path for item, match in zip(items, found, strict=True) if not match), None)
        if missing is not None:
            raise PylorusError(f"--group: {group!r} finds no patient in {missing}.")
        groups = [group_in(match) for match in found if match]
    return TrialImages(
        tuple(Path(str(item.source)) for item in items),
        np.array([UNKNOWN if item.label is None else item.label for item in items], dtype=np.int64),
        np.array(groups, dtype=np.str_),
        "--images",
    )


def run_images(bundle: Path, said: Description, part: str | None = None) -> TrialImages:
    """The images of the run that a bundle lies in.

    Args:
        bundle: The folder `model` of a run.
        said: The bundle's description.
        part: train, val or test; None: all of them.

    Raises:
        PylorusError: If it lies in no run, or the run's images are not there; asks for others.
    """
    run = bundle.absolute().parent
    try:
        table = pd.read_csv(run / "split.csv", dtype=str)
        config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"), resolve=False)
        kind, root = (config["data"][key] for key in ("kind", "root"))  # type: ignore[index, call-overload]
        rows = table if part is None else table[table["split"] == part]
        labels = [said.classes.index(name) for name in rows["class"]]
        paths, groups = list(rows["path"]), rows["group"].to_numpy(dtype=np.str_)
    except Exception:  # of a table, of YAML: whatever lies there is no run's
        raise PylorusError(
            f"{bundle}: an export is tried on real images, and this bundle lies in no run that has some. {ASK}"
        ) from None
    if kind == "shards":
        raise PylorusError(f"{run}: its images lie in shards, which are not read here. {ASK}")
    folder = run / "images" if kind == "synthetic" else Path(str(root))
    files = tuple(folder / path for path in paths)
    gone = next((file for file in files if not file.is_file()), None)
    if gone is not None:
        raise PylorusError(f"{gone}: an image of the run, on which to try the export, is not there any more. {ASK}")
    drawn = " (drawn, not real)" if kind == "synthetic" else ""
    return TrialImages(
        files, np.array(labels, dtype=np.int64), groups, f"the run's own {f'{part} ' if part else ''}images{drawn}"
    )
