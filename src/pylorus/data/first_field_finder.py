"""The first version of the field finder: bundles that were trained with it go on to crop as in their training.

Nothing here is changed any more, so the fits are copies of those in `field_shape.py`, whose limits may be tuned; only
what has no limits is shared. The ground is black, its edge is searched for on rays from the centre of the brightest
region, and the shape on which most points of the edge lie is the field. The current finder is in `field_of_view.py`.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pylorus.core.formatting import format_percent
from pylorus.data.field_shape import (
    Box,
    ChamferedBox,
    Corner,
    Disc,
    FieldOfView,
    Points,
    RoundedBox,
    Shape,
    build_cut_box,
    build_full_field,
    compute_box_distance,
    draw_mask,
    measure_from_corner,
    replace_side,
    scale_to_frame,
)
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


TOLERANCE = 1.3
"""Tolerance in pixels: a point this close to a shape's border lies on it."""
PROPOSALS = 256
"""Random circles that are tried."""
MIN_CORNER_POINTS = 5
MIN_SIDE_POINTS = 10
"""Minimum number of points on a cut corner, and on a straight side of a disc."""
MIN_AGREEMENT = 0.6
"""Minimum proportion of the points at a corner that must agree on it; otherwise text or an inset hides it."""


def fit_shape(points: Points, *, centre: tuple[float, float]) -> tuple[Shape, int]:
    """Fit the shape whose border passes through most points.

    Args:
        points: Of shape (points, 2), x and y in pixels, at least 12 of them, ordered by angle.
        centre: A point inside the shape.

    Returns:
        The shape, and the number of points on its border.
    """
    boxes = _find_boxes(points, centre)
    disc = _fit_disc(points, boxes[0])
    shapes: list[Shape] = [fit(points, box) for box in boxes for fit in (_fit_cut_box, _fit_rounded_box)]
    counts = [_count_border_points(shape, points) for shape in shapes]
    best = int(np.argmax(counts))
    if disc is not None:
        # A box with wide corners is nearly a disc; a disc that is cut on all sides is nearly a box.
        penalty = 0.98 if np.isinf(disc.box).sum() >= 2 else 1.0
        if _count_border_points(disc, points) > penalty * counts[best]:
            return disc, _count_border_points(disc, points)
    return shapes[best], counts[best]


def _count_border_points(shape: Shape, points: Points) -> int:
    return int(np.count_nonzero(np.abs(shape.compute_distance(points)) < TOLERANCE))


def _find_boxes(points: Points, centre: tuple[float, float]) -> list[Box]:
    """Propose boxes of straight lines through many points: first the likeliest, then variants with one other side."""
    offsets = points - centre
    half = np.maximum(np.percentile(np.abs(offsets), 90, axis=0), 1)
    across, down = (offsets / half).T
    sideways = np.abs(across) >= np.abs(down)
    sectors = (sideways & (across < 0), ~sideways & (down < 0), sideways & (across > 0), ~sideways & (down > 0))
    sides = [_find_side_lines(points[sector, side % 2]) for side, sector in enumerate(sectors)]
    low, high = points.min(axis=0), points.max(axis=0)
    likely = [side[0] if side else float(bound) for side, bound in zip(sides, (*low, *high), strict=True)]
    box = likely[0], likely[1], likely[2], likely[3]
    variants = [replace_side(box, side, position) for side, lines in enumerate(sides) for position in lines[1:]]
    return [box, *variants]


def _find_side_lines(values: NDArray[np.floating]) -> list[float]:
    """Return the coordinate that most points of a side share, then a second one that has at least a third as many."""
    if not len(values):
        return []
    lowest = float(values.min()) - 1
    counts = np.convolve(np.bincount(((values - lowest) * 2).astype(np.int64), minlength=5), np.ones(5), mode="same")
    first = int(np.argmax(counts))
    distant_counts = np.where(np.abs(np.arange(len(counts)) - first) > 4 * TOLERANCE, counts, 0)
    second = int(np.argmax(distant_counts))
    peaks = [first, second] if distant_counts[second] >= max(MIN_SIDE_POINTS, counts[first] / 3) else [first]
    centres = [lowest + 0.25 + 0.5 * peak for peak in peaks]
    return [float(np.median(values[np.abs(values - centre) <= TOLERANCE])) for centre in centres]


