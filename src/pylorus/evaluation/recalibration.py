"""Adapt a model's probabilities to another clinic: one scale for all logits and one bias per class.

The scale corrects over- or underconfidence, the biases other proportions of classes. Both are fitted by maximum
likelihood with a penalty that pulls them towards no change, so that few images change little (a normal prior;
Steyerberg et al., Stat Med 2004;23:2567 on recalibration instead of retraining).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from pylorus.evaluation.drift import measure_correlation
from pylorus.evaluation.intervals import Estimate
from pylorus.evaluation.predictions import check_labels, encode_groups

SCALE_SPREAD, BIAS_SPREAD = 0.5, 1.0
"""Standard deviations of the prior of the logarithm of the scale and of each bias."""
FOLDS, RESAMPLES, CHANGE_RESAMPLES = 10, 200, 2000
SMALLEST = 1e-300
"""A smaller probability counts as this one."""


@dataclass(frozen=True)
class Recalibration:
    """New probabilities are the softmax of scale × log(old probability) + bias.

    Attributes:
        scale: Above 1 makes the model more confident, below 1 less; 1 changes nothing.
        bias: One for each class, with mean 0.
    """

    scale: float
    bias: tuple[float, ...]

    def apply(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the new probabilities of old ones, both of shape (n, classes).

        Example:
            >>> Recalibration(1.0, (0.5, -0.5)).apply(np.array([[0.5, 0.5]])).round(2).tolist()
            [[0.73, 0.27]]
        """
        logits = self.scale * np.log(np.maximum(probabilities, SMALLEST)) + np.asarray(self.bias)
        result: NDArray[np.float64] = special.softmax(logits, axis=1)
        return result

    def carry_threshold(self, threshold: float, column: int) -> float:
        """Return the highest new threshold that every image reaches whose old probability reached the old one.

        With two classes the decisions are the same. With more, further images may be called positive: the new
        probability depends on how the others share the rest, and the least favorable way is assumed. So a guaranteed
        sensitivity stays guaranteed.

        Args:
            threshold: Old threshold of the class's probability, in [0, 1].
            column: Index of the class.

        Example:
            >>> round(Recalibration(1.0, (0.0, 0.0, 0.0)).carry_threshold(0.3, 0), 3)
            0.3
            >>> round(Recalibration(2.0, (0.0, 0.0)).carry_threshold(0.8, 0), 3)
            0.941
        """
        if not 0 < threshold < 1:
            return float(np.clip(threshold, 0, 1))
        others = np.delete(np.asarray(self.bias), column)
        if self.scale >= 1:  # the rest weighs most if one class has all of it
            heaviest = float(others.max())
        else:  # by Hölder's inequality
            heaviest = (1 - self.scale) * float(special.logsumexp(others / (1 - self.scale)))
        logit = self.scale * float(special.logit(threshold)) + self.bias[column] - heaviest
        return float(special.expit(logit))


@dataclass(frozen=True)
class RecalibrationStudy:
    """A fitted recalibration, and what it is worth on images that it has not seen.

    Attributes:
        fitted: Fitted on all images.
        scale: The scale with its 95 % interval, from a bootstrap over patients.
        bias: The biases with theirs.
        before: Old probabilities, of shape (n, classes).
        after: New probabilities by cross-validation: each image's by a fit on other patients.
        change: Change of the log loss by recalibration, with its 95 % interval; below 0 is better.
    """

    fitted: Recalibration
    scale: Estimate
    bias: tuple[Estimate, ...]
    before: NDArray[np.float64]
    after: NDArray[np.float64]
    change: Estimate


