"""Prediction sets: the plausible classes of an image, which contain the true class with a given probability.

Split-conformal calibration for each class separately (Vovk 2012, "Mondrian"), with the score 1 - probability of the
class (Sadinle, Lei and Wasserman 2019). Images of one patient are not exchangeable with those of others, but patients
are: each patient of a class has the same weight, divided among its images of that class, and one additional patient
with the worst score represents the new one (hierarchical conformal prediction; Lee, Barber and Willett 2023). With one
image per patient this is the usual quantile of rank ceil((n + 1) coverage).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.predictions import check_labels, check_probabilities, encode_groups


@dataclass(frozen=True)
class SetLimits:
    """Lowest probabilities with which a class is in the prediction set, calibrated on validation images.

    Attributes:
        coverage: Proportion of each class's images whose set contains that class, with equal weight for each patient,
            in (0, 1).
        lowest: Lowest probability with which each class is in the set, in the order of the classes. None if the class
            has too few patients: it is then in every set.
        patients: Number of patients that each class was calibrated on.
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

    For one image of a new patient, of any class, the set then contains the true class with a probability of at least
    `coverage`, if the patient is exchangeable with the validation patients of that class.

    Args:
        probabilities: Probabilities of the validation images, of shape (n, classes); rows sum to one.
        true: Their true classes, of shape (n,).
        groups: Patient of each image, of shape (n,), or None if each image is its own group.
        coverage: Target coverage, in (0, 1).

    Raises:
        ValueError: If the shapes differ, the arrays are empty, or coverage is not in (0, 1).

    Example:
        >>> first = np.linspace(0.1, 0.9, 9)
        >>> table = np.stack([first, 1 - first], axis=1)
        >>> limits = fit_set_limits(table, np.zeros(9, dtype=int), coverage=0.8)
        >>> limits.lowest, limits.patients
        ((0.2, None), (9, 0))
        >>> prediction_sets(np.array([[0.15, 0.85], [0.2, 0.8]]), limits).tolist()
        [[False, True], [True, True]]
    """
    table = check_probabilities(probabilities)
    truth = check_labels(true, table.shape[1], name="true")
    if len(truth) != len(table):
        raise ValueError(f"found {len(truth)} true labels and probabilities of {len(table)} images; expected as many")
    if not 0 < coverage < 1:
        raise ValueError(f"coverage is {coverage}; expected a proportion in (0, 1), such as 0.9")
    codes = encode_groups(groups, length=len(truth))
    lowest, patients = [], []
    for column in range(table.shape[1]):
        in_class = truth == column
        count = len(np.unique(codes[in_class]))
        lowest.append(
            _find_lowest_probability(table[in_class, column], codes[in_class], patients=count, coverage=coverage)
        )
        patients.append(count)
    return SetLimits(float(coverage), tuple(lowest), tuple(patients))


def prediction_sets(probabilities: NDArray[np.float64], limits: SetLimits) -> NDArray[np.bool_]:
    """Determine which classes are in the prediction set of each image.

    Args:
        probabilities: Shape (n, classes), in the order of the limits.
        limits: Result of `fit_set_limits`.

    Returns:
        Membership, of shape (n, classes). A set may be empty: no class is as probable as usual for its own images.

    Raises:
        ValueError: If the number of columns differs from that of the limits, or a value is not a probability.
    """
    table = check_probabilities(probabilities)
    if table.ndim != 2 or table.shape[1] != len(limits.lowest):
        raise ValueError(f"probabilities have shape {table.shape}; expected (n, {len(limits.lowest)})")
    members: NDArray[np.bool_] = table >= np.array([0.0 if low is None else low for low in limits.lowest])
    return members


def count_patients_needed_for_sets(coverage: float) -> int:
    """Return how many patients of a class are needed before a set can exclude that class: n / (n + 1) >= coverage.

    Example:
        >>> count_patients_needed_for_sets(0.9), count_patients_needed_for_sets(0.95)
        (9, 19)
    """
    return max(1, int(np.ceil(coverage / (1 - coverage) - 1e-9)))


def _find_lowest_probability(
    probabilities: NDArray[np.float64], codes: NDArray[np.int64], *, patients: int, coverage: float
) -> float | None:
    """Return the highest limit that a weight of `coverage` * (patients + 1) reaches; None if all weigh too little."""
    _, member, images = np.unique(codes, return_inverse=True, return_counts=True)
    weights = 1 / images[member]
    order = np.argsort(-probabilities, kind="stable")
    # Tolerate rounding: 0.9 * 10 patients are 9 patients, even if their weights are sums of thirds.
    enough = np.cumsum(weights[order]) >= coverage * (patients + 1) - 1e-9
    return float(probabilities[order][np.argmax(enough)]) if enough.any() else None
