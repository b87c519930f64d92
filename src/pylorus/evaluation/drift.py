"""Compare periods of use with a reference: control limits for proportions and scores that know the reference's size.

A reference of n images is itself uncertain, so a limit of plus or minus so many standard errors around its value is too
narrow. Here the reference is a second sample: proportions are compared by the conditional (hypergeometric) test with
the mid-p correction (Lancaster 1961), scores by Wilcoxon's rank-sum test on the classes of a histogram. Images of one
patient resemble each other; both samples therefore count as their number divided by a design effect, which follows from
the correlation within the reference's patients (Eldridge, Ashby and Kerry, Int J Epidemiol 2006;35:1292). Few patients
leave that correlation uncertain: the numbers are then reduced further by the ratio of the normal to the t quantile,
squared (Korn and Graubard, Survey Methodology 1998;24:193).

A small change that lasts shows in the average of several periods, exponentially weighted (EWMA; Roberts, Technometrics
1959;1:239). It is compared with the reference by the same tests, as a sample of its effective size (Kish).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from pylorus.evaluation.influence import estimate_correlation
from pylorus.evaluation.predictions import encode_groups

MAX_BINS, IMAGES_PER_BIN = 20, 5
"""The most classes of a histogram of scores, and the fewest reference images in one of them."""
ROUNDING = 1e-9
"""Scores that never vary have limits of width 0, which rounding must not exceed."""
COUNTS_AT_ONCE = 32
"""Number of counts whose tails are computed at once: a call of SciPy takes longer than a count."""


@dataclass(frozen=True)
class RateReference:
    """A proportion of the reference images.

    Attributes:
        images: Number of reference images.
        count: How many of them have the property.
        effective: To how many independent images they amount, in [1, images].
        correlation: Intraclass correlation of the property within patients, in [0, 1].
    """

    images: int
    count: int
    effective: float
    correlation: float

    @property
    def value(self) -> float:
        """The proportion, in [0, 1]."""
        return self.count / self.images


@dataclass(frozen=True)
class ScoreReference:
    """The distribution of a score among the reference images, as a histogram.

    Attributes:
        cuts: Limits between the classes of the histogram, ascending; a score equal to a limit is below it.
        counts: Number of images in each class, one more than there are limits.
        effective: To how many independent images they amount.
        correlation: Intraclass correlation of the score's rank within patients, in [0, 1].
        median: The median score.
    """

    cuts: tuple[float, ...]
    counts: tuple[int, ...]
    effective: float
    correlation: float
    median: float

    @property
    def images(self) -> int:
        """Number of reference images."""
        return sum(self.counts)


@dataclass(frozen=True)
class Drift:
    """A period compared with the reference.

    Attributes:
        value: The period's proportion; of a score, the proportion of pairs of an image of the period and a reference
            image in which the former's score is higher (ties count half): 0.5 without drift.
        reference: The reference's proportion; 0.5 for a score.
        low: Lower control limit of the value.
        high: Upper control limit.
        p: Two-sided p-value.
        is_beyond: Whether the value is beyond a limit.
    """

    value: float
    reference: float
    low: float
    high: float
    p: float
    is_beyond: bool


@dataclass(frozen=True)
class Sample:
    """Images of a period, or of several, to compare with a reference.

    Attributes:
        shares: Proportions of the images with sum 1: without and with a property; of a score, in each class of the
            reference's histogram.
        effective: To how many independent images they amount.
    """

    shares: tuple[float, ...]
    effective: float


def build_rate_reference(flags: NDArray[np.bool_], groups: NDArray[np.generic] | None = None) -> RateReference:
    """Measure the reference proportion of a property.

    Args:
        flags: Whether each reference image has the property, of shape (n,), n >= 1.
        groups: The patient of each image, of shape (n,); None if each image is its own.

    Example:
        >>> build_rate_reference(np.array([True, False, False, False])).value
        0.25
    """
    correlation, effect = measure_correlation(flags.astype(np.float64), groups)
    return RateReference(len(flags), int(flags.sum()), max(1.0, len(flags) / effect), correlation)


def build_score_reference(scores: NDArray[np.float64], groups: NDArray[np.generic] | None = None) -> ScoreReference:
    """Summarize the reference distribution of a score in classes of about equal size.

    Args:
        scores: Score of each reference image, of shape (n,), n >= 1, finite.
        groups: The patient of each image, of shape (n,); None if each image is its own.

    Example:
        >>> build_score_reference(np.arange(20.0)).counts
        (5, 5, 5, 5)
    """
    bins = max(2, min(MAX_BINS, len(scores) // IMAGES_PER_BIN))
    cuts = np.unique(np.quantile(scores, np.arange(1, bins) / bins))
    codes = np.searchsorted(cuts, scores, side="left")
    shares = np.bincount(codes) / len(scores)
    ranks = (np.cumsum(shares) - shares / 2)[codes]
    correlation, effect = measure_correlation(ranks, groups)
    return ScoreReference(
        tuple(map(float, cuts)),
        tuple(int(count) for count in np.bincount(codes, minlength=len(cuts) + 1)),
        max(1.0, len(scores) / effect),
        correlation,
        float(np.median(scores)),
    )


def summarize_rate(
    flags: NDArray[np.bool_], reference: RateReference, groups: NDArray[np.generic] | None = None
) -> Sample:
    """Summarize a property of a period's images.

    Args:
        flags: Whether each image of the period has the property, of shape (n,), n >= 1.
        reference: The reference, which tells how much images of one patient resemble each other.
        groups: The patient of each image, of shape (n,); None if unknown: as many images per patient as in the
            reference are then assumed.
    """
    value = float(flags.mean())
    return Sample((1 - value, value), _count_effective(len(flags), reference, groups))


def summarize_score(
    scores: NDArray[np.float64], reference: ScoreReference, groups: NDArray[np.generic] | None = None
) -> Sample:
    """Summarize a score of a period's images in the classes of the reference's histogram.

    Args:
        scores: Score of each image of the period, of shape (n,), n >= 1, finite.
        reference: The reference.
        groups: As in `summarize_rate`.
    """
    codes = np.searchsorted(np.asarray(reference.cuts), scores, side="left")
    shares = np.bincount(codes, minlength=len(reference.counts)) / len(scores)
    return Sample(tuple(map(float, shares)), _count_effective(len(scores), reference, groups))


def accumulate_samples(samples: Sequence[Sample], *, decay: float) -> Sample:
    """Average the samples of successive periods, the last one with the greatest weight.

    Patients that are in several periods count as different ones.

    Args:
        samples: Of the periods, in the order of time, at least one.
        decay: How much an image counts relative to one of the next period, in [0, 1].

    Example:
        >>> average = accumulate_samples([Sample((0.5, 0.5), 100.0), Sample((0.7, 0.3), 100.0)], decay=0.5)
        >>> (round(average.shares[1], 3), round(average.effective))
        (0.367, 180)
    """
    sizes = np.array([sample.effective for sample in samples])
    factors = decay ** np.arange(len(samples) - 1, -1, -1, dtype=np.float64)
    weights = sizes * factors
    shares = weights @ np.array([sample.shares for sample in samples]) / weights.sum()
    return Sample(tuple(map(float, shares)), float(weights.sum() ** 2 / (weights * factors).sum()))


def compare_sample(
    sample: Sample, reference: RateReference | ScoreReference, *, false_alarms: float, patients: int | None = None
) -> Drift:
    """Compare a period, or an average of periods, with the reference.

    Args:
        sample: From `summarize_rate` or `summarize_score` with this reference, or from `accumulate_samples`.
        reference: The reference.
        false_alarms: Probability that a sample without drift is beyond a limit, in (0, 1).
        patients: Number of patients of the reference, from which the correlation within patients was estimated; None
            if each image is its own patient.
    """
    factor = 1.0
    if patients is not None:
        freedom = max(1, patients - 1)
        factor = float(special.ndtri(false_alarms / 2) / special.stdtrit(freedom, false_alarms / 2)) ** 2
    size, other = (max(1.0, factor * number) for number in (sample.effective, reference.effective))
    if isinstance(reference, RateReference):
        return _compare_rate(sample.shares[1], size, reference.value, other, false_alarms)
    theirs = np.asarray(reference.counts, dtype=np.float64) / reference.images
    return _compare_score(np.array(sample.shares), size, theirs, other, false_alarms)


def _compare_rate(value: float, period_size: float, known_value: float, known_size: float, level: float) -> Drift:
    """Compare two proportions; the limits are those at which the conditional test, with mid-p, rejects equality.

    Both samples enter with their effective sizes, rounded down to whole images.
    """
    size, reference_size = int(period_size + 1e-9), int(known_size + 1e-9)
    tails = _ConditionalTails(round(known_value * reference_size), reference_size, size)
    high = _find_first(size, lambda counts: tails.compute_above(counts) <= level / 2) - 1
    low = _find_first(size, lambda counts: tails.compute_above(counts) < 1 - level / 2)
    count = value * size
    upper, lower = min(size, math.ceil(count - 1e-9)), max(0, math.floor(count + 1e-9))
    above = tails.compute_above(np.array([upper, lower]))
    p = float(min(1.0, 2 * min(above[0], 1 - above[1])))
    is_beyond = count > high + 1e-9 or count < low - 1e-9
    return Drift(value, known_value, low / size, high / size, p, is_beyond)


def _compare_score(
    own: NDArray[np.float64], size: float, theirs: NDArray[np.float64], other: float, level: float
) -> Drift:
    """Compare two distributions over the same classes by Wilcoxon's rank-sum test."""
    value = float((own * (np.cumsum(theirs) - theirs / 2)).sum())
    pooled = (size * own + other * theirs) / (size + other)
    variance = (size + other + 1) / (12 * size * other) * max(0.0, 1 - float((pooled**3).sum()))
    error = math.sqrt(variance)
    reach = -float(special.ndtri(level / 2)) * error
    p = 1.0 if error < ROUNDING else float(2 * special.ndtr(-abs(value - 0.5) / error))
    return Drift(value, 0.5, max(0.0, 0.5 - reach), min(1.0, 0.5 + reach), p, abs(value - 0.5) > reach + ROUNDING)


