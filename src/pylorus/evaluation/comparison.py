"""Two models compared: on the same images (McNemar, DeLong, exchange of whole groups) and on different ones.

Each paired function takes two `Predictions`, puts the second in the order of the first and refuses different sets of
images. Differences are first minus second. Their intervals are combined from those of the two models and the
correlation of their errors (MOVER, Zou, Psychol Methods 2007;12:399), so no end lies outside the scale of the index.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from statsmodels.stats.multitest import multipletests

from pylorus.evaluation.confusion import overall_indices
from pylorus.evaluation.delong import auroc, compute_placements, estimate_area_variance
from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.index_intervals import OVERALL, estimate_overall
from pylorus.evaluation.influence import BATCH_NUMBERS, count_by_group, linearise_indices
from pylorus.evaluation.inputs import group_codes
from pylorus.evaluation.interval import check_confidence, quantile, two_sided_p
from pylorus.evaluation.predictions import Predictions, aligned

EXACT_STEPS = 500_000_000
"""Additions up to which a sign-flip test is computed exactly; beyond, the sum of so many groups is normal."""


@dataclass(frozen=True)
class McNemar:
    """Whether two models recognise equally many of the same images.

    Attributes:
        images: How many images both saw.
        groups: How many groups (patients) these belong to.
        right_first: Images that the first model recognises.
        right_second: Images that the second model recognises.
        only_first: Images that the first alone recognises.
        only_second: Images that the second alone recognises.
        p_value: Two-sided, exact, in (0, 1]; 1 if no image tells the two apart.
    """

    images: int
    groups: int
    right_first: int
    right_second: int
    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Predictions, second: Predictions) -> McNemar:
    """Exact test that two models recognise equally many images (McNemar 1947), each group kept together.

    If the models are equally good, exchanging their answers on all images of a group changes nothing. So each
    group's balance (images that the first alone recognises, less those that the second alone does) is as
    likely to be turned round, and p is the exact share of all such turns that are as lopsided as what was
    seen. With one image a group this is the binomial exact McNemar test.

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
    other = aligned(first, second)
    codes = group_codes(first.group, length=len(first.true))
    lead = first.correct.astype(np.int64) - other.correct.astype(np.int64)
    balance = np.bincount(codes, weights=lead).astype(np.int64)
    return McNemar(
        images=len(lead),
        groups=len(balance),
        right_first=int(first.correct.sum()),
        right_second=int(other.correct.sum()),
        only_first=int((lead > 0).sum()),
        only_second=int((lead < 0).sum()),
        p_value=sign_flip_test(balance),
    )


def sign_flip_test(balance: NDArray[np.int64]) -> float:
    """Two-sided exact p that two models, or means of models, recognise equally many images of each group.

    If the two are equally good, exchanging them on all images of a group changes nothing, so each group's balance is
    as likely to have the other sign. With one model each this is McNemar's test with groups kept together.

    Args:
        balance: How many images of each group the first recognises more than the second, of shape (groups,), in
            whole numbers: multiply means over replicates by their common denominator.

    Returns:
        The share of all sign patterns whose sum is as far from 0; by the normal distribution, with half a unit of
        continuity, where there are too many to add up.

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
        return two_sided_p(max(0.0, observed - 0.5) / math.sqrt(float((sizes.astype(np.float64) ** 2).sum())))
    chance = np.zeros(2 * reach + 1)
    chance[reach] = 1.0
    for size in sizes:
        chance = (np.roll(chance, size) + np.roll(chance, -size)) / 2
    sums = np.abs(np.arange(-reach, reach + 1))
    # So many groups that the share is too small for a float are still not none.
    return min(1.0, max(float(chance[sums >= observed].sum()), float(np.finfo(float).tiny)))


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Correct a family of p-values so that the chance of any false claim stays below the level (Holm 1979).

    Args:
        p_values: Every test of the family, of shape (tests,), in [0, 1]; none may be left out because it is
            nan.

    Returns:
        Corrected p-values, of shape (tests,), in the same order.

    Raises:
        ValueError: If there are none, or one is nan or out of range.

    Example:
        >>> holm(np.array([0.01, 0.04, 0.03])).round(3).tolist()
        [0.03, 0.06, 0.06]
    """
    family = np.asarray(p_values, dtype=np.float64)
    if family.ndim != 1 or not len(family) or not ((family >= 0) & (family <= 1)).all():
        raise ValueError(f"p-values are {family.tolist()}; expected at least one, each in [0, 1], none nan")
    corrected: NDArray[np.float64] = multipletests(family, method="holm")[1]
    return corrected


