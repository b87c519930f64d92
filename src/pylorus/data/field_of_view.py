"""Detect the field of view of an endoscopic frame: what the lens shows, without the console's text, logos and insets.

Around the field lies ground of one or several flat colours: black, a mat painted into the corners, a status bar, white
paper. Flat areas of one exact colour at the rim are ground; mucosa is smooth in places, but of all shades. A small copy
of the frame says how much each pixel differs from the ground: the field is its largest region of large differences, as
text is too thin to survive a morphological opening. Where the region ends sharply lie the points of its edge.

As parts of the border are hidden by text, by an inset or in dark mucosa, complete shapes are fitted to the edge
(`field_shape.py`) and weighed: how much of the shape's border is visible, how many points it explains, what it cuts off
and what ground it leaves inside. If none convinces, the frame is left as it is and the reason is given.

Text inside the field remains; text that crosses the border is cut off at the border.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pylorus.core.formatting import format_percent
from pylorus.data.field_shape import (
    SNAP,
    FieldOfView,
    Shape,
    build_full_field,
    draw_mask,
    fit_shapes,
    scale_to_frame,
)
from pylorus.data.files import RGB

FINDER = 2
"""Version of the finder, to be raised when it finds another field in some frame. A bundle states the version with which
it was trained; version 1 is `first_field_finder.py`."""
WORKING_SIDE = 320
"""Longer side of the working copy in pixels; an edge is located to within a third of such a pixel."""
PAD = 8
"""Pixels of ground padded around the working copy, so that the frame's own border is an edge like any other."""
RIM = 2
"""Outermost pixels of the working copy that are not trusted: a hairline around the frame hides what lies inside it."""
BAND = 0.05
"""Width of the rim in which ground colours are sought, as a proportion of the shorter side."""
RIM_STEP = 5
"""Every so many pixels of the rim are examined."""
MAX_COLOURS = 6
"""Maximum number of ground colours."""
FLAT_RANGE = 2
"""Maximum difference in grey levels between neighbours in flat ground, after smoothing."""
MIN_COLOUR = 0.015
"""Minimum proportion of the rim that a ground colour covers."""
SATURATED, MIN_SATURATED_CORNERS = 225, 3
"""Grey level from which a colour may be overexposed mucosa, and the number of corners of the frame that it fills if it
is ground."""
MIN_INNER_COLOUR = 0.12
"""Minimum proportion of the rim of the region inside the ground that a further ground colour covers."""
MIN_CORE = 0.4
"""Minimum proportion of a ground colour's pixels that are surrounded by two pixels of the same colour."""
MIN_THRESHOLD, MAX_THRESHOLD = 5.0, 20.0
"""Grey levels by which a pixel differs at least from the ground, with the least and the most noise."""
MAX_EDGE_POINTS = 400
REACH, OUTER_REACH = 8, 4
"""Pixels of the working copy examined inside and outside of the region's contour, which lies where the edge ends."""
_OFFSETS = np.arange(-REACH, OUTER_REACH + 1, dtype=np.float32)[:, None]
_NUMBERS = np.arange(1, len(_OFFSETS) + 1, dtype=np.uint8)[:, None]
_SHARES = np.array([[0.8], [0.5], [0.2]], dtype=np.float32)
"""Of the difference between field and ground, where the beginning, the middle and the end of an edge lie."""
MAX_EDGE_WIDTH = 5.0
"""Maximum width in pixels of the working copy over which an edge falls from 80 % to 20 %; shadows fall more slowly."""
MIN_CONTRAST = 7
"""Minimum difference in grey levels between field and ground at an edge."""

Plane = NDArray[np.floating]
Grey = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Value = TypeVar("Value", np.uint8, np.bool_)


@dataclass(frozen=True)
class WorkingCopy:
    """A small copy of a frame, padded with ground, in which each pixel says how much it differs from the ground.

    Attributes:
        difference: Largest difference of a channel from the nearest ground colour, of shape
            (height + 2 PAD, width + 2 PAD), in grey levels.
        threshold: Difference above which a pixel is not ground.
        colours: The ground colours.
        region: Contour of the largest region that is not ground, of shape (points, 2), in padded pixels.
    """

    difference: Grey
    threshold: float
    colours: tuple[NDArray[np.float32], ...]
    region: NDArray[np.int32]


