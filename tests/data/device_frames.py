"""Draw frames of endoscopy devices with known geometry: what the field finder and the text detector are tested on.

`draw_frame(layout, seed)` gives a frame and its exact masks: the field of view, what covers it (text, insets,
pictograms) and what is drawn beside it. A layout is a kind of device, such as an octagon on blue-black ground. Frames of
one device share geometry, ground and the positions of text; patient, view, noise and compression differ:

>>> frame = draw_frame("octagon", 7, longest=320)
>>> frame.image.shape[:2] == frame.field.shape == frame.overlay.shape == frame.text.shape
True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pylorus.data import synthetic

Mask = NDArray[np.bool_]
Pixels = NDArray[np.uint8]
Plane = NDArray[np.float32]

FRAMES_PER_DEVICE = 5
"""Consecutive seeds that are frames of one device, unless the device is given."""
MUCOSA_SIDE = 400
"""Longer side in pixels at which mucosa is rendered before it is enlarged to the field."""


@dataclass(frozen=True)
class DeviceFrame:
    """A frame and what is known of it; masks are of shape (height, width).

    Attributes:
        image: RGB, uint8 of shape (height, width, 3).
        field: True where the lens's picture is, also where text or an inset covers it.
        overlay: True where text, a pictogram or an inset covers the field; a subset of `field`.
        text: True where text, logos or insets lie beside the field.
        layout: The kind of device, one of `LAYOUTS`.
        device: The device, such as `octagon-3`.
    """

    image: Pixels
    field: Mask
    overlay: Mask
    text: Mask
    layout: str
    device: str


@dataclass
class Canvas:
    """A frame while it is drawn: `image` as float RGB, and what was drawn over it."""

    image: Plane
    distance: Plane  # signed distance from the field's border in pixels, negative inside
    drawn: Mask = field(init=False)

    def __post_init__(self) -> None:
        self.drawn = np.zeros(self.distance.shape, dtype=bool)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.distance.shape[1], self.distance.shape[0]

    def paint(self, alpha: Plane, colour: NDArray[np.floating] | tuple[float, ...], *, left: int, top: int) -> None:
        """Paint a colour or picture with the given coverage; parts beyond the frame are cut."""
        width, height = self.size
        x0, y0, x1, y1 = max(0, left), max(0, top), min(width, left + alpha.shape[1]), min(height, top + alpha.shape[0])
        if x0 >= x1 or y0 >= y1:
            return
        cut = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
        colour = np.asarray(colour, dtype=np.float32)
        part, weight = colour[cut] if colour.ndim == 3 else colour, alpha[cut][..., None]
        place = np.s_[y0:y1, x0:x1]
        self.image[place] = self.image[place] * (1 - weight) + part * weight
        self.drawn[place] |= alpha[cut] >= 0.25


Geometry = Callable[[Generator, int, int], Plane]
"""Draws the signed distance from the field's border for a device and the frame's width and height."""


@dataclass(frozen=True)
class Layout:
    """A kind of device: everything that its frames have in common.

    Attributes:
        geometry: Shape and position of the field.
        sizes: Widths and heights of frames.
        grounds: Kinds of ground around the field, one of `_GROUNDS` each.
        texts: Where text stands: left, right, top, bottom (beside or over the field, as it happens), over.
        inset: none, map, black, picture.
        rim: none, hairline, mat: what surrounds the frame.
        soft: Range of the width of the field's edge, in thousandths of the frame's longer side.
        interlaced: Probability that odd rows are shifted against even ones.
    """

    geometry: Geometry
    sizes: tuple[tuple[int, int], ...]
    grounds: tuple[str, ...] = ("black",)
    texts: tuple[str, ...] = ("left",)
    inset: str = "none"
    rim: str = "none"
    soft: tuple[float, float] = (0.5, 2.0)
    interlaced: float = 0.0


def draw_frame(layout: str, seed: int, *, device: int | None = None, longest: int | None = None) -> DeviceFrame:
    """Draw one frame; the same arguments give the same pixels.

    Args:
        layout: One of `LAYOUTS`.
        seed: Patient, view, text, noise and compression, 0 or more.
        device: Geometry, ground and the places of text; None: `seed // FRAMES_PER_DEVICE`.
        longest: Longer side of the frame in pixels, at most; None: as the device records it.
    """
    device = seed // FRAMES_PER_DEVICE if device is None else device
    kind, number = LAYOUTS[layout], list(LAYOUTS).index(layout)
    unit = np.random.default_rng(SeedSequence(device, spawn_key=(number, 0)))
    view = np.random.default_rng(SeedSequence(seed, spawn_key=(number, 1)))
    width, height = kind.sizes[unit.integers(len(kind.sizes))]
    scale = 1.0 if longest is None else min(1.0, longest / max(width, height))
    width, height = round(width * scale), round(height * scale)
    inner = _place_inside_mat(unit, width, height) if kind.rim == "mat" else (0, 0, width, height)
    distance = np.full((height, width), 1e3, dtype=np.float32)
    left, top, right, bottom = inner
    distance[top:bottom, left:right] = kind.geometry(unit, right - left, bottom - top)
    canvas = Canvas(np.zeros((height, width, 3), dtype=np.float32), distance)
    ground = _GROUNDS[kind.grounds[unit.integers(len(kind.grounds))]]
    if kind.rim == "mat":
        canvas.image[:] = unit.uniform(236, 255)
    canvas.image[top:bottom, left:right] = ground(unit, distance[top:bottom, left:right])
    _draw_field(canvas, unit, view, kind)
    is_field = distance < 0
    for place in kind.texts:
        _TEXTS[place](canvas, unit, view)
    if kind.inset != "none":
        _draw_inset(canvas, unit, view, kind.inset)
    if unit.random() < 0.25 and "none" not in kind.texts:
        _draw_colour_bar(canvas, unit)
    if kind.rim == "hairline":
        line = max(1, round(unit.uniform(0.6, 1.8) * max(width, height) / 1000))
        canvas.image[:line], canvas.image[-line:], canvas.image[:, :line], canvas.image[:, -line:] = (255,) * 4
    image = _record(canvas, unit, view, is_field)
    return DeviceFrame(image, is_field, canvas.drawn & is_field, canvas.drawn & ~is_field, layout, f"{layout}-{device}")


def _place_inside_mat(unit: Generator, width: int, height: int) -> tuple[int, int, int, int]:
    left, right = (round(share * width) for share in unit.uniform(0.008, 0.07, 2))
    top, bottom = (round(share * height) for share in unit.uniform(0.008, 0.07, 2))
    return left, top, width - right, height - bottom


# --- geometry: signed distances ---


def _grid(width: int, height: int) -> tuple[Plane, Plane]:
    return np.arange(width, dtype=np.float32)[None], np.arange(height, dtype=np.float32)[:, None]


def _disc(width: int, height: int, centre: tuple[float, float], radius: float, stretch: float = 1.0) -> Plane:
    x, y = _grid(width, height)
    return np.asarray(np.hypot((x - centre[0]) * stretch, y - centre[1]) - radius, dtype=np.float32)


def _box(width: int, height: int, box: tuple[float, float, float, float]) -> Plane:
    """Distance from a box; a side at the frame's border or beyond is not an edge."""
    x, y = _grid(width, height)
    left, top, right, bottom = box
    across = np.maximum(np.where(left <= 0, -1e3, left - 0.5 - x), np.where(right >= width, -1e3, x - right + 0.5))
    down = np.maximum(np.where(top <= 0, -1e3, top - 0.5 - y), np.where(bottom >= height, -1e3, y - bottom + 0.5))
    return np.asarray(np.maximum(across, down), dtype=np.float32)