INDICES = ("accuracy", *OVERALL)
"""What two models are compared by, besides AUROC."""

RESAMPLES = 10_000
"""Random exchanges of the two models unless told otherwise: a p of 0.05 is then known to within 0.002."""

MOST_ENUMERATED = 12
"""Up to so many groups that tell the models apart, all exchanges are counted instead of some drawn."""


@dataclass(frozen=True)
class Difference(Estimate):
    """A difference between two models on the same images, first minus second, with its interval.

    Attributes:
        standard_error: Of the difference, linearised, with whole groups drawn; NaN for a single group, 0 where nothing
            varied.
        p_value: Two-sided, of no difference, in (0, 1]; NaN where the difference is undefined.
    """

    standard_error: float
    p_value: float


@dataclass(frozen=True)
class PairedDifferences:
    """Differences of the indices of all classes together; see `OverallIndices` for what they are."""

    accuracy: Difference
    balanced_accuracy: Difference
    macro_precision: Difference
    macro_f1: Difference
    cohen_kappa: Difference
    mcc: Difference


def delong_test(first: Predictions, second: Predictions, *, class_name: str, confidence: float = 0.95) -> Difference:
    """Compute the difference of two one-vs-rest AUROCs on the same images (DeLong 1988; in groups Obuchowski 1997).

    p is of Student's t, with Welch's degrees of freedom for positives and negatives and Satterthwaite's of the groups
    of each: where few patients are positive there is little to tell from, however many are not.

    Args:
        first: One model's predictions.
        second: The other's, about the same images.
        class_name: The class to rank above the rest.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The difference with its interval and p. Undefined if the class, or the rest, has no images. Where the variance
        of the difference can't be told (nothing varied, one patient holds all positives) p is that of the interval.

    Raises:
        ValueError: If the two are not about the same images, or do not know the class.

    Example:
        >>> names, truth = np.array(list("abcdef")), np.array([0, 0, 0, 1, 1, 1])
        >>> def said(chance):
        ...     return Predictions(names, names, truth, np.column_stack([chance, 1 - chance]), ("x", "y"))
        >>> one = said(np.array([0.9, 0.8, 0.3, 0.5, 0.2, 0.1]))
        >>> two = said(np.array([0.9, 0.2, 0.6, 0.5, 0.7, 0.1]))
        >>> round(delong_test(one, two, class_name="x").value, 3)
        0.222
    """
    check_confidence(confidence)
    other = aligned(first, second)
    if class_name not in first.class_names:
        raise ValueError(f'no class "{class_name}"; there are {list(first.class_names)}')
    column = first.class_names.index(class_name)
    positive = first.true == column
    if positive.all() or not positive.any():
        reason = auroc(positive, first.probabilities[:, column]).reason
        return Difference(math.nan, math.nan, math.nan, math.nan, math.nan, reason=reason)
    codes = group_codes(first.group, length=len(first.true))
    scores = [model.probabilities[:, column] for model in (first, other)]
    areas = [auroc(positive, score, codes, confidence=confidence) for score in scores]
    placements = [compute_placements(positive, score) for score in scores]
    apart = estimate_area_variance(positive, placements[0] - placements[1], codes)
    value, error = areas[0].value - areas[1].value, math.sqrt(apart.variance)
    own = [area.standard_error**2 for area in areas]
    shared = (sum(own) - apart.variance) / 2
    low, high = _combine_intervals(
        areas[0], areas[1], np.array([[own[0], shared], [shared, own[1]]]), confidence=confidence
    )
    if abs(value) < 1e-12 and not error > 1e-9:
        p_value = 1.0
    elif error > 1e-9:
        p_value = two_sided_p(value / error, freedom=apart.freedom)
    else:
        # Nothing varied, or one patient holds a kind: p is the one that fits the interval.
        reach = (value - low if value > 0 else high - value) / quantile(confidence)
        p_value = two_sided_p(value / reach)
    return Difference(value, low, high, error, p_value)


