"""Test whether the scores that a network gives to a part of its images are better than chance, with whole patients.

The part is one that shows no tissue, such as the border of the frame. If it says nothing about the class, the classes
of patients can be exchanged without a difference, so the test permutes them: it is exact whatever the scores are.
Images of a patient and a class count once, with their mean scores. Patients of one class exchange their classes with
each other; a patient with images of several classes exchanges them within itself only. The statistic is the AUROC of a
class that is furthest from 0.5, since a mark often tells one class from all others, in either direction: a network that
sees the part on an unusual background may answer the opposite of what it learned.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import rankdata

from pylorus.evaluation.predictions import check_labels, encode_groups

PERMUTATIONS = 20_000
"""Random permutations; the smallest p is 1 in 20,001."""
BATCH_NUMBERS = 4_000_000
"""Numbers that are permuted at a time."""


@dataclass(frozen=True)
class ChanceTest:
    """Whether scores separate the classes better than chance.

    Attributes:
        area: One-vs-rest AUROC of the class whose AUROC is furthest from 0.5, each patient and class counting once; 0.5
            is chance for a class that is chosen beforehand. NaN if there is only one class.
        label: Index of that class; -1 if there is only one.
        p_value: p that it is further from 0.5 than chance gives, in (0, 1]; NaN if the area is.
        limit: AUROC above 0.5 beyond which, or beyond whose mirror image, chance lies in 1 of 1,000 permutations: only
            those further from 0.5 can be found.
        units: Number of patients, or of their classes if a patient has several.
        images: Number of images.
        smallest_p: The smallest p that these patients allow.
    """

    area: float
    label: int
    p_value: float
    limit: float
    units: int
    images: int
    smallest_p: float


def chance_test(
    scores: NDArray[np.float64],
    true: NDArray[np.int64],
    groups: NDArray[np.generic] | None = None,
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> ChanceTest:
    """Test whether scores separate the classes better than chance, by permutations of whole patients.

    Args:
        scores: A score of each class for each image, of shape (n, classes): more speaks for the class. Scores that
            differ only by rounding must be equal.
        true: True classes, whole numbers in [0, classes), of shape (n,).
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        permutations: Number of random permutations.
        seed: Their random seed.

    Raises:
        ValueError: If shapes do not fit, or there are no images.

    Example:
        >>> true = np.repeat([0, 1], 10)
        >>> separated = chance_test(np.eye(2)[true], true)
        >>> separated.area, separated.p_value < 0.001
        (1.0, True)
        >>> blind = chance_test(np.zeros((20, 2)), true)
        >>> blind.area, blind.p_value
        (0.5, 1.0)
    """
    table = np.asarray(scores, dtype=np.float64)
    labels = check_labels(true, table.shape[1], name="true")
    if table.shape[0] != len(labels) or not np.isfinite(table).all():
        raise ValueError(f"scores have shape {table.shape}; expected ({len(labels)}, classes), all finite")
    codes = encode_groups(groups, length=len(labels))
    units, unit = np.unique(np.column_stack([codes, labels]), axis=0, return_inverse=True)
    patient, label = units.T
    sums = np.stack([np.bincount(unit.ravel(), weights=column, minlength=len(units)) for column in table.T], axis=1)
    means = np.round(sums / np.bincount(unit.ravel())[:, None], 9)
    present = np.unique(label)
    if len(present) < 2:
        return ChanceTest(math.nan, -1, math.nan, math.nan, len(units), len(labels), 1.0)
    ranks = np.stack([rankdata(means[:, column]) for column in present], axis=1)

    def compute_areas(assignments: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the AUROC of each class, of shape (classes, m), for assignments of shape (m, units)."""
        areas = []
        for column, name in enumerate(present):
            positives = int((label == name).sum())
            rank_sums = (assignments == name) @ ranks[:, column]
            areas.append((rank_sums - positives * (positives + 1) / 2) / (positives * (len(label) - positives)))
        return np.stack(areas)

    blocks = _find_exchangeable_units(patient)
    generator = np.random.default_rng(seed)
    size = max(1, BATCH_NUMBERS // len(label))
    chance = np.concatenate(
        [
            np.abs(compute_areas(_permute_labels(label, blocks, generator, min(size, permutations - start))) - 0.5).max(
                axis=0
            )
            for start in range(0, permutations, size)
        ]
    )
    observed = compute_areas(label[None])[:, 0]
    furthest = int(np.abs(observed - 0.5).argmax())
    reached = int((chance >= abs(observed[furthest] - 0.5) - 1e-12).sum())
    return ChanceTest(
        float(observed[furthest]),
        int(present[furthest]),
        (reached + 1) / (permutations + 1),  # the observed assignment is one of them (Phipson and Smyth 2010)
        0.5 + float(np.quantile(chance, 0.999)),
        len(units),
        len(labels),
        max(1 / (permutations + 1), _compute_smallest_p(label, blocks)),
    )


def _find_exchangeable_units(patient: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return the units of patients with one class together, and those of each other patient by themselves."""
    counts = np.bincount(patient)
    blocks = [np.flatnonzero(counts[patient] == 1)]
    blocks += [np.flatnonzero(patient == each) for each in np.flatnonzero(counts > 1)]
    return [block for block in blocks if len(block) > 1]


def _permute_labels(
    label: NDArray[np.int64], blocks: list[NDArray[np.int64]], generator: np.random.Generator, count: int
) -> NDArray[np.int64]:
    """Return assignments of shape (count, units) with the labels permuted within each block."""
    assignments = np.tile(label, (count, 1))
    for block in blocks:
        assignments[:, block] = generator.permuted(assignments[:, block], axis=1)
    return assignments


def _compute_smallest_p(label: NDArray[np.int64], blocks: list[NDArray[np.int64]]) -> float:
    """Return two over the number of different assignments: the best one and its opposite."""
    logarithm = 0.0
    for block in blocks:
        counts = np.unique(label[block], return_counts=True)[1]
        logarithm += gammaln(len(block) + 1) - gammaln(counts + 1).sum()
    return float(min(1.0, 2 * math.exp(-min(logarithm, 700.0))))
