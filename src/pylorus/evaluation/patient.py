"""From images to patients: one prediction a group, the mean of what was said of its images."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.inputs import group_codes
from pylorus.evaluation.predictions import SHOWN, Predictions


@dataclass(frozen=True, eq=False)
class PatientLevel:
    """Predictions with one row a group, and what became of the images.

    Attributes:
        predictions: `sample` and `group` are the group's name; probabilities are means over its images.
        images: How many images each row stands for, of shape (groups,).
        left_out: Names of groups left out because their images carry several true classes.
    """

    predictions: Predictions
    images: NDArray[np.int64]
    left_out: tuple[str, ...]


def patient_level(predictions: Predictions, *, leave_out_mixed: bool = False) -> PatientLevel:
    """Average the probabilities of each group's images.

    A group whose images carry several true classes has no one truth. It is refused, or, if asked, left out
    and named in the result; it is never counted under one of its classes.

    Args:
        predictions: Image-level predictions.
        leave_out_mixed: Leave groups of several true classes out instead of refusing.

    Returns:
        One row a group, sorted by name.

    Raises:
        ValueError: If a group is mixed and not to be left out, or if no group remains.

    Example:
        >>> said = Predictions(
        ...     sample=np.array(["a", "b", "c"]),
        ...     group=np.array(["p1", "p1", "p2"]),
        ...     true=np.array([0, 0, 1]),
        ...     probabilities=np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8]]),
        ...     class_names=("cancer", "other"),
        ... )
        >>> patients = patient_level(said)
        >>> patients.images.tolist(), patients.predictions.probabilities.round(3).tolist()
        ([2, 1], [[0.6, 0.4], [0.2, 0.8]])
    """
    codes = group_codes(predictions.group, length=len(predictions.true))
    first = np.unique(codes, return_index=True)[1]
    names = np.asarray(predictions.group)[first].astype(np.str_)
    images = np.bincount(codes).astype(np.int64)
    truth = predictions.true[first]
    mixed = np.bincount(codes, weights=predictions.true != truth[codes]) > 0
    if mixed.any() and not leave_out_mixed:
        raise ValueError(
            f"{int(mixed.sum())} of {len(names)} groups carry several true classes "
            f"({', '.join(names[mixed][:SHOWN])}, …): they have no patient-level truth; "
            "leave_out_mixed=True leaves them out and names them"
        )
    if mixed.all():
        raise ValueError(f"all {len(names)} groups carry several true classes: no patient-level truth is left")
    means = np.zeros((len(names), predictions.classes))
    np.add.at(means, codes, predictions.probabilities)
    means /= images[:, None]
    kept = ~mixed
    return PatientLevel(
        predictions=Predictions(
            sample=names[kept],
            group=names[kept],
            true=truth[kept],
            probabilities=means[kept],
            class_names=predictions.class_names,
        ),
        images=images[kept],
        left_out=tuple(str(name) for name in names[mixed]),
    )
