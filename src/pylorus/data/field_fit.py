"""Which shape passes through the edge of a field: many points lie on it, some on text, insets or dark mucosa.

Each kind of shape is proposed from few points and judged by all: the best is the one that passes through most of them.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pylorus.data.field_shape import Box, Corner, CutBox, Disc, Points, RoundedBox, Shape, box_distance, from_corner

NEAR = 1.3
"""Pixels: a point so close to a shape's border lies on it."""
PROPOSALS = 256
LEAST_OF_A_CORNER = 5
LEAST_OF_A_SIDE = 10
"""Points that a cut corner, or a straight side of a disc, needs to be believed."""
CLEAR = 0.6
"""Share of the points at a corner that must agree on it; else text or an inset hides it."""


def fit_shape(points: Points, *, middle: tuple[float, float]) -> tuple[Shape, int]:
    """The shape whose border passes through most points.

    Args:
        points: Of shape (points, 2), x and y in pixels, at least 12 of them; in the order of their angle.
        middle: A place within the shape.

    Returns:
        The shape, and through how many points it passes.
    """
    boxes = _boxes(points, middle)
    disc = _disc(points, boxes[0])
    shapes: list[Shape] = [fit(points, box) for box in boxes for fit in (_cut_box, _rounded_box)]
    counts = [_passes(shape, points) for shape in shapes]
    best = int(np.argmax(counts))
    if disc is not None:
        # A box with wide corners is nearly a disc; a disc cut on all sides is nearly a box.
        handicap = 0.98 if np.isinf(disc.box).sum() >= 2 else 1.0
        if _passes(disc, points) > handicap * counts[best]:
            return disc, _passes(disc, points)
    return shapes[best], counts[best]


def _passes(shape: Shape, points: Points) -> int:
    return int(np.count_nonzero(np.abs(shape.distance(points)) < NEAR))


def _boxes(points: Points, middle: tuple[float, float]) -> list[Box]:
    """Boxes of straight lines through many points: first the likeliest, then those with one side elsewhere."""
    away = points - middle
    half = np.maximum(np.percentile(np.abs(away), 90, axis=0), 1)
    across, down = (away / half).T
    wide = np.abs(across) >= np.abs(down)
    sectors = (wide & (across < 0), ~wide & (down < 0), wide & (across > 0), ~wide & (down > 0))
    sides = [_lines(points[sector, side % 2]) for side, sector in enumerate(sectors)]
    low, high = points.min(axis=0), points.max(axis=0)
    likely = [side[0] if side else float(bound) for side, bound in zip(sides, (*low, *high), strict=True)]
    box = likely[0], likely[1], likely[2], likely[3]
    others = [_with_side(box, side, at) for side, lines in enumerate(sides) for at in lines[1:]]
    return [box, *others]


def _lines(values: NDArray[np.floating]) -> list[float]:
    """The coordinate that most points of a side share, then one that at least a third as many share."""
    if not len(values):
        return []
    lowest = float(values.min()) - 1
    counts = np.convolve(np.bincount(((values - lowest) * 2).astype(np.int64), minlength=5), np.ones(5), mode="same")
    first = int(np.argmax(counts))
    apart = np.where(np.abs(np.arange(len(counts)) - first) > 4 * NEAR, counts, 0)
    second = int(np.argmax(apart))
    peaks = [first, second] if apart[second] >= max(LEAST_OF_A_SIDE, counts[first] / 3) else [first]
    middles = [lowest + 0.25 + 0.5 * peak for peak in peaks]
    return [float(np.median(values[np.abs(values - at) <= NEAR])) for at in middles]


def _cut_box(points: Points, box: Box) -> CutBox:
    """The box with those corners cut that the points show, and those that they hide cut like their neighbours."""
    size = np.array([box[2] - box[0], box[3] - box[1]])
    if size.min() < 4 * NEAR:
        return CutBox(box)
    lines = [_cut_corner(from_corner(points, box, index), size) for index in range(4)]
    seen = [line[0] if line is not None and line[1] >= CLEAR else None for line in lines]
    largest = max((corner for corner in seen if corner is not None), default=(0.0, 0.0))
    for index, corner in enumerate(seen):
        if corner is None and _is_square(from_corner(points, box, index), largest):
            seen[index] = (0.0, 0.0)
    # Where text or an inset hides a corner: fields are cut at the left only, or at the right, not at the top only.
    for index in [index for index, corner in enumerate(seen) if corner is None]:
        line, others = lines[index], (seen[3 - index], seen[index ^ 1], seen[index ^ 2])
        seen[index] = next((other for other in others if other is not None), None if line is None else line[0])
    cut = _with_corners(box, seen)
    for index in range(4):  # a reflex in the lumen may look like a cut where points on the sides say that there is none
        square = _with_corners(box, [None if other == index else corner for other, corner in enumerate(seen)])
        if _passes(square, points) > _passes(cut, points) + LEAST_OF_A_CORNER:
            cut, seen[index] = square, None
    return cut


def _with_corners(box: Box, corners: list[Corner | None]) -> CutBox:
    top_left, top_right, bottom_right, bottom_left = (corner or (0.0, 0.0) for corner in corners)
    return CutBox(box, (top_left, top_right, bottom_right, bottom_left))


def _is_square(points: Points, corner: Corner) -> bool:
    """Whether points lie on the box's own sides where a corner of some size would have been cut off."""
    if corner == (0.0, 0.0):
        return True
    within = points[((points / corner).sum(axis=1) < 0.8) & (points > -2 * np.array(corner)).all(axis=1)]
    on_sides = int(np.count_nonzero(np.abs(within.min(axis=1)) < NEAR)) if len(within) else 0
    return on_sides >= max(LEAST_OF_A_CORNER, CLEAR * len(within))


