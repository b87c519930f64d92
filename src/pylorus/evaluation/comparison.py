"""Comparison of two models, on the same images (McNemar, DeLong, exchange of whole groups) or on different ones.

Each paired function takes two `Predictions`, puts the second in the order of the first and refuses different sets of
images. Differences are first minus second. Their intervals are combined from those of the two models and the
correlation of their errors (MOVER, Zou, Psychol Methods 2007;12:399), so that no end is outside the scale of the index.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pylorus.evaluation.confusion import overall_indices
from pylorus.evaluation.discrimination import auroc, compute_placements, estimate_area_variance
from pylorus.evaluation.index_intervals import OVERALL, clustered_wilson, estimate_overall
from pylorus.evaluation.influence import (
    BATCH_NUMBERS,
    compute_linearised_indices,
    count_by_group,
    estimate_mean_variance,
)
from pylorus.evaluation.intervals import Estimate, check_confidence, compute_quantile, compute_two_sided_p
from pylorus.evaluation.predictions import Predictions, align_predictions, encode_groups

EXACT_STEPS = 500_000_000
"""Additions up to which a sign-flip test is exact; beyond, it uses the normal approximation."""

INDICES = ("accuracy", *OVERALL)
"""Indices in which two models are compared, besides AUROC."""

RESAMPLES = 10_000
"""Default number of random exchanges of the two models: the standard error of a p of 0.05 is then about 0.002."""

MAX_ENUMERATED_GROUPS = 12
"""Up to this many groups in which the models differ, all exchanges are enumerated instead of sampled."""


@dataclass(frozen=True)
class McNemar:
    """Result of a test that two models classify equally many of the same images correctly.

    Attributes:
        images: Number of images.
        groups: Number of groups (patients) of these images.
        right_first: Number of images that the first model classifies correctly.
        right_second: Number of images that the second model classifies correctly.
        only_first: Number of images that only the first model classifies correctly.
        only_second: Number of images that only the second model classifies correctly.
        p_value: Two-sided, exact, in (0, 1]; 1 if the two models are correct on the same images.
    """

    images: int
    groups: int
    right_first: int
    right_second: int
    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Predictions, second: Predictions) -> McNemar:
    """Test that two models classify equally many images correctly (McNemar 1947), exactly and with whole groups.

    If the models are equally good, exchanging their predictions on all images of a group changes nothing. Each
    group's balance (images that only the first classifies correctly, minus those that only the second does) is then as
    likely to have the other sign, and p is the exact proportion of all sign patterns that are at least as unbalanced
    as the observed one. With one image per group this is the exact binomial McNemar test.

    Raises:
        ValueError: If the two are not about the same images.

    Example:
        >>> truth, names = np.zeros(6, dtype=np.int64), np.array(list("abcdef"))
        >>> right, wrong = np.tile([1.0, 0.0], (6, 1)), np.tile([0.0, 1.0], (6, 1))
        >>> mcnemar(
        ...     Predictions(names, names, truth, right, ("x", "y")),
        ...     Predictions(names, names, truth, wrong, ("x", "y")),
        ... ).p_value
        0.03125
    """
    second = align_predictions(first, second)
    codes = encode_groups(first.group, length=len(first.true))
    lead = first.correct.astype(np.int64) - second.correct.astype(np.int64)
    balance = np.bincount(codes, weights=lead).astype(np.int64)
    return McNemar(
        images=len(lead),
        groups=len(balance),
        right_first=int(first.correct.sum()),
        right_second=int(second.correct.sum()),
        only_first=int((lead > 0).sum()),
        only_second=int((lead < 0).sum()),
        p_value=sign_flip_test(balance),
    )


def sign_flip_test(balance: NDArray[np.int64]) -> float:
    """Compute a two-sided exact p that two models, or two means of models, classify equally many images correctly.

    If the two are equally good, exchanging them on all images of a group changes nothing, so each group's balance is
    as likely to have the other sign. With one model each this is McNemar's test with whole groups.

    Args:
        balance: Number of correctly classified images of the first minus that of the second, by group, of shape
            (groups,), in whole numbers: multiply means over replicates by their common denominator.

    Returns:
        The proportion of all sign patterns whose sum is at least as far from 0; from the normal distribution, with a
        continuity correction of half a unit, if there are too many to add up.

    Example:
        >>> sign_flip_test(np.array([1, 1, 1, 1, 1, 1]))
        0.03125
    """
    observed = abs(int(np.sum(balance)))
    sizes = np.abs(balance[balance != 0]).astype(np.int64)
    if not len(sizes):
        return 1.0
    unit = int(np.gcd.reduce(sizes))
    sizes, observed = sizes // unit, observed // unit
    reach = int(sizes.sum())
    if len(sizes) * (2 * reach + 1) > EXACT_STEPS:
        return compute_two_sided_p(max(0.0, observed - 0.5) / math.sqrt(float((sizes.astype(np.float64) ** 2).sum())))
    probability = np.zeros(2 * reach + 1)
    probability[reach] = 1.0
    for size in sizes:
        probability = (np.roll(probability, size) + np.roll(probability, -size)) / 2
    sums = np.abs(np.arange(-reach, reach + 1))
    # With very many groups the proportion may underflow; it is still above 0.
    return min(1.0, max(float(probability[sums >= observed].sum()), float(np.finfo(float).tiny)))


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correct a family of p-values so that the family-wise error rate stays below the level (Holm 1979).

    statsmodels' `multipletests` gives the same, but runs a full garbage collection at each call.

    Args:
        p_values: The p-values of all tests of the family, of shape (tests,), in [0, 1]; a NaN must not be left out,
            since that would change the family.

    Returns:
        Corrected p-values, of shape (tests,), in the same order.

    Raises:
        ValueError: If there are none, or one is NaN or out of range.

    Example:
        >>> holm(np.array([0.01, 0.04, 0.03])).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    family = np.asarray(p_values, dtype=np.float64)
    if family.ndim != 1 or not len(family) or not ((family >= 0) & (family <= 1)).all():
        raise ValueError(f"p-values are {family.tolist()}; expected at least one, each in [0, 1], none NaN")
    order = np.argsort(family)
    steps = family[order] * np.arange(len(family), 0, -1)
    corrected = np.empty_like(family)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected


@dataclass(frozen=True)
class Difference(Estimate):
    """A difference between two models on the same images, first minus second, with its interval.

    Attributes:
        standard_error: Of the difference, linearised, with sampling of whole groups; NaN for a single group, 0 if
            nothing varied.
        p_value: Two-sided, for the hypothesis of no difference, in (0, 1]; NaN if the difference is undefined.
    """

    standard_error: float
    p_value: float


@dataclass(frozen=True)
class PairedDifferences:
    """Differences of the overall indices, which `OverallIndices` defines."""

    accuracy: Difference
    balanced_accuracy: Difference
    macro_precision: Difference
    macro_f1: Difference
    cohen_kappa: Difference
    mcc: Difference


def delong_test(first: Predictions, second: Predictions, *, class_name: str, confidence: float = 0.95) -> Difference:
    """Compare two one-vs-rest AUROCs on the same images (DeLong 1988; with groups, Obuchowski 1997).

    p comes from Student's t, with Welch's degrees of freedom for positives and negatives and Satterthwaite's for the
    groups of each: few positive patients carry little information, however many negative ones there are.

    Args:
        first: Predictions of one model.
        second: Predictions of the other model for the same images.
        class_name: The positive class; the others are the rest.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The difference with its interval and p. Undefined if the class, or the rest, has no images. If the variance of
        the difference can't be estimated (nothing varied, or one patient has all positives), p matches the interval.

    Raises:
        ValueError: If the two are not about the same images, or have no such class.

    Example:
        >>> names, truth = np.array(list("abcdef")), np.array([0, 0, 0, 1, 1, 1])
        >>> def build_predictions(scores):
        ...     return Predictions(names, names, truth, np.column_stack([scores, 1 - scores]), ("x", "y"))
        >>> one = build_predictions(np.array([0.9, 0.8, 0.3, 0.5, 0.2, 0.1]))
        >>> two = build_predictions(np.array([0.9, 0.2, 0.6, 0.5, 0.7, 0.1]))
        >>> round(delong_test(one, two, class_name="x").value, 3)
        0.222
    """
    check_confidence(confidence)
    second = align_predictions(first, second)
    if class_name not in first.class_names:
        raise ValueError(f'no class "{class_name}"; expected one of {list(first.class_names)}')
    column = first.class_names.index(class_name)
    positive = first.true == column
    if positive.all() or not positive.any():
        reason = auroc(positive, first.probabilities[:, column]).reason
        return Difference(math.nan, math.nan, math.nan, math.nan, math.nan, reason=reason)
    codes = encode_groups(first.group, length=len(first.true))
    scores = [model.probabilities[:, column] for model in (first, second)]
    areas = [auroc(positive, score, codes, confidence=confidence) for score in scores]
    placements = [compute_placements(positive, score) for score in scores]
    difference = estimate_area_variance(positive, placements[0] - placements[1], codes)
    value, error = areas[0].value - areas[1].value, math.sqrt(difference.variance)
    own = [area.standard_error**2 for area in areas]
    shared = (sum(own) - difference.variance) / 2
    low, high = _merge_intervals(
        areas[0], areas[1], np.array([[own[0], shared], [shared, own[1]]]), confidence=confidence
    )
    if abs(value) < 1e-12 and not error > 1e-9:
        p_value = 1.0
    elif error > 1e-9:
        p_value = compute_two_sided_p(value / error, freedom=difference.freedom)
    else:
        # Nothing varied, or one patient has all positives or negatives: take the p that matches the interval.
        reach = (value - low if value > 0 else high - value) / compute_quantile(confidence)
        p_value = compute_two_sided_p(value / reach)
    return Difference(value, low, high, error, p_value)


def paired_differences(
    first: Predictions,
    second: Predictions,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> PairedDifferences:
    """Compare accuracy, macro F1 and the other overall indices of two models on the same images.

    If two models are equally good, exchanging their predictions on all images of a group makes no systematic
    difference. p is the proportion of such random exchanges with a difference at least as large as the observed one:
    the method of `mcnemar`, for any index. For accuracy, p is the exact one of `mcnemar`. Interval and p are computed
    by different methods and may disagree close to the level.

    Args:
        first: Predictions of one model.
        second: Predictions of the other model for the same images.
        seed: Random seed of the exchanges.
        resamples: Number of random exchanges, if there are too many to enumerate.
        confidence: Coverage of the intervals, in (0, 1).

    Returns:
        Differences, first minus second; undefined for an index that is undefined for one of the models.

    Raises:
        ValueError: If the two are not about the same images, or resamples is below 1.

    Example:
        >>> names, truth = np.array([f"image {i}" for i in range(40)]), np.arange(40) % 2
        >>> half_right = np.eye(2)[np.where(np.arange(40) < 20, truth, 1 - truth)]
        >>> perfect = Predictions(names, names, truth, np.eye(2)[truth], ("x", "y"))
        >>> guessing = Predictions(names, names, truth, half_right, ("x", "y"))
        >>> difference = paired_differences(perfect, guessing, seed=0).macro_f1
        >>> difference.value, difference.low > 0, difference.p_value < 0.001
        (0.5, True, True)
    """
    check_confidence(confidence)
    second, classes = align_predictions(first, second), first.classes
    codes = encode_groups(first.group, length=len(first.true))
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; expected at least 1")
    cells = (first.true * classes + first.predicted) * classes + second.predicted

    def compute_both(tables: NDArray[np.float64]) -> NDArray[np.float64]:
        cube = tables.reshape(-1, classes, classes, classes)  # axes: truth, prediction of the first, of the second
        models = [overall_indices(cube.sum(axis=axis)) for axis in (3, 2)]
        return np.column_stack([getattr(model, name) for name in INDICES for model in models])

    covariance = compute_linearised_indices(count_by_group(codes, cells), compute_both, width=classes**3).covariance
    p_values = _compute_exchange_p_values(first, second, codes, seed=seed, resamples=resamples)
    p_values["accuracy"] = mcnemar(first, second).p_value
    estimates = [estimate_overall(model, confidence=confidence) for model in (first, second)]
    differences = {}
    for index, name in enumerate(INDICES):
        one, two = (each[name] for each in estimates)
        pair = covariance[2 * index : 2 * index + 2, 2 * index : 2 * index + 2]
        error = float(np.sqrt(np.maximum(pair[0, 0] + pair[1, 1] - 2 * pair[0, 1], 0.0)))
        low, high = _merge_intervals(one, two, pair, confidence=confidence)
        p_value = p_values[name] if one.defined and two.defined else math.nan
        differences[name] = Difference(
            one.value - two.value, low, high, error, p_value, reason=one.reason or two.reason
        )
    return PairedDifferences(**differences)


def paired_share_difference(
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    groups: NDArray[np.generic] | None,
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Estimate the difference of two proportions on the same images, such as two models' sensitivities (MOVER).

    On all images, with whether each model is correct, it is the difference in accuracy of `paired_differences`.

    Args:
        first: Shape (n,), n >= 1: whether each image has the property by the first model.
        second: The same for the second model, of the same images.
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        confidence: Coverage of the interval, in (0, 1).

    Raises:
        ValueError: If the shapes differ or there are no images.

    Example:
        >>> one, two = np.arange(100) < 90, np.arange(100) < 85
        >>> difference = paired_share_difference(one, two, None)
        >>> round(difference.value, 2), round(difference.low, 3), round(difference.high, 3)
        (0.05, 0.005, 0.105)
    """
    estimates = [clustered_wilson(each, groups, confidence=confidence) for each in (first, second)]
    if estimates[0].total != estimates[1].total:
        raise ValueError(f"found {estimates[0].total} and {estimates[1].total} images; expected the same images")
    codes = encode_groups(groups, length=estimates[0].total)
    count = int(codes.max()) + 1
    deviations = np.array(
        [
            np.bincount(codes, weights=np.asarray(each, dtype=np.float64) - estimate.value, minlength=count)
            for each, estimate in zip((first, second), estimates, strict=True)
        ]
    )
    covariance = deviations @ deviations.T / estimates[0].total ** 2
    covariance *= count / (count - 1) if count > 1 else math.nan
    low, high = _merge_intervals(estimates[0], estimates[1], covariance, confidence=confidence)
    return Estimate(estimates[0].value - estimates[1].value, low, high)


