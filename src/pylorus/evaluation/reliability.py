"""The reliability curve: accuracy against certainty of the model."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.evaluation.inputs import check_labels, check_probabilities, encode_groups
from pylorus.evaluation.interval import check_confidence
from pylorus.evaluation.proportion import Proportion, clustered_wilson

BINS = 10
"""Default number of bins: 45 images per bin for a test set of 450."""


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