def _cut_corner(points: Points, size: NDArray[np.floating]) -> tuple[Corner, float] | None:
    """The slanting line through most points near a corner, and through which share of them it passes.

    The points are seen from the corner; `size` is the box's.
    """
    reach = (points > NEAR).all(axis=1) & (points < 0.5 * size).all(axis=1) & ((points / size).sum(axis=1) < 0.6)
    near = points[reach]
    near = near[:: 1 + len(near) // 40]
    if len(near) < LEAST_OF_A_CORNER:
        return None
    first, second = np.triu_indices(len(near), k=2)
    run, fall = (near[second] - near[first]).T
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = -fall / run
    kept = (slope > 0.5) & (slope < 2.0)
    slope, first = slope[kept], first[kept]
    if not len(slope):
        return None
    level = near[first, 1] + slope * near[first, 0]
    miss = np.abs(near[:, 1] + slope[:, None] * near[:, 0] - level[:, None]) / np.hypot(1, slope)[:, None]
    counts = np.count_nonzero(miss < NEAR, axis=1)
    best = int(np.argmax(counts))
    if counts[best] < LEAST_OF_A_CORNER:
        return None
    on = near[miss[best] < NEAR]
    corner = _line(on) or (float(level[best] / slope[best]), float(level[best]))
    return corner, len(on) / len(near)


def _line(points: Points) -> Corner | None:
    """The lengths that the line of least squared distances cuts from the axes."""
    middle = points.mean(axis=0)
    normal = np.linalg.svd(points - middle, full_matrices=False)[2][1]
    if (normal == 0).any():
        return None
    across, down = (middle @ normal) / normal
    return (float(across), float(down)) if across > 0 and down > 0 else None


def _rounded_box(points: Points, box: Box) -> RoundedBox:
    """The box with the radius of its corners that passes through most points."""
    low, high = np.array(box[:2]), np.array(box[2:])
    radii = np.linspace(0.02, 0.5, 49) * float((high - low).min())
    over = np.abs(points[::2] - (low + high) / 2) - (high - low) / 2 + radii[:, None, None]
    across, down = over[..., 0], over[..., 1]
    outside = np.hypot(np.maximum(across, 0), np.maximum(down, 0))
    misses = np.abs(outside + np.minimum(np.maximum(across, down), 0) - radii[:, None])
    # Two radii may pass through as many points: then the one that passes closer.
    best = int(np.argmax(np.maximum(0, 1 - misses / NEAR).sum(axis=1)))
    return RoundedBox(box, float(radii[best]))


def _disc(points: Points, sides: Box) -> Disc | None:
    """The circle through most points, cut by those straight sides that lie within it and show."""
    # Where a disc is cut on all sides little of its arc is left among many points on straight sides.
    on_arc = points[box_distance(points, sides) < -NEAR]
    proposed = _circles(on_arc if len(on_arc) >= LEAST_OF_A_SIDE else points)
    if proposed is None:
        return None
    disc = _adjusted(proposed, points)
    for side, at in enumerate(sides):
        cut = replace(disc, box=_with_side(disc.box, side, at))
        on_side = (np.abs(points[:, side % 2] - at) < NEAR) & (disc.arc_distance(points) < -NEAR)
        if np.count_nonzero(on_side) >= LEAST_OF_A_SIDE and _passes(cut, points) > _passes(disc, points):
            disc = cut
    return disc


def _with_side(box: Box, side: int, at: float) -> Box:
    left, top, right, bottom = (at if index == side else old for index, old in enumerate(box))
    return left, top, right, bottom


def _circles(points: Points) -> Disc | None:
    """The circle through three of the points that passes through most."""
    chance = np.random.default_rng(0)  # the same proposals each time
    picks = chance.integers(0, len(points), (PROPOSALS, 3))
    start, second, third = points[picks[:, 0]], points[picks[:, 1]], points[picks[:, 2]]
    (bx, by), (cx, cy) = (second - start).T, (third - start).T
    twice = 2 * (bx * cy - by * cx)
    kept = np.abs(twice) > 1
    bx, by, cx, cy, twice, start = bx[kept], by[kept], cx[kept], cy[kept], twice[kept], start[kept]
    if not len(twice):
        return None
    b, c = bx * bx + by * by, cx * cx + cy * cy
    x, y = (cy * b - by * c) / twice, (bx * c - cx * b) / twice
    radii = np.hypot(x, y)
    middles = np.stack([x, y], axis=1) + start
    judged = points[:: 1 + len(points) // 180]
    distance = np.hypot(judged[:, 0] - middles[:, :1], judged[:, 1] - middles[:, 1:])
    counts = np.count_nonzero(np.abs(distance - radii[:, None]) < 2 * NEAR, axis=1)
    counts[radii > np.hypot(*np.ptp(points, axis=0))] = 0
    best = int(np.argmax(counts))
    everywhere = (-np.inf, -np.inf, np.inf, np.inf)
    middle, radius = middles[best], float(radii[best])
    return Disc(everywhere, (float(middle[0]), float(middle[1])), (radius, radius))


def _adjusted(disc: Disc, points: Points) -> Disc:
    """The upright ellipse of least squares through the points on a circle; up to 4 % off a circle, else a circle."""
    for _ in range(4):
        x, y = (points[np.abs(disc.arc_distance(points)) < 1.5 * NEAR] - disc.middle).T
        if len(x) < LEAST_OF_A_SIDE:
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
        middle = disc.middle[0] - scale * c / (2 * a), disc.middle[1] - scale * d / (2 * b)
        radii = scale * np.sqrt(over / a), scale * np.sqrt(over / b)
        disc = replace(disc, middle=(float(middle[0]), float(middle[1])), radii=(float(radii[0]), float(radii[1])))
    return disc
