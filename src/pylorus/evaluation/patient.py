"""Patient-level predictions: one per group, the mean of the probabilities of its images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.inputs import encode_groups
from pylorus.evaluation.predictions import SHOWN, Predictions


@dataclass(frozen=True, eq=False)
class PatientLevel:
    """Predictions with one row per group.

    Attributes:
        predictions: `sample` and `group` are the group's name; probabilities are means over its images.
        images: Number of images of each row, of shape (groups,).
        left_out: Names of the groups left out because their images have several true classes.
    """

    predictions: Predictions
    images: NDArray[np.int64]
    left_out: tuple[str, ...]


def patient_level(predictions: Predictions, *, leave_out_mixed: bool = False) -> PatientLevel:
    """Average the probabilities of each group's images.

    A group whose images have several true classes has no single true class. It is an error, or, on request, left out
    and named in the result; it is never counted as one of its classes.

    Args:
        predictions: Image-level predictions.
        leave_out_mixed: Leave out groups with several true classes instead of raising an error.

    Returns:
        One row per group, sorted by name.

    Raises:
        ValueError: If a group has several true classes and is not to be left out, or if no group remains.

    Example:
        >>> predictions = Predictions(
        ...     sample=np.array(["a", "b", "c"]),
        ...     group=np.array(["p1", "p1", "p2"]),
        ...     true=np.array([0, 0, 1]),
        ...     probabilities=np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]]),
        ...     class_names=("cancer", "other"),
        ... )
        >>> patients = patient_level(predictions)
        >>> patients.images.tolist(), patients.predictions.probabilities.round(3).tolist()
        ([2, 1], [[0.6, 0.4], [0.2, 0.8]])
    """
    codes = encode_groups(predictions.group, length=len(predictions.true))
    first = np.unique(codes, return_index=True)[1]
    names = np.asarray(predictions.group)[first].astype(np.str_)
    images = np.bincount(codes).astype(np.int64)
    truth = predictions.true[first]
    mixed = np.bincount(codes, weights=predictions.true != truth[codes]) > 0
    if mixed.any() and not leave_out_mixed:
        raise ValueError(
            f"{int(mixed.sum())} of {len(names)} groups have several true classes "
            f"({', '.join(names[mixed][:SHOWN])}, …) and therefore no patient-level one; "
            "leave_out_mixed=True leaves them out and names them"
        )
    if mixed.all():
        raise ValueError(f"all {len(names)} groups have several true classes, so no patient-level prediction remains")
    means = np.zeros((len(names), predictions.classes))
    np.add.at(means, codes, predictions.probabilities)
    means /= images[:, None]
    single = ~mixed
    return PatientLevel(
        predictions=Predictions(
            sample=names[single],
            group=names[single],
            true=truth[single],
            probabilities=means[single],
            class_names=predictions.class_names,
        ),
        images=images[single],
        left_out=tuple(str(name) for name in names[mixed]),
    )