def _cut_corners(
    plane: Plane, box: tuple[float, float, float, float], cuts: tuple[float, float, float, float], slant: float
) -> Plane:
    """Cut corners, from top left clockwise, by lines that remove `cut` pixels of the horizontal side."""
    x, y = _grid(plane.shape[1], plane.shape[0])
    left, top, right, bottom = box
    across, down = (x - left, right - x, right - x, x - left), (y - top, y - top, bottom - y, bottom - y)
    for cut, u, v in zip(cuts, across, down, strict=True):
        if cut > 0:
            plane = np.maximum(plane, (cut * slant - u * slant - v) / np.hypot(1, slant))
    return np.asarray(plane, dtype=np.float32)


def _field_box(unit: Generator, width: int, height: int, *, full: float = 0.4) -> tuple[float, float, float, float]:
    """A box that fills much of the height and part of the width, mostly towards the right, as text stands left."""
    high = float(height) if unit.random() < full else round(unit.uniform(0.72, 0.97) * height)
    wide = min(float(width), round(unit.uniform(1.0, 1.3) * high))
    left = round(min(1.0, unit.uniform(0.3, 1.15)) * (width - wide))
    top = round(unit.uniform(0, 1) * (height - high))
    return float(left), float(top), left + wide, top + high


def _draw_whole(unit: Generator, width: int, height: int) -> Plane:
    return np.full((height, width), -1e3, dtype=np.float32)


def _draw_round(unit: Generator, width: int, height: int) -> Plane:
    radius = unit.uniform(0.38, 0.495) * min(width, height)
    x = width / 2 + unit.uniform(-0.3, 0.95) * (width / 2 - radius)
    y = height / 2 + unit.uniform(-0.8, 0.8) * (height / 2 - radius)
    return _disc(width, height, (x, y), radius, unit.uniform(0.988, 1.012))


def _draw_round_cut_by_frame(unit: Generator, width: int, height: int) -> Plane:
    radius = min(unit.uniform(0.54, 0.68) * height, 0.497 * width)
    x = width / 2 + unit.uniform(-0.6, 0.95) * (width / 2 - radius)
    return _disc(width, height, (x, height * unit.uniform(0.46, 0.54)), radius)


