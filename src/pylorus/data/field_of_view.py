"""Detect the field of view of an endoscopic frame: what the lens shows, without the console's text, logos and insets.

The field is a bright convex shape on a nearly black background. On each ray from its center, its edge is where the dark
background begins; text is too thin to survive a morphological opening, and logos and insets are not connected to the
field. As parts of the border are hidden by text, by an inset or in dark mucosa, a complete shape is fitted to
the visible parts (`field_shape.py`). If no shape fits, the frame is left as it is and the reason is given.

Text inside the field remains; text that crosses the border is cut off at the border.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.core.formatting import format_percent
from pylorus.data.field_shape import Disc, Shape, fit_shape
from pylorus.data.files import RGB

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


MIN_SIDE = 32
"""Minimum side in pixels: in smaller frames a border can't be distinguished from texture."""
MIN_POINTS = 12
"""Minimum number of points on the edge."""
MIN_SUPPORT = 0.4
"""Minimum proportion of the points of the sharp edge that lie on the shape."""
MIN_AREA = 0.08
"""Minimum proportion of the frame that a field covers."""
FULL_AREA = 0.995
"""A field that covers at least this proportion of the frame is the whole frame."""
MAX_BRIGHT_OUTSIDE = 0.4
"""Maximum proportion of the pixels outside a field that may be bright: text, insets, bars."""
MIN_BRIGHT_AREA = 0.1
"""Proportion of the frame: a smaller bright area outside the field may be an inset in the only cut corner."""

_SHIFT = 4
"""Fractional bits of the coordinates with which OpenCV draws polygons."""


@dataclass(frozen=True)
class FieldOfView:
    """The field of view in a frame.

    Attributes:
        box: Left, top, right, bottom in pixels of the frame; right and bottom are exclusive.
        shape: `full` if nothing is to be cropped, otherwise a description of the shape, such as `octagon`.
        mask: True inside the field, of shape (bottom - top, right - left); None if the field fills the whole box.
        support: Proportion of the visible edge that lies on the shape, in [0, 1]; 0 if no shape was fitted.
        reason: Why this is the field, or why none was found, for the audit.
    """

    box: tuple[int, int, int, int]
    shape: str
    mask: NDArray[np.bool_] | None
    support: float
    reason: str


def find_field(image: RGB) -> FieldOfView:
    """Detect the field of view of a frame; deterministic.

    Args:
        image: RGB, uint8 of shape (height, width, 3).

    Returns:
        The field; the whole frame if it has no dark background around a field, or no shape fits the edge.

    Raises:
        ValueError: If the image is not a uint8 RGB array.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} of shape {image.shape}; expected uint8 of shape (height, width, 3).")
    if min(image.shape[:2]) < MIN_SIDE:
        return _build_full_field(
            image, f"no field of view found: a side is shorter than {MIN_SIDE} pixels; not cropped"
        )
    copy = create_working_copy(image)
    if copy is None:
        return _build_full_field(
            image, "no dark background at the edge of the frame: the field of view is the whole frame"
        )
    edge = find_edge(copy)
    if edge is None or len(edge.points) < MIN_POINTS:
        return _build_full_field(
            image, "no field of view found: no sharp edge between field and dark background; not cropped"
        )
    shape, points_on_shape = fit_shape(edge.points, centre=edge.centre)
    support = points_on_shape / len(edge.points)
    if support < MIN_SUPPORT:
        return _build_full_field(
            image,
            f"no field of view found: no shape fits the edge (at best {format_percent(support, digits=0)} %); "
            "not cropped",
        )
    objection = _find_objection(copy, shape)
    if objection is not None:
        return _build_full_field(image, f"{objection}; not cropped", support=support)
    return _scale_to_frame(image, shape, support)


def crop_to_field(image: RGB, field: FieldOfView | None = None) -> RGB:
    """Crop a frame to the bounding box of its field of view, and set pixels outside the field to black.

    Args:
        image: RGB, uint8 of shape (height, width, 3).
        field: The field of view; None: it is searched for in this image.

    Returns:
        A new array of the box's size; the same array object if the field is the whole frame or none was found.

    Raises:
        ValueError: If the image is not a uint8 RGB array.
    """
    import cv2

    field = find_field(image) if field is None else field
    if field.shape == "full":
        return image
    left, top, right, bottom = field.box
    cropped = image[top:bottom, left:right]
    if field.mask is None:
        return cropped.copy()
    return np.asarray(cv2.bitwise_and(cropped, cropped, mask=field.mask.view(np.uint8)))


def _build_full_field(image: RGB, reason: str, *, support: float = 0.0) -> FieldOfView:
    height, width = image.shape[:2]
    return FieldOfView((0, 0, width, height), "full", None, support, reason)


def _find_objection(copy: WorkingCopy, shape: Shape) -> str | None:
    """Return what speaks against a shape as the field; None if nothing does."""
    height, width = copy.grey.shape[0] - 2 * PAD, copy.grey.shape[1] - 2 * PAD
    inside = _draw_mask(shape, scale=(1.0, 1.0), size=(width, height))
    area = np.count_nonzero(inside) / inside.size
    if area < MIN_AREA:
        return f"no field of view found: the best shape covers only {format_percent(area, digits=0)} % of the frame"
    if area >= FULL_AREA:
        return "the field of view fills the frame"
    bright = copy.grey[PAD:-PAD, PAD:-PAD] > copy.threshold
    bright_outside = np.count_nonzero(bright & ~inside)
    bright_proportion = bright_outside / np.count_nonzero(~inside)
    if bright_proportion > MAX_BRIGHT_OUTSIDE and bright_outside > MIN_BRIGHT_AREA * inside.size:
        percent = format_percent(bright_proportion, digits=0)
        return f"no field of view found: {percent} % of the area outside the best shape is bright"
    return None


def _scale_to_frame(image: RGB, shape: Shape, support: float) -> FieldOfView:
    """Convert a shape from pixels of the working copy to a field of view in pixels of the frame."""
    height, width = image.shape[:2]
    scale = min(1.0, WORKING_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    mask = _draw_mask(shape, scale=(width / size[0], height / size[1]), size=(width, height))
    rows, columns = np.asarray(mask.any(axis=1)), np.asarray(mask.any(axis=0))
    top, bottom = int(np.argmax(rows)), height - int(np.argmax(rows[::-1]))
    left, right = int(np.argmax(columns)), width - int(np.argmax(columns[::-1]))
    box_mask = np.ascontiguousarray(mask[top:bottom, left:right])
    reason = f"{shape.name}: fits {format_percent(support, digits=0)} % of the visible edge"
    return FieldOfView((left, top, right, bottom), shape.name, None if box_mask.all() else box_mask, support, reason)


def _draw_mask(shape: Shape, *, scale: tuple[float, float], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Rasterize a shape, scaled by (x, y) `scale`, to a mask of a frame of `size` (width, height)."""
    import cv2

    width, height = size
    mask = np.zeros((height, width), dtype=np.uint8)
    corners = np.round((shape.get_polygon() * scale - 0.5) * 2**_SHIFT).astype(np.int32)
    cv2.fillConvexPoly(mask, corners, 1, lineType=cv2.LINE_8, shift=_SHIFT)
    if isinstance(shape, Disc):
        box = np.clip(np.array(shape.box), -1e6, 1e6) * np.tile(scale, 2)
        left, top, right, bottom = (max(0, round(side)) for side in box.tolist())
        mask[:top], mask[bottom:], mask[:, :left], mask[:, right:] = 0, 0, 0, 0
    return mask.view(np.bool_)
