"""The net-benefit curve: whether acting on the model does more good than treating everybody or nobody.

Vickers and Elkin (Med Decis Making 2006;26:565). A threshold probability p says how much a needless
intervention weighs: whoever acts at 10 % holds a missed case for nine times as bad as a needless one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.inputs import checked_flags, checked_scores, group_codes
from pylorus.evaluation.interval import check_confidence
from pylorus.evaluation.proportion import clustered_wilson

THRESHOLDS = np.arange(1, 100) / 100
"""Threshold probabilities unless told otherwise: 1 % to 99 %."""


@dataclass(frozen=True, eq=False)
class NetBenefit:
    """Net benefit in true positives an image; each array of shape (thresholds,).

    Attributes:
        threshold: Threshold probabilities, in (0, 1), rising.
        model: Of acting on images whose probability reaches the threshold; at most the class's share.
        treat_all: Of acting on every image.
        treat_none: Of never acting: 0.
        low: Lower end of the model's interval at each threshold.
        high: Upper end.
        prevalence: The class's share of the images, on which the whole curve rests: in a test set with as
            many cancers as ulcers it says little of a clinic where cancers are rare.
    """

    threshold: NDArray[np.float64]
    model: NDArray[np.float64]
    treat_all: NDArray[np.float64]
    treat_none: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    prevalence: float


def net_benefit(
    positive: NDArray[np.bool_],
    probability: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    confidence: float = 0.95,
    thresholds: NDArray[np.float64] = THRESHOLDS,
) -> NetBenefit:
    """Compute TP/n - FP/n * p / (1 - p) at each threshold probability p, with its interval.

    TP/n and FP/n are proportions; their Wilson intervals, which allow for groups, are combined with the correlation of
    the two (MOVER). The band holds at each threshold by itself, not along the whole curve at once.

    Args:
        positive: Shape (n,): whether each image is of the class.
        probability: Shape (n,): the class's probability, calibrated, in [0, 1].
        groups: Names of shape (n,) of what the images belong to, or None if each stands for itself.
        confidence: Coverage of the interval at each threshold, in (0, 1).
        thresholds: Threshold probabilities, each in (0, 1), rising.

    Raises:
        ValueError: If the arrays don't fit each other, are empty, or a probability or threshold is out of
            range.

    Example:
        >>> chance, steps = np.array([0.9, 0.3]), np.array([0.2, 0.5])
        >>> curve = net_benefit(np.array([True, False]), chance, thresholds=steps)
        >>> curve.model.tolist(), curve.treat_all.tolist()
        ([0.375, 0.5], [0.375, 0.0])
    """
    check_confidence(confidence)
    flags = checked_flags(positive, name="positive")
    chance = checked_scores(probability, length=len(flags))
    if ((chance < 0) | (chance > 1)).any():
        raise ValueError("a net benefit needs probabilities in [0, 1]; give calibrated ones, no logits")
    steps = np.asarray(thresholds, dtype=np.float64)
    if steps.ndim != 1 or not len(steps) or not ((steps > 0) & (steps < 1)).all() or (np.diff(steps) <= 0).any():
        raise ValueError("thresholds must be rising probabilities in (0, 1)")
    codes = group_codes(groups, length=len(flags))
    odds = steps / (1 - steps)
    share = float(flags.mean())
    model, low, high = zip(
        *(
            _estimate_benefit(flags, chance >= step, weight, codes, confidence)
            for step, weight in zip(steps, odds, strict=True)
        ),
        strict=True,
    )
    return NetBenefit(
        threshold=steps,
        model=np.array(model),
        treat_all=share - (1 - share) * odds,
        treat_none=np.zeros(len(steps)),
        low=np.array(low),
        high=np.array(high),
        prevalence=share,
    )


def _estimate_benefit(
    positive: NDArray[np.bool_], called: NDArray[np.bool_], odds: float, codes: NDArray[np.int64], confidence: float
) -> tuple[float, float, float]:
    """Net benefit at one threshold, and the ends of its interval."""
    kinds = (called & positive, called & ~positive)
    gain, loss = (clustered_wilson(kind, codes, confidence=confidence) for kind in kinds)
    added = np.array(
        [np.bincount(codes, weights=kind - share.value) for kind, share in zip(kinds, (gain, loss), strict=True)]
    )
    spread = added @ added.T
    scale = float(np.sqrt(spread[0, 0] * spread[1, 1]))
    correlation = float(spread[0, 1]) / scale if scale > 0 else 0.0

    def reach(one: float, two: float) -> float:
        return float(np.sqrt(max(0.0, one**2 + two**2 - 2 * correlation * one * two)))

    value = gain.value - odds * loss.value
    below = reach(gain.value - gain.low, odds * (loss.high - loss.value))
    above = reach(gain.high - gain.value, odds * (loss.value - loss.low))
    return value, value - below, value + above
