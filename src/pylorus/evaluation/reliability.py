"""The reliability curve: how sure the model was against how often it was right."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.inputs import checked_probabilities, group_codes, labels_in_range
from pylorus.evaluation.interval import check_confidence
from pylorus.evaluation.proportion import Proportion, clustered_wilson

BINS = 10
"""Bins unless told otherwise: 45 images each on a test set of 450."""


@dataclass(frozen=True, eq=False)
class ReliabilityCurve:
    """Bins of images by the probability of their likeliest class, from least to most sure.

    Attributes:
        certainty: Mean probability of the likeliest class in each bin, in [0, 1], of shape (bins,).
        accuracy: Share of the bin's images recognised, with its Wilson interval, one a bin.
        images: How many images a bin holds, of shape (bins,).
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
    """Sort images by how sure the model was and cut them into bins of equal mass.

    Bins of equal mass, not of equal width: a trained model is nearly always sure, so bins of equal width
    would be empty below and hold nearly all images above, and their error is the more biased (Roelofs et al.
    2022). Images of equal probability stay in one bin, so the curve does not depend on their order; bins may
    then be fewer.

    Args:
        probabilities: Shape (n, classes); rows sum to one.
        true: True classes, of shape (n,).
        groups: Names of shape (n,) of what the images belong to, or None if each stands for itself.
        bins: How many bins to aim at, >= 1; no more than there are images.
        confidence: Coverage of the accuracy's intervals, in (0, 1).

    Raises:
        ValueError: If the arrays don't fit each other, are empty, hold nan, or bins is below 1.

    Example:
        >>> sure = np.array([0.6, 0.7, 0.9, 1.0])
        >>> curve = reliability_curve(np.column_stack([sure, 1 - sure]), np.array([1, 0, 0, 0]), bins=2)
        >>> curve.certainty.round(2).tolist(), [share.value for share in curve.accuracy]
        ([0.65, 0.95], [0.5, 1.0])
    """
    check_confidence(confidence)
    table = checked_probabilities(probabilities)
    truth = labels_in_range(true, table.shape[1], name="true")
    if len(truth) != len(table):
        raise ValueError(f"{len(truth)} true labels but probabilities of {len(table)} images")
    if bins < 1:
        raise ValueError(f"bins is {bins}; expected at least 1")
    codes = group_codes(groups, length=len(truth))
    sure, right = table.max(axis=1), table.argmax(axis=1) == truth
    member = assign_equal_mass_bins(sure, bins=bins)
    images = np.bincount(member).astype(np.int64)
    certainty = np.bincount(member, weights=sure) / images
    accuracy = tuple(
        clustered_wilson(right[member == each], codes[member == each], confidence=confidence)
        for each in range(len(images))
    )
    gaps = np.abs(certainty - np.array([share.value for share in accuracy]))
    return ReliabilityCurve(certainty, accuracy, images, float((images * gaps).sum() / len(truth)))


def assign_equal_mass_bins(values: NDArray[np.float64], *, bins: int) -> NDArray[np.int64]:
    """Assign each value to a bin, 0, 1, … without gaps; equal values share one.

    Args:
        values: Of shape (n,).
        bins: How many bins of equally many values to aim at, >= 1.

    Example:
        >>> assign_equal_mass_bins(np.array([0.6, 0.9, 0.7, 1.0]), bins=2).tolist()
        [0, 1, 0, 1]
    """
    ordered = np.sort(values)
    starts = ordered[(np.arange(min(bins, len(values))) * len(values)) // min(bins, len(values))]
    member = np.searchsorted(np.unique(starts), values, side="right") - 1
    return member.astype(np.int64)
