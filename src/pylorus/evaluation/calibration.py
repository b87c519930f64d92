"""Calibration: whether predictions with a probability of 0.8 are correct in 80 % of cases, and how to correct them.

Scores with intervals, temperature scaling and logistic recalibration.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from pylorus.evaluation.confusion import ALL_IMAGES, NO_IMAGES
from pylorus.evaluation.index_intervals import Proportion, clustered_wilson
from pylorus.evaluation.influence import compute_copies, estimate_bounded_mean, estimate_mean_variance
from pylorus.evaluation.intervals import (
    ONE_GROUP,
    Estimate,
    check_confidence,
    compute_quantile,
    create_undefined_estimate,
)
from pylorus.evaluation.predictions import (
    check_flags,
    check_labels,
    check_logits,
    check_probabilities,
    check_scores,
    encode_groups,
)

BINS = 10
"""Default number of bins: 45 images per bin for a test set of 450."""

MIN_ODDS_RANGE = 0.5
"""If the log odds of all images lie closer together, the slope of the calibration line says nothing."""
NO_LINE = "no line can be fitted: the probabilities are too close to 0 and 1, or contain almost no information"
MAX_STANDARD_ERROR = 30.0
"""Standard error of a coefficient, in log odds, above which the coefficient is undetermined."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
"""Range that is searched for a temperature; beyond it, logits would be scaled more than twentyfold."""


@dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """Bins of images by the probability of their most probable class, in increasing order.

    Attributes:
        certainty: Mean probability of the most probable class in each bin, in [0, 1], of shape (bins,).
        accuracy: Proportion of correctly classified images in each bin, with its Wilson interval, one per bin.
        images: Number of images in each bin, of shape (bins,).
        ece: Mean over images of |accuracy - certainty| of their bin, in [0, 1].
    """

    certainty: NDArray[np.float64]
    accuracy: tuple[Proportion, ...]
    images: NDArray[np.int64]
    ece: float


def reliability_curve(
    probabilities: NDArray[np.float64],
    true: NDArray[np.int64],
    groups: NDArray[np.generic] | None = None,
    *,
    bins: int = BINS,
    confidence: float = 0.95,
) -> ReliabilityCurve:
    """Compute the accuracy of the model in bins of equal mass by its certainty.

    Bins have equal mass, not equal width: a trained model is nearly always confident, so that bins of equal width would
    be empty at low certainty and contain nearly all images at high certainty, with a more biased error (Roelofs et al.
    2022). Images of equal probability stay in one bin, so the curve does not depend on their order; there may then be
    fewer bins.

    Args:
        probabilities: Shape (n, classes); rows sum to one.
        true: True classes, of shape (n,).
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        bins: Target number of bins, >= 1; at most as many as images.
        confidence: Coverage of the intervals of the accuracy, in (0, 1).

    Raises:
        ValueError: If the shapes differ, the arrays are empty, a value is NaN, or bins is below 1.

    Example:
        >>> first = np.array([0.6, 0.7, 0.9, 1.0])
        >>> curve = reliability_curve(np.column_stack([first, 1 - first]), np.array([1, 0, 0, 0]), bins=2)
        >>> curve.certainty.round(2).tolist(), [accuracy.value for accuracy in curve.accuracy]
        ([0.65, 0.95], [0.5, 1.0])
    """
    check_confidence(confidence)
    table = check_probabilities(probabilities)
    truth = check_labels(true, table.shape[1], name="true")
    if len(truth) != len(table):
        raise ValueError(f"found {len(truth)} true labels and probabilities of {len(table)} images; expected as many")
    if bins < 1:
        raise ValueError(f"bins is {bins}; expected at least 1")
    codes = encode_groups(groups, length=len(truth))
    confidences, correct = table.max(axis=1), table.argmax(axis=1) == truth
    member = compute_equal_mass_bins(confidences, bins=bins)
    images = np.bincount(member).astype(np.int64)
    certainty = np.bincount(member, weights=confidences) / images
    accuracy = tuple(
        clustered_wilson(correct[member == each], codes[member == each], confidence=confidence)
        for each in range(len(images))
    )
    gaps = np.abs(certainty - np.array([proportion.value for proportion in accuracy]))
    return ReliabilityCurve(certainty, accuracy, images, float((images * gaps).sum() / len(truth)))


