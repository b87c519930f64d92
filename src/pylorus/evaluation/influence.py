"""Sampling variation of indices: linearised variances, degrees of freedom, averages over classes.

The variance of an index is the sum over groups of their squared contributions to its deviation (the infinitesimal
jackknife, Efron 1982), so that whole patients vary and no resampling is needed: the same data give the same interval.
Indices that average classes are combined from the intervals of the classes (MOVER, Zou and Donner, Stat Med
2008;27:1693), which allow for errors in a class that has none in this test set. A bootstrap does not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pylorus.evaluation.intervals import (
    Estimate,
    check_confidence,
    check_proportions,
    compute_quantile,
    compute_satterthwaite_freedom,
    compute_upper_bound,
    compute_wilson_ends,
)
from pylorus.evaluation.predictions import encode_groups

STEP = 1e-4
"""Step, in images, of a numerical derivative: small compared with one image, large compared with rounding."""

NOISE = 1e-15
"""Variance, relative to the squared range of its index, below which it is rounding error."""

BATCH_NUMBERS = 2**21
"""Numbers in a batch of tables (16 MiB as float64), which bounds the memory for any number of classes."""


@dataclass(frozen=True, eq=False)
class GroupCounts:
    """Number of images of each group in each cell of a table.

    Attributes:
        seen: Indices of the cells that contain an image, increasing, of shape (cells,).
        images: Counts of shape (groups, cells), sparse, since most groups have few images.
    """

    seen: NDArray[np.int64]
    images: sparse.csr_array

    @property
    def totals(self) -> NDArray[np.float64]:
        """Number of images in each of the seen cells, of shape (cells,)."""
        counts: NDArray[np.float64] = np.asarray(self.images.sum(axis=0), dtype=np.float64).ravel()
        return counts

    def count_where(self, selected: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Count each group's images in the selected ones of the seen cells, of shape (groups,)."""
        counts: NDArray[np.float64] = self.images @ selected.astype(np.float64)
        return counts