def compare_rate(
    flags: NDArray[np.bool_],
    reference: RateReference,
    groups: NDArray[np.generic] | None = None,
    *,
    false_alarms: float,
    patients: int | None = None,
) -> Drift:
    """Compare a period's proportion with the reference's; see `summarize_rate` and `compare_sample`.

    Example:
        >>> reference = RateReference(images=200, count=20, effective=200.0, correlation=0.0)
        >>> drift = compare_rate(np.arange(100) < 30, reference, false_alarms=0.01)
        >>> (round(drift.low, 2), round(drift.high, 2), drift.is_beyond)
        (0.03, 0.21, True)
    """
    sample = summarize_rate(flags, reference, groups)
    return compare_sample(sample, reference, false_alarms=false_alarms, patients=patients)


def compare_score(
    scores: NDArray[np.float64],
    reference: ScoreReference,
    groups: NDArray[np.generic] | None = None,
    *,
    false_alarms: float,
    patients: int | None = None,
) -> Drift:
    """Compare a period's scores with the reference's; see `summarize_score` and `compare_sample`.

    Example:
        >>> reference = build_score_reference(np.arange(100.0))
        >>> drift = compare_score(np.arange(100.0) + 30, reference, false_alarms=0.01)
        >>> (round(drift.value, 2), round(drift.high, 2), drift.is_beyond)
        (0.75, 0.6, True)
    """
    sample = summarize_score(scores, reference, groups)
    return compare_sample(sample, reference, false_alarms=false_alarms, patients=patients)