def _fit_cut_box(points: Points, box: Box) -> ChamferedBox:
    """Fit the box's cut corners: those that the points show; a hidden corner is cut like its neighbours."""
    size = np.array([box[2] - box[0], box[3] - box[1]])
    if size.min() < 4 * TOLERANCE:
        return ChamferedBox(box)
    lines = [_fit_corner(_transform_to_corner(points, box, index), size) for index in range(4)]
    corners = [line[0] if line is not None and line[1] >= MIN_AGREEMENT else None for line in lines]
    largest = max((corner for corner in corners if corner is not None), default=(0.0, 0.0))
    for index, corner in enumerate(corners):
        if corner is None and _is_right_angle(_transform_to_corner(points, box, index), largest):
            corners[index] = (0.0, 0.0)
    # For a corner hidden by text or an inset: fields may be cut only at the left or right, not only at the top.
    for index in [index for index, corner in enumerate(corners) if corner is None]:
        line, neighbours = lines[index], (corners[3 - index], corners[index ^ 1], corners[index ^ 2])
        corners[index] = next((other for other in neighbours if other is not None), None if line is None else line[0])
    cut = build_cut_box(box, corners)
    for index in range(4):  # a reflection in the lumen may look like a cut although points lie on the sides
        square = build_cut_box(box, [None if other == index else corner for other, corner in enumerate(corners)])
        if _count_border_points(square, points) > _count_border_points(cut, points) + MIN_CORNER_POINTS:
            cut, corners[index] = square, None
    return cut


def _is_right_angle(points: Points, corner: Corner) -> bool:
    """Whether the points lie on the box's own sides where a corner of the given size would have been cut off."""
    if corner == (0.0, 0.0):
        return True
    within = points[((points / corner).sum(axis=1) < 0.8) & (points > -2 * np.array(corner)).all(axis=1)]
    on_sides = int(np.count_nonzero(np.abs(within.min(axis=1)) < TOLERANCE)) if len(within) else 0
    return on_sides >= max(MIN_CORNER_POINTS, MIN_AGREEMENT * len(within))


def _transform_to_corner(points: Points, box: Box, index: int) -> Points:
    return np.stack(measure_from_corner(points, box, index), axis=1)