def create_working_copy(image: RGB) -> WorkingCopy | None:
    """Create the working copy of a frame; None if its rim shows no flat colour, so that no ground surrounds a field.

    A frame that is so long that its copy would have hardly any width has none either.

    Args:
        image: RGB, uint8 of shape (height, width, 3).
    """
    import cv2

    height, width = image.shape[:2]
    scale = min(1.0, WORKING_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if min(size) < 4 * RIM:
        return None
    # Area averaging takes seven times as long; the median filter removes the noise that it would remove.
    small = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR) if scale < 1 else image.copy()
    small[:RIM], small[-RIM:] = small[RIM], small[-RIM - 1]
    small[:, :RIM], small[:, -RIM:] = small[:, RIM : RIM + 1], small[:, -RIM - 1 : -RIM]
    small = np.asarray(cv2.medianBlur(small, 3), dtype=np.uint8)
    smooth = np.asarray(cv2.blur(small, (3, 3)), dtype=np.uint8)
    slopes = cv2.split(cv2.morphologyEx(smooth, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)))
    flat = cv2.max(slopes[0], cv2.max(slopes[1], slopes[2])) <= FLAT_RANGE
    band = max(2, round(BAND * min(size)))
    rim = _extract_rim(smooth, band)[::RIM_STEP]
    colours = _find_flat_colours(rim[_extract_rim(flat, band)[::RIM_STEP]], least=MIN_COLOUR * len(rim))
    colours = [colour for colour in colours if _fills_areas(smooth, colour) and _is_not_glare(smooth, colour)]
    if not colours:
        return None
    difference = _measure_difference(small, colours)
    threshold = _measure_noise(difference, _measure_difference(smooth, colours))
    region = _find_region(difference, threshold, thickness=3 if len(colours) == 1 else 7)
    for _ in range(2):  # a mat or a banner may surround a second ground
        if region is None:
            return None
        left, top, right, bottom = _get_bounds(region, size)
        inner = np.s_[top:bottom, left:right]
        rim = _extract_rim(smooth[inner], band)[::RIM_STEP]
        is_unknown = _extract_rim(flat[inner], band) & (_extract_rim(difference[inner], band) > threshold)
        unknown = rim[is_unknown[::RIM_STEP]]
        further = _find_flat_colours(unknown, least=MIN_INNER_COLOUR * len(rim))
        further = [colour for colour in further if _fills_areas(smooth, colour) and colour.min() < SATURATED]
        if not further:
            break
        colours += further
        difference = _measure_difference(small, colours)
        region = _find_region(difference, threshold, thickness=7)
    if region is None:
        return None
    padded = cv2.copyMakeBorder(difference, PAD, PAD, PAD, PAD, cv2.BORDER_CONSTANT, value=0)
    return WorkingCopy(np.asarray(padded), threshold, tuple(colours), region)


def _extract_rim(values: NDArray[Value], width: int) -> NDArray[Value]:
    """Return the pixels along the four sides as an array of shape (pixels, ...)."""
    between = values[width:-width]
    strips = values[:width], values[-width:], between[:, :width], between[:, -width:]
    return np.concatenate([strip.reshape(-1, *values.shape[2:]) for strip in strips])


