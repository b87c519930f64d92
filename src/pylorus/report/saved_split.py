"""Read the split that a run saved: its hash, the images and groups of each split, and overlaps between splits."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from pylorus.errors import PylorusError

# As in pylorus.data.split, whose import would load scikit-learn and is slow.
COLUMNS = ["sample_id", "path", "class", "group", "split", "sha256"]
PARTS = ("train", "val", "test")

SHOWN_DIGITS = 12
"""Number of digits of a hash that tables cite."""


@dataclass(frozen=True, eq=False)
class SavedSplit:
    """The split of a run.

    Attributes:
        sha256: SHA-256 of split.csv, by which tables cite the split.
        table: One row per image: sample_id, path, class (name of the folder), group, split and sha256, all as text.
    """

    sha256: str
    table: pd.DataFrame

    @property
    def short_hash(self) -> str:
        """Short hash, as cited in tables."""
        return self.sha256[:SHOWN_DIGITS]

    @cached_property
    def test_set_hash(self) -> str:
        """Hash of the contents of the test images: the same for every split that tests on these images."""
        return compute_image_set_hash(set(self.get_split_rows("test")["sha256"]))

    def get_split_rows(self, name: str) -> pd.DataFrame:
        """Return the rows of train, val or test."""
        return self.table[self.table["split"] == name]

    def count_by_split(self, class_name: str, column: str | None = None) -> list[int]:
        """Count the images of a class, or their distinct values of a column, in train, val and test."""
        images = self.table[self.table["class"] == class_name]
        tables = [images[images["split"] == name] for name in PARTS]
        return [len(table) if column is None else int(table[column].nunique()) for table in tables]

    @cached_property
    def groups_in_several_splits(self) -> int:
        """Number of groups that occur in more than one split (train, val, test)."""
        return self._count_in_several_splits("group")

    @cached_property
    def images_in_several_splits(self) -> int:
        """Number of images, identified by their content, that occur in more than one split (train, val, test)."""
        return self._count_in_several_splits("sha256")

    def _count_in_several_splits(self, column: str) -> int:
        return int((self.table.groupby(column)["split"].nunique() > 1).sum())


def read_split(path: Path) -> SavedSplit:
    """Read split.csv.

    Raises:
        PylorusError: If the file does not have the form in which a run writes it.
    """
    content = path.read_bytes()
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise PylorusError(f"{path}: cannot be read as a split: {error}") from error
    missing = [name for name in COLUMNS if name not in table.columns]
    unknown = set() if missing else set(table["split"]) - set(PARTS)
    if missing or unknown or table.empty:
        found = f"columns {list(table.columns)}" if missing else f"splits {sorted(unknown)}" if unknown else "no rows"
        raise PylorusError(f"{path}: found {found}, expected columns {COLUMNS} and splits {list(PARTS)}.")
    return SavedSplit(hashlib.sha256(content).hexdigest(), table)


def compute_image_set_hash(contents: set[str]) -> str:
    """Hash a set of images, each given by the hash of its content; independent of their order and names."""
    return hashlib.sha256("\n".join(sorted(contents)).encode()).hexdigest()


def find_contradiction(split: SavedSplit, split_name: str, samples: np.ndarray, classes: list[str]) -> str | None:
    """Describe how predictions and split disagree about images or classes; return None if they agree.

    Args:
        split: Split of the run.
        split_name: train, val or test.
        samples: Sample ids of the predicted images, of shape (images,).
        classes: Folder name of the true class of each image, in the same order.
    """
    rows = split.get_split_rows(split_name).set_index("sample_id")["class"]
    unmatched = len(set(samples) ^ set(rows.index))
    if unmatched:
        verb = "image is" if unmatched == 1 else "images are"
        return (
            f"{unmatched} {verb} either in the predictions or in the {split_name} split of split.csv, but not in both"
        )
    differing = int((rows.loc[list(samples)].to_numpy() != np.array(classes)).sum())
    verb = "image has" if differing == 1 else "images have"
    return f"{differing} {verb} another class in the predictions than in split.csv" if differing else None
