"""Measure the quality of an image: sharpness, brightness, black border, burned-in text."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

LONGEST = 256
"""Longer side in pixels at which sharpness and border are measured: otherwise sharpness would depend on the size."""
LONGEST_TEXT = 768
"""Longer side in pixels at which text is searched for."""
DARK = 24
"""Grey level up to which a pixel connected to the frame's edge is border."""

Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageMeasures:
    """Measures of one image.

    Attributes:
        sharpness: Variance of the Laplacian outside the border, in grey levels squared.
        brightness: Mean grey level outside the border, in [0, 255].
        border: Fraction of the frame that is dark and connected to its edge, in [0, 1].
        letters: Number of small bright shapes of the size of letters in the border.
    """

    sharpness: float
    brightness: float
    border: float
    letters: int


def measure_image(grey: Grey) -> ImageMeasures:
    """Measure a grey image of shape (height, width)."""
    resized = _resize_to_limit(grey, LONGEST)
    border = _find_edge_regions(resized <= DARK)
    interior = cv2.erode((~border).astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=1).astype(bool)
    if not interior.any():
        interior = np.ones_like(border)
    laplacian = cv2.Laplacian(resized, cv2.CV_32F)
    return ImageMeasures(
        sharpness=float(laplacian[interior].var()),
        brightness=float(resized[interior].mean()),
        border=float(border.mean()),
        letters=count_letters(_resize_to_limit(grey, LONGEST_TEXT)),
    )


def count_letters(grey: Grey) -> int:
    """Count bright shapes of the size of letters in the dark border of a frame.

    This indicates text but does not read it. It misses text over the mucosa, letters that touch the field of view and
    dark letters on a bright bar; a logo or a scale in the border counts as letters.

    Args:
        grey: Image of shape (height, width).

    Returns:
        Number of shapes; four or more indicate text.
    """
    longest = max(grey.shape)
    if longest < 96:
        return 0  # letters would have a few pixels only
    stroke = max(5, round(longest / 40) | 1)
    background = cv2.morphologyEx(grey, cv2.MORPH_OPEN, np.ones((stroke, stroke), np.uint8))
    border = _find_edge_regions(np.asarray(background <= 2 * DARK))
    strokes = border & (grey.astype(np.int16) - background >= 60)
    count, _, stats, _ = cv2.connectedComponentsWithStats(strokes.astype(np.uint8), connectivity=8)
    height, width, area = (stats[1:count, which] for which in (cv2.CC_STAT_HEIGHT, cv2.CC_STAT_WIDTH, cv2.CC_STAT_AREA))
    has_letter_height = (height >= max(4, longest / 100)) & (height <= longest / 16)
    return int((has_letter_height & (width <= longest / 8) & (area >= 4)).sum())


def _resize_to_limit(grey: Grey, longest: int) -> Grey:
    scale = longest / max(grey.shape)
    if scale >= 1:
        return grey
    target = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    return np.asarray(cv2.resize(grey, target, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _find_edge_regions(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the connected components of a mask that touch the frame's edge."""
    _, components = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    edge_labels = np.concatenate([components[0], components[-1], components[:, 0], components[:, -1]])
    return np.asarray(np.isin(components, edge_labels[edge_labels > 0]), dtype=np.bool_)