def fit_recalibration(
    probabilities: NDArray[np.float64], true: NDArray[np.int64], groups: NDArray[np.generic] | None = None
) -> Recalibration:
    """Fit scale and biases by penalized maximum likelihood.

    Images of one patient count as fewer independent ones: the likelihood is divided by the design effect of the log
    loss.

    Args:
        probabilities: Calibrated probabilities of the model, of shape (n, classes).
        true: True classes, of shape (n,).
        groups: The patient of each image, of shape (n,); None if each image is its own.

    Example:
        >>> probabilities = np.repeat([[0.5, 0.5]], 1000, axis=0)
        >>> fit_recalibration(probabilities, (np.arange(1000) < 200).astype(np.int64)).apply(probabilities)[0].round(2)
        array([0.8, 0.2])
    """
    logs = np.log(np.maximum(probabilities, SMALLEST))
    classes = logs.shape[1]
    truth = check_labels(true, classes)
    rows = np.arange(len(truth))
    codes = encode_groups(groups, length=len(truth))
    _, effect = measure_correlation(-logs[rows, truth], codes)

    def compute_loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scale, bias = math.exp(values[0]), values[1:]
        log_probability = special.log_softmax(scale * logs + bias, axis=1)
        residual = np.exp(log_probability)
        loss = -float(log_probability[rows, truth].sum())
        residual[rows, truth] -= 1
        slope = np.concatenate([[scale * float((residual * logs).sum())], residual.sum(axis=0)]) / effect
        precision = np.concatenate([[SCALE_SPREAD**-2], np.full(classes, BIAS_SPREAD**-2)])
        return loss / effect + float((precision * values**2).sum()) / 2, slope + precision * values

    bounds = [(math.log(0.05), math.log(20.0)), *[(-20.0, 20.0)] * classes]
    best = optimize.minimize(compute_loss, np.zeros(classes + 1), jac=True, method="L-BFGS-B", bounds=bounds).x
    return Recalibration(math.exp(best[0]), tuple(map(float, best[1:] - best[1:].mean())))


def cross_validate_recalibration(
    probabilities: NDArray[np.float64],
    true: NDArray[np.int64],
    groups: NDArray[np.generic] | None = None,
    *,
    seed: int = 0,
) -> tuple[NDArray[np.float64], Estimate]:
    """Measure what recalibration is worth on images of patients that it has not seen.

    Args:
        probabilities: Calibrated probabilities of the model, of shape (n, classes).
        true: True classes, of shape (n,).
        groups: The patient of each image, of shape (n,); None if each image is its own.
        seed: Seed of folds and bootstrap.

    Returns:
        New probabilities, each image's by a fit on other patients, of shape (n, classes); and the change of the log
        loss with its 95 % interval, from a bootstrap over patients.
    """
    codes = encode_groups(groups, length=len(true))
    chance, patients = np.random.default_rng(seed), int(codes.max()) + 1
    fold = chance.permutation(patients)[codes] % min(FOLDS, patients)
    after = np.empty_like(probabilities)
    for number in range(fold.max() + 1):
        held_out = fold == number
        fitted = fit_recalibration(probabilities[~held_out], true[~held_out], codes[~held_out])
        after[held_out] = fitted.apply(probabilities[held_out])
    rows = np.arange(len(true))
    before_loss, after_loss = (-np.log(np.maximum(table[rows, true], SMALLEST)) for table in (probabilities, after))
    sizes, sums = np.bincount(codes), np.bincount(codes, weights=after_loss - before_loss)
    drawn = chance.integers(patients, size=(CHANGE_RESAMPLES, patients))
    low, high = np.quantile(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), (0.025, 0.975))
    return after, Estimate(float((after_loss - before_loss).mean()), float(low), float(high))


def study_recalibration(
    probabilities: NDArray[np.float64],
    true: NDArray[np.int64],
    groups: NDArray[np.generic] | None = None,
    *,
    seed: int = 0,
) -> RecalibrationStudy:
    """Fit a recalibration, and measure it by cross-validation and bootstrap, both over patients.

    Args:
        probabilities: Calibrated probabilities of the model, of shape (n, classes).
        true: True classes, of shape (n,).
        groups: The patient of each image, of shape (n,); None if each image is its own.
        seed: Seed of folds and bootstrap.
    """
    after, change = cross_validate_recalibration(probabilities, true, groups, seed=seed)
    codes = encode_groups(groups, length=len(true))
    chance, patients = np.random.default_rng(seed), int(codes.max()) + 1
    members = [np.flatnonzero(codes == patient) for patient in range(patients)]
    values = []
    for _ in range(RESAMPLES):
        drawn = chance.integers(patients, size=patients)
        images = np.concatenate([members[patient] for patient in drawn])
        copies = np.repeat(np.arange(patients), [len(members[patient]) for patient in drawn])
        resampled = fit_recalibration(probabilities[images], true[images], copies)
        values.append([resampled.scale, *resampled.bias])
    fitted = fit_recalibration(probabilities, true, codes)
    low, high = np.quantile(np.array(values), (0.025, 0.975), axis=0)
    estimates = [
        Estimate(value, float(lower), float(upper))
        for value, lower, upper in zip((fitted.scale, *fitted.bias), low, high, strict=True)
    ]
    return RecalibrationStudy(fitted, estimates[0], tuple(estimates[1:]), probabilities, after, change)