@dataclass(frozen=True)
class _ConditionalTails:
    """Where a period's count lies in its distribution, given the total of both samples.

    Attributes:
        known: Images with the property in the reference.
        reference: Number of images of the reference.
        period: Number of images of the period.
    """

    known: int
    reference: int
    period: int

    def compute_above(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the probability of a larger count than each of these, plus half of that of this one."""
        from scipy.stats import hypergeom  # slow to import, and whoever loads a bundle imports this module

        parameters = (self.reference + self.period, counts + self.known, self.period)
        tails: NDArray[np.float64] = hypergeom.sf(counts, *parameters) + hypergeom.pmf(counts, *parameters) / 2
        return tails


def _find_first(size: int, condition: Callable[[NDArray[np.int64]], NDArray[np.bool_]]) -> int:
    """Return the first count in 0 to `size` that meets a condition, which all later ones meet; otherwise size + 1."""
    low, high = 0, size + 1
    while low < high:
        counts = np.unique(np.linspace(low, high - 1, COUNTS_AT_ONCE).astype(np.int64))
        is_met = condition(counts)
        first = int(is_met.argmax()) if is_met.any() else len(counts)
        high = int(counts[first]) if first < len(counts) else high
        low = int(counts[first - 1]) + 1 if first else low
    return low


def measure_correlation(values: NDArray[np.float64], groups: NDArray[np.generic] | None) -> tuple[float, float]:
    """Measure by how much images of the same patients are fewer independent ones.

    Args:
        values: Value of each image, of shape (n,), finite.
        groups: The patient of each image, of shape (n,); None if each image is its own.

    Returns:
        The correlation within patients, in [0, 1], by a one-way analysis of variance; 1 if the values do not vary, or
        there is one patient, so that it is unknown. And the design effect, >= 1, that follows from it.
    """
    codes = encode_groups(groups, length=len(values))
    sizes = np.bincount(codes).astype(np.float64)
    typical = float((sizes**2).sum() / sizes.sum())
    deviations = values - values.mean()
    totals = np.asarray(np.bincount(codes, weights=deviations), dtype=np.float64)
    correlation = estimate_correlation(totals, sizes, float((deviations**2).sum()))
    return correlation, 1 + (typical - 1) * correlation


def _count_effective(
    images: int, reference: RateReference | ScoreReference, groups: NDArray[np.generic] | None
) -> float:
    """Return to how many independent images the images of a period amount."""
    if groups is None:
        return images * reference.effective / reference.images
    sizes = np.bincount(encode_groups(groups, length=images)).astype(np.float64)
    typical = float((sizes**2).sum() / sizes.sum())
    return images / (1 + (typical - 1) * reference.correlation)
