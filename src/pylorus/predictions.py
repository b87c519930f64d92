"""Prediction tables: the predictions of a stage's best checkpoint for one split, the only input of the evaluation.

Columns of the table, written as Parquet:

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

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax

from pylorus.columns import ABOUT
from pylorus.errors import PylorusError, format_name_list
from pylorus.evaluation.confusion import confusion_matrix
from pylorus.files import write_atomically


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
    table = table.join(rows[[name for name in rows.columns if name.startswith(ABOUT)]])
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
        table.to_parquet(temporary, index=False)


def get_class_names(table: pd.DataFrame) -> list[str]:
    """Return the short names of the classes, in the order of the labels."""
    return [name.removeprefix("logit/") for name in table.columns if name.startswith("logit/")]


def extract_labels(table: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return true and predicted classes as indices into `get_class_names`, each of shape (rows,)."""
    label_of_name = {name: index for index, name in enumerate(get_class_names(table))}
    true, predicted = (np.asarray(table[column].map(label_of_name), dtype=np.int64) for column in ("true", "predicted"))
    return true, predicted


def count_confusion(table: pd.DataFrame) -> NDArray[np.int64]:
    """Count images by class, in shape (classes, classes); rows are true, columns predicted."""
    return confusion_matrix(*extract_labels(table), classes=len(get_class_names(table)))