def _draw_round_above_bar(unit: Generator, width: int, height: int) -> Plane:
    bar = round(unit.uniform(0.925, 0.95) * height)
    radius = min(unit.uniform(0.56, 0.64) * height, 0.495 * width)
    x = width / 2 + unit.uniform(-0.5, 0.5) * (width / 2 - radius)
    disc = _disc(width, height, (x, 0.5 * bar), radius)
    return np.maximum(disc, _box(width, height, (0, 0, width, bar)))


def _draw_round_cut_sideways(unit: Generator, width: int, height: int) -> Plane:
    radius = unit.uniform(0.44, 0.495) * height
    x, cut = width * unit.uniform(0.45, 0.6), unit.uniform(0.75, 0.92) * radius
    disc = _disc(width, height, (x, height / 2), radius)
    return np.maximum(disc, _box(width, height, (round(x - cut), 0, round(x + cut), height)))


def _draw_octagon(unit: Generator, width: int, height: int) -> Plane:
    box = _field_box(unit, width, height)
    cut = unit.uniform(0.07, 0.24) * (box[3] - box[1])
    return _cut_corners(_box(width, height, box), box, (cut,) * 4, unit.uniform(0.8, 1.25))


def _draw_octagon_cropped(unit: Generator, width: int, height: int) -> Plane:
    """An octagon that fills the frame, as public sets crop it; some lose a strip, some keep one."""
    strips = np.round(unit.uniform(-0.03, 0.015, 4) * height)
    box = strips[0], strips[1], width - strips[2], height - strips[3]
    cut = unit.uniform(0.12, 0.3) * height
    return _cut_corners(_box(width, height, box), box, (cut,) * 4, unit.uniform(0.85, 1.2))


def _draw_left_corners_cut(unit: Generator, width: int, height: int) -> Plane:
    box = _field_box(unit, width, height)
    cut = unit.uniform(0.08, 0.22) * (box[3] - box[1])
    return _cut_corners(_box(width, height, box), box, (cut, 0, 0, cut), unit.uniform(0.85, 1.2))


def _draw_right_corners_cut(unit: Generator, width: int, height: int) -> Plane:
    box = _field_box(unit, width, height)
    cut = unit.uniform(0.08, 0.22) * (box[3] - box[1])
    return _cut_corners(_box(width, height, box), box, (0, cut, cut, 0), unit.uniform(0.85, 1.2))


def _draw_rectangle(unit: Generator, width: int, height: int) -> Plane:
    return _box(width, height, _field_box(unit, width, height))


def _draw_rounded(unit: Generator, width: int, height: int) -> Plane:
    left, top, right, bottom = _field_box(unit, width, height)
    radius = unit.uniform(0.04, 0.25) * (bottom - top)
    x, y = _grid(width, height)
    u = np.abs(x - (left + right - 1) / 2) - (right - left) / 2 + radius
    v = np.abs(y - (top + bottom - 1) / 2) - (bottom - top) / 2 + radius
    outside = np.hypot(np.maximum(u, 0), np.maximum(v, 0))
    return np.asarray(outside + np.minimum(np.maximum(u, v), 0) - radius, dtype=np.float32)


def _draw_rounded_in_whole(unit: Generator, width: int, height: int) -> Plane:
    """A picture that fills the frame but for painted corners and a banner above or below."""
    banner = round(unit.uniform(0.05, 0.11) * height)
    top, bottom = (banner, height) if unit.random() < 0.5 else (0, height - banner)
    cut = unit.uniform(0.1, 0.24) * height
    box = 0.0, float(top), float(width), float(bottom)
    if unit.random() < 0.5:
        return _cut_corners(_box(width, height, box), box, (cut,) * 4, unit.uniform(0.85, 1.2))
    x, y = _grid(width, height)
    u = np.abs(x - (width - 1) / 2) - width / 2 + cut
    v = np.abs(y - (top + bottom - 1) / 2) - (bottom - top) / 2 + cut
    outside = np.hypot(np.maximum(u, 0), np.maximum(v, 0))
    return np.asarray(outside + np.minimum(np.maximum(u, v), 0) - cut, dtype=np.float32)


# --- ground: what lies around the field ---


def _fill(colour: NDArray[np.floating], distance: Plane) -> Plane:
    return np.broadcast_to(np.asarray(colour, np.float32), (*distance.shape, 3)).copy()


def _fill_black(unit: Generator, distance: Plane) -> Plane:
    return _fill(np.full(3, unit.uniform(0, 9)), distance)


def _fill_blue_black(unit: Generator, distance: Plane) -> Plane:
    return _fill(unit.uniform((2, 4, 16), (16, 22, 52)), distance)


def _fill_dark_grey(unit: Generator, distance: Plane) -> Plane:
    return _fill(unit.uniform(22, 75) * unit.uniform(0.92, 1.08, 3), distance)


def _fill_brown(unit: Generator, distance: Plane) -> Plane:
    return _fill(unit.uniform((70, 42, 20), (135, 85, 60)), distance)


def _fill_white(unit: Generator, distance: Plane) -> Plane:
    return _fill(np.full(3, unit.uniform(232, 255)), distance)


