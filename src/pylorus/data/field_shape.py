"""The shapes that a field of view can have: a disc, a box with cut corners, a box with round corners.

Each knows the signed distance of points from its border, below 0 inside, and its border as a polygon. Lengths are in
pixels of whatever picture the shape was found in.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """What every shape of a field gives."""

    @property
    def box(self) -> Box:
        """The straight sides that cut the shape."""

    @property
    def name(self) -> str:
        """In words, for the audit."""

    def distance(self, points: Points) -> Distances:
        """Signed distance of each point from the border, below 0 inside."""

    def polygon(self) -> Points:
        """The convex border before the box cuts it."""


@dataclass(frozen=True)
class Disc:
    """An upright ellipse, nearly a circle, cut by a box."""

    box: Box
    middle: tuple[float, float]
    radii: tuple[float, float]

    @property
    def name(self) -> str:
        """Whether straight sides cut it."""
        inner = self.inner_box()
        cut = [side for side, own, bound in zip(_SIDES, self.box, inner, strict=True) if own == bound]
        return f"round, cut {' and '.join(cut)}" if cut else "round"

    def inner_box(self) -> Box:
        """What the disc fills of its box."""
        (x, y), (a, b), (left, top, right, bottom) = self.middle, self.radii, self.box
        return max(left, x - a), max(top, y - b), min(right, x + a), min(bottom, y + b)

    def distance(self, points: Points) -> Distances:
        """Signed distance of each point; to the ellipse it is approximate."""
        return np.maximum(self.arc_distance(points), box_distance(points, self.box))

    def arc_distance(self, points: Points) -> Distances:
        """As `distance`, without the box."""
        share = np.hypot(*((points - self.middle) / self.radii).T)
        return np.asarray((share - 1) * np.mean(self.radii))

    def polygon(self) -> Points:
        """The ellipse as 256 points."""
        return np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1) * self.radii + self.middle


@dataclass(frozen=True)
class CutBox:
    """A box whose corners may be cut off: top left, top right, bottom right, bottom left.

    A corner is the length it takes from the horizontal and from the vertical side; (0, 0) is a right angle.
    """

    box: Box
    corners: tuple[Corner, Corner, Corner, Corner] = ((0, 0), (0, 0), (0, 0), (0, 0))

    @property
    def name(self) -> str:
        """Rectangle, octagon, or how many corners are cut."""
        cut = sum(corner != (0, 0) for corner in self.corners)
        return {0: "rectangle", 4: "octagon"}.get(cut, f"rectangle, {cut} corners cut")

    def distance(self, points: Points) -> Distances:
        """Signed distance of each point; beyond a corner it is the distance to the nearer side's line."""
        found = box_distance(points, self.box)
        for index, (wide, high) in enumerate(self.corners):
            if wide > 0 and high > 0:
                across, down = from_corner(points, self.box, index).T
                beyond = (1 - across / wide - down / high) / np.hypot(1 / wide, 1 / high)
                found = np.maximum(found, beyond)
        return found

    def polygon(self) -> Points:
        """Its eight corners; two of them coincide where none is cut off."""
        left, top, right, bottom = self.box
        (aw, ah), (bw, bh), (cw, ch), (dw, dh) = self.corners
        border = [
            (left, top + ah), (left + aw, top), (right - bw, top), (right, top + bh),
            (right, bottom - ch), (right - cw, bottom), (left + dw, bottom), (left, bottom - dh),
        ]  # fmt: skip
        return np.array(border, dtype=np.float64)


@dataclass(frozen=True)
class RoundedBox:
    """A box whose corners are quarters of a circle."""

    box: Box
    radius: float

    @property
    def name(self) -> str:
        """Always the same."""
        return "rounded rectangle"

    def distance(self, points: Points) -> Distances:
        """Signed distance of each point."""
        left, top, right, bottom = self.box
        middle, half = np.array([left + right, top + bottom]) / 2, np.array([right - left, bottom - top]) / 2
        over = np.abs(points - middle) - half + self.radius
        outside = np.hypot(*np.maximum(over, 0).T)
        return np.asarray(outside + np.minimum(over.max(axis=1), 0) - self.radius)

    def polygon(self) -> Points:
        """Its four arcs as 256 points."""
        left, top, right, bottom = self.box
        middle, half = np.array([left + right, top + bottom]) / 2, np.array([right - left, bottom - top]) / 2
        circle = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)
        inner = np.maximum(half - self.radius, 0)
        return np.asarray(circle * self.radius + np.where(circle >= 0, inner, -inner) + middle)


def box_distance(points: Points, box: Box) -> Distances:
    """Signed distance of each point from the nearest line of a box's sides, below 0 inside."""
    left, top, right, bottom = box
    x, y = points.T
    distance: Distances = np.maximum(np.maximum(left - x, x - right), np.maximum(top - y, y - bottom))
    return distance


def from_corner(points: Points, box: Box, index: int) -> Points:
    """Points seen from a corner of a box, 0 to 3 from top left clockwise: how far they are into it, across and down."""
    left, top, right, bottom = box
    x, y = points.T
    across = x - left if index in (0, 3) else right - x
    down = y - top if index in (0, 1) else bottom - y
    return np.stack([across, down], axis=1)
