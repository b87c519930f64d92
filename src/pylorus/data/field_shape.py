"""The shapes that a field of view can have, and how one is fitted to the points of its edge.

A shape is a disc, a box with cut corners or a box with rounded corners. It gives the signed distance of points from its
border, negative inside, and its border as a polygon; lengths are in pixels of the image in which it was found. Many of
the points lie on the edge, others on text, insets or dark mucosa: each kind of shape is proposed from a few points and
scored on all of them, and the best passes through most points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.floating]  # of shape (points, 2): x and y
Distances = NDArray[np.floating]  # of shape (points,)
Corner = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

_SIDES = ("left", "top", "right", "bottom")
_TURN = np.linspace(0, 2 * np.pi, 256, endpoint=False)


class Shape(Protocol):
    """The interface of all shapes of a field."""

    @property
    def box(self) -> Box:
        """The straight sides that bound the shape."""

    @property
    def name(self) -> str:
        """A description for the audit."""

    def compute_distance(self, points: Points) -> Distances:
        """Compute the signed distance of each point from the border, negative inside."""

    def get_polygon(self) -> Points:
        """Return the convex border before the box cuts it."""


@dataclass(frozen=True)
class Disc:
    """An axis-aligned ellipse, nearly a circle, cut by a box."""

    box: Box
    centre: tuple[float, float]
    radii: tuple[float, float]

    @property
    def name(self) -> str:
        """`round`, and the sides that are cut."""
        inner = self.get_inner_box()
        cut_sides = [side for side, own, bound in zip(_SIDES, self.box, inner, strict=True) if own == bound]
        return f"round, cut {' and '.join(cut_sides)}" if cut_sides else "round"

    def get_inner_box(self) -> Box:
        """Return the bounding box of the disc inside its box."""
        (x, y), (a, b), (left, top, right, bottom) = self.centre, self.radii, self.box
        return max(left, x - a), max(top, y - b), min(right, x + a), min(bottom, y + b)

    def compute_distance(self, points: Points) -> Distances:
        """Compute the signed distance of each point; approximate for the ellipse."""
        return np.maximum(self.compute_arc_distance(points), compute_box_distance(points, self.box))

    def compute_arc_distance(self, points: Points) -> Distances:
        """Compute the signed distance of each point from the ellipse, ignoring the box."""
        relative_radius = np.hypot(*((points - self.centre) / self.radii).T)
        return np.asarray((relative_radius - 1) * np.mean(self.radii))

    def get_polygon(self) -> Points:
        """Return the ellipse as 256 points."""
        return np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1) * self.radii + self.centre


@dataclass(frozen=True)
class ChamferedBox:
    """A box whose corners may be cut off: top left, top right, bottom right, bottom left.

    A corner is given by the lengths that it removes from the horizontal and the vertical side; (0, 0) is a right angle.
    """

    box: Box
    corners: tuple[Corner, Corner, Corner, Corner] = ((0, 0), (0, 0), (0, 0), (0, 0))

    @property
    def name(self) -> str:
        """Rectangle, octagon, or the number of cut corners."""
        cut = sum(corner != (0, 0) for corner in self.corners)
        return {0: "rectangle", 4: "octagon"}.get(cut, f"rectangle, {cut} corners cut")

    def compute_distance(self, points: Points) -> Distances:
        """Compute the signed distance of each point; beyond a corner it is that to the nearer side's line."""
        distance = compute_box_distance(points, self.box)
        for index, (width, height) in enumerate(self.corners):
            if width > 0 and height > 0:
                across, down = transform_to_corner(points, self.box, index).T
                beyond = (1 - across / width - down / height) / np.hypot(1 / width, 1 / height)
                distance = np.maximum(distance, beyond)
        return distance

    def get_polygon(self) -> Points:
        """Return its eight corners; two of them coincide where no corner is cut."""
        left, top, right, bottom = self.box
        (aw, ah), (bw, bh), (cw, ch), (dw, dh) = self.corners
        border = [
            (left, top + ah), (left + aw, top), (right - bw, top), (right, top + bh),
            (right, bottom - ch), (right - cw, bottom), (left + dw, bottom), (left, bottom - dh),
        ]  # fmt: skip
        return np.array(border, dtype=np.float64)


