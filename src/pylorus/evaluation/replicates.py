"""Replicates of a configuration (seeds, folds, repeated splits) and the comparison of two configurations.

A trained model is one sample from its configuration: another seed or another training set gives another model. A claim
about a configuration has to allow for that variation as well as for the sample of tested patients.

* Several seeds on one set of test images correspond to several readers in a reader study: `compare_replicates` uses
  the variance of Obuchowski and Rockette (Commun. Stat. Simul. Comput. 1995;24:285) with readers nested in the
  configuration (Hillis, Stat. Med. 2014;33:330), or crossed with it if replicates are paired, and Satterthwaite's
  degrees of freedom.
* Folds and repeated splits each have their own test images, and overlapping training sets: `corrected_resampled_t`
  uses the variance of Nadeau and Bengio (Mach. Learn. 2003;52:239).
* `sign_flip_test` allows for patients only and is exact for the models as they were trained.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from pylorus.evaluation.comparison import INDICES, Difference
from pylorus.evaluation.confusion import overall_indices
from pylorus.evaluation.intervals import (
    ONE_GROUP,
    Estimate,
    check_confidence,
    compute_quantile,
    compute_satterthwaite_freedom,
    compute_two_sided_p,
    compute_wilson_ends,
)
from pylorus.evaluation.predictions import check_labels, encode_groups

NOTHING_VARIES = "neither patients nor replicates vary"
UNDEFINED = "the index is undefined for a replicate, or without one of the groups"


@dataclass(frozen=True)
class ReplicateSummary:
    """One index over the replicates of a configuration.

    Attributes:
        mean: Mean over the replicates; NaN if the index is undefined for one of them.
        deviation: Standard deviation with denominator n - 1; NaN for a single replicate.
        lowest: Lowest value of a replicate.
        highest: Highest value of a replicate.
        replicates: Number of replicates.
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
        allows_for_training: Whether interval and p allow for another seed or training set, not only for patients; for
            one of the configurations only, if the other has a single replicate.
    """

    allows_for_training: bool


@dataclass(frozen=True, eq=False)
class ReplicateIndices:
    """Indices of several replicates on the same images, and their variation with the patients.

    Attributes:
        values: The indices, of shape (replicates, indices), in the order of `pylorus.evaluation.comparison.INDICES`.
        deviations: Change of each index if one group is left out, minus the mean change, of shape (indices,
            replicates, groups); NaN if the index is undefined without one of the groups.
    """

    values: NDArray[np.float64]
    deviations: NDArray[np.float64]

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Covariance of the replicates for each index, of shape (indices, replicates, replicates)."""
        groups = self.deviations.shape[2]
        table: NDArray[np.float64] = (groups - 1) / groups * np.einsum("iag,ibg->iab", self.deviations, self.deviations)
        return table

    def count_freedom(self, index: int, contrast: NDArray[np.float64]) -> float:
        """Compute the degrees of freedom, at least 1, of the variance of a contrast of one index over the replicates.

        Args:
            index: Position of the index in `INDICES`.
            contrast: Weight of each replicate, of shape (replicates,).
        """
        changes = contrast @ self.deviations[index]
        if np.isnan(changes).any() or not (np.abs(changes) > 1e-12).any():
            return 1.0
        return max(1.0, compute_satterthwaite_freedom(changes))


