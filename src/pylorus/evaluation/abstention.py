"""The risk-coverage curve: how many mistakes are left if the least certain images go to the doctor."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.estimate import Estimate
from pylorus.evaluation.influence import estimate_from_variance, estimate_mean_variance
from pylorus.evaluation.inputs import checked_flags, checked_scores, group_codes
from pylorus.evaluation.interval import check_confidence
from pylorus.evaluation.ranking import compute_mean_share_above


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Points of the curve, from the surest images alone to all images; each array of shape (points,).

    Attributes:
        certainty: The least certainty at which the model still answers.
        coverage: Share of images answered, in (0, 1]; the last is 1.
        risk: Share of the answered images that are mistaken, in [0, 1]; the last is 1 - accuracy.
        area: Mean risk over images, each at its own coverage (AURC, Geifman and El-Yaniv 2017), in [0, 1]:
            lower is better, and 1 - accuracy is what certainty that says nothing gives on average.
    """

    certainty: NDArray[np.float64]
    coverage: NDArray[np.float64]
    risk: NDArray[np.float64]
    area: float


def risk_coverage(correct: NDArray[np.bool_], certainty: NDArray[np.float64]) -> RiskCoverage:
    """Answer the surest images first and count mistakes.

    Images of equal certainty are answered together, so the curve does not depend on their order.

    Args:
        correct: Shape (n,): whether each image is recognised.
        certainty: Shape (n,): how sure the model was, such as the largest probability; any finite numbers.

    Raises:
        ValueError: If the arrays don't fit each other, are empty, or hold nan.

    Example:
        >>> curve = risk_coverage(np.array([True, False, True, True]), np.array([0.9, 0.4, 0.8, 0.8]))
        >>> curve.coverage.tolist(), curve.risk.tolist()
        ([0.25, 0.75, 1.0], [0.0, 0.0, 0.25])
    """
    right = checked_flags(correct, name="correct")
    sure = checked_scores(certainty, length=len(right))
    levels, member, images = np.unique(-sure, return_inverse=True, return_counts=True)
    answered = np.cumsum(images)
    mistakes = np.cumsum(np.bincount(member, weights=~right))
    risk = mistakes / answered
    return RiskCoverage(
        certainty=-levels,
        coverage=answered / len(right),
        risk=risk,
        area=float((risk * images).sum() / len(right)),
    )


def area_under_risk_coverage(
    correct: NDArray[np.bool_],
    certainty: NDArray[np.float64],
    groups: NDArray[np.generic] | None = None,
    *,
    confidence: float = 0.95,
) -> Estimate:
    """Compute the area under the risk-coverage curve with an interval that keeps groups together.

    The interval is the Wilson interval of as many images as have the area's linearised variance, with Student's t.

    Args:
        correct: Shape (n,): whether each image is recognised.
        certainty: Shape (n,): how sure the model was; any finite numbers.
        groups: Names of shape (n,) of what the images belong to, or None if each stands for itself.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        In [0, 1]; the value is the `area` of `risk_coverage`.

    Raises:
        ValueError: If the arrays don't fit each other, are empty, or hold NaN.

    Example:
        >>> found = area_under_risk_coverage(np.array([True, False, True, True]), np.array([0.9, 0.4, 0.8, 0.8]))
        >>> round(found.value, 4), found.low < found.value < found.high
        (0.0625, True)
    """
    check_confidence(confidence)
    right = checked_flags(correct, name="correct")
    sure = checked_scores(certainty, length=len(right))
    codes = group_codes(groups, length=len(right))
    found = compute_mean_share_above(~right, np.ones(len(right), dtype=np.bool_), sure)
    spread = estimate_mean_variance(found.contributions * len(right), codes)
    return estimate_from_variance(found.value, spread, codes, confidence=confidence)
