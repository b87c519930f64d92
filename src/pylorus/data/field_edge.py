"""Find where the bright field of a frame ends: on each ray from its centre, the point where the dark background begins.

Text is too thin to survive a morphological opening, logos and insets are not connected to the field, and dark mucosa
fades out where the field ends sharply. Remaining errors on single rays are left to the fit of a shape (`field_fit.py`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.data.image import RGB

WORKING_SIDE = 480
"""Longer side of the working copy in pixels; an edge is located to within a third of such a pixel."""
PAD = 10
"""Pixels of background padded around the working copy, so that the frame's own border is an edge like any other."""
RAYS = 720
REACH = 7
"""Pixels of the working copy examined on each side of an edge."""
MAX_BACKGROUND = 28
"""Maximum grey level of the background: if the darkest part of a frame's rim is brighter, there is none."""
MAX_BACKGROUND_RANGE = 20
"""Maximum difference in grey levels between the darkest and the brightest background pixel."""
MIN_CONTRAST = 8
"""Minimum difference in grey levels between field and background at an edge."""

Plane = NDArray[np.floating]
Grey = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class WorkingCopy:
    """A small grey copy of a frame, padded with background.

    Attributes:
        grey: Maximum of the three channels, of shape (height + 2 PAD, width + 2 PAD), in grey levels.
        background: Grey level of the background.
        threshold: Grey level above which a pixel is not background.
    """

    grey: Grey
    background: float
    threshold: float


@dataclass(frozen=True)
class Edge:
    """The points where rays leave the field.

    Attributes:
        points: Of shape (rays, 2), x and y in pixels of the working copy without its padding; pixel centres are at 0.5.
        centre: Where the rays start, in the same coordinates.
        bright: Largest connected bright region without thin strokes, its holes filled, of the padded copy's shape.
    """

    points: Plane
    centre: tuple[float, float]
    bright: Mask


def create_working_copy(image: RGB) -> WorkingCopy | None:
    """Create the working copy of a frame; None if its rim is nowhere dark, so that no background surrounds a field.

    Args:
        image: RGB, uint8 of shape (height, width, 3).
    """
    import cv2

    height, width = image.shape[:2]
    scale = min(1.0, WORKING_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    # Area averaging takes seven times as long; the median filter removes the noise that it would remove.
    small = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR) if scale < 1 else np.ascontiguousarray(image)
    red, green, blue = cv2.split(small)
    grey = np.asarray(cv2.medianBlur(cv2.max(red, cv2.max(green, blue)), 3), dtype=np.uint8)
    rim = _extract_rim(grey)
    dark = rim[rim < np.percentile(rim, 1) + MAX_BACKGROUND_RANGE]
    background, high = np.percentile(dark, [50, 84])
    if background > MAX_BACKGROUND:
        return None
    threshold = float(background + min(MAX_BACKGROUND_RANGE, max(MIN_CONTRAST, 3 * (high - background))))
    padded = cv2.copyMakeBorder(grey, PAD, PAD, PAD, PAD, cv2.BORDER_CONSTANT, value=float(background))
    return WorkingCopy(np.asarray(padded), float(background), threshold)


def find_edge(copy: WorkingCopy) -> Edge | None:
    """Find the sharp edge of the largest bright region; None if no bright region is larger than text."""
    bright = _find_largest_bright_region(copy)
    if bright is None:
        return None
    rows, columns = (np.flatnonzero(bright.any(axis=axis)) for axis in (1, 0))
    centre = np.array([0.5 * (columns[0] + columns[-1]), 0.5 * (rows[0] + rows[-1])], dtype=np.float32)
    angles = np.arange(RAYS, dtype=np.float32) * np.float32(2 * np.pi / RAYS)
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    last_bright = _find_last_bright(bright, centre, directions)
    offsets = np.arange(-REACH, REACH + 1, dtype=np.float32)
    profiles = _sample_rays(copy.grey, centre, directions, last_bright[:, None] + offsets)
    sharp, shift = _find_half_level(profiles, copy.threshold)
    distance = last_bright + shift
    points = centre + directions * distance[:, None] + 0.5 - PAD
    start = float(centre[0]) + 0.5 - PAD, float(centre[1]) + 0.5 - PAD
    return Edge(np.asarray(points[sharp], dtype=np.float64), start, bright)


def _extract_rim(grey: Grey) -> Grey:
    """Return the pixels along the four sides as a flat array."""
    width = max(2, round(0.03 * min(grey.shape)))
    between = grey[width:-width]
    strips = grey[:width], grey[-width:], between[:, :width], between[:, -width:]
    return np.concatenate([strip.ravel() for strip in strips])


def _find_largest_bright_region(copy: WorkingCopy) -> Mask | None:
    import cv2

    bright = (copy.grey > copy.threshold).astype(np.uint8)
    contours, _ = cv2.findContours(bright, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(bright, contours, -1, 1, thickness=-1)
    side = 2 * round(0.009 * max(copy.grey.shape)) + 1
    opened = cv2.morphologyEx(bright, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_RECT, (side, side)))
    count, labels, statistics, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
    if count < 2:
        return None
    return np.asarray(labels == 1 + int(np.argmax(statistics[1:, cv2.CC_STAT_AREA])))


def _find_last_bright(bright: Mask, centre: Plane, directions: Plane) -> Plane:
    """Return the distance from the centre to the last bright pixel of each ray."""
    import cv2

    reach = np.arange(int(np.hypot(*bright.shape)) // 2 + 2, dtype=np.float32)
    columns = centre[0] + directions[:, :1] * reach
    rows = centre[1] + directions[:, 1:] * reach
    samples = cv2.remap(bright.astype(np.uint8), columns, rows, cv2.INTER_NEAREST, borderValue=0)
    return np.asarray(reach[-1] - np.argmax(samples[:, ::-1], axis=1), dtype=np.float32)


def _sample_rays(grey: Grey, centre: Plane, directions: Plane, distances: Plane) -> Plane:
    """Sample grey levels at the given distances from the centre on each ray; shape (rays, distances)."""
    import cv2

    columns = (centre[0] + directions[:, :1] * distances).astype(np.float32)
    rows = (centre[1] + directions[:, 1:] * distances).astype(np.float32)
    return np.asarray(cv2.remap(grey, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32)


def _find_half_level(profiles: Plane, threshold: float) -> tuple[Mask, Plane]:
    """Find which profiles fall sharply to the background, and where.

    Returns:
        Whether each profile is sharp, and where it crosses the level halfway between field and background, in pixels
        from the profile's centre; each of shape (rays,).
    """
    inside, outside = profiles[:, 1 : REACH - 2].mean(axis=1), profiles[:, REACH + 3 : -1].mean(axis=1)
    contrast = inside - outside
    steep = profiles[:, REACH - 2] - profiles[:, REACH + 2] >= 0.5 * contrast
    sharp = steep & (contrast >= MIN_CONTRAST) & (outside <= threshold)
    above = profiles >= (0.5 * (inside + outside))[:, None]
    last = profiles.shape[1] - 1 - np.argmax(above[:, ::-1], axis=1)
    last = np.minimum(last, profiles.shape[1] - 2)
    rays = np.arange(len(profiles))
    high, low = profiles[rays, last], profiles[rays, last + 1]
    fraction = (high - 0.5 * (inside + outside)) / np.maximum(high - low, 1)
    return np.asarray(sharp), np.asarray(last + np.clip(fraction, 0, 1) - REACH)