def summarize_replicates(values: NDArray[np.float64]) -> ReplicateSummary:
    """Compute mean, standard deviation and range of one index over replicates.

    Args:
        values: Value of each replicate, of shape (replicates,), at least one; NaN where undefined.

    Raises:
        ValueError: If there are none.

    Example:
        >>> summary = summarize_replicates(np.array([0.8, 0.9, 0.85]))
        >>> round(summary.mean, 3), round(summary.deviation, 3), summary.lowest, summary.highest
        (0.85, 0.05, 0.8, 0.9)
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 1 or not len(table):
        raise ValueError(f"values have shape {table.shape}; expected (replicates,), with at least one")
    if np.isnan(table).any():
        return ReplicateSummary(math.nan, math.nan, math.nan, math.nan, len(table))
    deviation = float(table.std(ddof=1)) if len(table) > 1 else math.nan
    return ReplicateSummary(float(table.mean()), deviation, float(table.min()), float(table.max()), len(table))


def compute_replicate_balance(
    first: NDArray[np.bool_], second: NDArray[np.bool_], groups: NDArray[np.generic] | None
) -> NDArray[np.int64]:
    """Compute the balance of each group between two configurations, in whole numbers for `sign_flip_test`.

    Args:
        first: Whether each replicate of the first classifies each image correctly, of shape (first replicates, n).
        second: The same for the second configuration, of shape (second replicates, n).
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.

    Returns:
        Difference in correctly classified images between the mean replicates, multiplied by both numbers of
        replicates, of shape (groups,).

    Raises:
        ValueError: If the numbers of images differ.

    Example:
        >>> one, two = np.array([[True, True], [True, False]]), np.array([[False, False]])
        >>> compute_replicate_balance(one, two, np.array(["a", "b"])).tolist()
        [2, 1]
    """
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"found {first.shape[1]} images for the first and {second.shape[1]} for the second; expected the same"
        )
    lead = first.sum(axis=0).astype(np.int64) * len(second) - second.sum(axis=0).astype(np.int64) * len(first)
    codes = encode_groups(groups, length=len(lead))
    return np.rint(np.bincount(codes, weights=lead)).astype(np.int64)


def compute_replicate_indices(
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    groups: NDArray[np.generic] | None,
    *,
    classes: int,
) -> ReplicateIndices:
    """Compute the overall indices of several replicates on the same images, with their covariance.

    The covariance comes from the jackknife that leaves out one group after the other (the pseudovalues of Dorfman,
    Berbaum and Metz, Invest. Radiol. 1992;27:723).

    Args:
        true: True classes of shape (n,), whole numbers in [0, classes).
        predicted: Predicted classes of each replicate, of shape (replicates, n).
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        classes: Number of classes.

    Raises:
        ValueError: If the shapes differ or a label is out of range.

    Example:
        >>> truth, predictions = np.array([0, 0, 1, 1]), np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
        >>> indices = compute_replicate_indices(truth, predictions, None, classes=2)
        >>> indices.values[:, 0].tolist(), indices.covariance[0].round(4).tolist()
        ([1.0, 0.75], [[0.0, 0.0], [0.0, 0.0625]])
    """
    truth = check_labels(true, classes, name="true")
    predictions = np.atleast_2d(predicted)
    if predictions.shape[1] != len(truth):
        raise ValueError(f"found {len(truth)} true and {predictions.shape[1]} predicted labels; expected equally many")
    codes = encode_groups(groups, length=len(truth))
    count = int(codes.max()) + 1
    values, left_out = [], []
    for row in predictions:
        cells = (codes * classes + truth) * classes + check_labels(row, classes, name="predicted")
        tables = np.bincount(cells, minlength=count * classes**2).reshape(count, classes, classes)
        total = tables.sum(axis=0)
        values.append(_compute_indices(total))
        left_out.append(_compute_indices(total - tables) if count > 1 else np.full((1, len(INDICES)), math.nan))
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
    """Compare the means of two configurations whose replicates were tested on the same images.

    The variance is that of patients plus the additional variance of seeds (Obuchowski and Rockette 1995, readers nested
    as in Hillis 2014); it is never below that of patients alone. It can't include the seeds of a configuration with a
    single replicate.

    Args:
        first: An index of each replicate of the first configuration, of shape (first replicates,).
        second: The same index of the second configuration, of shape (second replicates,).
        covariance: Covariance of the values due to the patients, of shape (all replicates, all replicates), those of
            the first before those of the second.
        degrees: Degrees of freedom of the covariance, > 0.
        allow_for_seeds: False treats the replicates as fixed, and only patients as random.
        paired: Whether the n-th replicates of both belong together, like two stages of one run.
        bounds: Least and greatest possible difference.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        First minus second; without an interval, and with a p of NaN, if the covariance is undefined.

    Raises:
        ValueError: If there are no replicates, the covariance has another shape, or the numbers of paired replicates
            differ.

    Example:
        >>> covariance = np.full((6, 6), 4e-4) + np.diag([1e-4] * 6)
        >>> one, two = np.array([0.90, 0.92, 0.94]), np.array([0.80, 0.82, 0.84])
        >>> difference = compare_replicates(one, two, covariance, degrees=60)
        >>> round(difference.value, 3), difference.low > 0, difference.allows_for_training
        (0.1, True, True)
    """
    check_confidence(confidence)
    ours, theirs = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    size = len(ours) + len(theirs)
    if not len(ours) or not len(theirs) or covariance.shape != (size, size):
        raise ValueError(
            f"found {len(ours)} and {len(theirs)} replicates with a covariance of shape {covariance.shape}; "
            f"expected at least one of each and a covariance of shape {(size, size)}"
        )
    value = float(ours.mean() - theirs.mean())
    contrast = np.concatenate([np.full(len(ours), 1 / len(ours)), np.full(len(theirs), -1 / len(theirs))])
    patients = float(contrast @ covariance @ contrast)
    seeds = allow_for_seeds and max(len(ours), len(theirs)) > 1
    if math.isnan(value) or math.isnan(patients):
        return ReplicateDifference(value, math.nan, math.nan, math.nan, math.nan, seeds, reason=UNDEFINED)
    if paired and len(ours) != len(theirs):
        raise ValueError(
            f"found {len(ours)} and {len(theirs)} replicates; expected equally many, since they are paired"
        )
    own_first, own_second = covariance[: len(ours), : len(ours)], covariance[len(ours) :, len(ours) :]
    parts = [(ours, own_first), (theirs, own_second)]
    if paired:
        cross = covariance[: len(ours), len(ours) :]
        parts = [(ours - theirs, own_first + own_second - cross - cross.T)]
    variance, total = _compute_total_variance(patients, parts, degrees) if seeds else (patients, degrees)
    return _build_difference(value, variance, total, bounds, confidence, training=seeds)


def estimate_replicates(
    values: NDArray[np.float64],
    covariance: NDArray[np.float64],
    *,
    degrees: float,
    bounds: tuple[float, float] = (0.0, 1.0),
    confidence: float = 0.95,
) -> Estimate:
    """Estimate the mean of an index over the replicates of one configuration on the same images.

    The interval allows for patients and, with two or more replicates, for seeds.

    Args:
        values: An index (accuracy, macro F1) of each replicate, of shape (replicates,).
        covariance: Covariance of the values due to the patients, of shape (replicates, replicates).
        degrees: Degrees of freedom of the covariance, > 0.
        bounds: Least and greatest possible value of the index.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The mean with an interval within the bounds; without one if nothing varies or the covariance is undefined.

    Example:
        >>> mean = estimate_replicates(np.array([0.9, 0.8]), np.full((2, 2), 4e-4), degrees=60)
        >>> round(mean.value, 3), mean.low < 0.8 < 0.9 < mean.high
        (0.85, True)
    """
    check_confidence(confidence)
    table = np.asarray(values, dtype=np.float64)
    value, patients = float(table.mean()), float(covariance.mean())
    if math.isnan(value) or math.isnan(patients):
        return Estimate(value, math.nan, math.nan, reason=UNDEFINED)
    variance = patients
    if len(table) > 1:
        variance, degrees = _compute_total_variance(patients, [(table, covariance)], degrees)
    if variance < 1e-18:
        return Estimate(value, math.nan, math.nan, reason=NOTHING_VARIES)
    position = (value - bounds[0]) / (bounds[1] - bounds[0])
    if not 0 < position < 1:
        return Estimate(value, math.nan, math.nan, reason=NOTHING_VARIES)
    # The score interval of a proportion with that variance, which is asymmetric if the mean is near a bound.
    size = position * (1 - position) * (bounds[1] - bounds[0]) ** 2 / variance
    ends = compute_wilson_ends(position, size, compute_quantile(confidence, freedom=degrees))
    low, high = (bounds[0] + (bounds[1] - bounds[0]) * end for end in ends)
    return Estimate(value, low, high)


def corrected_resampled_t(
    values: NDArray[np.float64],
    *,
    test_to_train: float,
    bounds: tuple[float, float] = (-1.0, 1.0),
    confidence: float = 0.95,
) -> ReplicateDifference:
    """Estimate the mean over folds or repeated splits with overlapping training sets (Nadeau and Bengio 2003).

    The variance of the mean is (1 / J + test / train) times that of the J values. Use it for the difference of two
    configurations on the same folds, or for a single configuration, for which p tests a mean of 0.

    Args:
        values: Difference of an index in each fold, of shape (folds,), at least one; NaN where undefined.
        test_to_train: Ratio of test to training images of a fold, > 0; 1 / (k - 1) in k folds without validation.
        bounds: Least and greatest possible value.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        The mean, its interval and p with J - 1 degrees of freedom; without an interval for a single value, if a value
        is undefined, or if all values are equal.

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
        raise ValueError(f"values have shape {table.shape}; expected (folds,), with at least one")
    if not test_to_train > 0:
        raise ValueError(f"test_to_train is {test_to_train}; expected a positive ratio of images")
    value = float(table.mean())
    if math.isnan(value) or len(table) < 2:
        reason = "the index is undefined for a fold" if math.isnan(value) else "there is a single fold"
        return ReplicateDifference(value, math.nan, math.nan, math.nan, math.nan, True, reason=reason)
    variance = (1 / len(table) + test_to_train) * float(table.var(ddof=1))
    return _build_difference(value, variance, len(table) - 1, bounds, confidence, training=True)


