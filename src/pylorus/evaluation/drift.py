"""Compare periods of use with a reference: control limits for proportions and scores that know the reference's size.

A reference of n images is itself uncertain, so a limit of plus or minus so many standard errors around its value is too
narrow. Here the reference is a second sample: proportions are compared by the conditional (hypergeometric) test with
the mid-p correction (Lancaster 1961), scores by Wilcoxon's rank-sum test on the classes of a histogram. Images of one
patient resemble each other; both samples therefore count as their number divided by a design effect, which follows from
the correlation within the reference's patients (Eldridge, Ashby and Kerry, Int J Epidemiol 2006;35:1292).
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from pylorus.evaluation.influence import estimate_correlation
from pylorus.evaluation.predictions import encode_groups

MAX_BINS, IMAGES_PER_BIN = 20, 5
"""The most classes of a histogram of scores, and the fewest reference images in one of them."""


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


def compare_rate(
    flags: NDArray[np.bool_],
    reference: RateReference,
    groups: NDArray[np.generic] | None = None,
    *,
    false_alarms: float,
) -> Drift:
    """Compare a period's proportion with the reference's.

    The limits are the proportions at which the two-sided conditional test, with mid-p, rejects equality. Both samples
    enter with their effective sizes, rounded down to whole images.

    Args:
        flags: Whether each image of the period has the property, of shape (n,), n >= 1.
        reference: The reference.
        groups: The patient of each image, of shape (n,); None if each image is its own.
        false_alarms: Probability that a period without drift is beyond a limit, in (0, 1).

    Example:
        >>> reference = RateReference(images=200, count=20, effective=200.0, correlation=0.0)
        >>> drift = compare_rate(np.arange(100) < 30, reference, false_alarms=0.01)
        >>> (round(drift.low, 2), round(drift.high, 2), drift.is_beyond)
        (0.03, 0.21, True)
    """
    value = float(flags.mean())
    size = max(1, int(_count_effective(len(flags), reference.correlation, groups) + 1e-9))
    reference_size = max(1, int(reference.effective + 1e-9))
    known = round(reference.value * reference_size)
    tails = _ConditionalTails(known, reference_size, size)
    # Both tails are monotonic in the count, so that the limits are found by bisection.
    high = bisect_left(range(size + 1), True, key=lambda count: tails.compute_above(count) <= false_alarms / 2) - 1
    low = bisect_left(range(size + 1), True, key=lambda count: tails.compute_below(count) > false_alarms / 2)
    count = value * size
    upper, lower = min(size, math.ceil(count - 1e-9)), max(0, math.floor(count + 1e-9))
    p = min(1.0, 2 * min(tails.compute_above(upper), tails.compute_below(lower)))
    is_beyond = count > high + 1e-9 or count < low - 1e-9
    return Drift(value, reference.value, low / size, high / size, p, is_beyond)


def compare_score(
    scores: NDArray[np.float64],
    reference: ScoreReference,
    groups: NDArray[np.generic] | None = None,
    *,
    false_alarms: float,
) -> Drift:
    """Compare a period's scores with the reference's by Wilcoxon's rank-sum test on the classes of the histogram.

    Args:
        scores: Score of each image of the period, of shape (n,), n >= 1, finite.
        reference: The reference.
        groups: The patient of each image, of shape (n,); None if each image is its own.
        false_alarms: Probability that a period without drift is beyond a limit, in (0, 1).

    Example:
        >>> reference = build_score_reference(np.arange(100.0))
        >>> drift = compare_score(np.arange(100.0) + 30, reference, false_alarms=0.01)
        >>> (round(drift.value, 2), round(drift.high, 2), drift.is_beyond)
        (0.75, 0.6, True)
    """
    codes = np.searchsorted(np.asarray(reference.cuts), scores, side="left")
    own = np.bincount(codes, minlength=len(reference.counts)) / len(scores)
    theirs = np.asarray(reference.counts, dtype=np.float64) / reference.images
    value = float((own * (np.cumsum(theirs) - theirs / 2)).sum())
    size, other = _count_effective(len(scores), reference.correlation, groups), reference.effective
    pooled = (size * own + other * theirs) / (size + other)
    variance = (size + other + 1) / (12 * size * other) * max(0.0, 1 - float((pooled**3).sum()))
    error = math.sqrt(variance)
    reach = -float(special.ndtri(false_alarms / 2)) * error
    p = 1.0 if error == 0 else float(2 * special.ndtr(-abs(value - 0.5) / error))
    return Drift(value, 0.5, max(0.0, 0.5 - reach), min(1.0, 0.5 + reach), p, abs(value - 0.5) > reach)


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

    def compute_above(self, count: int) -> float:
        """Return the probability of a larger count, plus half of that of this one."""
        from scipy.stats import hypergeom  # slow to import, and whoever loads a bundle imports this module

        parameters = (self.reference + self.period, count + self.known, self.period)
        return float(hypergeom.sf(count, *parameters) + hypergeom.pmf(count, *parameters) / 2)

    def compute_below(self, count: int) -> float:
        """Return the probability of a smaller count, plus half of that of this one."""
        return 1 - self.compute_above(count)


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


def _count_effective(images: int, correlation: float, groups: NDArray[np.generic] | None) -> float:
    """Return to how many independent images the images of a period amount."""
    if groups is None:
        return float(images)
    sizes = np.bincount(encode_groups(groups, length=images)).astype(np.float64)
    typical = float((sizes**2).sum() / sizes.sum())
    return images / (1 + (typical - 1) * correlation)
