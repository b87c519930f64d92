"""Results of a stress test, and the test whether a part of the images without tissue tells a network the class.

The test asks whether the scores that a network gives to that part are better than chance, with whole patients.

The part is one that shows no tissue, such as the border of the frame. If it says nothing about the class, the classes
of patients can be exchanged without a difference, so the test permutes them: it is exact whatever the scores are.
Images of a patient and a class count once, with their mean scores. Patients of one class exchange their classes with
each other; a patient with images of several classes exchanges them within itself only. The statistic is the AUROC of a
class that is furthest from 0.5, since a mark often tells one class from all others, in either direction: a network that
sees the part on an unusual background may answer the opposite of what it learned.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import rankdata

from pylorus.core.formatting import format_count
from pylorus.evaluation.intervals import Estimate
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


LEVEL = 0.001
"""Family-wise level at which a region counts as better than chance: one false alarm in a thousand models."""
MIN_CHANGE = 0.01
"""Mean change of the probabilities, in [0, 1], from which hiding a region counts as a change at all."""


@dataclass(frozen=True)
class GradeResult:
    """A model on images that are degraded in one kind and grade, beside the same images as they are.

    Attributes:
        name: Name of the kind in `DEGRADATIONS`; empty for the images as they are.
        grade: 1 to 5; 0 for the images as they are.
        accuracy: Proportion of correctly classified images.
        sensitivity: Of the class of interest at its stored threshold.
        specificity: Likewise.
        answered: Proportion of images on which the model does not abstain.
        unlike: Proportion of images that it calls unlike the training images.
        accuracy_change: Accuracy minus that on the images as they are, paired.
        sensitivity_change: Likewise.
        specificity_change: Likewise.
        newly_wrong: Images that were classified correctly as they are and are not any more.
        caught: Those among them on which the model abstains.
    """

    name: str
    grade: int
    accuracy: Estimate
    sensitivity: Estimate
    specificity: Estimate
    answered: Estimate
    unlike: Estimate
    accuracy_change: Estimate
    sensitivity_change: Estimate
    specificity_change: Estimate
    newly_wrong: int
    caught: int


@dataclass(frozen=True)
class RegionResult:
    """What a region without tissue tells the network.

    Attributes:
        region: Name in `REGIONS`.
        images: Number of images that have it.
        problem: Why it can't be tested, as text; empty if it was.
        test: The network on the region alone, against chance; None if it can't be tested.
        corrected_p: p of the test, corrected for the number of regions (Holm).
        changed: Proportion of images whose most probable class changes if the region is hidden.
        shift: Mean change of the probabilities if it is hidden: half of the sum over classes, in [0, 1].
        accuracy_change: Accuracy with the region hidden minus that of the images as they are, paired.
    """

    region: str
    images: int
    problem: str = ""
    test: ChanceTest | None = None
    corrected_p: float = float("nan")
    changed: float = float("nan")
    shift: float = float("nan")
    accuracy_change: Estimate | None = None

    @property
    def is_shortcut(self) -> bool:
        """Whether the region alone is better than chance, and hiding it changes what the model says."""
        return self.test is not None and self.corrected_p <= LEVEL and self.shift >= MIN_CHANGE


@dataclass(frozen=True)
class StressResult:
    """All results of a stress test.

    Attributes:
        architecture: Name of the network.
        identity: SHA-256 of the bundle's list of file hashes.
        source: Where the images are from, as text.
        images: Number of images.
        patients: Number of patients; None if they are not known, so that each image counts as one.
        counts: Number of images of each class.
        unused: Sentences on images that were left out.
        deciding: Short name of the class of interest.
        threshold: Its stored threshold; None if it has none.
        margin: Loss of accuracy that counts, in (0, 1).
        seed: Seed of the degradations.
        baseline: The images as they are.
        grades: The degraded images.
        regions: The regions without tissue.
        prepared: What the bundle's preparation does to what surrounds the tissue, as a sentence; may be empty.
    """

    architecture: str
    identity: str
    source: str
    images: int
    patients: int | None
    counts: Mapping[str, int]
    unused: tuple[str, ...]
    deciding: str
    threshold: float | None
    margin: float
    seed: int
    baseline: GradeResult
    grades: tuple[GradeResult, ...]
    regions: tuple[RegionResult, ...]
    prepared: str = ""

    @property
    def basis(self) -> str:
        """The images that all figures are based on."""
        patients = "" if self.patients is None else f" of {format_count(self.patients, 'patient')}"
        return f"{format_count(self.images, 'image')}{patients}, {self.source}."

    def get_grades(self, name: str) -> list[GradeResult]:
        """Return the results of a kind of degradation, grade by grade."""
        return [each for each in self.grades if each.name == name]


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
