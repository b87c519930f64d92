"""The field of view, the shapes that it can have, and how these are fitted to the points of its edge.

A shape is a disc, a box with cut corners or a box with rounded corners. It gives the signed distance of points from its
border, negative inside, and its border as a polygon; lengths are in pixels of the image in which it was found. Many of
the points lie on the edge, others on text, insets or dark mucosa: each kind of shape is proposed from a few points and
scored on all of them, and the best passes through most points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from itertools import product
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pylorus.core.formatting import format_percent

Points = NDArray[np.floating]  # of shape (points, 2): x and y
Pixels = NDArray[np.uint8]  # RGB, of shape (height, width, 3)
Distances = NDArray[np.floating]  # of shape (points,)
Corner = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

_SIDES = ("left", "top", "right", "bottom")
_TURN = np.linspace(0, 2 * np.pi, 256, endpoint=False)
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)
"""256 points of the unit circle."""


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
        (x, y), (centre_x, centre_y), (a, b) = points.T, self.centre, self.radii
        return np.asarray((np.hypot((x - centre_x) / a, (y - centre_y) / b) - 1) * ((a + b) / 2))

    def get_polygon(self) -> Points:
        """Return the ellipse as 256 points."""
        return np.asarray(_CIRCLE * self.radii + self.centre)


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
                distance = np.maximum(distance, compute_cut_distance(points, self.box, index, (width, height)))
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

    @property
    def is_nearly_disc(self) -> bool:
        """Whether hardly any straight side is left."""
        left, top, right, bottom = self.box
        return self.radius > 0.42 * min(right - left, bottom - top)

    def compute_distance(self, points: Points) -> Distances:
        """Compute the signed distance of each point."""
        (x, y), (left, top, right, bottom) = points.T, self.box
        across = np.abs(x - (left + right) / 2) - (right - left) / 2 + self.radius
        down = np.abs(y - (top + bottom) / 2) - (bottom - top) / 2 + self.radius
        outside = np.hypot(np.maximum(across, 0), np.maximum(down, 0))
        return np.asarray(outside + np.minimum(np.maximum(across, down), 0) - self.radius)

    def get_polygon(self) -> Points:
        """Return its four arcs as 256 points."""
        left, top, right, bottom = self.box
        centre, half = np.array([left + right, top + bottom]) / 2, np.array([right - left, bottom - top]) / 2
        inner = np.maximum(half - self.radius, 0)
        return np.asarray(_CIRCLE * self.radius + np.where(_CIRCLE >= 0, inner, -inner) + centre)


def compute_box_distance(points: Points, box: Box) -> Distances:
    """Compute the signed distance of each point from the nearest line through a side of the box, negative inside."""
    left, top, right, bottom = box
    x, y = points.T
    distance: Distances = np.maximum(np.maximum(left - x, x - right), np.maximum(top - y, y - bottom))
    return distance


def measure_from_corner(points: Points, box: Box, index: int) -> tuple[Distances, Distances]:
    """Compute distances from a corner of a box, inwards across and down; corners are 0 to 3 clockwise from top left."""
    left, top, right, bottom = box
    x, y = points.T
    return x - left if index in (0, 3) else right - x, y - top if index in (0, 1) else bottom - y


def compute_cut_distance(points: Points, box: Box, index: int, corner: Corner) -> Distances:
    """Compute the signed distance of each point from the line of a cut corner of a box, negative inside."""
    across, down = measure_from_corner(points, box, index)
    width, height = corner
    return np.asarray((1 - across / width - down / height) / np.hypot(1 / width, 1 / height))


_SHIFT = 4
"""Fractional bits of the coordinates with which OpenCV draws polygons."""


@dataclass(frozen=True)
class FieldOfView:
    """The field of view in a frame.

    Attributes:
        box: Left, top, right, bottom in pixels of the frame; right and bottom are exclusive.
        shape: `full` if nothing is to be cropped, otherwise a description of the shape, such as `octagon`.
        mask: True inside the field, of shape (bottom - top, right - left); None if the field fills the whole box.
        support: Proportion of the shape's border at which an edge is visible, in [0, 1]; 0 if no shape was fitted.
        reason: Why this is the field, or why none was found, for the audit.
        is_clear: Whether the field is known: False if there is ground at the rim of the frame but no shape convinces.
    """

    box: tuple[int, int, int, int]
    shape: str
    mask: NDArray[np.bool_] | None
    support: float
    reason: str
    is_clear: bool = True

    @property
    def outcome(self) -> str:
        """The shape, `whole` if there is nothing to crop, or `unclear`."""
        return self.shape if self.shape != "full" else "whole" if self.is_clear else "unclear"

    def measure_area(self) -> int:
        """Count the pixels inside the field."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top) if self.mask is None else int(np.count_nonzero(self.mask))


