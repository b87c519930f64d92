"""Replicates of a configuration: seeds, folds and repeated splits, and what two configurations differ in over them.

A trained model is one draw from its configuration: another seed or another training set gives another model. A claim
about a configuration has to allow for that draw as well as for the patients that happened to be tested.

* Several seeds on one set of test images are what several readers are in a reader study: `compare_replicates` takes
  the variance of Obuchowski and Rockette (Commun. Stat. Simul. Comput. 1995;24:285) with readers nested in the
  configuration (Hillis, Stat. Med. 2014;33:330), or crossed with it where replicates are paired, and Satterthwaite's
  degrees of freedom.
* Folds and repeated splits have other test images each, and training sets that overlap: `corrected_resampled_t` takes
  the variance of Nadeau and Bengio (Mach. Learn. 2003;52:239).
* `sign_flip_test` allows for patients alone and is exact for the models as they were trained.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.comparison import INDICES, Difference
from pylorus.evaluation.confusion import overall_indices
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.inputs import group_codes, labels_in_range
from pylorus.evaluation.interval import (
    check_confidence,
    compute_satterthwaite_freedom,
    compute_wilson_ends,
    quantile,
    two_sided_p,
)

NOTHING_VARIES = "neither patients nor replicates vary"


@dataclass(frozen=True)
class ReplicateSummary:
    """One index over the replicates of a configuration.

    Attributes:
        mean: Over the replicates; nan where the index is undefined for one of them.
        deviation: Standard deviation of n - 1; nan for a single replicate.
        lowest: Of the replicates.
        highest: Of the replicates.
        replicates: How many there are.
    """

    mean: float
    deviation: float
    lowest: float
    highest: float
    replicates: int


@dataclass(frozen=True)
class ReplicateDifference(Difference):
    """A difference between two configurations, first minus second.

    Attributes:
        allows_for_training: Whether interval and p allow for another seed or training set, not for patients alone; of
            one configuration alone, where the other has a single replicate.
    """

    allows_for_training: bool


@dataclass(frozen=True, eq=False)
class ReplicateIndices:
    """Indices of several replicates on the same images, and how these vary with the patients.

    Attributes:
        values: Of shape (replicates, indices), in the order of `pylorus.evaluation.comparison.INDICES`.
        deviations: What leaving out each group changes, less its mean, of shape (indices, replicates, groups); nan
            where leaving out one group leaves the index undefined.
    """

    values: NDArray[np.float64]
    deviations: NDArray[np.float64]

    @property
    def covariance(self) -> NDArray[np.float64]:
        """How each index varies together over the replicates with the patients: (indices, replicates, replicates)."""
        groups = self.deviations.shape[2]
        table: NDArray[np.float64] = (groups - 1) / groups * np.einsum("iag,ibg->iab", self.deviations, self.deviations)
        return table

    def count_freedom(self, index: int, contrast: NDArray[np.float64]) -> float:
        """Degrees of freedom of the variance of a contrast of one index over the replicates; at least 1.

        Args:
            index: Place of the index.
            contrast: Weight of each replicate, of shape (replicates,).
        """
        changes = contrast @ self.deviations[index]
        if np.isnan(changes).any() or not (np.abs(changes) > 1e-12).any():
            return 1.0
        return max(1.0, compute_satterthwaite_freedom(changes))


def summarize_replicates(values: NDArray[np.float64]) -> ReplicateSummary:
    """Mean, standard deviation and range of one index over replicates.

    Args:
        values: Shape (replicates,), at least one; nan where the index is undefined.

    Raises:
        ValueError: If there are none.

    Example:
        >>> summary = summarize_replicates(np.array([0.8, 0.9, 0.85]))
        >>> round(summary.mean, 3), round(summary.deviation, 3), summary.lowest, summary.highest
        (0.85, 0.05, 0.8, 0.9)
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 1 or not len(table):
        raise ValueError(f"values have shape {table.shape}; expected (replicates,), at least one")
    if np.isnan(table).any():
        return ReplicateSummary(math.nan, math.nan, math.nan, math.nan, len(table))
    deviation = float(table.std(ddof=1)) if len(table) > 1 else math.nan
    return ReplicateSummary(float(table.mean()), deviation, float(table.min()), float(table.max()), len(table))