@dataclass(frozen=True, eq=False)
class Linearisation:
    """Indices of a set of images, and the contribution of each group to their deviations.

    Attributes:
        values: The indices, of shape (indices,), NaN where undefined.
        contributions: Contributions of the groups, of shape (groups, indices).
    """

    values: NDArray[np.float64]
    contributions: NDArray[np.float64]

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Covariance of the indices if groups are sampled, of shape (indices, indices); NaN for a single group."""
        count = len(self.contributions)
        if count < 2:
            return np.full((len(self.values), len(self.values)), np.nan)
        products: NDArray[np.float64] = self.contributions.T @ self.contributions
        return count / (count - 1) * products


def count_by_group(codes: NDArray[np.int64], cells: NDArray[np.int64]) -> GroupCounts:
    """Count each group's images by cell.

    Args:
        codes: Group of each image, whole numbers from 0 without gaps, of shape (n,).
        cells: Cell of each image (a flat index into a confusion matrix), >= 0, of shape (n,).

    Example:
        >>> counts = count_by_group(np.array([0, 1, 1]), np.array([3, 3, 0]))
        >>> counts.seen.tolist(), counts.images.toarray().tolist()
        ([0, 3], [[0.0, 1.0], [1.0, 1.0]])
    """
    seen, column = np.unique(cells, return_inverse=True)
    shape = (int(codes.max()) + 1, len(seen))
    return GroupCounts(
        seen.astype(np.int64), sparse.csr_array((np.ones(len(cells)), (codes, column.ravel())), shape=shape)
    )


def compute_linearised_indices(
    counts: GroupCounts, indices: Callable[[NDArray[np.float64]], NDArray[np.float64]], *, width: int
) -> Linearisation:
    """Compute indices of a table of counts, and the contribution of each group to their deviations.

    Args:
        counts: Counts by group.
        indices: Function of flat tables of counts, of shape (batch, width), that returns indices of shape (batch, k);
            smooth in the counts, and unchanged if all counts are multiplied by a constant.
        width: Number of cells of a table.

    Example:
        >>> counts = count_by_group(np.array([0, 0, 1]), np.array([0, 1, 1]))
        >>> share = lambda table: table[:, :1] / table.sum(axis=1, keepdims=True)
        >>> first = compute_linearised_indices(counts, share, width=2)
        >>> first.values.round(3).tolist(), first.contributions.round(3).ravel().tolist()
        ([0.333], [0.111, -0.111])
    """
    observed = np.zeros(width)
    observed[counts.seen] = counts.totals
    batch = max(1, BATCH_NUMBERS // width)
    slopes = []
    for start in range(0, len(counts.seen), batch):
        cells = counts.seen[start : start + batch]
        steps = np.zeros((len(cells), width))
        steps[np.arange(len(cells)), cells] = STEP
        slopes.append((indices(observed + steps) - indices(observed - steps)) / (2 * STEP))
    values: NDArray[np.float64] = indices(observed[None])[0]
    return Linearisation(values, counts.images @ np.concatenate(slopes))


@dataclass(frozen=True)
class MeanVariance:
    """Variance of a mean over images that come in groups.

    Attributes:
        variance: Variance of the mean; NaN for a single group.
        freedom: Its degrees of freedom, at least 1.
    """

    variance: float
    freedom: float


def estimate_mean_variance(values: NDArray[np.float64], codes: NDArray[np.int64]) -> MeanVariance:
    """Estimate the variance of the mean of a value over images that come in groups.

    As for proportions (`compute_cluster_design`), the variance is the largest of that between whole groups, that from
    the intraclass correlation of an analysis of variance, and that of independent images.

    Args:
        values: Value of each image, of shape (n,).
        codes: Group of each image, whole numbers >= 0, of shape (n,).

    Example:
        >>> mean = estimate_mean_variance(np.array([1.0, 1.0, 0.0, 0.0]), np.array([0, 0, 1, 1]))
        >>> mean.variance, mean.freedom
        (0.25, 1.0)
    """
    member = np.unique(codes, return_inverse=True)[1]
    sizes = np.bincount(member).astype(np.float64)
    total, groups = float(sizes.sum()), len(sizes)
    if groups < 2:
        return MeanVariance(math.nan, 1.0)
    mean = float(values.mean())
    deviations = np.bincount(member, weights=values - mean).astype(np.float64)
    linearised = groups / (groups - 1) * float((deviations**2).sum()) / total**2
    spread = float(((values - mean) ** 2).sum())
    independent = spread / (total - 1) / total
    variance = max(linearised, independent)
    variance = max(variance, independent * estimate_design_effect(deviations, sizes, spread))
    return MeanVariance(variance, max(1.0, compute_satterthwaite_freedom(deviations)))


def estimate_design_effect(deviations: NDArray[np.float64], sizes: NDArray[np.float64], spread: float) -> float:
    """Estimate the design effect of a mean: its variance relative to that of independent images.

    1 + (Σm² / n - 1) ICC, with the intraclass correlation of a one-way analysis of variance (Fleiss 2003, 15.2).

    Args:
        deviations: Sum over each group's images of value minus mean, of shape (groups,), at least two groups.
        sizes: Number of images of each group, of shape (groups,), each >= 1.
        spread: Sum over all images of (value minus mean) squared.

    Returns:
        1 or more.

    Example:
        >>> estimate_design_effect(np.array([1.0, 1.0, -2.0]), np.array([2.0, 2.0, 2.0]), 3.0)
        2.0
    """
    total, groups = float(sizes.sum()), len(sizes)
    if total == groups:
        return 1.0
    squares = float((sizes**2).sum())
    between = float((deviations**2 / sizes).sum())
    within = max(0.0, spread - between) / (total - groups)
    between /= groups - 1
    typical = (total - squares / total) / (groups - 1)
    scale = between + (typical - 1) * within
    correlation = min(1.0, max(0.0, (between - within) / scale)) if scale > 0 else 0.0
    return 1 + (squares / total - 1) * correlation


def estimate_correlation(deviations: NDArray[np.float64], sizes: NDArray[np.float64], spread: float) -> float:
    """Estimate the intraclass correlation of a one-way analysis of variance; see `estimate_design_effect`.

    Returns:
        In [0, 1]: 0 if each group has one image; 1 if it is unknown, since nothing varies or there is a single group.
    """
    typical = float((sizes**2).sum() / sizes.sum())
    if typical == 1:
        return 0.0
    if len(sizes) < 2 or not spread > 1e-12 * sizes.sum():
        return 1.0
    return min(1.0, max(0.0, (estimate_design_effect(deviations, sizes, spread) - 1) / (typical - 1)))


def estimate_bounded_mean(
    values: NDArray[np.float64], codes: NDArray[np.int64], *, highest: float, confidence: float
) -> Estimate:
    """Estimate the mean of values in [0, highest], with the Wilson interval at the effective number of images.

    Args:
        values: Value of each image, of shape (n,).
        codes: Group of each image, whole numbers >= 0, of shape (n,).
        highest: Greatest possible value.
        confidence: Coverage of the interval, in (0, 1).

    Example:
        >>> mean = estimate_bounded_mean(np.array([0.1, 0.3, 0.2, 0.2]), np.arange(4), highest=2.0, confidence=0.95)
        >>> round(mean.value, 2), round(mean.low, 2), round(mean.high, 2)
        (0.2, 0.1, 0.37)
    """
    mean = float(values.mean())
    return estimate_from_variance(
        min(mean, highest), estimate_mean_variance(values, codes), codes, highest=highest, confidence=confidence
    )


def estimate_from_variance(
    value: float, spread: MeanVariance, codes: NDArray[np.int64], *, highest: float = 1.0, confidence: float
) -> Estimate:
    """Turn a value in [0, highest] and its variance into an estimate with a Wilson interval.

    If nothing varied, the images of a group count as copies of one another.

    Args:
        value: The value, in [0, highest].
        spread: Its variance, NaN or 0 if nothing varied.
        codes: Group of each image that the value is based on, of shape (n,).
        highest: Greatest possible value.
        confidence: Coverage of the interval, in (0, 1).
    """
    share = value / highest
    if spread.variance > NOISE * highest**2 and 0 < share < 1:
        size = share * (1 - share) * highest**2 / spread.variance
        low, high = compute_wilson_ends(share, size, compute_quantile(confidence, freedom=spread.freedom))
    else:
        low, high = compute_wilson_ends(share, compute_copies(codes), compute_quantile(confidence))
    return Estimate(value, highest * low, highest * high)


def compute_copies(codes: NDArray[np.int64]) -> float:
    """Compute n² / Σm²: the number of independent images if the images of a group are copies of one another.

    Example:
        >>> compute_copies(np.array([0, 0, 1, 1]))
        2.0
    """
    sizes = np.unique(codes, return_counts=True)[1].astype(np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def compute_correlation(covariance: NDArray[np.float64], *, copies: float, unknown: float) -> NDArray[np.float64]:
    """Convert covariances to the correlations that combine intervals.

    A negative correlation makes a combined interval narrower. It is imprecise with few independent patients, so it is
    moved one standard error closer to 0, on Fisher's z scale.

    Args:
        covariance: Covariance of the indices, of shape (k, k).
        copies: Number of independent images, from `compute_copies`.
        unknown: Correlation to assume for two indices neither of which varied in these data.

    Returns:
        Correlations of shape (k, k), in [-1, 1]; 0 between an index that varied and one that did not.

    Example:
        >>> covariance = np.array([[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        >>> compute_correlation(covariance, copies=40, unknown=0.5).tolist()
        [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
        >>> compute_correlation(np.array([[1.0, -0.6], [-0.6, 1.0]]), copies=12, unknown=0.5).round(2).tolist()
        [[1.0, -0.35], [-0.35, 1.0]]
    """
    errors = np.sqrt(np.nan_to_num(np.diagonal(covariance)))
    constant = errors < 1e-12
    scale = np.outer(errors, errors)
    correlation = np.where(scale > 0, np.nan_to_num(covariance) / np.where(scale > 0, scale, 1.0), 0.0)
    correlation = np.clip(correlation, -1 + 1e-12, 1.0)
    correlation[np.ix_(constant, constant)] = unknown
    error = 1 / math.sqrt(copies - 3) if copies > 3 else math.inf
    shrunk = np.minimum(0.0, np.tanh(np.arctanh(np.minimum(correlation, 0.0)) + error))
    correlation = np.where(correlation < 0, shrunk, correlation)
    np.fill_diagonal(correlation, 1.0)
    return correlation


def compute_mean_estimate(parts: Sequence[Estimate], correlation: NDArray[np.float64]) -> Estimate:
    """Average the estimates of the classes and combine their intervals.

    Each end is the wider of two. MOVER adds the squared distances from value to end, and so preserves the asymmetry of
    the classes' intervals. But an average of several proportions is less skewed than each of them: the second method
    preserves only as much asymmetry as remains of the third cumulant. Either alone covers 88 to 93 % with few images
    per class; together they cover 93 % or more (`benchmarks/coverage.py`).

    Args:
        parts: Estimates of the classes, at least one, each in [0, 1].
        correlation: Correlation of their errors, of shape (classes, classes).

    Returns:
        The mean, in [0, 1]. Undefined as soon as one class is: a mean over fewer classes would be a different index.

    Example:
        >>> halves = [Estimate(0.9, 0.8, 0.95), Estimate(0.7, 0.6, 0.8)]
        >>> mean = compute_mean_estimate(halves, np.eye(2))
        >>> round(mean.value, 3), round(mean.low, 3), round(mean.high, 3)
        (0.8, 0.729, 0.858)
    """
    values = np.array([part.value for part in parts])
    value = float(values.mean())
    missing = next((part for part in parts if not part.defined), None)
    if missing is not None:
        return Estimate(math.nan, math.nan, math.nan, reason=missing.reason)
    below = values - np.array([part.low for part in parts])
    above = np.array([part.high for part in parts]) - values

    def compute_distance(distances: NDArray[np.float64]) -> float:
        return math.sqrt(max(0.0, float(distances @ correlation @ distances))) / len(parts)

    half, shift = (below + above) / 2, (below - above) / 2
    squares = float((half**2).sum())
    # Fully correlated classes keep their skewness.
    weight = float(half @ correlation @ half) / squares**2 if squares > 0 else 0.0
    asymmetry = float((shift * half**2).sum()) * weight / len(parts)
    low = value - max(compute_distance(below), compute_distance(half) + asymmetry)
    high = value + max(compute_distance(above), compute_distance(half) - asymmetry)
    without = next((part for part in parts if not part.has_interval), None)
    if without is not None:
        return Estimate(value, math.nan, math.nan, reason=without.reason)
    return Estimate(value, max(0.0, low), min(1.0, high))


def estimate_mean_over_groups(
    values: NDArray[np.float64], groups: NDArray[np.generic] | None, *, confidence: float = 0.95
) -> Estimate:
    """Estimate the mean of values in [0, 1], with equal weight for each group, and its interval.

    Args:
        values: Shape (n,), n >= 1, each in [0, 1].
        groups: Group (patient) of each value, of shape (n,), or None if each value is its own group.
        confidence: Coverage of the two-sided interval, in (0, 1).

    Returns:
        The mean of the groups' means. The interval is nonparametric, and wider than a normal one.

    Raises:
        ValueError: If there are no values, one is outside [0, 1], the shapes differ, or confidence is not in (0, 1).

    Example:
        >>> estimate_mean_over_groups(np.array([1.0, 1.0, 1.0, 0.0]), np.array(["a", "a", "a", "b"])).value
        0.5
    """
    check_confidence(confidence)
    means = compute_group_means(check_proportions(values), groups)
    one_sided = (1 + confidence) / 2
    return Estimate(
        value=float(means.mean()),
        low=1 - compute_upper_bound(1 - means, confidence=one_sided),
        high=compute_upper_bound(means, confidence=one_sided),
    )


def compute_group_means(values: NDArray[np.float64], groups: NDArray[np.generic] | None) -> NDArray[np.float64]:
    """Compute the mean of each group's values, in the order of the groups' sorted names.

    Args:
        values: Shape (n,), n >= 1.
        groups: Group of each value, of shape (n,), or None if each value is its own group.

    Example:
        >>> compute_group_means(np.array([1.0, 0.0, 1.0]), np.array(["b", "b", "a"])).tolist()
        [1.0, 0.5]
    """
    codes = encode_groups(groups, length=len(values))
    means: NDArray[np.float64] = np.bincount(codes, weights=values) / np.bincount(codes)
    return means


def estimate_by_jackknife(
    compute: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    cells: NDArray[np.int64],
    groups: NDArray[np.generic] | None,
    *,
    width: int,
    confidence: float = 0.95,
) -> tuple[Estimate, ...]:
    """Estimate indices of which only a function of a table of counts is known, by leaving out one group at a time.

    The interval is symmetric: Student's t times the standard error of the grouped jackknife (Efron 1982), at
    Satterthwaite's degrees of freedom. It suits indices that are smooth in the counts, and may exceed their range.

    Args:
        compute: Function of a flat table of counts, of shape (width,), that returns k indices, NaN where undefined.
        cells: Cell of each image (a flat index into the table), of shape (n,).
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        width: Number of cells of the table.
        confidence: Coverage of the intervals, in (0, 1).

    Returns:
        One estimate per index; without an interval if there is one group only, if the index is undefined without one of
        the groups, or if it is the same without any of them.

    Example:
        >>> share = lambda table: table[1:] / table.sum()
        >>> (estimate,) = estimate_by_jackknife(share, np.array([0, 1] * 50), None, width=2)
        >>> round(estimate.value, 2), round(estimate.low, 2), round(estimate.high, 2)
        (0.5, 0.4, 0.6)
    """
    check_confidence(confidence)
    counts = count_by_group(encode_groups(groups, length=len(cells)), cells)
    observed = np.zeros(width)
    observed[counts.seen] = counts.totals
    values = compute(observed)
    without: dict[tuple[bytes, bytes], NDArray[np.float64]] = {}  # groups with equal counts are computed once
    by_group = []
    for group in range(counts.images.shape[0]):
        start, end = counts.images.indptr[group : group + 2]
        columns, images = counts.images.indices[start:end], counts.images.data[start:end]
        key = (columns.tobytes(), images.tobytes())
        if key not in without:
            rest = observed.copy()
            rest[counts.seen[columns]] -= images
            without[key] = _compute_or_nan(compute, rest, len(values))
        by_group.append(without[key])
    left_out = np.stack(by_group)
    return tuple(
        _estimate_from_left_out(float(value), column, confidence)
        for value, column in zip(values, left_out.T, strict=True)
    )


def _compute_or_nan(
    compute: Callable[[NDArray[np.float64]], NDArray[np.float64]], table: NDArray[np.float64], count: int
) -> NDArray[np.float64]:
    try:
        with np.errstate(all="ignore"):
            return compute(table)
    except ArithmeticError:  # a function in plain Python may divide by zero
        return np.full(count, np.nan)


def _estimate_from_left_out(value: float, left_out: NDArray[np.float64], confidence: float) -> Estimate:
    """Estimate an index from its values without each group, of shape (groups,)."""
    groups = len(left_out)
    if math.isnan(value) or groups < 2 or not np.isfinite(left_out).all():
        return Estimate(value, math.nan, math.nan)
    deviations = left_out - left_out.mean()
    variance = (groups - 1) / groups * float((deviations**2).sum())
    if variance <= NOISE:
        return Estimate(value, math.nan, math.nan)
    half = compute_quantile(confidence, freedom=compute_satterthwaite_freedom(deviations)) * math.sqrt(variance)
    return Estimate(value, value - half, value + half)
