"""The images of one split as batches, decoded or loaded from the cache, and augmented."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from pylorus.cache.records import Records
from pylorus.chance import compute_seed
from pylorus.config import AugmentConfig
from pylorus.data.augment import build_augmentation
from pylorus.data.content import Root
from pylorus.data.input import InputFormat
from pylorus.data.order import Draw


class Batch(NamedTuple):
    """Images with their labels.

    Attributes:
        image: uint8 of shape (batch, 3, size, size), RGB in [0, 255]; the classifier normalizes it.
        label: int64 of shape (batch,).
        row: int64 of shape (batch,): row of each image in the split's table.
    """

    image: torch.Tensor
    label: torch.Tensor
    row: torch.Tensor


class ImageDataset(Dataset[Batch]):
    """Dataset that returns whole batches; paths are held in one array, which worker processes share.

    Args:
        table: Rows of one split.
        root: Root of the table's paths: a folder or shards.
        form: How a file becomes the network's input.
        policy: The augmentation.
        seed: Seed of the augmentation.
        cached: The prepared images of all rows; None: each is read from its file.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        root: Root,
        form: InputFormat,
        *,
        policy: AugmentConfig,
        seed: int,
        cached: Records | None = None,
    ) -> None:
        self.root, self.form, self.seed, self._cached = root, form, seed, cached
        self.paths: NDArray[np.str_] = table["path"].to_numpy(dtype=np.str_)
        self.ids: NDArray[np.str_] = table["sample_id"].to_numpy(dtype=np.str_)
        self.labels: NDArray[np.int64] = table["label"].to_numpy(dtype=np.int64)
        self._augment = build_augmentation(policy)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        """Return the batch of the given draws: a pure function of them and the constructor's arguments."""
        images = self.load_rows([draw.row for draw in draws])
        if self._augment is not None:
            for index, draw in enumerate(draws):
                if draw.view is not None:
                    images[index] = self._augment(images[index], self.get_augmentation_seed(draw.row, draw.view))
        rows = np.array([draw.row for draw in draws])
        return Batch(
            image=torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
            label=torch.from_numpy(self.labels[rows]),
            row=torch.from_numpy(rows),
        )

    def get_augmentation_seed(self, row: int, view: int) -> int:
        """Return the seed of an augmented variant, in [0, 2^63)."""
        return compute_seed(self.seed, view, str(self.ids[row]))

    def load_rows(self, rows: list[int]) -> NDArray[np.uint8]:
        """Load unaugmented images of the network's input size, as a writable array of shape (rows, size, size, 3).

        Raises:
            UnreadableImageError: Names the file.
        """
        if self._cached is not None:
            return self._cached.read_rows(rows).reshape(len(rows), self.form.size, self.form.size, 3)
        return self.form.load_images([self.root / str(self.paths[row]) for row in rows])


def return_batch(batch: Any) -> Any:
    """Return the batch unchanged, as the collate function of a DataLoader whose dataset returns whole batches."""
    return batch