def build_full_field(image: Pixels, reason: str, *, support: float = 0.0, is_clear: bool = True) -> FieldOfView:
    """Return the whole frame as the field, with the reason."""
    height, width = image.shape[:2]
    return FieldOfView((0, 0, width, height), "full", None, support, reason, is_clear)


def scale_to_frame(image: Pixels, shape: Shape, support: float, *, working_side: int) -> FieldOfView:
    """Convert a shape from pixels of the working copy to a field of view in pixels of the frame."""
    import cv2

    height, width = image.shape[:2]
    scale = min(1.0, working_side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    mask = draw_mask(shape, scale=(width / size[0], height / size[1]), size=(width, height))
    left, top, box_width, box_height = cv2.boundingRect(mask.view(np.uint8))
    right, bottom = left + box_width, top + box_height
    box_mask = np.ascontiguousarray(mask[top:bottom, left:right])
    reason = f"{shape.name}: {format_percent(support, digits=0)} % of its border is visible"
    return FieldOfView((left, top, right, bottom), shape.name, None if box_mask.all() else box_mask, support, reason)


def draw_mask(shape: Shape, *, scale: tuple[float, float], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Rasterize a shape, scaled by (x, y) `scale`, to a mask of a frame of `size` (width, height)."""
    import cv2

    width, height = size
    mask = np.zeros((height, width), dtype=np.uint8)
    corners = np.round((shape.get_polygon() * scale - 0.5) * 2**_SHIFT).astype(np.int32)
    cv2.fillConvexPoly(mask, corners, 1, lineType=cv2.LINE_8, shift=_SHIFT)
    if isinstance(shape, Disc):
        sides = (min(max(side, -1e6), 1e6) * factor for side, factor in zip(shape.box, scale * 2, strict=True))
        left, top, right, bottom = (max(0, round(side)) for side in sides)
        mask[:top], mask[bottom:], mask[:, :left], mask[:, right:] = 0, 0, 0, 0
    return mask.view(np.bool_)


TOLERANCE = 1.0
"""Tolerance in pixels: a point this close to a shape's border lies on it."""
SNAP = 1.6
"""A side this close to the frame's border, in pixels, is the frame's border."""
CERTAIN = 0.96
"""Proportion of the points from which a box with cut or round corners explains an edge well enough."""
PROPOSALS, MAX_SCORED = 128, 100
"""Random circles that are tried, and the maximum number of points, below 256, by which one is chosen."""
MIN_CORNER_POINTS = 5
MIN_SIDE_POINTS = 8
"""Minimum number of points on a cut corner, and on a straight side."""
MIN_AGREEMENT = 0.6
"""Minimum proportion of the slanted points at a corner that must agree on its cut; otherwise something hides it."""
MIN_VISIBLE_CORNER = 0.4
"""Minimum proportion of a cut corner's length that points show."""
_RADII = np.linspace(0.02, 0.5, 49)
"""Radii of round corners that are tried, as proportions of the box's shorter side."""
_FACING = 0.9
"""Cosine of the largest angle between the normal of a point on a side and that of the side."""
_SLANTS = np.deg2rad(np.arange(28.0, 63.0, 2.5))
"""Angles of a cut corner's normal that are tried."""
_SLANTED_NORMALS = np.stack([np.cos(_SLANTS), np.sin(_SLANTS)])


def fit_shapes(points: Points, normals: Points, *, size: tuple[int, int]) -> list[tuple[Shape, int]]:
    """Propose shapes whose borders pass through many points: boxes with cut or round corners, and a disc.

    Args:
        points: Of shape (points, 2), x and y in pixels, at least 12 of them.
        normals: Of the same shape, of length 1, pointing out of the field.
        size: Width and height of the frame.

    Returns:
        Each shape with the number of points on its border.
    """
    lines = [_find_side_lines(points, normals, side, bound=bound) for side, bound in enumerate((0, 0, *size))]
    boxes = np.array(list(product(*lines)))
    boxes = boxes[(boxes[:, 2] - boxes[:, 0] > 8) & (boxes[:, 3] - boxes[:, 1] > 8)]
    shapes: list[tuple[Shape, int]] = []
    if len(boxes):
        x, y = points.T[:, None]
        left, top, right, bottom = boxes.T[..., None]
        distance = np.maximum(np.maximum(left - x, x - right), np.maximum(top - y, y - bottom))
        counts = np.count_nonzero(np.abs(distance) < TOLERANCE, axis=1)
        order = np.argsort(-counts, kind="stable")[:2]
        best = [_convert_box(boxes[index]) for index in order[counts[order] >= 0.6 * counts.max()]]
        for box, corners in zip(best, _fit_corners(points, normals, best), strict=True):
            fitted: list[Shape] = [*_fit_cut_boxes(points, box, corners), _fit_rounded_box(points, box)]
            shapes += [(shape, _count_near(shape.compute_distance(points))) for shape in fitted]
    boxlike = [each for each in shapes if not (isinstance(each[0], RoundedBox) and each[0].is_nearly_disc)]
    if max((count for _, count in boxlike), default=0) >= CERTAIN * len(points):
        return shapes  # a disc would be cut on all sides to explain as many
    disc = _fit_disc(points, lines, size)
    if disc is None:
        return shapes
    count = _count_near(disc.compute_distance(points))
    return [*(boxlike if count >= CERTAIN * len(points) else shapes), (disc, count)]  # four quarter circles are a disc


def _count_near(distance: Distances) -> int:
    return int(np.count_nonzero(np.abs(distance) < TOLERANCE))


def _convert_box(values: NDArray[np.floating]) -> Box:
    left, top, right, bottom = values.tolist()
    return left, top, right, bottom


def _compute_median(values: Distances) -> float:
    """Compute a median; NumPy's own takes several times as long for a few hundred values."""
    ordered = np.sort(values)
    return float((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2)


def _find_side_lines(points: Points, normals: Points, side: int, *, bound: float) -> list[float]:
    """Return up to three coordinates that points facing a side share, the commonest first; the bound if none."""
    axis = side % 2
    is_facing = normals[:, axis] < -_FACING if side < 2 else normals[:, axis] > _FACING
    values = points[:, axis][is_facing]
    lines: list[float] = []
    while len(values) >= MIN_SIDE_POINTS and len(lines) < 3:
        lowest = float(values.min()) - 1
        counts = np.convolve(np.bincount(((values - lowest) * 2).astype(np.int64), minlength=5), np.ones(4), "same")
        peak = lowest + 0.5 * int(np.argmax(counts))
        near = values[np.abs(values - peak) <= 1.5]
        if len(near) < MIN_SIDE_POINTS:
            break
        position = _compute_median(near)
        lines.append(float(bound) if abs(position - bound) <= SNAP else position)
        values = values[np.abs(values - position) > 3 * TOLERANCE]
    return lines or [float(bound)]


def _fit_cut_boxes(points: Points, box: Box, lines: list[tuple[Corner, float] | None]) -> list[ChamferedBox]:
    """Fit the box's cut corners: the `lines` that the points show; a hidden corner is cut like its neighbours."""
    whole = compute_box_distance(points, box)
    corners = [line[0] if line is not None and line[1] >= MIN_AGREEMENT else None for line in lines]
    largest = max((corner for corner in corners if corner is not None), default=(0.0, 0.0))
    for index, corner in enumerate(corners):
        if corner is None and _is_right_angle(points, box, index, largest):
            corners[index] = (0.0, 0.0)
    for index in [index for index, corner in enumerate(corners) if corner is None]:  # text or an inset hides it
        neighbours = (corners[3 - index], corners[index ^ 1], corners[index ^ 2])
        line = lines[index]
        corners[index] = next((other for other in neighbours if other is not None), None if line is None else line[0])
    cuts = {
        index: compute_cut_distance(points, box, index, corner)
        for index, corner in enumerate(corners)
        if corner is not None and corner != (0.0, 0.0)
    }
    for index, cut in list(cuts.items()):
        # A reflection in the lumen may look like a cut although points lie on the sides.
        others = [distance for other, distance in cuts.items() if other != index]
        square = reduce(np.maximum, others, whole)
        if _count_near(square) > _count_near(np.maximum(square, cut)) + MIN_CORNER_POINTS:
            del cuts[index]
            corners[index] = None
    return [build_cut_box(box, variant) for variant in _complete_corners(corners)]


def _complete_corners(corners: list[Corner | None]) -> list[list[Corner | None]]:
    """Return the ways in which devices cut corners that agree best with those found: none, two at a side, or all."""
    cut = [index for index, corner in enumerate(corners) if corner is not None and corner != (0.0, 0.0)]
    if len(cut) == 3:  # an inset hides the fourth
        hidden = next(index for index in range(4) if index not in cut)
        return [[corners[3 - hidden] if index == hidden else corner for index, corner in enumerate(corners)]]
    if len(cut) == 1:
        pair = [corners[cut[0]] if index in (cut[0], 3 - cut[0]) else None for index in range(4)]
        return [[None] * 4, pair]
    return [[None] * 4] if cut in ([0, 2], [1, 3]) else [corners]


def build_cut_box(box: Box, corners: list[Corner | None]) -> ChamferedBox:
    """Return a box with its corners cut off, from the top left one clockwise; those that are None are whole."""
    top_left, top_right, bottom_right, bottom_left = (corner or (0.0, 0.0) for corner in corners)
    return ChamferedBox(box, (top_left, top_right, bottom_right, bottom_left))


def _is_right_angle(points: Points, box: Box, index: int, corner: Corner) -> bool:
    """Whether the points lie on the box's own sides where a corner of the given size would have been cut off."""
    if corner == (0.0, 0.0):
        return True
    (across, down), (width, height) = measure_from_corner(points, box, index), corner
    is_within = (across / width + down / height < 0.8) & (across > -2 * width) & (down > -2 * height)
    count = np.count_nonzero(is_within)
    on_sides = _count_near(np.minimum(across[is_within], down[is_within]))
    return on_sides >= max(MIN_CORNER_POINTS, MIN_AGREEMENT * count)


def _fit_corners(points: Points, normals: Points, boxes: list[Box]) -> list[list[tuple[Corner, float] | None]]:
    """Fit the slanted line through most points near each corner of each box, all of them at once.

    Returns:
        For each corner, its line, and the proportion of the slanted points near it that lie on it; None without a line.
    """
    sides = np.array(boxes)[:, :, None]
    from_sides = np.concatenate([points.T - sides[:, :2], sides[:, 2:] - points.T], axis=1)
    is_slanted = np.concatenate([normals.T < -0.3, normals.T > 0.3])
    is_near = (from_sides > -TOLERANCE) & is_slanted
    is_near &= from_sides < 0.55 * np.tile(sides[:, 2:] - sides[:, :2], (1, 2, 1))
    horizontal, vertical = [0, 2, 2, 0], [1, 1, 3, 3]  # sides of the corners, clockwise from top left
    corner, point = np.nonzero((is_near[:, horizontal] & is_near[:, vertical]).reshape(4 * len(boxes), -1))
    count = 4 * len(boxes)
    near = np.bincount(corner, minlength=count)
    if near.max(initial=0) < MIN_CORNER_POINTS:
        return [[None] * 4 for _ in boxes]
    across = from_sides[:, horizontal].reshape(count, -1)[corner, point]
    down = from_sides[:, vertical].reshape(count, -1)[corner, point]
    # A line a u + b v = level for each slant.
    levels = across[:, None] * _SLANTED_NORMALS[0] + down[:, None] * _SLANTED_NORMALS[1]
    cells = (levels + 4 * TOLERANCE).astype(np.int64)
    width = int(cells.max()) + 3
    table = (corner[:, None] * len(_SLANTS) + np.arange(len(_SLANTS))) * width + cells
    counts = np.bincount(table.ravel(), minlength=count * len(_SLANTS) * width).reshape(count, -1)
    slant, cell = np.divmod(np.argmax(counts[:, :-1] + counts[:, 1:], axis=1), width)
    offsets = levels[np.arange(len(levels)), slant[corner]] - (cell + 1 - 4 * TOLERANCE)[corner]
    is_on_line = np.abs(offsets) < 1.5 * TOLERANCE
    corner, across, down = corner[is_on_line], across[is_on_line], down[is_on_line]
    lines = _fit_lines(corner, across, down, count=count)
    on_line = np.bincount(corner, minlength=count)
    steps = np.diff(points.T)
    spacing = _compute_median(np.sqrt(steps[0] ** 2 + steps[1] ** 2))
    visible = [
        None if line is None or number * spacing < MIN_VISIBLE_CORNER * math.hypot(*line) else (line, number / total)
        for line, number, total in zip(lines, on_line.tolist(), near.tolist(), strict=True)
    ]
    return [visible[start : start + 4] for start in range(0, count, 4)]


def _fit_lines(corner: NDArray[np.intp], across: Distances, down: Distances, *, count: int) -> list[Corner | None]:
    """Fit lines by total least squares, and return their intercepts; None for few points, or if it is not slanted."""
    number = np.bincount(corner, minlength=count)
    centres = [np.bincount(corner, values, count) / np.maximum(number, 1) for values in (across, down)]
    u, v = across - centres[0][corner], down - centres[1][corner]
    moments = (np.bincount(corner, product, count).tolist() for product in (u * v, u * u, v * v))
    lines: list[Corner | None] = []
    for points, x, y, uv, uu, vv in zip(number.tolist(), *(each.tolist() for each in centres), *moments, strict=True):
        angle = 0.5 * math.atan2(2 * uv, uu - vv)
        a, b = -math.sin(angle), math.cos(angle)
        is_slanted = points >= MIN_CORNER_POINTS and min(abs(a), abs(b)) >= 0.3
        width, height = ((x * a + y * b) / a, (x * a + y * b) / b) if is_slanted else (0.0, 0.0)
        lines.append((width, height) if width > 0 and height > 0 else None)
    return lines


def _fit_rounded_box(points: Points, box: Box) -> RoundedBox:
    """Fit the corner radius with which the box passes through most points."""
    (x, y), (left, top, right, bottom) = points[::3].T, box
    radii = (_RADII * min(right - left, bottom - top))[:, None]
    across = np.abs(x - (left + right) / 2) - (right - left) / 2 + radii
    down = np.abs(y - (top + bottom) / 2) - (bottom - top) / 2 + radii
    outside = np.sqrt(np.maximum(across, 0) ** 2 + np.maximum(down, 0) ** 2)
    errors = np.abs(outside + np.minimum(np.maximum(across, down), 0) - radii)
    # Several radii may pass through equally many points, so closer points score higher.
    best = int(np.argmax(np.maximum(0, 1 - errors / TOLERANCE).sum(axis=1)))
    return RoundedBox(box, float(radii[best, 0]))


def _fit_disc(points: Points, lines: list[list[float]], size: tuple[int, int]) -> Disc | None:
    """Fit the circle through most points, cut by those straight sides that lie inside it and are visible."""
    x, y = points.T
    is_inner = np.minimum(np.minimum(x, size[0] - x), np.minimum(y, size[1] - y)) >= SNAP
    inner = points[is_inner]
    circle = _find_circle(inner) if len(inner) >= MIN_SIDE_POINTS else None
    if circle is None:
        return None
    disc = _fit_ellipse(circle, inner)
    arc_distance = disc.compute_arc_distance(points)
    is_inside, count = arc_distance < -TOLERANCE, _count_near(arc_distance)
    for side, positions in enumerate(lines):
        for position in positions:
            on_side = np.count_nonzero((np.abs(points[:, side % 2] - position) < TOLERANCE) & is_inside)
            if on_side < MIN_SIDE_POINTS:
                continue
            box = replace_side(disc.box, side, position)
            cut_count = _count_near(np.maximum(arc_distance, compute_box_distance(points, box)))
            if cut_count > count:
                disc, count = replace(disc, box=box), cut_count
    return disc


def replace_side(box: Box, side: int, position: float) -> Box:
    """Return a box with another position of one side: 0 is the left, 1 the top, 2 the right, 3 the bottom one."""
    left, top, right, bottom = (position if index == side else old for index, old in enumerate(box))
    return left, top, right, bottom


def _find_circle(points: Points) -> Disc | None:
    """Find the circle through most points among circles through three random points each."""
    x, y = np.ascontiguousarray(points.T)
    (ax, bx, cx), (ay, by, cy) = (values[_draw_triples(len(points))] for values in (x, y))
    bx, by, cx, cy = bx - ax, by - ay, cx - ax, cy - ay
    twice = 2 * (bx * cy - by * cx)
    valid = np.abs(twice) > 1
    if not valid.any():
        return None
    ax, ay, bx, by, cx, cy, twice = (values[valid] for values in (ax, ay, bx, by, cx, cy, twice))
    b, c = bx * bx + by * by, cx * cx + cy * cy
    right, down = (cy * b - by * c) / twice, (bx * c - cx * b) / twice
    radii, centres = np.sqrt(right**2 + down**2), (right + ax, down + ay)
    step = 1 + len(points) // MAX_SCORED
    distance = np.sqrt((x[::step] - centres[0][:, None]) ** 2 + (y[::step] - centres[1][:, None]) ** 2)
    is_near = np.abs(distance - radii[:, None]) < 2 * TOLERANCE
    counts = is_near.sum(axis=1, dtype=np.uint8)
    counts[radii > math.hypot(x.max() - x.min(), y.max() - y.min())] = 0
    best = int(np.argmax(counts))
    unbounded = (-np.inf, -np.inf, np.inf, np.inf)
    radius = float(radii[best])
    return Disc(unbounded, (float(centres[0][best]), float(centres[1][best])), (radius, radius))


@lru_cache(maxsize=512)
def _draw_triples(count: int) -> NDArray[np.int64]:
    """Draw triples of points among `count`, of shape (3, triples), with a fixed seed: the result is deterministic."""
    return np.ascontiguousarray(np.random.default_rng(0).integers(0, count, (PROPOSALS, 3)).T)


def _fit_ellipse(disc: Disc, points: Points) -> Disc:
    """Refine a circle to the axis-aligned ellipse of least squares through the points on it.

    The axes may differ by up to 4 %; otherwise a circle is fitted.
    """
    for _ in range(3):
        x, y = (points[np.abs(disc.compute_arc_distance(points)) < 1.5 * TOLERANCE] - disc.centre).T
        if len(x) < MIN_SIDE_POINTS:
            return disc
        scale = (disc.radii[0] + disc.radii[1]) / 2
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