def ensure_interval_width(mean: Estimate, singles: Sequence[Estimate]) -> Estimate:
    """Widen the interval of a mean so that neither side is narrower than the replicates' intervals are on average.

    Where replicates make hardly any errors, their spread is uninformative, and the single intervals tell more.
    """
    if not all(each.has_interval for each in singles):
        return mean
    below = float(np.mean([each.value - each.low for each in singles]))
    above = float(np.mean([each.high - each.value for each in singles]))
    low, high = mean.value - below, mean.value + above
    if mean.has_interval:
        low, high = min(low, mean.low), max(high, mean.high)
    return Estimate(mean.value, low, high)


def _compute_indices(tables: NDArray[np.int64]) -> NDArray[np.float64]:
    indices = overall_indices(tables)
    return np.stack([getattr(indices, name) for name in INDICES], axis=-1)


def _compute_total_variance(
    patients: float, parts: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], degrees: float
) -> tuple[float, float]:
    """Compute the total variance of patients and seeds, and its degrees of freedom.

    Args:
        patients: Variance due to patients, with fixed seeds.
        parts: Values and covariance of the replicates of each configuration.
        degrees: Degrees of freedom of `patients`.
    """
    parts = [(values, table) for values, table in parts if len(values) > 1]
    spreads = [float(values.var(ddof=1)) / len(values) for values, _ in parts]
    # The part of the differences between seeds that comes from errors on different images; `patients` includes it.
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