def difference_of_paired(
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    groups: NDArray[np.generic] | None = None,
    *,
    confidence: float = 0.95,
) -> Difference:
    """Compute the difference of two proportions of the same images, first minus second, with its p-value.

    The interval is that of `paired_share_difference`, the p-value the exact one of `sign_flip_test`.

    Args:
        first: Whether each image has the property under one condition, of shape (n,).
        second: The same under the other condition.
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        confidence: Coverage of the interval, in (0, 1).

    Example:
        >>> before, after = np.arange(40) < 36, np.arange(40) < 30
        >>> difference = difference_of_paired(after, before)
        >>> round(difference.value, 3), round(difference.low, 3), round(difference.high, 3)
        (-0.15, -0.277, -0.039)
    """
    estimate = paired_share_difference(first, second, groups, confidence=confidence)
    balance = np.asarray(first, dtype=np.int64) - np.asarray(second, dtype=np.int64)
    codes = encode_groups(groups, length=len(balance))
    variance = estimate_mean_variance(balance.astype(np.float64), codes).variance
    changes = np.bincount(codes, weights=balance).astype(np.int64)
    return Difference(estimate.value, estimate.low, estimate.high, math.sqrt(variance), sign_flip_test(changes))


def paired_loss_difference(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    confidence: float = 0.95,
) -> Difference:
    """Compute the difference of two mean losses of the same images, first minus second: Brier scores or log losses.

    Interval and p-value are those of Student's t for the mean of the images' differences, with the variance of
    `estimate_mean_variance`, which keeps the images of a group together.

    Args:
        first: Loss of each image under one condition, of shape (n,), finite.
        second: The same under the other condition.
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The difference; without an interval if there is one group only.

    Raises:
        ValueError: If the shapes differ, or a loss is not finite.

    Example:
        >>> difference = paired_loss_difference(np.array([0.2, 0.1, 0.3, 0.2]), np.array([0.3, 0.3, 0.3, 0.3]))
        >>> round(difference.value, 2), round(difference.low, 3), round(difference.high, 3)
        (-0.1, -0.23, 0.03)
    """
    check_confidence(confidence)
    if first.shape != second.shape or not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("expected finite losses of the same images")
    change = np.asarray(first - second, dtype=np.float64)
    spread = estimate_mean_variance(change, encode_groups(groups, length=len(change)))
    value, error = float(change.mean()), math.sqrt(spread.variance)
    reach = compute_quantile(confidence, freedom=spread.freedom) * error
    if math.isnan(error):
        p_value = math.nan
    elif error == 0:
        p_value = 1.0 if value == 0 else 0.0
    else:
        p_value = compute_two_sided_p(value / error, freedom=spread.freedom)
    return Difference(value, value - reach, value + reach, error, p_value)


