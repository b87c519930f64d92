"""Predictions of a stage's best checkpoint for one split: build their table, write it as Parquet, read and check it.

Also says what makes the results of a stage degenerate.

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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import softmax

from pylorus.core.errors import PylorusError, format_name_list
from pylorus.core.formatting import format_percent_with_unit
from pylorus.core.io import PARQUET_OPTIONS, write_atomically
from pylorus.core.privacy import MANIFEST_PREFIX
from pylorus.evaluation.confusion import confusion_matrix, get_monitor_column
from pylorus.evaluation.index_intervals import Proportion, proportions_of_predictions
from pylorus.evaluation.intervals import Estimate
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

    @property
    def accuracy(self) -> Proportion:
        """Accuracy with its 95 % confidence interval, which keeps the images of a group together."""
        table = self.predictions
        return proportions_of_predictions(table.true, table.predicted, self.clusters, classes=table.classes).accuracy


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


RANDOM_WEIGHTS = (
    "Training began with random weights (model.weights=none), not with weights pretrained on other images: this is not "
    "transfer learning."
)
MAX_LOSS_RATIO = 3.0
"""A loss above this multiple of that of equal probabilities for all classes has exploded."""
LEARNED, MAX_GAIN = 0.9, 0.1
"""Training accuracy of a network that fits its images; validation accuracy above the training accuracy by more than
the second is suspicious."""


def explain_degenerate_predictions(
    true: NDArray[np.int64], predicted: NDArray[np.int64], class_names: Sequence[str], accuracy: Estimate
) -> tuple[str, ...]:
    """Say if predictions are worthless: a single class for all images, or no better than always the same answer.

    Args:
        true: True classes of shape (n,), n >= 1.
        predicted: Predicted classes of shape (n,).
        class_names: Names of the classes.
        accuracy: Accuracy with its interval.

    Returns:
        A sentence; none if nothing is wrong.

    Example:
        >>> true, accuracy = np.array([0, 1, 1]), Estimate(2 / 3, 0.2, 0.9)
        >>> explain_degenerate_predictions(true, np.array([1, 1, 1]), ["GC", "CG"], accuracy)
        ('The model predicts CG for every test image.',)
        >>> print(*explain_degenerate_predictions(true, np.array([0, 1, 0]), ["GC", "CG"], accuracy))
        The model's accuracy is not shown to be above that of always answering CG, 66.7 %.
    """
    answers = np.unique(predicted)
    if len(answers) == 1:
        return (f"The model predicts {class_names[answers[0]]} for every test image.",)
    counts = np.bincount(true, minlength=len(class_names))
    most, frequent = int(counts.argmax()), counts.max() / len(true)
    if accuracy.has_interval and accuracy.low <= frequent:
        return (
            f"The model's accuracy is not shown to be above that of always answering {class_names[most]}, "
            f"{format_percent_with_unit(frequent)}.",
        )
    return ()


def explain_training_problems(
    *, loss: tuple[float, float], train_accuracy: float, validation: Estimate, frequent: float, classes: int
) -> tuple[str, ...]:
    r"""Say if training went wrong: the loss exploded, or training and validation contradict each other.

    Args:
        loss: Training loss and validation loss at the selected epoch, of cross-entropy.
        train_accuracy: Accuracy on the training images in that epoch, in [0, 1].
        validation: Accuracy on the validation images with its interval.
        frequent: Fraction of the most frequent class among the validation images.
        classes: Number of classes.

    Returns:
        Sentences; none if nothing is wrong.

    Example:
        >>> chance = Estimate(0.3, 0.2, 0.4)
        >>> (sentence,) = explain_training_problems(
        ...     loss=(5e7, 6e7), train_accuracy=0.3, validation=chance, frequent=0.4, classes=3
        ... )
        >>> print(sentence.replace(" Try", "\nTry"))
        The loss exploded: 5e+07 on training images, where equal probabilities for all classes give 1.1.
        Try a lower learning rate; with model.weights=none, pretrained weights.
    """
    sentences = []
    uniform = math.log(classes)
    exploded = [
        f"{value:.2g} on {images} images"
        for value, images in zip(loss, ("training", "validation"), strict=True)
        if not math.isnan(value) and value > MAX_LOSS_RATIO * uniform
    ]
    if exploded:
        sentences.append(
            f"The loss exploded: {exploded[0]}, where equal probabilities for all classes give {uniform:.2g}. "
            "Try a lower learning rate; with model.weights=none, pretrained weights."
        )
    if train_accuracy >= LEARNED and validation.has_interval and validation.low <= frequent:
        sentences.append(
            "Training and validation contradict each other: "
            f"{format_percent_with_unit(train_accuracy)} of the training images are classified correctly, but only "
            f"{format_percent_with_unit(validation.value)} of the validation images. The network has "
            "memorized its images, or the two splits differ in more than chance."
        )
    elif validation.has_interval and validation.low > train_accuracy + MAX_GAIN:
        sentences.append(
            f"Validation images are classified better ({format_percent_with_unit(validation.value)}) than training "
            f"images ({format_percent_with_unit(train_accuracy)}). Strong augmentation and dropout do that; otherwise "
            "check the splits."
        )
    return tuple(sentences)


def explain_stage_problems(
    name: str,
    *,
    monitor: str,
    curves: pd.DataFrame | None,
    predictions: Mapping[str, SavedPredictions],
    is_cross_entropy: bool,
    weights: str,
) -> tuple[str, ...]:
    """Say what makes the results of a stage degenerate: one predicted class, chance, an exploded loss, a contradiction,
    random weights at the start.

    Args:
        name: Name of the stage.
        monitor: Metric that selected the epoch.
        curves: Content of its metrics.csv; None if it is missing.
        predictions: Predictions by split: test, and val if there is one.
        is_cross_entropy: Whether the loss is comparable with that of equal probabilities.
        weights: Source of the network's initial weights; none: random ones.

    Returns:
        Sentences, the first ones about the test images; none if nothing is wrong.
    """
    sentences: list[str] = []
    accuracies = {split: saved.accuracy for split, saved in predictions.items()}
    test, validation = predictions.get("test"), predictions.get("val")
    if test is not None:
        table = test.predictions
        sentences += explain_degenerate_predictions(
            table.true, np.asarray(table.predicted), table.class_names, accuracies["test"]
        )
    if curves is not None and len(curves) and validation is not None:
        monitored = curves.get(f"{name}/{get_monitor_column(monitor)}", pd.Series(np.nan, index=curves.index))
        if monitored.notna().any():
            best = curves.iloc[int(np.nanargmin(monitored) if monitor == "loss" else np.nanargmax(monitored))]
            truth = validation.predictions.true
            loss = [float(best.get(f"{name}/{split}/loss", np.nan)) for split in ("train", "val")]
            sentences += explain_training_problems(
                loss=(loss[0], loss[1]) if is_cross_entropy else (np.nan, np.nan),
                train_accuracy=float(best.get(f"{name}/train/accuracy", np.nan)),
                validation=accuracies["val"],
                frequent=float(np.bincount(truth).max() / len(truth)),
                classes=validation.predictions.classes,
            )
    return (*sentences, *[RANDOM_WEIGHTS] * (weights == "none"))