def _build_difference(
    value: float, variance: float, degrees: float, bounds: tuple[float, float], confidence: float, *, training: bool
) -> ReplicateDifference:
    if variance < 1e-18:
        p_value = 1.0 if value == 0 else math.nan
        return ReplicateDifference(value, math.nan, math.nan, math.nan, p_value, training, reason=NOTHING_VARIES)
    error = math.sqrt(variance)
    reach = compute_quantile(confidence, freedom=degrees) * error
    low, high = max(bounds[0], value - reach), min(bounds[1], value + reach)
    return ReplicateDifference(value, low, high, error, compute_two_sided_p(value / error, freedom=degrees), training)


# --- the average of replicates as one model ---

GAIN_RESAMPLES = 2000
"""Bootstrap samples of patients."""
NO_DIFFERENCE = "the two do not differ on any image"


def average_log_probabilities(tables: NDArray[np.float64], votes: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Compute the logarithm of the mean probabilities of the models that vote on each image.

    Args:
        tables: Logarithms of each model's probabilities, of shape (models, n, classes), finite.
        votes: Which models vote on each image, of shape (models, n), at least one on each.

    Returns:
        Shape (n, classes); never -inf, also where the probabilities are too small for a float.

    Example:
        >>> tables = np.log([[[0.9, 0.1]], [[0.5, 0.5]]])
        >>> np.exp(average_log_probabilities(tables, np.array([[True], [True]]))).round(3).tolist()
        [[0.7, 0.3]]
    """
    if not votes.any(axis=0).all():
        raise ValueError("an image has no votes; expected at least one model on each image")
    masked = np.where(votes[..., np.newaxis], tables, -np.inf)
    total: NDArray[np.float64] = special.logsumexp(masked, axis=0)
    return np.asarray(total - np.log(votes.sum(axis=0))[:, np.newaxis])


@dataclass(frozen=True)
class AveragingGain:
    """Scores of the average of models minus the mean of their own scores, on the same images.

    Attributes:
        accuracy: Difference of accuracies.
        balanced_accuracy: Difference of the mean sensitivities of the classes.
        brier: Difference of Brier scores; below 0 the average is better.
        log_loss: Difference of mean log losses, in nats; below 0 the average is better.
    """

    accuracy: Estimate
    balanced_accuracy: Estimate
    brier: Estimate
    log_loss: Estimate


def estimate_averaging_gain(
    average: NDArray[np.float64],
    models: NDArray[np.float64],
    votes: NDArray[np.bool_],
    true: NDArray[np.int64],
    groups: NDArray[np.generic] | None = None,
    *,
    seed: int = 0,
) -> AveragingGain:
    """Estimate what averaging gains over the models that vote on each image, with 95 % intervals.

    The intervals are percentiles of a bootstrap that draws whole patients, and for each image both sides together.

    Args:
        average: Probabilities of the average, of shape (n, classes).
        models: Probabilities of each model, of shape (models, n, classes); those of a single model compare with it.
        votes: Which models vote on each image, of shape (models, n), at least one on each.
        true: True classes, of shape (n,).
        groups: The patient of each image, of shape (n,); None if each image is its own.
        seed: Seed of the bootstrap.

    Example:
        >>> true, votes = np.array([0, 1, 0, 1]), np.ones((2, 4), dtype=bool)
        >>> right = np.eye(2)[true] * 0.8 + 0.1
        >>> wrong = 1 - right
        >>> estimate_averaging_gain(right, np.stack([right, wrong]), votes, true).accuracy.value
        0.5
    """
    classes = average.shape[1]
    truth = check_labels(true, classes)
    codes = encode_groups(groups, length=len(truth))
    count = votes.sum(axis=0)[:, np.newaxis]
    own = sum(mask[:, np.newaxis] * score_images(table, truth) for mask, table in zip(votes, models, strict=True))
    difference = score_images(average, truth) - own / count
    is_class = np.eye(classes)[truth]
    columns = np.column_stack([difference, is_class * difference[:, :1], is_class])
    sums = np.zeros((int(codes.max()) + 1, columns.shape[1]))
    np.add.at(sums, codes, columns)

    def compute_gain(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        by_class, images = totals[:, 3 : 3 + classes], totals[:, 3 + classes :]
        with np.errstate(invalid="ignore"):
            sensitivities = by_class / images
        means = totals[:, :3] / images.sum(axis=1, keepdims=True)
        return np.column_stack([means[:, 0], np.nanmean(sensitivities, axis=1), means[:, 1:]])

    value = compute_gain(sums.sum(axis=0, keepdims=True))[0]
    generator, patients = np.random.default_rng(seed), len(sums)
    drawn = [generator.multinomial(patients, np.full(patients, 1 / patients)) @ sums for _ in range(GAIN_RESAMPLES)]
    low, high = np.quantile(compute_gain(np.array(drawn)), (0.025, 0.975), axis=0)
    varies = np.abs(difference).max(axis=0) > 0
    reasons = [ONE_GROUP if patients == 1 else "" if varies[index] else NO_DIFFERENCE for index in (0, 0, 1, 2)]
    return AveragingGain(
        *(
            Estimate(float(value[index]), math.nan, math.nan, reason=reason)
            if reason
            else Estimate(float(value[index]), float(low[index]), float(high[index]))
            for index, reason in enumerate(reasons)
        )
    )


def score_images(probabilities: NDArray[np.float64], true: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return whether each image is classified correctly, its Brier score and its log loss, of shape (n, 3)."""
    rows = np.arange(len(true))
    error = probabilities - np.eye(probabilities.shape[1])[true]
    loss = -np.log(np.maximum(probabilities[rows, true], np.finfo(np.float64).tiny))
    return np.column_stack([probabilities.argmax(axis=1) == true, (error**2).sum(axis=1), loss])
