"""What a stage's best checkpoint says of each image of a part: the only thing that evaluation reads.

Columns of the table, written as Parquet:

=====================  =====================================================================
sample_id, group       as in the catalog
split                  val or test
true                   short name of the true class
predicted              short name of the class with the highest logit
logit/<class>          a column a class, by short name, in the order of the classes
probability/<class>    softmax of the logits, in double precision
about/<column>         what a manifest says of the image, as text
=====================  =====================================================================
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax

from pylorus.columns import ABOUT
from pylorus.errors import PylorusError, listing
from pylorus.evaluation.confusion import confusion_matrix
from pylorus.files import whole


def prediction_table(
    rows: pd.DataFrame, logits: NDArray[np.float32], *, names: Sequence[str], split: str
) -> pd.DataFrame:
    """The table of one part.

    Args:
        rows: The part's rows of the split, with sample_id, group and label.
        logits: Of shape (rows, classes), in the order of `rows`.
        names: Short name of each class.
        split: val or test.

    Raises:
        ValueError: If the shapes differ.
        PylorusError: If a logit is no number; it names the images.
    """
    if logits.shape != (len(rows), len(names)):
        raise ValueError(f"found logits of shape {logits.shape}, expected {(len(rows), len(names))}")
    broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(broken):
        raise PylorusError(
            f"{len(broken)} of the {len(rows)} images of {split} get logits that are no numbers: the weights or the "
            "arithmetic broke. Lower optimizer.lr, or take trainer.precision=32.\n"
            f"It befell these images (split.csv has their files):\n{listing(rows['sample_id'].iloc[broken])}\n"
            "With other values it is a new run."
        )
    probabilities = softmax(logits.astype(np.float64), axis=1)
    table = pd.DataFrame({"sample_id": rows["sample_id"], "group": rows["group"], "split": split})
    table = table.join(rows[[name for name in rows.columns if name.startswith(ABOUT)]])
    table["true"] = [names[label] for label in rows["label"]]
    table["predicted"] = [names[label] for label in logits.argmax(axis=1)]
    for place, name in enumerate(names):
        table[f"logit/{name}"] = logits[:, place]
    for place, name in enumerate(names):
        table[f"probability/{name}"] = probabilities[:, place]
    return table


def write_predictions(table: pd.DataFrame, path: Path) -> None:
    """Writes the table as Parquet, whole or not at all."""
    with whole(path) as temporary:
        table.to_parquet(temporary, index=False)


def class_names(table: pd.DataFrame) -> list[str]:
    """Short names of the classes, in the order of the labels."""
    return [name.removeprefix("logit/") for name in table.columns if name.startswith("logit/")]


def labels_of(table: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """True and predicted classes as indices, each of shape (rows,), in the order of `class_names`."""
    place = {name: index for index, name in enumerate(class_names(table))}
    true, predicted = (np.asarray(table[column].map(place), dtype=np.int64) for column in ("true", "predicted"))
    return true, predicted


def confusion_of(table: pd.DataFrame) -> NDArray[np.int64]:
    """Counts of shape (classes, classes); rows are true, columns predicted."""
    return confusion_matrix(*labels_of(table), classes=len(class_names(table)))