def replicate_balance(
    first: NDArray[np.bool_], second: NDArray[np.bool_], groups: NDArray[np.generic] | None
) -> NDArray[np.int64]:
    """What each group says of two configurations, in whole numbers for `sign_flip_test`.

    Args:
        first: Whether each replicate of the one recognises each image, of shape (replicates, n).
        second: The same of the other, of shape (other replicates, n).
        groups: Names of shape (n,), or None if every image stands for itself.

    Returns:
        Images that the mean replicate of the first recognises more, times both numbers of replicates, by group.

    Raises:
        ValueError: If the two are not about equally many images.

    Example:
        >>> one, two = np.array([[True, True], [True, False]]), np.array([[False, False]])
        >>> replicate_balance(one, two, np.array(["a", "b"])).tolist()
        [2, 1]
    """
    ours, theirs = np.atleast_2d(first), np.atleast_2d(second)
    if ours.shape[1] != theirs.shape[1]:
        raise ValueError(f"{ours.shape[1]} images of the first, {theirs.shape[1]} of the second; expected the same")
    lead = ours.sum(axis=0).astype(np.int64) * len(theirs) - theirs.sum(axis=0).astype(np.int64) * len(ours)
    codes = group_codes(groups, length=len(lead))
    return np.rint(np.bincount(codes, weights=lead)).astype(np.int64)


def indices_of_replicates(
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    groups: NDArray[np.generic] | None,
    *,
    classes: int,
) -> ReplicateIndices:
    """Accuracy, macro F1 and their like of several replicates on the same images, with their covariance.

    The covariance is that of the jackknife which leaves out one group after the other (the pseudovalues of Dorfman,
    Berbaum and Metz, Invest. Radiol. 1992;27:723).

    Args:
        true: True classes of shape (n,), whole numbers in [0, classes).
        predicted: Predicted classes of each replicate, of shape (replicates, n).
        groups: Names of shape (n,), or None if every image stands for itself.
        classes: How many classes there are.

    Raises:
        ValueError: If the arrays don't fit each other or hold labels out of range.

    Example:
        >>> truth, answers = np.array([0, 0, 1, 1]), np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
        >>> indices = indices_of_replicates(truth, answers, None, classes=2)
        >>> indices.values[:, 0].tolist(), indices.covariance[0].round(4).tolist()
        ([1.0, 0.75], [[0.0, 0.0], [0.0, 0.0625]])
    """
    truth = labels_in_range(true, classes, name="true")
    answers = np.atleast_2d(predicted)
    if answers.shape[1] != len(truth):
        raise ValueError(f"{len(truth)} true labels but {answers.shape[1]} predicted ones")
    codes = group_codes(groups, length=len(truth))
    number = int(codes.max()) + 1
    values, left_out = [], []
    for row in answers:
        cells = (codes * classes + truth) * classes + labels_in_range(row, classes, name="predicted")
        tables = np.bincount(cells, minlength=number * classes**2).reshape(number, classes, classes)
        total = tables.sum(axis=0)
        values.append(_indices(total))
        left_out.append(_indices(total - tables) if number > 1 else np.full((1, len(INDICES)), math.nan))
    changes = np.moveaxis(np.array(left_out), 2, 0)
    return ReplicateIndices(np.array(values), changes - changes.mean(axis=2, keepdims=True))


