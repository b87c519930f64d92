"""What the pixels of one image say about how it was taken: sharpness, light, black border, burned-in text."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

LONGEST = 256
"""Pixels of the longer side at which sharpness and border are measured: else a larger file would be a sharper one."""
LONGEST_TEXT = 768
"""Pixels of the longer side at which text is looked for."""
DARK = 24
"""Grey level up to which a pixel at the frame's edge is border."""

Grey = NDArray[np.uint8]


@dataclass(frozen=True)
class Look:
    """Measures of one image.

    Attributes:
        sharpness: Variance of the Laplacian in grey levels squared, where the image is not border.
        brightness: Mean grey level where the image is not border, in [0, 255].
        border: Share of the frame that is dark and joined to its edge, in [0, 1].
        letters: Small bright shapes in that dark part, the size of letters.
    """

    sharpness: float
    brightness: float
    border: float
    letters: int


def look_at(grey: Grey) -> Look:
    """The measures of an image of shape (height, width)."""
    small = _at_most(grey, LONGEST)
    edge = _joined_to_edge(small <= DARK)
    inside = cv2.erode((~edge).astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=1).astype(bool)
    if not inside.any():
        inside = np.ones_like(edge)
    laplacian = cv2.Laplacian(small, cv2.CV_32F)
    return Look(
        sharpness=float(laplacian[inside].var()),
        brightness=float(small[inside].mean()),
        border=float(edge.mean()),
        letters=count_letters(_at_most(grey, LONGEST_TEXT)),
    )


def count_letters(grey: Grey) -> int:
    """Bright shapes the size of letters in the dark border of a frame.

    A sign, no reader: text over the mucosa is not seen, nor letters that touch the field of view, nor dark letters
    on a bright bar; a logo or a scale in the border counts as letters.

    Args:
        grey: Of shape (height, width).

    Returns:
        How many; four or more are a sign of text.
    """
    longest = max(grey.shape)
    if longest < 96:
        return 0  # letters would be a few pixels
    stroke = max(5, round(longest / 40) | 1)
    ground = cv2.morphologyEx(grey, cv2.MORPH_OPEN, np.ones((stroke, stroke), np.uint8))
    border = _joined_to_edge(np.asarray(ground <= 2 * DARK))
    bright = border & (grey.astype(np.int16) - ground >= 60)
    count, _, boxes, _ = cv2.connectedComponentsWithStats(bright.astype(np.uint8), connectivity=8)
    height, width, area = (boxes[1:count, which] for which in (cv2.CC_STAT_HEIGHT, cv2.CC_STAT_WIDTH, cv2.CC_STAT_AREA))
    high = (height >= max(4, longest / 100)) & (height <= longest / 16)
    return int((high & (width <= longest / 8) & (area >= 4)).sum())


def _at_most(grey: Grey, longest: int) -> Grey:
    scale = longest / max(grey.shape)
    if scale >= 1:
        return grey
    target = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
    return np.asarray(cv2.resize(grey, target, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _joined_to_edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The parts of a mask that reach the frame's edge."""
    _, parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    edge = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    return np.asarray(np.isin(parts, edge[edge > 0]), dtype=np.bool_)