def compute_equal_mass_bins(values: NDArray[np.float64], *, bins: int) -> NDArray[np.int64]:
    """Assign each value to one of the bins 0, 1, … without gaps; equal values get the same bin.

    Args:
        values: Shape (n,), n >= 1.
        bins: Target number of bins with equally many values, >= 1.

    Example:
        >>> compute_equal_mass_bins(np.array([0.6, 0.9, 0.7, 1.0]), bins=2).tolist()
        [0, 1, 0, 1]
    """
    ordered = np.sort(values)
    starts = ordered[(np.arange(min(bins, len(values))) * len(values)) // min(bins, len(values))]
    member = np.searchsorted(np.unique(starts), values, side="right") - 1
    return member.astype(np.int64)


@dataclass(frozen=True)
class Temperature:
    """A temperature fitted on validation logits, by which the logits of all other images are divided.

    Attributes:
        temperature: In [0.05, 20]; above 1 it makes the model less confident. 1.0 if not identified.
        identified: Whether the likelihood has its maximum between the bounds. If not (for example because no
            validation image is misclassified, so that more confidence always scores better), the logits stay
            unchanged.
        images: Number of validation images that it was fitted on.
        nll_before: Mean negative log-likelihood on these images at temperature 1, in nats.
        nll_after: The same at the fitted temperature; never above `nll_before`.
    """

    temperature: float
    identified: bool
    images: int
    nll_before: float
    nll_after: float


@dataclass(frozen=True)
class CalibrationScores:
    """Calibration scores of a set of probabilities; for each, lower is better.

    Attributes:
        ece: Expected calibration error of the most probable class over bins of equal mass, in [0, 1].
        brier: Sum over classes of (probability - truth) squared, mean over images, in [0, 2] (Brier 1950).
        nll: Mean negative log of the true class's probability, in nats, >= 0; infinite if one is 0.
    """

    ece: float
    brier: float
    nll: float


def probabilities_of_logits(logits: NDArray[np.float64], *, temperature: float = 1.0) -> NDArray[np.float64]:
    """Compute the softmax of logits / temperature.

    Args:
        logits: Shape (n, classes), finite.
        temperature: > 0; 1 leaves the probabilities of the model unchanged.

    Raises:
        ValueError: If a logit is NaN or infinite, or temperature is not a positive number.

    Example:
        >>> probabilities_of_logits(np.array([[2.0, 0.0]]), temperature=2.0).round(3).tolist()
        [[0.731, 0.269]]
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    softmax: NDArray[np.float64] = special.softmax(check_logits(logits) / temperature, axis=1)
    return softmax


def fit_temperature(logits: NDArray[np.float64], true: NDArray[np.int64]) -> Temperature:
    """Fit the temperature that maximizes the likelihood of validation images (Guo et al. 2017).

    Pass validation logits only: a temperature fitted on test images has seen their labels.

    Args:
        logits: Validation logits of shape (n, classes), finite.
        true: Their true classes, of shape (n,).

    Raises:
        ValueError: If the shapes differ, the arrays are empty, or a value is NaN.

    Example:
        >>> logits = np.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
        >>> fit = fit_temperature(logits, np.array([0, 0, 1, 1]))
        >>> fit.identified, round(fit.temperature, 2)
        (True, 3.64)
    """
    table = check_logits(logits)
    truth = _check_labels(true, table)

    def compute_loss(log_temperature: float) -> float:
        log_probability = special.log_softmax(table / math.exp(log_temperature), axis=1)
        return float(-log_probability[np.arange(len(truth)), truth].mean())

    # The loss is convex in 1 / temperature, so it has one minimum between the bounds or none.
    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    result = optimize.minimize_scalar(compute_loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    best, before = float(result.x), compute_loss(0.0)
    # Both ends must be worse: logits without information, or without errors, have no optimal temperature.
    identified = min(compute_loss(low), compute_loss(high)) > compute_loss(best) + 1e-9 and compute_loss(best) <= before
    temperature = math.exp(best) if identified else 1.0
    return Temperature(temperature, identified, len(truth), before, compute_loss(math.log(temperature)))


def calibration_scores(
    probabilities: NDArray[np.float64], true: NDArray[np.int64], *, bins: int = BINS
) -> CalibrationScores:
    """Compute expected calibration error, Brier score and negative log-likelihood.

    The calibration error depends on its bins and, through sampling error, is above 0 even for a perfectly calibrated
    model; read it together with Brier score and NLL, which have no bins, and with the reliability curve.

    Args:
        probabilities: Shape (n, classes); rows sum to one.
        true: True classes, of shape (n,).
        bins: Bins of equal mass for the calibration error, >= 1.

    Raises:
        ValueError: If the shapes differ, the arrays are empty, a value is NaN, or a row does not sum to one.

    Example:
        >>> scores = calibration_scores(np.array([[0.8, 0.2], [0.6, 0.4]]), np.array([0, 1]), bins=1)
        >>> round(scores.ece, 2), round(scores.brier, 2), round(scores.nll, 3)
        (0.2, 0.4, 0.57)
    """
    table = check_probabilities(probabilities)
    truth = _check_labels(true, table)
    rows = np.arange(len(truth))
    error = table.copy()
    error[rows, truth] -= 1
    true_probability = table[rows, truth]
    nll = math.inf if (true_probability == 0).any() else float(-np.log(true_probability).mean()) + 0.0
    return CalibrationScores(
        ece=reliability_curve(table, truth, bins=bins).ece,
        brier=float((error**2).sum(axis=1).mean()),
        nll=nll,
    )


@dataclass(frozen=True)
class CalibrationEstimates:
    """Calibration scores with intervals that allow for groups; for each, lower is better.

    Attributes:
        ece: As in `CalibrationScores`. The interval is for the error in the population, without the bias that small
            bins add to it.
        brier: As in `CalibrationScores`.
        nll: As in `CalibrationScores`.
    """

    ece: Estimate
    brier: Estimate
    nll: Estimate


@dataclass(frozen=True)
class CalibrationLine:
    """Logistic recalibration of one class's probability: log odds of the truth against log odds of the model.

    Attributes:
        slope: 1 if calibrated; below 1 the model is overconfident, above 1 underconfident.
        intercept: With the slope fixed at 1; 0 if calibrated; above 0 the class is more frequent than predicted.
        odds_range: Difference of the largest and the smallest log odds of the model.
    """

    slope: Estimate
    intercept: Estimate
    odds_range: float = math.nan

    @property
    def is_flat(self) -> bool:
        """Whether the model gives all images nearly the same probability, so that the slope can't be interpreted."""
        return self.odds_range < MIN_ODDS_RANGE


def estimate_calibration(
    probabilities: NDArray[np.float64],
    true: NDArray[np.int64],
    groups: NDArray[np.generic] | None = None,
    *,
    bins: int = BINS,
    confidence: float = 0.95,
) -> CalibrationEstimates:
    """Estimate calibration error, Brier score and negative log-likelihood with intervals.

    Brier: Wilson interval at the number of independent images that has its variance, with Student's t. NLL: symmetric
    on the log scale. The upper end of both is at least the value for as many errors as the interval of the accuracy
    allows. ECE: sampling error biases it upwards, the more so the fewer images a bin has. The lower end starts from
    errors that are corrected for their variance, sqrt(max(0, d² - Var d)), as for squared errors (Kumar et al. 2019),
    the upper end from the value itself; the interval is therefore asymmetric.

    Args:
        probabilities: Shape (n, classes); rows sum to one.
        true: True classes, of shape (n,).
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        bins: Bins of equal mass for the calibration error, >= 1.
        confidence: Coverage of the intervals, in (0, 1).

    Raises:
        ValueError: If the shapes differ, the arrays are empty, a value is NaN, or a row does not sum to one.

    Example:
        >>> probabilities, truth = np.tile([[0.8, 0.2]], (50, 1)), np.arange(50) % 5 // 4
        >>> scores = estimate_calibration(probabilities, truth)
        >>> round(scores.brier.value, 2), scores.brier.low < 0.32 < scores.brier.high, round(scores.ece.low, 2)
        (0.32, True, 0.0)
    """
    check_confidence(confidence)
    table = check_probabilities(probabilities)
    truth = _check_labels(true, table)
    codes = encode_groups(groups, length=len(truth))
    return CalibrationEstimates(
        ece=_estimate_ece(table, truth, codes, bins, confidence),
        brier=_estimate_brier(table, truth, codes, confidence),
        nll=_estimate_nll(table, truth, codes, confidence),
    )


def calibration_line(
    positive: NDArray[np.bool_],
    probability: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    confidence: float = 0.95,
) -> CalibrationLine:
    """Fit slope and intercept of logistic recalibration (Cox 1958; Van Calster et al. 2019).

    Standard errors are cluster-robust (sandwich), with Student's t; its degrees of freedom come from the groups of the
    rarer outcome.

    Args:
        positive: Shape (n,): whether each image is of the class.
        probability: Shape (n,): the class's probability, in [0, 1]; values are clipped to at least 10⁻¹² from 0 and 1.
        groups: Group (patient) of each image, of shape (n,), or None if each image is its own group.
        confidence: Coverage of the intervals, in (0, 1).

    Raises:
        ValueError: If the shapes differ, the arrays are empty, or a probability is not in [0, 1].

    Example:
        >>> probability = np.repeat([0.2, 0.8], 20)
        >>> positive = np.arange(40) % 5 < np.repeat([1, 4], 20)
        >>> line = calibration_line(positive, probability)
        >>> round(line.slope.value, 3), line.slope.low < 1 < line.slope.high
        (1.0, True)
    """
    check_confidence(confidence)
    flags = check_flags(positive, name="positive")
    values = check_scores(probability, length=len(flags))
    if ((values < 0) | (values > 1)).any():
        raise ValueError("a calibration line needs probabilities in [0, 1]; pass calibrated probabilities, not logits")
    codes = encode_groups(groups, length=len(flags))
    if flags.all() or not flags.any():
        no_estimate = create_undefined_estimate(ALL_IMAGES if flags.all() else NO_IMAGES)
        return CalibrationLine(no_estimate, no_estimate)
    odds = special.logit(np.clip(values, 1e-12, 1 - 1e-12))
    freedom = max(1.0, min(compute_copies(codes[flags]), compute_copies(codes[~flags])) - 1)
    intercept = _fit_logistic(flags, np.ones((len(flags), 1)), odds, codes, freedom, confidence)
    if np.ptp(odds) < 1e-9:
        return CalibrationLine(create_undefined_estimate("all images have the same probability"), intercept, 0.0)
    if odds[flags].min() >= odds[~flags].max() or odds[flags].max() <= odds[~flags].min():
        return CalibrationLine(
            create_undefined_estimate(
                "the probability separates the class from the rest, so that the best slope is infinite"
            ),
            intercept,
        )
    # Standardized, so that Newton's steps have the right size even if the probabilities vary little.
    unit = float(odds.std())
    design = np.column_stack([odds / unit, np.ones(len(flags))])
    slope = _fit_logistic(flags, design, np.zeros(len(flags)), codes, freedom, confidence)
    scaled = Estimate(slope.value / unit, slope.low / unit, slope.high / unit, reason=slope.reason)
    return CalibrationLine(scaled, intercept, float(np.ptp(odds)))


def _fit_logistic(
    positive: NDArray[np.bool_],
    design: NDArray[np.float64],
    offset: NDArray[np.float64],
    codes: NDArray[np.int64],
    freedom: float,
    confidence: float,
) -> Estimate:
    """Fit a logistic regression and estimate its first coefficient."""
    weights, information = np.zeros(design.shape[1]), np.eye(design.shape[1])
    for _ in range(100):
        fitted = special.expit(design @ weights + offset)
        information = design.T @ (design * np.maximum(fitted * (1 - fitted), 1e-12)[:, None])
        step = np.linalg.solve(information, design.T @ (positive - fitted))
        # A long step may overshoot if the model is nearly certain about all images.
        weights = weights + step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
        if float(np.abs(step).max()) < 1e-10:
            break
    else:
        return create_undefined_estimate(NO_LINE)
    value = float(weights[0])
    scores = design * (positive - special.expit(design @ weights + offset))[:, None]
    groups = int(codes.max()) + 1
    if groups < 2:
        return Estimate(value, math.nan, math.nan, reason=ONE_GROUP)
    sums = np.column_stack([np.bincount(codes, weights=column) for column in scores.T])
    bread = np.linalg.inv(information)
    variance = groups / (groups - 1) * float((bread @ (sums.T @ sums) @ bread)[0, 0])
    if not variance < MAX_STANDARD_ERROR**2:
        return create_undefined_estimate(NO_LINE)
    reach = compute_quantile(confidence, freedom=freedom) * math.sqrt(max(variance, 0.0))
    return Estimate(value, value - reach, value + reach)


def _estimate_brier(
    table: NDArray[np.float64], truth: NDArray[np.int64], codes: NDArray[np.int64], confidence: float
) -> Estimate:
    losses = (table**2).sum(axis=1)[:, None] - 2 * table + 1  # for each class, if it were the true one
    true_losses = losses[np.arange(len(truth)), truth]
    mean = estimate_bounded_mean(true_losses, codes, highest=2.0, confidence=confidence)
    reach = _compute_reach_of_unseen_errors(table, losses, truth, codes, confidence)
    return Estimate(mean.value, mean.low, min(2.0, max(mean.high, mean.value + reach)))


def _estimate_nll(
    table: NDArray[np.float64], truth: NDArray[np.int64], codes: NDArray[np.int64], confidence: float
) -> Estimate:
    true_probability = table[np.arange(len(truth)), truth]
    if (true_probability == 0).any():
        return Estimate(math.inf, math.nan, math.nan, reason="a true class has the predicted probability 0")
    true_losses = -np.log(true_probability)
    value, spread = float(true_losses.mean()) + 0.0, estimate_mean_variance(true_losses, codes)
    if math.isnan(spread.variance):
        return Estimate(value, math.nan, math.nan, reason=ONE_GROUP)
    exponent = (
        compute_quantile(confidence, freedom=spread.freedom) * math.sqrt(spread.variance) / value if value > 0 else 0.0
    )
    with np.errstate(divide="ignore"):
        losses = -np.log(table)
    reach = _compute_reach_of_unseen_errors(table, losses, truth, codes, confidence)
    low, high = value * math.exp(-exponent), value * math.exp(min(exponent, 700.0))
    return Estimate(value, low, max(high, value + reach))


def _compute_reach_of_unseen_errors(
    table: NDArray[np.float64],
    losses: NDArray[np.float64],
    truth: NDArray[np.int64],
    codes: NDArray[np.int64],
    confidence: float,
) -> float:
    """Compute how much a mean loss would grow if as many images were misclassified as the accuracy's interval allows.

    If hardly any image is misclassified the losses vary little, and do not show what the first error would cost: the
    loss of the second most probable class, for a model that is confident of the first.

    Args:
        table: Probabilities of shape (n, classes).
        losses: Loss of each image if the class of the column were the true one, of the same shape.
        truth: True classes, of shape (n,).
        codes: The group of each image, of shape (n,).
        confidence: Coverage of the accuracy's interval, in (0, 1).
    """
    order = np.argsort(-table, axis=1)[:, :2]
    rows = np.arange(len(table))
    cost = losses[rows, order[:, 1]] - losses[rows, order[:, 0]]
    accuracy = clustered_wilson(order[:, 0] == truth, codes, confidence=confidence)
    return max(0.0, (accuracy.value - accuracy.low) * float(cost.mean()))


def _estimate_ece(
    table: NDArray[np.float64], truth: NDArray[np.int64], codes: NDArray[np.int64], bins: int, confidence: float
) -> Estimate:
    confidences, correct = table.max(axis=1), table.argmax(axis=1) == truth
    member = compute_equal_mass_bins(confidences, bins=bins)
    images = np.bincount(member)
    gaps = np.bincount(member, weights=confidences - correct) / images
    bin_weights = images / len(truth)
    errors = compute_quantile(confidence)
    reaches = []
    for each in range(len(images)):
        inside = member == each
        spread = estimate_mean_variance((confidences - correct)[inside], codes[inside])
        accuracy = clustered_wilson(correct[inside], codes[inside], confidence=confidence)
        # Wilson's interval allows for a bin without errors, but is too narrow for a bin of few images.
        reaches.append(max((accuracy.high - accuracy.low) / 2, errors * math.sqrt(np.nan_to_num(spread.variance))))
    value = float(bin_weights @ np.abs(gaps))
    corrected = float(bin_weights @ np.sqrt(np.maximum(gaps**2 - (np.array(reaches) / errors) ** 2, 0.0)))
    reach = float(np.sqrt(((bin_weights * np.array(reaches)) ** 2).sum()))
    return Estimate(value, max(0.0, min(value, corrected - reach)), min(1.0, value + reach))


def _check_labels(true: NDArray[np.int64], table: NDArray[np.float64]) -> NDArray[np.int64]:
    truth = check_labels(true, table.shape[1], name="true")
    if len(truth) != len(table):
        raise ValueError(f"found {len(truth)} true labels and {len(table)} rows; expected equally many")
    return truth