def paired_differences(
    first: Predictions,
    second: Predictions,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> PairedDifferences:
    """Compute differences of accuracy, macro F1 and their like between two models.

    If two models are equally good, exchanging their answers on all images of a group changes nothing that matters. p is
    the share of such exchanges, of all groups at random, with a difference as large as the one seen: the method of
    `mcnemar`, for any index. That of accuracy is the exact one of `mcnemar`. An interval and a p come by different
    ways and may, close to the level, disagree.

    Args:
        first: One model's predictions.
        second: The other's, about the same images.
        seed: The same seed gives the same p.
        resamples: How many random exchanges to draw, where there are too many to count them all.
        confidence: Coverage of the intervals, in (0, 1).

    Returns:
        Differences, first minus second; undefined for an index that is undefined for one of the models.

    Raises:
        ValueError: If the two are not about the same images, or resamples is below 1.

    Example:
        >>> names, truth = np.array([f"image {i}" for i in range(40)]), np.arange(40) % 2
        >>> half_right = np.eye(2)[np.where(np.arange(40) < 20, truth, 1 - truth)]
        >>> perfect = Predictions(names, names, truth, np.eye(2)[truth], ("x", "y"))
        >>> other = Predictions(names, names, truth, half_right, ("x", "y"))
        >>> found = paired_differences(perfect, other, seed=0).macro_f1
        >>> found.value, found.low > 0, found.p_value < 0.001
        (0.5, True, True)
    """
    check_confidence(confidence)
    other, classes = aligned(first, second), first.classes
    codes = group_codes(first.group, length=len(first.true))
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; expected at least 1")
    cells = (first.true * classes + first.predicted) * classes + other.predicted

    def compute_both(tables: NDArray[np.float64]) -> NDArray[np.float64]:
        cube = tables.reshape(-1, classes, classes, classes)  # truth, the first's answer, the second's
        models = [overall_indices(cube.sum(axis=axis)) for axis in (3, 2)]
        return np.column_stack([getattr(model, name) for name in INDICES for model in models])

    spread = linearise_indices(count_by_group(codes, cells), compute_both, width=classes**3).covariance
    p_values = _exchange(first, other, codes, seed=seed, resamples=resamples)
    p_values["accuracy"] = mcnemar(first, other).p_value
    estimates = [estimate_overall(model, confidence=confidence) for model in (first, other)]
    found = {}
    for place, name in enumerate(INDICES):
        one, two = (each[name] for each in estimates)
        pair = spread[2 * place : 2 * place + 2, 2 * place : 2 * place + 2]
        error = float(np.sqrt(np.maximum(pair[0, 0] + pair[1, 1] - 2 * pair[0, 1], 0.0)))
        low, high = _combine_intervals(one, two, pair, confidence=confidence)
        p_value = p_values[name] if one.defined and two.defined else math.nan
        found[name] = Difference(one.value - two.value, low, high, error, p_value, reason=one.reason or two.reason)
    return PairedDifferences(**found)


def _combine_intervals(
    first: Estimate, second: Estimate, spread: NDArray[np.float64], *, confidence: float
) -> tuple[float, float]:
    """Combine two intervals to that of the difference, first minus second (MOVER).

    Args:
        first: The one estimate.
        second: The other.
        spread: Covariance of the two, of shape (2, 2), NaN where it can't be told.
        confidence: Coverage of both intervals, in (0, 1).
    """
    value = first.value - second.value
    errors = quantile(confidence) * np.sqrt(np.maximum(np.diagonal(spread), 0.0))
    halves = np.array([first.high - first.low, second.high - second.low]) / 2
    correlation = 0.0
    if (errors > 0).all() and (halves > 0).all():
        # A class without a mistake makes both intervals wider and adds nothing to what the two are seen to share, so
        # the correlation counts for as much of the width as the standard errors explain.
        explained = min(1.0, float(np.sqrt(np.prod(errors / halves))))
        correlation = explained * float(np.clip(spread[0, 1] / np.sqrt(spread[0, 0] * spread[1, 1]), -1, 1))

    def reach(one: float, two: float) -> float:
        return math.sqrt(max(0.0, one**2 + two**2 - 2 * correlation * one * two))

    below = reach(first.value - first.low, second.high - second.value)
    above = reach(first.high - first.value, second.value - second.low)
    return value - below, value + above


def _exchange(
    first: Predictions, second: Predictions, codes: NDArray[np.int64], *, seed: int, resamples: int
) -> dict[str, float]:
    """Compute p of each index by exchanging the two models' answers on whole groups, at random.

    Groups whose exchange changes the tables in the same way are drawn together, as a binomial number.
    """
    classes = first.classes
    width = classes**2
    answers = [first.true * classes + model.predicted for model in (first, second)]
    groups = int(codes.max()) + 1
    apart = np.unique(codes[answers[0] != answers[1]])
    if not len(apart):
        return dict.fromkeys(INDICES, 1.0)
    place = np.full(groups, -1)
    place[apart] = np.arange(len(apart))
    inside = place[codes] >= 0
    rows = np.tile(place[codes[inside]], 2)
    columns = np.concatenate([answer[inside] for answer in answers])
    signs = np.repeat([-1.0, 1.0], int(inside.sum()))
    moved = sparse.csr_array((signs, (rows, columns)), shape=(len(apart), width))
    if len(apart) <= MOST_ENUMERATED:
        drawn = (np.arange(2 ** len(apart))[:, None] >> np.arange(len(apart))) & 1
        shift = drawn @ moved
    else:
        alike, count = _unite_rows(moved)
        generator = np.random.default_rng(seed)
        batch = max(1, 10 * BATCH_NUMBERS // len(count))
        sizes = [min(batch, resamples - start) for start in range(0, resamples, batch)]
        shift = np.concatenate([generator.binomial(count, 0.5, size=(size, len(count))) @ alike for size in sizes])
    tables = [np.bincount(answer, minlength=width).astype(np.float64) for answer in answers]

    def compute_differences(change: NDArray[np.float64]) -> NDArray[np.float64]:
        ours, theirs = (
            overall_indices((table + sign * change).reshape(-1, classes, classes))
            for table, sign in zip(tables, (1.0, -1.0), strict=True)
        )
        return np.column_stack([getattr(ours, name) - getattr(theirs, name) for name in INDICES])

    observed = np.abs(compute_differences(np.zeros((1, width)))[0])
    exchanged = np.abs(compute_differences(shift))
    # An exchange that leaves an index undefined counts as one at least as large; rounding must not tell equals apart.
    reached = (~(exchanged < observed - 1e-12)).sum(axis=0)
    # Where only some are drawn, what was seen is one of them (Phipson and Smyth 2010).
    itself = 0 if len(apart) <= MOST_ENUMERATED else 1
    p_values = (reached + itself) / (len(shift) + itself)
    return {name: float(p) for name, p in zip(INDICES, p_values, strict=True)}


def _unite_rows(table: sparse.csr_array) -> tuple[sparse.csr_array, NDArray[np.int64]]:
    """Return the different rows of a table, in a fixed order, and how often each comes."""
    table.sum_duplicates()
    table.eliminate_zeros()
    first: dict[bytes, int] = {}
    counts: dict[bytes, int] = {}
    for row in range(table.shape[0]):
        here = slice(table.indptr[row], table.indptr[row + 1])
        key = table.indices[here].astype(">i8").tobytes() + table.data[here].tobytes()
        first.setdefault(key, row)
        counts[key] = counts.get(key, 0) + 1
    keys = sorted(first)
    return table[[first[key] for key in keys]], np.array([counts[key] for key in keys], dtype=np.int64)


def difference_of_independent(first: Estimate, second: Estimate) -> Estimate:
    """Difference of two estimates that share no image, first minus second.

    The interval is put together from the two intervals (MOVER, Zou and Donner, Stat Med 2008;27:1693); from
    two Wilson intervals it is Newcombe's (Stat Med 1998;17:873, method 10). It has the confidence that both
    have.

    Args:
        first: One estimate with its interval: a proportion, a macro F1, an area.
        second: The other's, of the same index and with the same confidence, from other images.

    Returns:
        The difference; nan if a value is undefined, with a nan interval if an interval is.

    Example:
        >>> from pylorus.evaluation.proportion import wilson
        >>> found = difference_of_independent(wilson(409, 450), wilson(401, 450))
        >>> round(found.value, 4), round(found.low, 4), round(found.high, 4)
        (0.0178, -0.0217, 0.0575)
    """
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, low, high, reason=first.reason or second.reason)
