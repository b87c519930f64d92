"""Prediction sets: all classes that an image may well be of, with the true one among them as often as asked for.

Split-conformal calibration, apart for each class (Vovk 2012, "Mondrian"), on the score 1 - probability of the class
(Sadinle, Lei and Wasserman 2019). Images of one patient are not exchangeable with those of others, but patients are:
each patient of a class has the same weight, shared by its images of that class, and one more patient stands for the
new one, with the worst score (hierarchical conformal prediction; Lee, Barber and Willett 2023). With one image a
patient this is the usual quantile of rank ceil((n + 1) coverage).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.inputs import checked_probabilities, group_codes, labels_in_range


@dataclass(frozen=True)
class SetLimits:
    """From which probability on a class belongs to the set, calibrated on validation images.

    Attributes:
        coverage: Share of each class's images, each patient counting the same, whose set holds that class, in (0, 1).
        lowest: The lowest probability with which each class is in the set, in the order of the classes. None where
            there are too few patients of the class: it is in every set.
        patients: How many patients each class was calibrated on.
    """

    coverage: float
    lowest: tuple[float | None, ...]
    patients: tuple[int, ...]


def fit_set_limits(
    probabilities: NDArray[np.float64],
    true: NDArray[np.int64],
    groups: NDArray[np.generic] | None = None,
    *,
    coverage: float,
) -> SetLimits:
    """Calibrate prediction sets on validation images.

    For one image of a new patient, of whatever class, the set then holds the true class with a chance of at least
    `coverage`, if the patient is exchangeable with those of the validation images of that class.

    Args:
        probabilities: Of validation images, of shape (n, classes); rows sum to one.
        true: Their true classes, of shape (n,).
        groups: Names of shape (n,) of their patients, or None if each image stands for itself.
        coverage: In (0, 1).

    Raises:
        ValueError: If the arrays don't fit each other, are empty, or coverage is not in (0, 1).

    Example:
        >>> chance = np.linspace(0.1, 0.9, 9)
        >>> table = np.stack([chance, 1 - chance], axis=1)
        >>> limits = fit_set_limits(table, np.zeros(9, dtype=int), coverage=0.8)
        >>> limits.lowest, limits.patients
        ((0.2, None), (9, 0))
        >>> prediction_sets(np.array([[0.15, 0.85], [0.2, 0.8]]), limits).tolist()
        [[False, True], [True, True]]
    """
    table = checked_probabilities(probabilities)
    truth = labels_in_range(true, table.shape[1], name="true")
    if len(truth) != len(table):
        raise ValueError(f"{len(truth)} true labels but probabilities of {len(table)} images")
    if not 0 < coverage < 1:
        raise ValueError(f"coverage is {coverage}; expected a share in (0, 1), such as 0.9")
    codes = group_codes(groups, length=len(truth))
    lowest, patients = [], []
    for column in range(table.shape[1]):
        chosen = truth == column
        count = len(np.unique(codes[chosen]))
        lowest.append(_lowest(table[chosen, column], codes[chosen], patients=count, coverage=coverage))
        patients.append(count)
    return SetLimits(float(coverage), tuple(lowest), tuple(patients))


def prediction_sets(probabilities: NDArray[np.float64], limits: SetLimits) -> NDArray[np.bool_]:
    """Which classes are in the set of each image.

    Args:
        probabilities: Shape (n, classes), in the order of the limits.
        limits: Of `fit_set_limits`.

    Returns:
        Shape (n, classes). A set may be empty: no class is as likely as it is for images of that class.

    Raises:
        ValueError: If there are not as many columns as limits, or a value is no probability.
    """
    table = checked_probabilities(probabilities)
    if table.ndim != 2 or table.shape[1] != len(limits.lowest):
        raise ValueError(f"probabilities have shape {table.shape}; expected (n, {len(limits.lowest)})")
    members: NDArray[np.bool_] = table >= np.array([0.0 if low is None else low for low in limits.lowest])
    return members


def patients_needed_for_sets(coverage: float) -> int:
    """How many patients of a class it takes before a set can leave that class out: n / (n + 1) >= coverage.

    Example:
        >>> patients_needed_for_sets(0.9), patients_needed_for_sets(0.95)
        (9, 19)
    """
    return max(1, int(np.ceil(coverage / (1 - coverage) - 1e-9)))


def _lowest(chances: NDArray[np.float64], codes: NDArray[np.int64], *, patients: int, coverage: float) -> float | None:
    """The highest limit that patients of the weight `coverage` * (patients + 1) reach; None if all do not suffice."""
    images = np.unique(codes, return_inverse=True, return_counts=True)
    weights = 1 / images[2][images[1]]
    order = np.argsort(-chances, kind="stable")
    # A hair less: 0.9 * 10 patients are 9 patients, whatever floating point makes of thirds of them.
    enough = np.cumsum(weights[order]) >= coverage * (patients + 1) - 1e-9
    return float(chances[order][np.argmax(enough)]) if enough.any() else None
