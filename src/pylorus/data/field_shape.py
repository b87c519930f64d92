"""The shapes that a field of view can have: a disc, a box with cut corners, a box with rounded corners.

Each gives the signed distance of points from its border, negative inside, and its border as a polygon. Lengths are in
pixels of the image in which the shape was found.
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
