"""Predictions of a stage's best checkpoint for one split: build their table, write it as Parquet, read and check it.

Training, sweeps, bundles and reports all read predictions with `read_predictions`. Columns of the table:

=====================  =====================================================================
sample_id, group       as in the catalog
split                  val or test
true                   short name of the true class
predicted              short name of the class with the highest logit
logit/<class>          one column per class, by short name, in the order of the classes
probability/<class>    softmax of the logits, in double precision
about/<column>         value of a column of the user's manifest, as text
=====================  =====================================================================
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax

from pylorus.core.errors import PylorusError, format_name_list
from pylorus.core.io import PARQUET_OPTIONS, write_atomically
from pylorus.core.privacy import MANIFEST_PREFIX
from pylorus.evaluation.confusion import confusion_matrix
from pylorus.evaluation.predictions import Predictions, check_logits

COLUMNS = ("sample_id", "group", "true", "predicted")
"""Columns of every table, besides `logit/CLASS` and `probability/CLASS` for each class."""
TOLERANCE = 1e-3
"""Maximum absolute difference between a saved probability and the softmax of its logits."""


@dataclass(frozen=True, eq=False)
class SavedPredictions:
    """Predictions of one stage for one split.

    Attributes:
        predictions: Sample ids, groups, true classes and probabilities.
        logits: Logits of shape (images, classes), in the same order of images and classes.
        about: Further columns of the manifest by name, with their values as text, each of shape (images,).
    """

    predictions: Predictions
    logits: NDArray[np.float64]
    about: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.predictions.true)

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(np.unique(self.predictions.group))

    @property
    def clusters(self) -> NDArray[np.generic] | None:
        """Group of each image if any group has several images, else None."""
        return self.predictions.clusters

    @property
    def confusion(self) -> NDArray[np.int64]:
        """Number of images by class, of shape (classes, classes); rows are true, columns predicted."""
        return confusion_matrix(self.predictions.true, self.predictions.predicted, self.predictions.classes)


def build_prediction_table(
    rows: pd.DataFrame, logits: NDArray[np.float32], *, names: Sequence[str], split: str
) -> pd.DataFrame:
    """Build the prediction table of one split.

    Args:
        rows: Rows of the catalog that are in this split, with sample_id, group and label.
        logits: Shape (rows, classes), in the order of `rows`.
        names: Short name of each class.
        split: val or test.

    Raises:
        ValueError: If the shapes differ.
        PylorusError: If a logit is NaN or infinite; the message lists the images.
    """
    if logits.shape != (len(rows), len(names)):
        raise ValueError(f"found logits of shape {logits.shape}, expected {(len(rows), len(names))}")
    non_finite = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(non_finite):
        raise PylorusError(
            f"The logits of {len(non_finite)} of the {len(rows)} images of {split} are NaN or infinite: the weights "
            "diverged or the arithmetic overflowed. Lower optimizer.lr, or set trainer.precision=32.\n"
            f"Affected images (split.csv lists their files):\n{format_name_list(rows['sample_id'].iloc[non_finite])}\n"
            "Changed values need a new run."
        )
    probabilities = softmax(logits.astype(np.float64), axis=1)
    table = pd.DataFrame({"sample_id": rows["sample_id"], "group": rows["group"], "split": split})
    table = table.join(rows[[name for name in rows.columns if name.startswith(MANIFEST_PREFIX)]])
    table["true"] = [names[label] for label in rows["label"]]
    table["predicted"] = [names[label] for label in logits.argmax(axis=1)]
    for column, name in enumerate(names):
        table[f"logit/{name}"] = logits[:, column]
    for column, name in enumerate(names):
        table[f"probability/{name}"] = probabilities[:, column]
    return table


def write_predictions(table: pd.DataFrame, path: Path) -> None:
    """Write a prediction table atomically, as Parquet."""
    with write_atomically(path) as temporary:
        table.to_parquet(temporary, index=False, write_page_checksum=True)


def read_predictions(path: Path, *, order: Sequence[str] = ()) -> SavedPredictions:
    """Read and check a table of predictions.

    Args:
        path: Parquet file.
        order: Short class names in the requested order; ignored if the file has other classes.

    Raises:
        PylorusError: If the file is damaged or inconsistent; the message names the file and the problem.
    """
    try:
        table = pd.read_parquet(path, page_checksum_verification=True, **PARQUET_OPTIONS)
    except Exception as error:  # pyarrow raises many types of exceptions on a damaged file
        raise PylorusError(f"{path}: cannot be read as a table of predictions: {error}") from error
    try:
        return check_predictions(table, order=order)
    except ValueError as error:
        raise PylorusError(
            f"{path}: {error}. The run that wrote this file has to compute its predictions again."
        ) from error


def check_predictions(table: pd.DataFrame, *, order: Sequence[str] = ()) -> SavedPredictions:
    """Check a table of predictions and convert it to arrays.

    Args:
        table: From `build_prediction_table`, or read from a file.
        order: Short class names in the requested order; ignored if the table has other classes.

    Raises:
        ValueError: If columns are missing or contradict each other.
    """
    names = [name.removeprefix("logit/") for name in table.columns if name.startswith("logit/")]
    ordered = list(order) if set(order) == set(names) else names
    required = [*COLUMNS, *(f"{kind}/{name}" for kind in ("logit", "probability") for name in names)]
    missing = [name for name in required if name not in table.columns]
    if missing or len(names) < 2:
        expected = f"also {missing}" if missing else "logits of at least two classes"
        raise ValueError(f"found columns {list(table.columns)}, expected {expected}")
    class_index = {name: index for index, name in enumerate(ordered)}
    for column in COLUMNS:
        if table[column].isna().any() or (table[column].astype(str) == "").any():
            raise ValueError(f"column {column} is empty in {int(table[column].isna().sum())} of {len(table)} rows")
        unknown = set(table[column]) - set(names) if column in ("true", "predicted") else set()
        if unknown:
            raise ValueError(f"column {column} contains {sorted(unknown)}, expected only {names}")
    logits = check_logits(table[[f"logit/{name}" for name in ordered]].to_numpy(dtype=np.float64))
    predictions = Predictions(
        sample=table["sample_id"].to_numpy(dtype=str),
        group=table["group"].to_numpy(dtype=str),
        true=np.asarray(table["true"].map(class_index), dtype=np.int64),
        probabilities=table[[f"probability/{name}" for name in ordered]].to_numpy(dtype=np.float64),
        class_names=tuple(ordered),
    )
    if np.abs(predictions.probabilities - softmax(logits, axis=1)).max() > TOLERANCE:
        raise ValueError("the probabilities are not the softmax of the logits")
    predicted = table["predicted"].map(class_index).to_numpy(dtype=np.int64)
    rows = np.arange(len(table))
    if (logits[rows, predicted] < logits.max(axis=1)).any():
        raise ValueError("the predicted class is not the one with the highest logit")
    about = {
        name.removeprefix(MANIFEST_PREFIX): table[name].fillna("").to_numpy(dtype=str)
        for name in table.columns
        if name.startswith(MANIFEST_PREFIX)
    }
    return SavedPredictions(predictions, logits, about)