def _merge_intervals(
    first: Estimate, second: Estimate, covariance: NDArray[np.float64], *, confidence: float
) -> tuple[float, float]:
    """Combine two intervals into that of the difference, first minus second (MOVER).

    Args:
        first: One estimate.
        second: The other estimate.
        covariance: Covariance of the two, of shape (2, 2), NaN where it can't be estimated.
        confidence: Coverage of both intervals, in (0, 1).
    """
    value = first.value - second.value
    errors = compute_quantile(confidence) * np.sqrt(np.maximum(np.diagonal(covariance), 0.0))
    halves = np.array([first.high - first.low, second.high - second.low]) / 2
    correlation = 0.0
    if (errors > 0).all() and (halves > 0).all():
        # A class without errors widens both intervals but adds nothing to the covariance, so the correlation
        # counts only for as much of the width as the standard errors explain.
        explained = min(1.0, float(np.sqrt(np.prod(errors / halves))))
        correlation = explained * float(np.clip(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]), -1, 1))

    def compute_reach(one: float, two: float) -> float:
        return math.sqrt(max(0.0, one**2 + two**2 - 2 * correlation * one * two))

    below = compute_reach(first.value - first.low, second.high - second.value)
    above = compute_reach(first.high - first.value, second.value - second.low)
    return value - below, value + above