def _find_flat_colours(pixels: Grey, *, least: float) -> list[NDArray[np.float32]]:
    """Find the colours that many flat pixels share exactly; smooth mucosa is flat in places, but of all shades.

    Args:
        pixels: Of shape (pixels, 3).
        least: Minimum number of pixels of a colour.
    """
    colours: list[NDArray[np.float32]] = []
    rest = np.ascontiguousarray(pixels.T, dtype=np.int32)
    cells = (rest[0] >> 2) * 4096 + (rest[1] >> 2) * 64 + (rest[2] >> 2)
    misses = 0
    while rest.shape[1] >= least and len(colours) < MAX_COLOURS and misses < 4:
        ordered = np.sort(cells)
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        commonest = ordered[starts[np.argmax(np.diff(starts, append=len(ordered)))]]
        levels = np.sort(rest[:, cells == commonest], axis=1)
        count = levels.shape[1]
        colour = (levels[:, (count - 1) // 2] + levels[:, count // 2]) / 2  # the median
        red, green, blue = np.abs(rest - colour[:, None])
        distance = np.maximum(np.maximum(red, green), blue)
        same, similar = np.count_nonzero(distance <= 1.5), np.count_nonzero(distance <= 5)
        if same >= least and (same >= 0.66 * similar or (same >= 0.4 * similar and same >= 6 * least)):
            colours.append(np.asarray(colour, dtype=np.float32))
        else:
            misses += 1
        is_other = distance > 5
        rest, cells = rest[:, is_other], cells[is_other]
    return colours


def _fills_areas(smooth: RGB, colour: NDArray[np.float32]) -> bool:
    """Whether a colour fills areas, as ground does; the pixels of a shade of mucosa form narrow bands."""
    import cv2

    low, high = ([min(255.0, max(0.0, level + offset)) for level in colour.tolist()] for offset in (-3, 3))
    same = cv2.inRange(smooth, tuple(low), tuple(high))
    core = cv2.erode(same, np.ones((5, 5), np.uint8))
    return cv2.countNonZero(core) >= MIN_CORE * cv2.countNonZero(same)


def _is_not_glare(smooth: RGB, colour: NDArray[np.float32]) -> bool:
    """Whether a colour is not saturated, as overexposed mucosa is, or fills the corners of the frame, as paper does."""
    corners = smooth[[RIM, RIM, -RIM - 1, -RIM - 1], [RIM, -RIM - 1, RIM, -RIM - 1]].astype(np.float32)
    in_corners = int(np.count_nonzero(np.abs(corners - colour).max(axis=1) <= 2 * FLAT_RANGE))
    return bool(colour.min() < SATURATED) or in_corners >= MIN_SATURATED_CORNERS


def _measure_difference(small: RGB, colours: list[NDArray[np.float32]]) -> Grey:
    """Return the largest difference of a channel from the nearest colour, of shape (height, width)."""
    import cv2

    nearest: Grey | None = None
    for colour in colours:
        red, green, blue = cv2.split(cv2.absdiff(small, np.array([*colour, 0.0], dtype=np.float64)))
        distance = np.asarray(cv2.max(red, cv2.max(green, blue)), dtype=np.uint8)
        nearest = distance if nearest is None else np.asarray(cv2.min(nearest, distance), dtype=np.uint8)
    assert nearest is not None
    return nearest


def _measure_noise(difference: Grey, smooth_difference: Grey) -> float:
    """Return the threshold of what is not ground: above the noise of the pixels that are ground for certain."""
    import cv2

    ground = cv2.threshold(smooth_difference, 1, 255, cv2.THRESH_BINARY_INV)[1]
    totals = np.cumsum(cv2.calcHist([difference], [0], ground, [256], [0, 256]))
    count = int(totals[-1])
    if not count:
        return MIN_THRESHOLD
    position = 0.98 * (count - 1)  # of the 98th percentile among the sorted values
    below, above = np.searchsorted(totals, [int(position), min(int(position) + 1, count - 1)], side="right")
    noise = below + (above - below) * (position - int(position))
    return float(min(MAX_THRESHOLD, max(MIN_THRESHOLD, 2.0 * noise + 1)))


def _find_region(difference: Grey, threshold: float, *, thickness: int) -> NDArray[np.int32] | None:
    """Return the contour of the largest region that is not ground; None if there is none.

    Args:
        difference: Of the working copy.
        threshold: Difference above which a pixel is not ground.
        thickness: Width in pixels of lines that are not part of the region.
    """
    import cv2

    bright = cv2.threshold(difference, threshold, 1, cv2.THRESH_BINARY)[1]
    bright = cv2.copyMakeBorder(bright, PAD, PAD, PAD, PAD, cv2.BORDER_CONSTANT, value=0)
    # First the outline of a mat goes, so that its inside is not filled, then the holes, then text.
    bright = cv2.morphologyEx(bright, cv2.MORPH_OPEN, np.ones((thickness, thickness), np.uint8))
    contours, _ = cv2.findContours(bright, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(bright, contours, -1, 1, thickness=-1)
    side = 2 * round(0.009 * max(difference.shape)) + 1
    opened = cv2.morphologyEx(bright, cv2.MORPH_OPEN, np.ones((side, side), np.uint8))
    contours, _ = cv2.findContours(opened, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return None
    return np.asarray(max(contours, key=cv2.contourArea)[:, 0], dtype=np.int32)


def _get_bounds(region: NDArray[np.int32], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a region in pixels of the working copy without its padding."""
    import cv2

    left, top, width, height = cv2.boundingRect(region)
    left, top = left - PAD, top - PAD
    return max(0, left), max(0, top), min(size[0], left + width), min(size[1], top + height)


def find_edge(copy: WorkingCopy) -> tuple[Plane, Plane]:
    """Find the points at which the region has a sharp edge.

    Returns:
        The points in pixels of the working copy without its padding, and the normals there, which point out of the
        region; both of shape (points, 2).
    """
    import cv2

    contour = copy.region[:: 1 + len(copy.region) // MAX_EDGE_POINTS].T.astype(np.float32)
    if contour.shape[1] < MIN_POINTS:
        return np.empty((0, 2)), np.empty((0, 2))
    closed = np.concatenate([contour[:, -2:], contour, contour[:, :2]], axis=1)
    along_x, along_y = closed[:, 4:] - closed[:, :-4]
    normals = np.stack([along_y, -along_x])
    normals /= np.maximum(np.hypot(along_y, along_x), 1e-6)
    if ((contour - contour.mean(axis=1, keepdims=True)) * normals).sum() < 0:
        normals = -normals  # outwards
    profiles = cv2.remap(
        copy.difference,
        contour[0] + normals[0] * _OFFSETS,
        contour[1] + normals[1] * _OFFSETS,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
    ).astype(np.float32)
    is_sharp, shift = _find_half_level(profiles, copy.threshold)
    points = contour[:, is_sharp] + normals[:, is_sharp] * shift[is_sharp] + 0.5 - PAD
    return points.T, normals[:, is_sharp].astype(np.float64).T


def _find_half_level(profiles: Plane, threshold: float) -> tuple[Mask, Plane]:
    """Find which profiles fall sharply to the ground, and where.

    Args:
        profiles: Differences from the ground, of shape (pixels of a profile, points).
        threshold: Difference above which a pixel is not ground.

    Returns:
        Whether each profile is sharp, and where it crosses the level halfway between field and ground, in pixels
        from the profile's centre; each of shape (points,).
    """
    inside, outside = profiles[: REACH - 4].mean(axis=0), profiles[-3:].min(axis=0)
    contrast = inside - outside
    high, half, low = _find_last_crossings(profiles, outside + _SHARES * contrast)
    sharp = (low - high <= MAX_EDGE_WIDTH) & (contrast >= MIN_CONTRAST) & (outside <= threshold)
    return np.asarray(sharp), half


def _find_last_crossings(profiles: Plane, levels: Plane) -> Plane:
    """Find where each profile falls below each of its levels for the last time, in pixels from its centre.

    Args:
        profiles: Of shape (pixels of a profile, points).
        levels: Of shape (levels, points).

    Returns:
        Of shape (levels, points).
    """
    is_above = profiles >= levels[:, None]
    last = (is_above * _NUMBERS).max(axis=1).astype(np.int64) - 1  # -1 if none is above
    last = np.where(last < 0, len(profiles) - 2, np.minimum(last, len(profiles) - 2))
    columns = np.arange(profiles.shape[1])
    high, low = profiles[last, columns], profiles[last + 1, columns]
    fraction = (high - levels) / np.maximum(high - low, 1)
    return np.asarray(last + np.clip(fraction, 0, 1) - REACH)


MIN_SIDE = 32
"""Minimum side in pixels: in smaller frames a border can't be distinguished from texture."""
MIN_POINTS = 12
"""Minimum number of points on the edge."""
MIN_SUPPORT = 0.5
"""Minimum proportion of the points of the sharp edge that lie on the shape."""
MIN_AREA = 0.08
"""Minimum proportion of the frame that a field covers."""
FULL_AREA = 0.995
"""A field that covers at least this proportion of the frame is the whole frame."""
FILLS_FRAME = "the field of view fills the frame"
MAX_LAG = 0.3
"""A shape that explains fewer points than the best by this proportion of all points is not considered."""
CAUTION = 0.9
"""Proportion of the border that has to be visible in addition, for each proportion of the picture that is cut off."""
HAS_EDGE, IS_INNER = 1, 2
"""Flags of pixels: an edge is near; they do not lie at the frame's border."""
MAX_CUT = 0.2
"""Maximum proportion of the region that a shape may cut off: an inset that touches the field, or text."""


def find_field(image: RGB) -> FieldOfView:
    """Detect the field of view of a frame; deterministic.

    Args:
        image: RGB, uint8 of shape (height, width, 3).

    Returns:
        The field; the whole frame if no flat ground surrounds a field, or no shape convinces.

    Raises:
        ValueError: If the image is not a uint8 RGB array.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} of shape {image.shape}; expected uint8 of shape (height, width, 3).")
    if min(image.shape[:2]) < MIN_SIDE:
        return build_full_field(image, f"no field of view found: a side is shorter than {MIN_SIDE} pixels; not cropped")
    copy = create_working_copy(image)
    if copy is None:
        return build_full_field(image, "no flat ground at the edge of the frame: the field of view is the whole frame")
    points, normals = find_edge(copy)
    if len(points) < MIN_POINTS:
        return build_full_field(
            image, "no field of view found: no sharp edge between field and ground; not cropped", is_clear=False
        )
    shape, support, reason = _choose_shape(copy, points, normals)
    if shape is None:
        return build_full_field(image, reason, support=support, is_clear=reason == FILLS_FRAME)
    return scale_to_frame(image, shape, support, working_side=WORKING_SIDE)


@dataclass(frozen=True)
class Evidence:
    """What speaks for a shape, as proportions in [0, 1].

    Attributes:
        visible: Of the shape's border inside the frame: where an edge is visible.
        ends: Of the shape's border, also that of the frame: where the picture ends.
        points: Of the points of the edge: on the shape's border.
        cut: Of the region: outside the shape.
        left: Of the shape: not in the region.
        area: Of the frame: inside the shape.
    """

    visible: float
    ends: float
    points: float
    cut: float
    left: float
    area: float

    @property
    def score(self) -> float:
        """More is better."""
        return self.ends + 0.75 * self.points - 1.5 * self.cut - self.left


def _choose_shape(copy: WorkingCopy, points: Plane, normals: Plane) -> tuple[Shape | None, float, str]:
    """Choose the shape whose border is visible, that leaves little ground inside and cuts little of the region.

    Returns:
        The shape, or None if none convinces, the proportion of its border that is visible, and the reason if None.
    """
    import cv2

    height, width = (side - 2 * PAD for side in copy.difference.shape)
    region = np.zeros(copy.difference.shape, dtype=np.uint8)
    cv2.drawContours(region, [copy.region[:, None]], -1, 1, thickness=-1)
    region = region[PAD:-PAD, PAD:-PAD]
    edge = np.zeros((height, width), dtype=np.uint8)
    columns, rows = np.clip(points, 0, (width - 1, height - 1)).astype(np.intp).T
    edge[rows, columns] = HAS_EDGE
    edge = np.asarray(cv2.dilate(edge, np.ones((7, 7), np.uint8)), dtype=np.uint8)
    rim = math.floor(SNAP) + 1
    edge[rim:-rim, rim:-rim] |= IS_INNER
    shapes = fit_shapes(points, normals, size=(width, height))
    least = max((count for _, count in shapes), default=0) - MAX_LAG * len(points)
    candidates = [
        (shape, _weigh_evidence(shape, count, points, edge=edge, region=region))
        for shape, count in shapes
        if count >= least
    ]
    if not candidates:
        return None, 0.0, "no field of view found: no shape fits the edge; not cropped"
    shape, evidence = max(candidates, key=lambda candidate: candidate[1].score)
    visible, cut = (format_percent(share, digits=0) for share in (evidence.visible, evidence.cut))
    area = evidence.area
    if area >= FULL_AREA:
        return None, evidence.visible, FILLS_FRAME
    reason = None
    if area < MIN_AREA:
        reason = f"the best shape covers only {format_percent(area, digits=0)} % of the frame"
    elif evidence.visible < MIN_SUPPORT + CAUTION * evidence.cut:
        reason = f"the edge shows only {visible} % of the best shape's border"
    elif evidence.cut > MAX_CUT:
        reason = f"the best shape would cut off {cut} % of the picture"
    if reason is not None:
        return None, evidence.visible, f"no field of view found: {reason}; not cropped"
    return shape, evidence.visible, ""


def _weigh_evidence(shape: Shape, count: int, points: Plane, *, edge: Grey, region: Grey) -> Evidence:
    import cv2

    height, width = region.shape
    inside = draw_mask(shape, scale=(1.0, 1.0), size=(width, height)).view(np.uint8)
    area, both = cv2.countNonZero(inside), cv2.countNonZero(cv2.bitwise_and(inside, region))
    contours, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    border = np.concatenate(contours)[:, 0] if contours else np.zeros((1, 2), np.int32)
    flags = np.bincount(edge[border[:, 1], border[:, 0]], minlength=(IS_INNER | HAS_EDGE) + 1).tolist()
    inner = flags[IS_INNER] + flags[IS_INNER | HAS_EDGE]
    return Evidence(
        visible=flags[IS_INNER | HAS_EDGE] / inner if inner else 0.0,
        ends=(flags[HAS_EDGE] + flags[IS_INNER | HAS_EDGE]) / len(border),
        points=count / len(points),
        cut=1 - both / max(1, cv2.countNonZero(region)),
        left=1 - both / max(1, area),
        area=area / region.size,
    )


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