@dataclass(frozen=True)
class RoundedBox:
    """A box whose corners are quarter circles."""

    box: Box
    radius: float

    @property
    def name(self) -> str:
        """Always `rounded rectangle`."""
        return "rounded rectangle"

    def compute_distance(self, points: Points) -> Distances:
        """Compute the signed distance of each point."""
        left, top, right, bottom = self.box
        centre, half = np.array([left + right, top + bottom]) / 2, np.array([right - left, bottom - top]) / 2
        over = np.abs(points - centre) - half + self.radius
        outside = np.hypot(*np.maximum(over, 0).T)
        return np.asarray(outside + np.minimum(over.max(axis=1), 0) - self.radius)

    def get_polygon(self) -> Points:
        """Return its four arcs as 256 points."""
        left, top, right, bottom = self.box
        centre, half = np.array([left + right, top + bottom]) / 2, np.array([right - left, bottom - top]) / 2
        circle = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)
        inner = np.maximum(half - self.radius, 0)
        return np.asarray(circle * self.radius + np.where(circle >= 0, inner, -inner) + centre)


def compute_box_distance(points: Points, box: Box) -> Distances:
    """Compute the signed distance of each point from the nearest line through a side of the box, negative inside."""
    left, top, right, bottom = box
    x, y = points.T
    distance: Distances = np.maximum(np.maximum(left - x, x - right), np.maximum(top - y, y - bottom))
    return distance


def transform_to_corner(points: Points, box: Box, index: int) -> Points:
    """Convert points to distances from a corner of a box: inwards across and down; 0 to 3 clockwise from top left."""
    left, top, right, bottom = box
    x, y = points.T
    across = x - left if index in (0, 3) else right - x
    down = y - top if index in (0, 1) else bottom - y
    return np.stack([across, down], axis=1)


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
    variants = [_replace_side(box, side, position) for side, lines in enumerate(sides) for position in lines[1:]]
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
    lines = [_fit_corner(transform_to_corner(points, box, index), size) for index in range(4)]
    corners = [line[0] if line is not None and line[1] >= MIN_AGREEMENT else None for line in lines]
    largest = max((corner for corner in corners if corner is not None), default=(0.0, 0.0))
    for index, corner in enumerate(corners):
        if corner is None and _is_right_angle(transform_to_corner(points, box, index), largest):
            corners[index] = (0.0, 0.0)
    # For a corner hidden by text or an inset: fields may be cut only at the left or right, not only at the top.
    for index in [index for index, corner in enumerate(corners) if corner is None]:
        line, neighbours = lines[index], (corners[3 - index], corners[index ^ 1], corners[index ^ 2])
        corners[index] = next((other for other in neighbours if other is not None), None if line is None else line[0])
    cut = _build_cut_box(box, corners)
    for index in range(4):  # a reflection in the lumen may look like a cut although points lie on the sides
        square = _build_cut_box(box, [None if other == index else corner for other, corner in enumerate(corners)])
        if _count_border_points(square, points) > _count_border_points(cut, points) + MIN_CORNER_POINTS:
            cut, corners[index] = square, None
    return cut


def _build_cut_box(box: Box, corners: list[Corner | None]) -> ChamferedBox:
    top_left, top_right, bottom_right, bottom_left = (corner or (0.0, 0.0) for corner in corners)
    return ChamferedBox(box, (top_left, top_right, bottom_right, bottom_left))


def _is_right_angle(points: Points, corner: Corner) -> bool:
    """Whether the points lie on the box's own sides where a corner of the given size would have been cut off."""
    if corner == (0.0, 0.0):
        return True
    within = points[((points / corner).sum(axis=1) < 0.8) & (points > -2 * np.array(corner)).all(axis=1)]
    on_sides = int(np.count_nonzero(np.abs(within.min(axis=1)) < TOLERANCE)) if len(within) else 0
    return on_sides >= max(MIN_CORNER_POINTS, MIN_AGREEMENT * len(within))


def _fit_corner(points: Points, size: NDArray[np.floating]) -> tuple[Corner, float] | None:
    """Fit the slanted line through most points near a corner.

    Args:
        points: In coordinates of the corner, see `transform_to_corner`.
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
        cut_disc = replace(disc, box=_replace_side(disc.box, side, position))
        on_side = (np.abs(points[:, side % 2] - position) < TOLERANCE) & (
            disc.compute_arc_distance(points) < -TOLERANCE
        )
        if np.count_nonzero(on_side) >= MIN_SIDE_POINTS and _count_border_points(
            cut_disc, points
        ) > _count_border_points(disc, points):
            disc = cut_disc
    return disc


def _replace_side(box: Box, side: int, position: float) -> Box:
    left, top, right, bottom = (position if index == side else old for index, old in enumerate(box))
    return left, top, right, bottom


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