def compare_replicates(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    covariance: NDArray[np.float64],
    *,
    degrees: float,
    allow_for_seeds: bool = True,
    paired: bool = False,
    bounds: tuple[float, float] = (-1.0, 1.0),
    confidence: float = 0.95,
) -> ReplicateDifference:
    """Difference of the means of two configurations whose replicates saw the same images.

    The variance is that of patients plus what seeds add to it (Obuchowski and Rockette 1995, readers nested as in
    Hillis 2014); it is never below that of patients alone. The seeds of a configuration with a single replicate can't
    be allowed for.

    Args:
        first: An index of each replicate of the one, of shape (replicates,).
        second: Of the other, of shape (other replicates,).
        covariance: How the values vary together with the patients, of shape (all replicates, all replicates), the
            first's before the second's.
        degrees: Degrees of freedom of the covariance, > 0.
        allow_for_seeds: False takes the replicates as they are, and patients alone as chance.
        paired: Whether the n-th replicates of both belong together, as two stages of one run do.
        bounds: The least and the greatest difference that there can be.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        First minus second; without interval, and with a p of nan, where the covariance is undefined.

    Raises:
        ValueError: If replicates that are paired are not equally many.

    Example:
        >>> spread = np.full((6, 6), 4e-4) + np.diag([1e-4] * 6)
        >>> one, two = np.array([0.90, 0.92, 0.94]), np.array([0.80, 0.82, 0.84])
        >>> difference = compare_replicates(one, two, spread, degrees=60)
        >>> round(difference.value, 3), difference.low > 0, difference.allows_for_training
        (0.1, True, True)
    """
    check_confidence(confidence)
    ours, theirs = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    size = len(ours) + len(theirs)
    if not len(ours) or not len(theirs) or covariance.shape != (size, size):
        raise ValueError(
            f"{len(ours)} and {len(theirs)} replicates with a covariance of shape {covariance.shape}; "
            "expected at least one of each, and their number for both sides of the covariance"
        )
    value = float(ours.mean() - theirs.mean())
    contrast = np.concatenate([np.full(len(ours), 1 / len(ours)), np.full(len(theirs), -1 / len(theirs))])
    patients = float(contrast @ covariance @ contrast)
    seeds = allow_for_seeds and max(len(ours), len(theirs)) > 1
    if math.isnan(value) or math.isnan(patients):
        reason = "the index is undefined for a replicate, or without one of the groups"
        return ReplicateDifference(value, math.nan, math.nan, math.nan, math.nan, seeds, reason=reason)
    if paired and len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} replicates; expected as many of each, since they are paired")
    own, other = covariance[: len(ours), : len(ours)], covariance[len(ours) :, len(ours) :]
    parts = [(ours, own), (theirs, other)]
    if paired:
        cross = covariance[: len(ours), len(ours) :]
        parts = [(ours - theirs, own + other - cross - cross.T)]
    variance, total = _total_variance(patients, parts, degrees) if seeds else (patients, degrees)
    return _difference(value, variance, total, bounds, confidence, training=seeds)


def estimate_replicates(
    values: NDArray[np.float64],
    covariance: NDArray[np.float64],
    *,
    degrees: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    confidence: float = 0.95,
) -> Estimate:
    """Mean of one configuration over replicates on the same images, allowing for patients and, from two, for seeds.

    Args:
        values: An index (accuracy, macro F1) of each replicate, of shape (replicates,).
        covariance: How they vary together with the patients, of shape (replicates, replicates).
        degrees: Degrees of freedom of the covariance, > 0.
        bounds: The least and the greatest value that there can be.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The mean with an interval inside the bounds; without one where nothing varies or the covariance is undefined.

    Example:
        >>> mean = estimate_replicates(np.array([0.9, 0.8]), np.full((2, 2), 4e-4), degrees=60)
        >>> round(mean.value, 3), mean.low < 0.8 < 0.9 < mean.high
        (0.85, True)
    """
    check_confidence(confidence)
    table = np.asarray(values, dtype=np.float64)
    value, patients = float(table.mean()), float(covariance.mean())
    if math.isnan(value) or math.isnan(patients):
        reason = "the index is undefined for a replicate, or without one of the groups"
        return Estimate(value, math.nan, math.nan, reason=reason)
    variance = patients
    if len(table) > 1:
        variance, degrees = _total_variance(patients, [(table, covariance)], degrees)
    if variance < 1e-18:
        return Estimate(value, math.nan, math.nan, reason=NOTHING_VARIES)
    share = (value - bounds[0]) / (bounds[1] - bounds[0])
    if not 0 < share < 1:
        return Estimate(value, math.nan, math.nan, reason=NOTHING_VARIES)
    # A score interval, as of a proportion with that variance: it is asymmetric where the mean is near a bound.
    size = share * (1 - share) * (bounds[1] - bounds[0]) ** 2 / variance
    ends = compute_wilson_ends(share, size, quantile(confidence, freedom=degrees))
    low, high = (bounds[0] + (bounds[1] - bounds[0]) * end for end in ends)
    return Estimate(value, low, high)


