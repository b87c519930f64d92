"""The images of one part of a split as batches: decoded or found decoded, and augmented."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from pylorus.cache.records import Records
from pylorus.chance import derived_seed
from pylorus.config import AugmentConfig
from pylorus.data.augment import build_augmentation
from pylorus.data.content import Root
from pylorus.data.input import InputFormat
from pylorus.data.order import Draw


class Batch(NamedTuple):
    """Images with what is true of them.

    Attributes:
        image: uint8 of shape (batch, 3, size, size), RGB in [0, 255]; the classifier normalises.
        label: int64 of shape (batch,).
        row: int64 of shape (batch,): the place in the table of the part.
    """

    image: torch.Tensor
    label: torch.Tensor
    row: torch.Tensor


class ImageDataset(Dataset[Batch]):
    """Serves whole batches; holds paths as one array, which processes share.

    Args:
        table: Rows of one part of the split.
        root: What the table's paths lie below.
        form: How a file becomes the network's input.
        policy: The augmentation.
        seed: Of the augmentation.
        kept: The fitted images of all rows; None: each is read from its file.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        root: Root,
        form: InputFormat,
        *,
        policy: AugmentConfig,
        seed: int,
        kept: Records | None = None,
    ) -> None:
        self.root, self.form, self.seed, self._kept = root, form, seed, kept
        self.paths: NDArray[np.str_] = table["path"].to_numpy(dtype=np.str_)
        self.ids: NDArray[np.str_] = table["sample_id"].to_numpy(dtype=np.str_)
        self.labels: NDArray[np.int64] = table["label"].to_numpy(dtype=np.int64)
        self._augment = build_augmentation(policy)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """The batch of some draws; a pure function of them and of the constructor's arguments."""
        images = self.fitted([draw.row for draw in draws])
        if self._augment is not None:
            for place, draw in enumerate(draws):
                if draw.view is not None:
                    images[place] = self._augment(images[place], self.chance(draw.row, draw.view))
        rows = np.array([draw.row for draw in draws])
        return Batch(
            image=torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
            label=torch.from_numpy(self.labels[rows]),
            row=torch.from_numpy(rows),
        )

    def chance(self, row: int, view: int) -> int:
        """The seed of an augmented variant, in [0, 2^63)."""
        return derived_seed(self.seed, view, str(self.ids[row]))

    def fitted(self, rows: list[int]) -> NDArray[np.uint8]:
        """Images of the network's size, unaugmented, of shape (rows, size, size, 3); free to be written to.

        Raises:
            UnreadableImageError: Names the file.
        """
        if self._kept is not None:
            return self._kept.take(rows).reshape(len(rows), self.form.size, self.form.size, 3)
        return self.form.read_all([self.root / str(self.paths[row]) for row in rows])


def as_is(batch: Any) -> Any:
    """Collates what is a batch already; of any kind, since torch's loader knows none."""
    return batch