def _fill_corners_and_banner(unit: Generator, distance: Plane) -> Plane:
    """Mats painted into the corners, a banner in a third colour, a bar of two tones below."""
    _height, width = distance.shape
    mats = (_fill_brown, _fill_black, _fill_dark_grey, _fill_blue_black)
    ground = mats[unit.integers(4)](unit, distance)
    rows = np.flatnonzero((distance < 0).any(axis=1))
    banner = unit.uniform((0, 0, 0), (90, 90, 120))
    ground[: rows[0]] = banner
    ground[rows[-1] + 1 :] = banner
    ground[rows[-1] + 1 :, : round(unit.uniform(0.2, 0.8) * width)] += unit.uniform(8, 30)
    return ground


def _fill_bar_below(unit: Generator, distance: Plane) -> Plane:
    """Black with a status bar of two dark tones below the field."""
    ground = _fill_black(unit, distance)
    last = int(np.flatnonzero((distance < 0).any(axis=1))[-1])
    ground[last + 1 :] = unit.uniform((8, 18, 18), (60, 60, 60))
    ground[last + 1 :, : round(unit.uniform(0.2, 0.8) * distance.shape[1])] += unit.uniform(0, 18)
    return ground


_GROUNDS: dict[str, Callable[[Generator, Plane], Plane]] = {
    "black": _fill_black,
    "blue-black": _fill_blue_black,
    "dark grey": _fill_dark_grey,
    "brown": _fill_brown,
    "white": _fill_white,
    "corners and banner": _fill_corners_and_banner,
    "bar below": _fill_bar_below,
}


# --- mucosa ---

_TINTS = {
    "white light": ((1.0, 1.0, 1.0), 12),
    "narrow-band, brown and green": ((0.62, 0.88, 0.95), 2),
    "green": ((0.45, 1.0, 0.9), 1),
    "brown, bile": ((0.95, 0.95, 0.55), 1),
    "lilac": ((0.9, 0.85, 1.35), 1),
    "blue dye": ((0.45, 0.9, 1.3), 1),
    "pale": ((1.0, 1.35, 1.4), 2),
}


