"""The net-benefit curve: whether acting on the model does more good than treating everybody or nobody.

Vickers and Elkin (Med Decis Making 2006;26:565). A threshold probability p says how much a needless
intervention weighs: whoever acts at 10 % holds a missed case for nine times as bad as a needless one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.inputs import checked_flags, checked_scores

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
        prevalence: The class's share of the images, on which the whole curve rests: in a test set with as
            many cancers as ulcers it says little of a clinic where cancers are rare.
    """

    threshold: NDArray[np.float64]
    model: NDArray[np.float64]
    treat_all: NDArray[np.float64]
    treat_none: NDArray[np.float64]
    prevalence: float


def net_benefit(
    positive: NDArray[np.bool_],
    probability: NDArray[np.float64],
    *,
    thresholds: NDArray[np.float64] = THRESHOLDS,
) -> NetBenefit:
    """TP/n - FP/n * p / (1 - p) at each threshold probability p.

    Args:
        positive: Shape (n,): whether each image is of the class.
        probability: Shape (n,): the class's probability, calibrated, in [0, 1].
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
    flags = checked_flags(positive, name="positive")
    chance = checked_scores(probability, length=len(flags))
    if ((chance < 0) | (chance > 1)).any():
        raise ValueError("a net benefit needs probabilities in [0, 1]; give calibrated ones, no logits")
    steps = np.asarray(thresholds, dtype=np.float64)
    if steps.ndim != 1 or not len(steps) or not ((steps > 0) & (steps < 1)).all() or (np.diff(steps) <= 0).any():
        raise ValueError("thresholds must be rising probabilities in (0, 1)")
    hits, others = np.sort(chance[flags]), np.sort(chance[~flags])
    true_positives = len(hits) - np.searchsorted(hits, steps, side="left")
    false_positives = len(others) - np.searchsorted(others, steps, side="left")
    odds = steps / (1 - steps)
    share = float(flags.mean())
    return NetBenefit(
        threshold=steps,
        model=(true_positives - false_positives * odds) / len(flags),
        treat_all=share - (1 - share) * odds,
        treat_none=np.zeros(len(steps)),
        prevalence=share,
    )
