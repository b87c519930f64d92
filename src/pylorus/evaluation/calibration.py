"""Whether a probability of 0.8 is right eight times in ten: scores, and a temperature to mend it."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from pylorus.evaluation.inputs import checked_logits, checked_probabilities, labels_in_range
from pylorus.evaluation.reliability import BINS, reliability_curve

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0
"""Where a temperature is looked for: beyond, logits would be scaled more than twentyfold."""


@dataclass(frozen=True)
class Temperature:
    """A temperature fitted on validation logits, to divide the logits of every other image by.

    Attributes:
        temperature: In [0.05, 20]; above 1 it makes the model less sure. 1.0 if not identified.
        identified: Whether the likelihood has its best point between the bounds. If not (as when no
            validation image is mistaken, so that more certainty always looks better) the logits are left as
            they are.
        images: How many validation images it was fitted on.
        nll_before: Mean negative log likelihood on them with temperature 1, in nats.
        nll_after: The same with the fitted temperature; never above `nll_before`.
    """

    temperature: float
    identified: bool
    images: int
    nll_before: float
    nll_after: float


@dataclass(frozen=True)
class CalibrationScores:
    """Scores of a set of probabilities; lower is better for each.

    Attributes:
        ece: Expected calibration error of the likeliest class over bins of equal mass, in [0, 1].
        brier: Sum over classes of (probability - truth) squared, mean over images, in [0, 2] (Brier 1950).
        nll: Mean negative log of the true class's probability, in nats, >= 0; infinite if one was 0.
    """

    ece: float
    brier: float
    nll: float


def probabilities_of_logits(logits: NDArray[np.float64], *, temperature: float = 1.0) -> NDArray[np.float64]:
    """Softmax of logits / temperature.

    Args:
        logits: Shape (n, classes), finite.
        temperature: > 0; 1 leaves the model as it is.

    Raises:
        ValueError: If a logit is nan or infinite, or temperature is not a positive number.

    Example:
        >>> probabilities_of_logits(np.array([[2.0, 0.0]]), temperature=2.0).round(3).tolist()
        [[0.731, 0.269]]
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; expected a positive number")
    softmax: NDArray[np.float64] = special.softmax(checked_logits(logits) / temperature, axis=1)
    return softmax


def fit_temperature(logits: NDArray[np.float64], true: NDArray[np.int64]) -> Temperature:
    """Fit the one temperature that makes validation images likeliest (Guo et al. 2017).

    Give validation logits only: fitted on test images, the temperature has seen the answers.

    Args:
        logits: Validation logits of shape (n, classes), finite.
        true: Their true classes, of shape (n,).

    Raises:
        ValueError: If the arrays don't fit each other, are empty, or hold nan.

    Example:
        >>> logits = np.array([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
        >>> fit = fit_temperature(logits, np.array([0, 0, 1, 1]))
        >>> fit.identified, round(fit.temperature, 2)
        (True, 3.64)
    """
    table = checked_logits(logits)
    truth = _fitting_labels(true, table)

    def loss(log_temperature: float) -> float:
        log_chance = special.log_softmax(table / math.exp(log_temperature), axis=1)
        return float(-log_chance[np.arange(len(truth)), truth].mean())

    # In 1 / temperature the loss is convex, so there is one best point or none between the bounds.
    low, high = math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE)
    found = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    best, before = float(found.x), loss(0.0)
    # Both ends must be worse: logits that say nothing, or that are never mistaken, have no best temperature.
    inside = min(loss(low), loss(high)) > loss(best) + 1e-9 and loss(best) <= before
    temperature = math.exp(best) if inside else 1.0
    return Temperature(temperature, inside, len(truth), before, loss(math.log(temperature)))


def calibration_scores(
    probabilities: NDArray[np.float64], true: NDArray[np.int64], *, bins: int = BINS
) -> CalibrationScores:
    """Expected calibration error, Brier score and negative log likelihood.

    The calibration error depends on its bins and is above 0 by chance even for a perfectly calibrated model;
    read it next to Brier and NLL, which have no bins, and to the reliability curve.

    Args:
        probabilities: Shape (n, classes); rows sum to one.
        true: True classes, of shape (n,).
        bins: Bins of equal mass for the calibration error, >= 1.

    Raises:
        ValueError: If the arrays don't fit each other, are empty, hold nan or rows that don't sum to one.

    Example:
        >>> scores = calibration_scores(np.array([[0.8, 0.2], [0.6, 0.4]]), np.array([0, 1]), bins=1)
        >>> round(scores.ece, 2), round(scores.brier, 2), round(scores.nll, 3)
        (0.2, 0.4, 0.57)
    """
    table = checked_probabilities(probabilities)
    truth = _fitting_labels(true, table)
    rows = np.arange(len(truth))
    error = table.copy()
    error[rows, truth] -= 1
    chance = table[rows, truth]
    nll = math.inf if (chance == 0).any() else float(-np.log(chance).mean())
    return CalibrationScores(
        ece=reliability_curve(table, truth, bins=bins).ece,
        brier=float((error**2).sum(axis=1).mean()),
        nll=nll,
    )


def _fitting_labels(true: NDArray[np.int64], table: NDArray[np.float64]) -> NDArray[np.int64]:
    truth = labels_in_range(true, table.shape[1], name="true")
    if len(truth) != len(table):
        raise ValueError(f"{len(truth)} true labels but {len(table)} rows")
    return truth