def render_mucosa(view: Generator, width: int, height: int) -> Plane:
    """Render mucosa as float RGB in grey levels, of shape (height, width, 3), without a field."""
    scale = min(1.0, MUCOSA_SIDE / max(width, height))
    w, h = max(24, round(width * scale)), max(24, round(height * scale))
    radius = 0.5 * min(w, h)
    x, y = np.meshgrid((np.arange(w) - w / 2) / radius, (np.arange(h) - h / 2) / radius)
    plane = synthetic.Field(np.ones((h, w), bool), x.astype(np.float32), y.astype(np.float32), radius)
    wall, lumen = synthetic.transform_wall(view, plane), synthetic.sample_lumen(view)
    layer = synthetic.render_mucosa(view, wall, lumen=lumen)
    findings = (synthetic.render_cancer, synthetic.render_ulcer, synthetic.render_gastritis)
    if view.random() < 0.6:
        layer = layer + findings[view.integers(3)](view, wall)
    shade = synthetic.compute_lumen_shade(view, wall, lumen=lumen) if view.random() < 0.7 else np.ones_like(wall.x)
    if view.random() < 0.3:  # a dark lumen at the rim, as dark as the ground
        angle, far, reach = view.uniform(0, 2 * np.pi), view.uniform(0.75, 1.2), view.uniform(0.25, 0.8)
        away = np.hypot(plane.x - far * np.cos(angle), plane.y - far * np.sin(angle))
        shade = shade * (1 - view.uniform(0.93, 1.0) * np.exp(-((away / reach) ** 2)))
    colour = synthetic.compute_wall_colour(view, layer)
    diffuse, specular = synthetic.compute_wall_light(view, plane, layer.height)
    vignette = 1 - view.uniform(0.0, 0.32) * np.minimum(plane.x**2 + plane.y**2, 2.2)
    light = colour * (shade * diffuse * vignette)[..., None] + (shade * specular)[..., None]
    names = list(_TINTS)
    weights = np.array([_TINTS[name][1] for name in names], dtype=float)
    tint = np.array(_TINTS[names[view.choice(len(names), p=weights / weights.sum())]][0], dtype=np.float32)
    grey = 255 * (1 - np.exp(-view.uniform(0.8, 2.2) * np.maximum(light, 0) * tint)) + view.uniform(0, 6)
    if view.random() < 0.12:
        _add_instrument(view, grey)
    if view.random() < 0.08:  # a cap on the tip: a pale ring at one side of the rim
        ring = np.clip((np.hypot(plane.x - 0.15, plane.y) - view.uniform(0.95, 1.05)) / 0.03, 0, 1)[..., None]
        shine = 0.65 + 0.35 * np.sin(3 * np.arctan2(plane.y, plane.x) + view.uniform(0, 6))[..., None]
        grey = grey * (1 - 0.7 * ring) + 0.7 * ring * shine * view.uniform(150, 235)
    large = cv2.resize(grey.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(large * _render_texture(view, width, height)[..., None])


def _render_texture(view: Generator, width: int, height: int) -> Plane:
    """Render the fine texture of pits and capillaries, which the reduced rendering lacks, as factors around 1."""
    texture = np.zeros((height, width), dtype=np.float32)
    cv2.setRNGSeed(int(view.integers(2**31)))
    for cell, strength in ((view.uniform(3, 5), 0.03), (view.uniform(7, 14), 0.05)):
        grain = np.empty((2 + round(height / cell), 2 + round(width / cell)), dtype=np.float32)
        cv2.randn(grain, 0, strength * view.uniform(0.3, 1.5))
        texture += cv2.resize(grain, (width, height), interpolation=cv2.INTER_CUBIC)
    return 1 + texture


def _add_instrument(view: Generator, grey: Plane) -> None:
    """Draw a shaft that enters over the rim: the endoscope itself in retroflexion, or a forceps."""
    height, width = grey.shape[:2]
    x, y = np.meshgrid(np.arange(width) / height, np.arange(height) / height)
    angle, offset = view.uniform(0, np.pi), view.uniform(-0.2, 0.2)
    u, v = x - 0.5 * width / height, y - 0.5
    across, along = u * np.cos(angle) + v * np.sin(angle) - offset, -u * np.sin(angle) + v * np.cos(angle)
    half = view.uniform(0.02, 0.09)
    profile = np.sqrt(np.clip(1 - (across / half) ** 2, 0, 1)) * np.clip((along - view.uniform(0, 0.2)) / 0.02, 0, 1)
    colour = np.array(((28, 30, 42), (60, 75, 110), (215, 215, 210))[view.integers(3)], dtype=np.float32)
    alpha = (profile > 0)[..., None]
    grey[:] = np.where(alpha, colour * (0.4 + 0.9 * profile[..., None]), grey)


def _draw_field(canvas: Canvas, unit: Generator, view: Generator, kind: Layout) -> None:
    """Draw mucosa with noise and reflections into the field, with a hard or soft edge."""
    inside = canvas.distance < 0
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    pad = 2 + round(kind.soft[1] * max(canvas.size) / 1000)
    width, height = canvas.size
    top, bottom = max(0, int(rows[0]) - pad), min(height, int(rows[-1]) + 1 + pad)
    left, right = max(0, int(columns[0]) - pad), min(width, int(columns[-1]) + 1 + pad)
    scene = render_mucosa(view, right - left, bottom - top)
    _add_reflections(view, scene)
    noise = np.empty(scene.shape[:2], dtype=np.float32)
    cv2.setRNGSeed(int(view.integers(2**31)))
    cv2.randn(noise, 0, view.uniform(0.5, 5.0))
    scene += noise[..., None]
    soft = max(0.5, unit.uniform(*kind.soft) * max(canvas.size) / 1000)
    place = np.s_[top:bottom, left:right]
    alpha = np.clip(0.5 - canvas.distance[place] / soft, 0, 1)[..., None]
    canvas.image[place] = canvas.image[place] * (1 - alpha) + np.clip(scene, 0, 255) * alpha
    if unit.random() < kind.interlaced:
        shift = round(view.uniform(1, 4) * max(canvas.size) / 1000) + 1
        canvas.image[1::2] = np.roll(canvas.image[1::2], shift, axis=1)


def _add_reflections(view: Generator, scene: Plane) -> None:
    """Add clusters of small, bright, sharp reflections of the lamp, some with coloured rims."""
    height, width = scene.shape[:2]
    unit = max(height, width) / 1000
    for _ in range(view.integers(0, 4)):
        x, y = view.uniform(0, width), view.uniform(0, height)
        angle = view.uniform(0, 180)
        for _ in range(view.integers(1, 14)):
            at = (int(x + view.normal(0, 45 * unit)), int(y + view.normal(0, 45 * unit)))
            axes = (max(1, int(view.gamma(1.6, 4.5 * unit))), max(1, int(view.gamma(1.6, 2.2 * unit))))
            level = view.uniform(215, 262)
            cv2.ellipse(
                scene, at, axes, angle + view.normal(0, 25), 0, 360, (level, level, level * 0.97), -1, cv2.LINE_AA
            )


# --- text, pictograms and insets ---

_HERSHEY = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_PLAIN,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
)
_TRUETYPE = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
)
_COLOURS = ((255, 255, 255), (255, 255, 255), (225, 228, 230), (250, 240, 60), (90, 240, 110), (120, 215, 250))
_OUTSIDE_ON_WHITE = (20, 20, 25)


@cache
def _load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


@dataclass(frozen=True)
class Style:
    """How a device writes: font, height of a line in pixels, colour, outline in pixels (0: none)."""

    font: int | str
    line: int
    colour: tuple[int, int, int]
    outline: int