def _fit_corner(points: Points, size: NDArray[np.floating]) -> tuple[Corner, float] | None:
    """Fit the slanted line through most points near a corner.

    Args:
        points: In coordinates of the corner, see `measure_from_corner`.
        size: Width and height of the box.

    Returns:
        The corner, and the proportion of the points near it that lie on the line; None if there is no such line.
    """
    reach = (points > TOLERANCE).all(axis=1) & (points < 0.5 * size).all(axis=1) & ((points / size).sum(axis=1) < 0.6)
    near = points[reach]
    near = near[:: 1 + len(near) // 40]
    if len(near) < MIN_CORNER_POINTS:
        return None
    first, second = np.triu_indices(len(near), k=2)
    run, fall = (near[second] - near[first]).T
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = -fall / run
    plausible = (slope > 0.5) & (slope < 2.0)
    slope, first = slope[plausible], first[plausible]
    if not len(slope):
        return None
    level = near[first, 1] + slope * near[first, 0]
    errors = np.abs(near[:, 1] + slope[:, None] * near[:, 0] - level[:, None]) / np.hypot(1, slope)[:, None]
    counts = np.count_nonzero(errors < TOLERANCE, axis=1)
    best = int(np.argmax(counts))
    if counts[best] < MIN_CORNER_POINTS:
        return None
    on_line = near[errors[best] < TOLERANCE]
    corner = _fit_line(on_line) or (float(level[best] / slope[best]), float(level[best]))
    return corner, len(on_line) / len(near)


def _fit_line(points: Points) -> Corner | None:
    """Fit a line by total least squares and return its intercepts with the axes; None if one is not positive."""
    centre = points.mean(axis=0)
    normal = np.linalg.svd(points - centre, full_matrices=False)[2][1]
    if (normal == 0).any():
        return None
    across, down = (centre @ normal) / normal
    return (float(across), float(down)) if across > 0 and down > 0 else None


def _fit_rounded_box(points: Points, box: Box) -> RoundedBox:
    """Fit the corner radius with which the box passes through most points."""
    low, high = np.array(box[:2]), np.array(box[2:])
    radii = np.linspace(0.02, 0.5, 49) * float((high - low).min())
    over = np.abs(points[::2] - (low + high) / 2) - (high - low) / 2 + radii[:, None, None]
    across, down = over[..., 0], over[..., 1]
    outside = np.hypot(np.maximum(across, 0), np.maximum(down, 0))
    errors = np.abs(outside + np.minimum(np.maximum(across, down), 0) - radii[:, None])
    # Several radii may pass through equally many points, so closer points score higher.
    best = int(np.argmax(np.maximum(0, 1 - errors / TOLERANCE).sum(axis=1)))
    return RoundedBox(box, float(radii[best]))


def _fit_disc(points: Points, sides: Box) -> Disc | None:
    """Fit the circle through most points, cut by those straight sides that lie inside it and are visible."""
    # If a disc is cut on all sides, few points lie on its arc and many on straight sides.
    on_arc = points[compute_box_distance(points, sides) < -TOLERANCE]
    circle = _find_circle(on_arc if len(on_arc) >= MIN_SIDE_POINTS else points)
    if circle is None:
        return None
    disc = _fit_ellipse(circle, points)
    for side, position in enumerate(sides):
        cut_disc = replace(disc, box=replace_side(disc.box, side, position))
        on_side = (np.abs(points[:, side % 2] - position) < TOLERANCE) & (
            disc.compute_arc_distance(points) < -TOLERANCE
        )
        if np.count_nonzero(on_side) >= MIN_SIDE_POINTS and _count_border_points(
            cut_disc, points
        ) > _count_border_points(disc, points):
            disc = cut_disc
    return disc


def _find_circle(points: Points) -> Disc | None:
    """Find the circle through most points among circles through three random points each."""
    generator = np.random.default_rng(0)  # fixed, so that the result is deterministic
    picks = generator.integers(0, len(points), (PROPOSALS, 3))
    start, second, third = points[picks[:, 0]], points[picks[:, 1]], points[picks[:, 2]]
    (bx, by), (cx, cy) = (second - start).T, (third - start).T
    twice = 2 * (bx * cy - by * cx)
    valid = np.abs(twice) > 1
    bx, by, cx, cy, twice, start = bx[valid], by[valid], cx[valid], cy[valid], twice[valid], start[valid]
    if not len(twice):
        return None
    b, c = bx * bx + by * by, cx * cx + cy * cy
    x, y = (cy * b - by * c) / twice, (bx * c - cx * b) / twice
    radii = np.hypot(x, y)
    centres = np.stack([x, y], axis=1) + start
    scored_points = points[:: 1 + len(points) // 180]
    distance = np.hypot(scored_points[:, 0] - centres[:, :1], scored_points[:, 1] - centres[:, 1:])
    counts = np.count_nonzero(np.abs(distance - radii[:, None]) < 2 * TOLERANCE, axis=1)
    counts[radii > np.hypot(*np.ptp(points, axis=0))] = 0
    best = int(np.argmax(counts))
    unbounded = (-np.inf, -np.inf, np.inf, np.inf)
    centre, radius = centres[best], float(radii[best])
    return Disc(unbounded, (float(centre[0]), float(centre[1])), (radius, radius))


def _fit_ellipse(disc: Disc, points: Points) -> Disc:
    """Refine a circle to the axis-aligned ellipse of least squares through the points on it.

    The axes may differ by up to 4 %; otherwise a circle is fitted.
    """
    for _ in range(4):
        x, y = (points[np.abs(disc.compute_arc_distance(points)) < 1.5 * TOLERANCE] - disc.centre).T
        if len(x) < MIN_SIDE_POINTS:
            return disc
        scale = np.mean(disc.radii)
        x, y = x / scale, y / scale
        terms = np.stack([x * x, y * y, x, y], axis=1)
        a, b, c, d = np.linalg.lstsq(terms, np.ones(len(x)), rcond=None)[0]
        if a <= 0 or b <= 0 or not 0.92 < a / b < 1.085:
            c, d, level = np.linalg.lstsq(np.stack([x, y, np.ones_like(x)], axis=1), -(x * x + y * y), rcond=None)[0]
            a, b, c, d = np.array([1, 1, c, d]) / -level
        over = 1 + c * c / (4 * a) + d * d / (4 * b)
        if over <= 0 or a <= 0 or b <= 0:
            return disc
        centre = disc.centre[0] - scale * c / (2 * a), disc.centre[1] - scale * d / (2 * b)
        radii = scale * np.sqrt(over / a), scale * np.sqrt(over / b)
        disc = replace(disc, centre=(float(centre[0]), float(centre[1])), radii=(float(radii[0]), float(radii[1])))
    return disc


def find_field_as_in_version_1(image: RGB) -> FieldOfView:
    """Detect the field of view of a frame; deterministic.

    Args:
        image: RGB, uint8 of shape (height, width, 3).

    Returns:
        The field; the whole frame if it has no dark background around a field, or no shape fits the edge.

    """
    if min(image.shape[:2]) < MIN_SIDE:
        return build_full_field(image, f"no field of view found: a side is shorter than {MIN_SIDE} pixels; not cropped")
    copy = create_working_copy(image)
    if copy is None:
        return build_full_field(
            image, "no dark background at the edge of the frame: the field of view is the whole frame"
        )
    edge = find_edge(copy)
    if edge is None or len(edge.points) < MIN_POINTS:
        return build_full_field(
            image, "no field of view found: no sharp edge between field and dark background; not cropped"
        )
    shape, points_on_shape = fit_shape(edge.points, centre=edge.centre)
    support = points_on_shape / len(edge.points)
    if support < MIN_SUPPORT:
        return build_full_field(
            image,
            f"no field of view found: no shape fits the edge (at best {format_percent(support, digits=0)} %); "
            "not cropped",
        )
    objection = _find_objection(copy, shape)
    if objection is not None:
        return build_full_field(image, f"{objection}; not cropped", support=support)
    return scale_to_frame(image, shape, support, working_side=WORKING_SIDE)


def _find_objection(copy: WorkingCopy, shape: Shape) -> str | None:
    """Return what speaks against a shape as the field; None if nothing does."""
    height, width = copy.grey.shape[0] - 2 * PAD, copy.grey.shape[1] - 2 * PAD
    inside = draw_mask(shape, scale=(1.0, 1.0), size=(width, height))
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
