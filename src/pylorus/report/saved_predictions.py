"""Predictions as a run saved them, read and checked: what does not hold together is refused, never counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax

from pylorus.columns import ABOUT
from pylorus.errors import PylorusError
from pylorus.evaluation.inputs import checked_logits
from pylorus.evaluation.predictions import Predictions
from pylorus.predictions import class_names

COLUMNS = ("sample_id", "group", "true", "predicted")
TOLERANCE = 1e-3
"""How far a saved probability may lie from the softmax of its logits."""


@dataclass(frozen=True, eq=False)
class SavedPredictions:
    """What one stage said of one part of the images.

    Attributes:
        predictions: Samples, groups, truth and probabilities.
        logits: Of shape (images, classes), in the same order of images and classes.
        about: What a manifest says of the images: a column's name and its values as text, of shape (images,).
    """

    predictions: Predictions
    logits: NDArray[np.float64]
    about: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """How many images there are."""
        return len(self.predictions.true)

    @property
    def groups(self) -> int:
        """How many groups they belong to."""
        return len(np.unique(self.predictions.group))

    @property
    def clusters(self) -> NDArray[np.generic] | None:
        """The group of each image where groups hold several, else None."""
        return self.predictions.clusters


def read_predictions(path: Path, *, order: Sequence[str] = ()) -> SavedPredictions:
    """Reads a table of predictions.

    Args:
        path: Of the Parquet file.
        order: Short names of the classes in the order wanted; of other classes than the file's: as in the file.

    Raises:
        PylorusError: If the file is damaged, or its values do not hold together; names the file and the fault.
    """
    try:
        table = pd.read_parquet(path)
    except Exception as error:  # pyarrow raises many kinds on a damaged file
        raise PylorusError(f"{path}: can't be read as a table of predictions: {error}") from error
    try:
        return _checked(table, order)
    except ValueError as error:
        raise PylorusError(f"{path}: {error}. The run that wrote it has to predict again.") from error


def _checked(table: pd.DataFrame, order: Sequence[str]) -> SavedPredictions:
    names = class_names(table)
    chosen = list(order) if set(order) == set(names) else names
    wanted = [*COLUMNS, *(f"{kind}/{name}" for kind in ("logit", "probability") for name in names)]
    absent = [name for name in wanted if name not in table.columns]
    if absent or len(names) < 2:
        raise ValueError(f"found columns {list(table.columns)}, expected {absent or 'logits of at least two classes'}")
    place = {name: index for index, name in enumerate(chosen)}
    for column in COLUMNS:
        if table[column].isna().any() or (table[column].astype(str) == "").any():
            raise ValueError(f"column {column} is empty in {int(table[column].isna().sum())} of {len(table)} rows")
        unknown = set(table[column]) - set(names) if column in ("true", "predicted") else set()
        if unknown:
            raise ValueError(f"column {column} holds {sorted(unknown)}, expected one of {names}")
    logits = checked_logits(table[[f"logit/{name}" for name in chosen]].to_numpy(dtype=np.float64))
    predictions = Predictions(
        sample=table["sample_id"].to_numpy(dtype=str),
        group=table["group"].to_numpy(dtype=str),
        true=np.asarray(table["true"].map(place), dtype=np.int64),
        probabilities=table[[f"probability/{name}" for name in chosen]].to_numpy(dtype=np.float64),
        class_names=tuple(chosen),
    )
    if np.abs(predictions.probabilities - softmax(logits, axis=1)).max() > TOLERANCE:
        raise ValueError("the probabilities are not those of the logits")
    said = table["predicted"].map(place).to_numpy(dtype=np.int64)
    rows = np.arange(len(table))
    if (logits[rows, said] < logits.max(axis=1)).any():
        raise ValueError("the predicted class is not the one with the highest logit")
    about = {
        name.removeprefix(ABOUT): table[name].fillna("").to_numpy(dtype=str)
        for name in table.columns
        if name.startswith(ABOUT)
    }
    return SavedPredictions(predictions, logits, about)