def _choose_style(unit: Generator, canvas: Canvas) -> Style:
    fonts: tuple[int | str, ...] = (*_HERSHEY, *_TRUETYPE)
    line = max(9, round(unit.uniform(0.018, 0.036) * canvas.size[1]))
    outline = max(1, line // 12) if unit.random() < 0.45 else 0
    return Style(fonts[unit.integers(len(fonts))], line, _COLOURS[unit.integers(len(_COLOURS))], outline)


def _render_text(text: str, style: Style) -> tuple[Plane, Plane]:
    """Render one line: the coverage of the letters, and that of letters with their outline."""
    pad = style.outline + 1
    if isinstance(style.font, str):
        font = _load_font(style.font, max(7, round(0.78 * style.line)))
        box = font.getbbox(text)
        ink = Image.new("L", (int(box[2]) + 2 * pad, style.line + 2 * pad), 0)
        ImageDraw.Draw(ink).text((pad, pad), text, fill=255, font=font)
        letters = np.array(ink)
    else:
        scale = cv2.getFontScaleFromHeight(style.font, max(5, round(0.55 * style.line)), 1)
        stroke = max(1, round(style.line / 14))
        (width, _), below = cv2.getTextSize(text, style.font, scale, stroke)
        letters = np.zeros((style.line + 2 * pad, width + 2 * pad + stroke), np.uint8)
        at = (pad, letters.shape[0] - pad - max(below // 2, round(0.2 * style.line)))
        cv2.putText(letters, text, at, style.font, scale, 255, stroke, cv2.LINE_AA)
    around = letters
    if style.outline:
        around = cv2.dilate(letters, np.ones((2 * style.outline + 1,) * 2, np.uint8))
    return letters.astype(np.float32) / 255, np.asarray(around, dtype=np.float32) / 255


def _write(canvas: Canvas, text: str, style: Style, *, left: int, top: int) -> None:
    letters, around = _render_text(text, style)
    height, width = letters.shape
    if style.outline:
        canvas.paint(around, (6, 6, 6), left=left, top=top)
    colour = style.colour
    below = canvas.image[max(0, top) : top + height, max(0, left) : left + width]
    if below.size and not style.outline and np.median(below) > 200:
        colour = _OUTSIDE_ON_WHITE
    canvas.paint(letters, colour, left=left, top=top)


def _compose_lines(unit: Generator, view: Generator) -> list[str]:
    """Lines of patient, date, time, settings and physician: the device says which, the frame what they say."""
    name = "".join(view.choice(list("ABDEGHIKLMNORSTUVZ"), view.integers(4, 10)))
    date = f"{view.integers(1, 29):02d}/{view.integers(1, 13):02d}/{view.integers(2008, 2026)}"
    time = f"{view.integers(7, 18):02d}:{view.integers(60):02d}:{view.integers(60):02d}"
    lines = [
        f"ID:{view.integers(10**5, 10**8)}",
        f"Name: {name}",
        f"Sex: {'FM'[view.integers(2)]}  Age: {view.integers(18, 92)}",
        f"D.O.B.: {date[:6]}{view.integers(1930, 2005)}",
        date,
        time,
        f"SCV:{view.integers(1, 99)}",
        "CVP:F" if view.random() < 0.5 else "CVP:A-1",
        f"D.F:{view.integers(1, 4)}.0",
        f"Eh:A{view.integers(1, 6)} Ce:{view.integers(0, 3)}",
        f"Dr. {name[::-1].title()}",
        "Comment:",
        "----/----(0/1)",
    ]
    wanted = np.sort(unit.choice(len(lines), unit.integers(3, 9), replace=False))
    return [lines[index] for index in wanted]


def _write_block(canvas: Canvas, unit: Generator, view: Generator, *, left: float, top: float) -> None:
    """Write a block of lines at a position given as fractions of the frame, with a gap or a pictogram between some."""
    style, (width, height) = _choose_style(unit, canvas), canvas.size
    y = round(top * height)
    for line in _compose_lines(unit, view):
        _write(canvas, line, style, left=round(left * width), top=y)
        y += round(style.line * (2.2 if unit.random() < 0.2 else 1.15))
        if unit.random() < 0.12:
            y = _draw_squares(canvas, unit, style, left=round(left * width), top=y)


def _draw_squares(canvas: Canvas, unit: Generator, style: Style, *, left: int, top: int) -> int:
    """Draw a row of squares or a small symbol, and return the row below it."""
    side = max(4, round(unit.uniform(0.4, 0.8) * style.line))
    count, is_hollow = int(unit.integers(1, 8)), unit.random() < 0.3
    for index in range(count):
        square = np.ones((side, side), dtype=np.float32)
        if is_hollow and side > 5:
            square[2:-2, 2:-2] = 0
        canvas.paint(square, style.colour, left=left + index * (side + max(2, side // 3)), top=top)
    return top + side + style.line // 2


def _write_left(canvas: Canvas, unit: Generator, view: Generator) -> None:
    _write_block(canvas, unit, view, left=unit.uniform(0.004, 0.03), top=unit.uniform(0.02, 0.3))
    if unit.random() < 0.5:
        _write_block(canvas, unit, view, left=unit.uniform(0.004, 0.03), top=unit.uniform(0.55, 0.75))


def _write_right(canvas: Canvas, unit: Generator, view: Generator) -> None:
    _write_block(canvas, unit, view, left=unit.uniform(0.84, 0.92), top=unit.uniform(0.02, 0.6))


def _write_bar(canvas: Canvas, unit: Generator, view: Generator) -> None:
    """Write one line near the bottom of the frame, into the bar or banner if there is one."""
    style, (width, height) = _choose_style(unit, canvas), canvas.size
    style = Style(style.font, max(9, round(0.022 * height)), style.colour, style.outline)
    x = unit.uniform(0.02, 0.3)
    for line in _compose_lines(unit, view)[:4]:
        _write(canvas, line, style, left=round(x * width), top=round(0.965 * height))
        x += unit.uniform(0.16, 0.28)


def _write_banner(canvas: Canvas, unit: Generator, view: Generator) -> None:
    """Write a line at the top of the frame."""
    style, (width, height) = _choose_style(unit, canvas), canvas.size
    style = Style(style.font, max(9, round(0.024 * height)), style.colour, style.outline)
    x = unit.uniform(0.01, 0.1)
    for line in _compose_lines(unit, view)[:4]:
        _write(canvas, line, style, left=round(x * width), top=round(0.006 * height))
        x += unit.uniform(0.18, 0.3)


def _write_over(canvas: Canvas, unit: Generator, view: Generator) -> None:
    """Write a block over the left part of the field itself."""
    rows, columns = np.flatnonzero((canvas.distance < 0).any(axis=1)), np.flatnonzero((canvas.distance < 0).any(axis=0))
    width, height = canvas.size
    left = (columns[0] + unit.uniform(0.0, 0.06) * np.ptp(columns)) / width
    top = (rows[0] + unit.uniform(0.08, 0.5) * np.ptp(rows)) / height
    _write_block(canvas, unit, view, left=float(left), top=float(top))


_TEXTS: dict[str, Callable[[Canvas, Generator, Generator], None]] = {
    "left": _write_left,
    "right": _write_right,
    "bottom": _write_bar,
    "top": _write_banner,
    "over": _write_over,
    "none": lambda canvas, unit, view: None,
}


def _draw_inset(canvas: Canvas, unit: Generator, view: Generator, kind: str) -> None:
    """Draw an inset: a scope map or a black patch over the field's lower left, or a second picture beside it."""
    width, height = canvas.size
    if kind == "picture":
        side = round(unit.uniform(0.2, 0.3) * height)
        left, top = round(unit.uniform(0.005, 0.02) * width), round(unit.uniform(0.3, 0.6) * height)
        picture = np.clip(render_mucosa(view, side, side), 0, 255)
        canvas.paint(np.ones((side, side), np.float32), picture, left=left, top=top)
        return
    wide, high = round(unit.uniform(0.28, 0.4) * width), round(unit.uniform(0.3, 0.42) * height)
    inside = canvas.distance < 0
    left = max(0, int(np.flatnonzero(inside.any(axis=0))[0]))
    top = int(np.flatnonzero(inside.any(axis=1))[-1]) + 1 - high + round(unit.uniform(0, 0.02) * height)
    if kind == "black":
        canvas.paint(np.ones((high, wide), np.float32), (0, 0, 0), left=left, top=top)
        return
    picture = np.empty((high, wide, 3), dtype=np.float32)
    picture[:] = unit.uniform((0, 70, 45), (40, 130, 95))
    picture += (12 * np.linspace(-1, 1, high))[:, None, None]
    line = max(1, round(height / 400))
    for share in np.linspace(0.1, 0.9, 5):
        cv2.line(picture, (0, round(share * high)), (wide, round(share * high)), (70, 160, 120), 1)
        cv2.line(picture, (round(share * wide), 0), (round(share * wide), high), (70, 160, 120), 1)
    turns = view.uniform(0.15, 0.85, (6, 2)) * (wide, high)
    curve = cv2.resize(turns.astype(np.float32)[:, None], (1, 60), interpolation=cv2.INTER_CUBIC).reshape(-1, 1, 2)
    cv2.polylines(picture, [curve.astype(np.int32)], False, (225, 225, 190), 4 * line, cv2.LINE_AA)
    cv2.rectangle(picture, (0, 0), (wide - 1, high - 1), (150, 200, 180), line)
    canvas.paint(np.ones((high, wide), np.float32), picture, left=left, top=top)


def _draw_colour_bar(canvas: Canvas, unit: Generator) -> None:
    """Draw a bar of colours or a logo's plate beside the field, if a place is found."""
    width, height = canvas.size
    for _ in range(12):
        wide, high = round(unit.uniform(0.02, 0.1) * width) + 2, round(unit.uniform(0.02, 0.1) * height) + 2
        left, top = int(unit.integers(0, width - wide)), int(unit.integers(0, height - high))
        place = np.s_[top : top + high, left : left + wide]
        if (canvas.distance[place] > 6).all() and not canvas.drawn[place].any():
            colours = unit.integers(40, 255, (6, 3))[np.linspace(0, 5.99, high).astype(int)]
            picture = np.repeat(colours[:, None], wide, axis=1)
            canvas.paint(np.ones((high, wide), np.float32), picture, left=left, top=top)
            return


def _record(canvas: Canvas, unit: Generator, view: Generator, is_field: Mask) -> Pixels:
    """Scale, blur, add the recorder's noise to everything, and compress as JPEG."""
    image, scale = canvas.image, max(canvas.size) / 1280
    blur = unit.uniform(0, 1.0) * scale
    if blur > 0.25:
        image = cv2.GaussianBlur(image, (0, 0), blur)
    if unit.random() < 0.3:
        noise = np.empty(is_field.shape, dtype=np.float32)
        cv2.setRNGSeed(int(view.integers(2**31)))
        cv2.randn(noise, 0, unit.uniform(0.5, 3.0))
        image = image + noise[..., None]
    recorded = np.clip(image, 0, 255).astype(np.uint8)
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(unit.integers(60, 96))]
    packed = cv2.imencode(".jpg", recorded[:, :, ::-1], quality)[1]
    return np.ascontiguousarray(cv2.imdecode(packed, cv2.IMREAD_COLOR)[:, :, ::-1])


_SD = ((720, 576), (640, 480), (768, 576))
_SXGA = ((1280, 1024), (1280, 1024), (1350, 1080))
_HD = ((1920, 1080), (1280, 720))

LAYOUTS: dict[str, Layout] = {
    "whole": Layout(_draw_whole, ((768, 576), *_HD), texts=("none",)),
    "whole with text": Layout(_draw_whole, ((1280, 1024), *_HD), texts=("over", "right")),
    "round": Layout(_draw_round, (*_SXGA, *_HD), texts=("left",)),
    "round, cut by the frame": Layout(_draw_round_cut_by_frame, _SXGA, texts=("left", "right")),
    "round above a status bar": Layout(
        _draw_round_above_bar, _SXGA, grounds=("bar below",), texts=("left", "right", "bottom")
    ),
    "round, cut left and right": Layout(
        _draw_round_cut_sideways, (*_SD, *_HD), grounds=("black", "blue-black"), texts=("left", "right")
    ),
    "round on white": Layout(_draw_round, (*_SXGA, (800, 800)), grounds=("white",), texts=("left",)),
    "round in a white mat": Layout(_draw_round, (*_SXGA, *_SD), texts=("left",), rim="mat"),
    "octagon": Layout(_draw_octagon, (*_SXGA, *_HD, *_SD), texts=("left",)),
    "octagon on blue-black": Layout(_draw_octagon, (*_SXGA, *_HD), grounds=("blue-black",), texts=("left", "top")),
    "octagon, soft edge": Layout(_draw_octagon, _SD, texts=("left",), soft=(6, 20)),
    "octagon, interlaced": Layout(_draw_octagon, _SD, texts=("left",), soft=(1, 8), interlaced=1.0),
    "octagon, hairline": Layout(_draw_octagon, (*_SXGA, *_HD, *_SD), texts=("left", "bottom"), rim="hairline"),
    "octagon, cropped": Layout(_draw_octagon_cropped, ((622, 529), (626, 547), (1348, 1070)), texts=("over",)),
    "octagon, cropped, scope map": Layout(
        _draw_octagon_cropped, ((622, 529), (570, 530), (1348, 1070)), texts=("over",), inset="map"
    ),
    "octagon, cropped, black patch": Layout(
        _draw_octagon_cropped, ((622, 529), (570, 530), (1348, 1070)), texts=("over",), inset="black"
    ),
    "left corners cut": Layout(_draw_left_corners_cut, (*_SD, *_HD), texts=("left",), inset="picture"),
    "right corners cut": Layout(
        _draw_right_corners_cut, (*_SD, *_HD), grounds=("black", "dark grey"), texts=("left",), soft=(0.5, 6)
    ),
    "rectangle on blue-black": Layout(_draw_rectangle, _HD, grounds=("blue-black",), texts=("left", "right")),
    "rectangle on dark grey": Layout(_draw_rectangle, (*_HD, *_SD), grounds=("dark grey",), texts=("left",)),
    "rectangle, hairline": Layout(_draw_rectangle, (*_HD, *_SD), texts=("left",), rim="hairline"),
    "rectangle in a white mat": Layout(_draw_rectangle, (*_HD, *_SXGA), texts=("left",), rim="mat"),
    "rounded rectangle": Layout(_draw_rounded, (*_HD, *_SD), grounds=("black", "blue-black"), texts=("left", "over")),
    "rounded rectangle on brown": Layout(_draw_rounded, (*_HD, *_SXGA), grounds=("brown",), texts=("left",)),
    "painted corners and banner": Layout(
        _draw_rounded_in_whole, (*_SD, *_SXGA), grounds=("corners and banner",), texts=("top", "bottom", "over")
    ),
}
"""The kinds of devices by name."""