def _compute_exchange_p_values(
    first: Predictions, second: Predictions, codes: NDArray[np.int64], *, seed: int, resamples: int
) -> dict[str, float]:
    """Compute p of each index by exchanging the two models' predictions on whole groups at random.

    Groups whose exchange changes the tables in the same way are sampled together, as a binomial number.
    """
    classes = first.classes
    width = classes**2
    answers = [first.true * classes + model.predicted for model in (first, second)]
    groups = int(codes.max()) + 1
    discordant = np.unique(codes[answers[0] != answers[1]])
    if not len(discordant):
        return dict.fromkeys(INDICES, 1.0)
    row_of_group = np.full(groups, -1)
    row_of_group[discordant] = np.arange(len(discordant))
    inside = row_of_group[codes] >= 0
    rows = np.tile(row_of_group[codes[inside]], 2)
    columns = np.concatenate([answer[inside] for answer in answers])
    signs = np.repeat([-1.0, 1.0], int(inside.sum()))
    change_by_group = sparse.csr_array((signs, (rows, columns)), shape=(len(discordant), width))
    if len(discordant) <= MAX_ENUMERATED_GROUPS:
        exchanged_groups = (np.arange(2 ** len(discordant))[:, None] >> np.arange(len(discordant))) & 1
        changes = exchanged_groups @ change_by_group
    else:
        unique_changes, count = _count_unique_rows(change_by_group)
        generator = np.random.default_rng(seed)
        batch = max(1, 10 * BATCH_NUMBERS // len(count))
        sizes = [min(batch, resamples - start) for start in range(0, resamples, batch)]
        changes = np.concatenate(
            [generator.binomial(count, 0.5, size=(size, len(count))) @ unique_changes for size in sizes]
        )
    tables = [np.bincount(answer, minlength=width).astype(np.float64) for answer in answers]

    def compute_differences(change: NDArray[np.float64]) -> NDArray[np.float64]:
        ours, theirs = (
            overall_indices((table + sign * change).reshape(-1, classes, classes))
            for table, sign in zip(tables, (1.0, -1.0), strict=True)
        )
        return np.column_stack([getattr(ours, name) - getattr(theirs, name) for name in INDICES])

    observed = np.abs(compute_differences(np.zeros((1, width)))[0])
    exchanged = np.abs(compute_differences(changes))
    # An exchange that makes an index undefined counts as at least as large; rounding must not separate equal values.
    reached = (~(exchanged < observed - 1e-12)).sum(axis=0)
    # If exchanges are sampled, the observed assignment counts as one of them (Phipson and Smyth 2010).
    itself = 0 if len(discordant) <= MAX_ENUMERATED_GROUPS else 1
    p_values = (reached + itself) / (len(changes) + itself)
    return {name: float(p) for name, p in zip(INDICES, p_values, strict=True)}


def _count_unique_rows(table: sparse.csr_array) -> tuple[sparse.csr_array, NDArray[np.int64]]:
    """Return the unique rows of a table, in a fixed order, and how often each occurs."""
    table.sum_duplicates()
    table.eliminate_zeros()
    first: dict[bytes, int] = {}
    counts: dict[bytes, int] = {}
    for row in range(table.shape[0]):
        entries = slice(table.indptr[row], table.indptr[row + 1])
        key = table.indices[entries].astype(">i8").tobytes() + table.data[entries].tobytes()
        first.setdefault(key, row)
        counts[key] = counts.get(key, 0) + 1
    keys = sorted(first)
    return table[[first[key] for key in keys]], np.array([counts[key] for key in keys], dtype=np.int64)


def difference_of_independent(first: Estimate, second: Estimate) -> Estimate:
    """Compute the difference of two estimates from different images, first minus second.

    The interval is combined from the two intervals (MOVER, Zou and Donner, Stat Med 2008;27:1693); from two Wilson
    intervals it is Newcombe's (Stat Med 1998;17:873, method 10). Its confidence is that of the two intervals.

    Args:
        first: One estimate with its interval: a proportion, a macro F1, an area.
        second: The other estimate, of the same index and with the same confidence, from other images.

    Returns:
        The difference; NaN if a value is undefined, with a NaN interval if an interval is undefined.

    Example:
        >>> from pylorus.evaluation.index_intervals import wilson
        >>> difference = difference_of_independent(wilson(409, 450), wilson(401, 450))
        >>> round(difference.value, 4), round(difference.low, 4), round(difference.high, 4)
        (0.0178, -0.0217, 0.0575)
    """
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, low, high, reason=first.reason or second.reason)
