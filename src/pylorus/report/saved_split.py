"""The split of a run as it saved it: its hash, how many images and groups lie where, and what lies in two parts."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from pylorus.errors import PylorusError

# As in pylorus.data.split, whose import would wait for scikit-learn.
COLUMNS = ["sample_id", "path", "class", "group", "split", "sha256"]
PARTS = ("train", "val", "test")

SHOWN_DIGITS = 12
"""Digits of a hash that tables cite."""


@dataclass(frozen=True, eq=False)
class SavedSplit:
    """A split.

    Attributes:
        sha256: Of split.csv, by which tables cite it.
        table: Its rows: sample_id, path, class (the folder's name), group, split and sha256, all text.
    """

    sha256: str
    table: pd.DataFrame

    @property
    def cited(self) -> str:
        """The hash as tables cite it."""
        return self.sha256[:SHOWN_DIGITS]

    @cached_property
    def test_images(self) -> str:
        """A name of the set of test images by their content: the same for each split that tests on these images."""
        return name_of_images(set(self.part("test")["sha256"]))

    def part(self, name: str) -> pd.DataFrame:
        """The rows of train, val or test."""
        return self.table[self.table["split"] == name]

    def counts(self, class_name: str, column: str | None = None) -> list[int]:
        """Images of a class, or distinct values of a column among them, in train, val and test."""
        own = self.table[self.table["class"] == class_name]
        rows = [own[own["split"] == part] for part in PARTS]
        return [len(part) if column is None else int(part[column].nunique()) for part in rows]

    @cached_property
    def shared_groups(self) -> int:
        """How many groups lie in more than one part."""
        return self._shared("group")

    @cached_property
    def shared_images(self) -> int:
        """How many images, told by their content, lie in more than one part."""
        return self._shared("sha256")

    def _shared(self, column: str) -> int:
        return int((self.table.groupby(column)["split"].nunique() > 1).sum())


def read_split(path: Path) -> SavedSplit:
    """Reads split.csv.

    Raises:
        PylorusError: If it is not as a run writes it.
    """
    content = path.read_bytes()
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise PylorusError(f"{path}: can't be read as a split: {error}") from error
    absent = [name for name in COLUMNS if name not in table.columns]
    unknown = set() if absent else set(table["split"]) - set(PARTS)
    if absent or unknown or table.empty:
        found = f"columns {list(table.columns)}" if absent else f"parts {sorted(unknown)}" if unknown else "no row"
        raise PylorusError(f"{path}: found {found}, expected columns {COLUMNS} and parts {list(PARTS)}.")
    return SavedSplit(hashlib.sha256(content).hexdigest(), table)


def name_of_images(contents: set[str]) -> str:
    """A hash of a set of images, each given by the hash of its content; their order and their names do not matter."""
    return hashlib.sha256("\n".join(sorted(contents)).encode()).hexdigest()


def contradiction(split: SavedSplit, part: str, samples: np.ndarray, classes: list[str]) -> str | None:
    """What is wrong if predictions and the split disagree on a part's images or their classes; None if nothing is.

    Args:
        split: The run's.
        part: train, val or test.
        samples: Ids of the predicted images, of shape (n,).
        classes: The folder's name of each one's true class.
    """
    rows = split.part(part).set_index("sample_id")["class"]
    strangers = len(set(samples) ^ set(rows.index))
    if strangers:
        return f"{strangers} images lie in the predictions or in {part} of split.csv, but not in both"
    differing = int((rows.loc[list(samples)].to_numpy() != np.array(classes)).sum())
    return f"{differing} images have another class there than in split.csv" if differing else None