def corrected_resampled_t(
    values: NDArray[np.float64],
    *,
    test_to_train: float,
    bounds: tuple[float, float] = (-1.0, 1.0),
    confidence: float = 0.95,
) -> ReplicateDifference:
    """Mean over folds or repeated splits, with an interval for training sets that overlap (Nadeau and Bengio 2003).

    The variance of the mean is (1 / J + test / train) times that of the J values. Use it for the difference of two
    configurations on the same folds, or for one configuration with 0 as what a p would be against.

    Args:
        values: The difference of an index in each fold, of shape (folds,), at least one; nan where undefined.
        test_to_train: Test images for each training image of a fold, > 0; 1 / (k - 1) in k folds without validation.
        bounds: The least and the greatest value that there can be.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The mean, its interval and p with J - 1 degrees of freedom; without interval for a single value, where a value
        is undefined, and where all values are equal.

    Raises:
        ValueError: If there are no values, or the ratio is not positive.

    Example:
        >>> mean = corrected_resampled_t(np.array([0.02, 0.05, 0.03, 0.06, 0.04]), test_to_train=0.25)
        >>> round(mean.value, 3), round(mean.low, 4), round(mean.high, 4), round(mean.p_value, 3)
        (0.04, 0.0106, 0.0694, 0.02)
    """
    check_confidence(confidence)
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 1 or not len(table):
        raise ValueError(f"values have shape {table.shape}; expected (folds,), at least one")
    if not test_to_train > 0:
        raise ValueError(f"test_to_train is {test_to_train}; expected a positive ratio of images")
    value = float(table.mean())
    if math.isnan(value) or len(table) < 2:
        reason = "the index is undefined for a fold" if math.isnan(value) else "there is a single fold"
        return ReplicateDifference(value, math.nan, math.nan, math.nan, math.nan, True, reason=reason)
    variance = (1 / len(table) + test_to_train) * float(table.var(ddof=1))
    return _difference(value, variance, len(table) - 1, bounds, confidence, training=True)


def _indices(tables: NDArray[np.int64]) -> NDArray[np.float64]:
    indices = overall_indices(tables)
    return np.stack([getattr(indices, name) for name in INDICES], axis=-1)


def _total_variance(
    patients: float, parts: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], degrees: float
) -> tuple[float, float]:
    """Variance of patients and seeds together, and its degrees of freedom.

    Args:
        patients: Variance with the seeds as they are.
        parts: Values and covariance of the replicates of each configuration.
        degrees: Degrees of freedom of `patients`.
    """
    parts = [(values, table) for values, table in parts if len(values) > 1]
    spreads = [float(values.var(ddof=1)) / len(values) for values, _ in parts]
    # What seeds differ in because each is wrong about other images: `patients` holds it already.
    own = sum(
        (float(np.trace(table)) - (float(table.sum()) - float(np.trace(table))) / (len(values) - 1)) / len(values) ** 2
        for values, table in parts
    )
    between = sum(spreads)
    if between <= own:
        return patients, degrees
    shared = max(patients - own, 0.0)
    total = shared + between if patients >= own else max(patients, between)
    loss = shared**2 / degrees
    loss += sum(part**2 / (len(values) - 1) for part, (values, _) in zip(spreads, parts, strict=True))
    return total, total**2 / loss


def _difference(
    value: float, variance: float, degrees: float, bounds: tuple[float, float], confidence: float, *, training: bool
) -> ReplicateDifference:
    if variance < 1e-18:
        p_value = 1.0 if value == 0 else math.nan
        return ReplicateDifference(value, math.nan, math.nan, math.nan, p_value, training, reason=NOTHING_VARIES)
    error = math.sqrt(variance)
    reach = quantile(confidence, freedom=degrees) * error
    low, high = max(bounds[0], value - reach), min(bounds[1], value + reach)
    return ReplicateDifference(value, low, high, error, two_sided_p(value / error, freedom=degrees), training)
