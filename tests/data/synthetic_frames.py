"""Drawn frames of endoscopy consoles with a known field of view: what the search for the field is tested on.

A frame is wall, field, console and codec: reddish mucosa with a dark lumen and reflexes, seen through a field of some
shape, with text, logos, bars and a second small picture around it or over its edge, then noise and JPEG.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

SHAPES = (
    "full",
    "round",
    "round cut top and bottom",
    "round cut left and right",
    "octagon",
    "left corners cut",
    "right corners cut",
    "rectangle",
    "rounded rectangle",
)
ASPECTS = (1.0, 1.25, 4 / 3, 1.5, 16 / 9, 0.8)
COLOURS = ((255, 255, 255), (230, 230, 225), (250, 240, 40), (60, 240, 80), (90, 200, 250))

Mask = NDArray[np.bool_]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class DrawnFrame:
    """A frame and what is known of it: `image` of shape (height, width, 3), `field` of shape (height, width)."""

    image: Pixels
    field: Mask
    shape: str


def drawn_frame(seed: int, *, longest: int = 1920, shape: str | None = None) -> DrawnFrame:
    """One frame; the same arguments give the same pixels. Its longer side has 320 to `longest` pixels."""
    rng = np.random.default_rng(seed)
    shape = SHAPES[seed % len(SHAPES)] if shape is None else shape
    aspect, side = rng.choice(ASPECTS), rng.integers(320, longest + 1)
    width, height = (side, round(side / aspect)) if aspect >= 1 else (round(side * aspect), side)
    field = _FIELDS[shape](rng, int(width), int(height))
    image = np.clip(_scene(rng, field), 0, 255).astype(np.uint8)
    if shape != "full":
        _console(rng, image, field)
    return DrawnFrame(_sensor(rng, image, field, shape), field, shape)


def _full(rng: Generator, width: int, height: int) -> Mask:
    return np.ones((height, width), dtype=bool)


def _disc(rng: Generator, width: int, height: int, radius: float) -> Mask:
    """A disc that may lie off the centre by what room there is, and is cut by the frame where there is none."""
    free_x, free_y = max(0, width / 2 - radius), max(0, height / 2 - radius)
    middle_x, middle_y = width / 2 + rng.uniform(-0.9, 0.9) * free_x, height / 2 + rng.uniform(-0.9, 0.9) * free_y
    rows, columns = np.ogrid[:height, :width]
    stretch = rng.uniform(0.985, 1.015)  # pixels that are not quite square
    return np.asarray(((columns - middle_x) * stretch) ** 2 + (rows - middle_y) ** 2 <= radius**2)


def _round(rng: Generator, width: int, height: int) -> Mask:
    return _disc(rng, width, height, rng.uniform(0.34, 0.49) * min(width, height))


def _round_cut(rng: Generator, width: int, height: int) -> Mask:
    """Wider than high: cut by the frame or, half of the time, by black bars within it."""
    radius = rng.uniform(1.08, 1.4) * 0.5 * height
    if rng.random() < 0.5:
        return _disc(rng, width, height, radius * rng.uniform(0.8, 0.9)) & _band(rng, width, height)
    return _disc(rng, width, height, radius)


def _band(rng: Generator, width: int, height: int) -> Mask:
    top, bottom = np.round(rng.uniform(0.08, 0.14, 2) * height).astype(int)
    band = np.zeros((height, width), dtype=bool)
    band[top : height - bottom] = True
    return band


def _round_cut_sideways(rng: Generator, width: int, height: int) -> Mask:
    return _round_cut(rng, height, width).T


def _box(rng: Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a field that fills much of the height and some of the width."""
    high = rng.uniform(0.6, 1.0) * height if rng.random() < 0.8 else float(height)
    wide = min(float(width), rng.uniform(0.85, 1.4) * high)
    left, top = rng.uniform(0, 1) * (width - wide), rng.uniform(0, 1) * (height - high)
    return round(left), round(top), round(left + wide), round(top + high)


def _cut_corners(rng: Generator, width: int, height: int, corners: tuple[bool, bool, bool, bool]) -> Mask:
    """A box without some corners, from top left clockwise; each takes 5 to 25 % of the shorter side."""
    left, top, right, bottom = _box(rng, width, height)
    cut = rng.uniform(0.05, 0.25) * min(right - left, bottom - top)
    slant = rng.uniform(0.75, 1.35)  # of the cut's height to its width
    rows, columns = np.ogrid[:height, :width]
    field = (columns >= left) & (columns < right) & (rows >= top) & (rows < bottom)
    across = (columns - left, right - 1 - columns, right - 1 - columns, columns - left)
    down = (rows - top, rows - top, bottom - 1 - rows, bottom - 1 - rows)
    for wanted, x, y in zip(corners, across, down, strict=True):
        if wanted:
            field = field & (x * slant + y >= cut * slant)
    return np.asarray(field)


def _octagon(rng: Generator, width: int, height: int) -> Mask:
    return _cut_corners(rng, width, height, (True, True, True, True))


def _left_cut(rng: Generator, width: int, height: int) -> Mask:
    return _cut_corners(rng, width, height, (True, False, False, True))


def _right_cut(rng: Generator, width: int, height: int) -> Mask:
    return _cut_corners(rng, width, height, (False, True, True, False))


def _rectangle(rng: Generator, width: int, height: int) -> Mask:
    return _cut_corners(rng, width, height, (False, False, False, False))


def _rounded(rng: Generator, width: int, height: int) -> Mask:
    left, top, right, bottom = _box(rng, width, height)
    radius = rng.uniform(0.05, 0.3) * min(right - left, bottom - top)
    rows, columns = np.ogrid[:height, :width]
    x = np.maximum(0, np.maximum(left + radius - columns, columns - (right - 1 - radius)))
    y = np.maximum(0, np.maximum(top + radius - rows, rows - (bottom - 1 - radius)))
    return np.asarray(x * x + y * y <= radius * radius)


_FIELDS: dict[str, Callable[[Generator, int, int], Mask]] = {
    "full": _full,
    "round": _round,
    "round cut top and bottom": _round_cut,
    "round cut left and right": _round_cut_sideways,
    "octagon": _octagon,
    "left corners cut": _left_cut,
    "right corners cut": _right_cut,
    "rectangle": _rectangle,
    "rounded rectangle": _rounded,
}


def _cloud(rng: Generator, shape: tuple[int, int], nodes: int) -> NDArray[np.float32]:
    """Smooth noise with a spread of about 1."""
    grid = rng.standard_normal((nodes, nodes)).astype(np.float32)
    return np.asarray(cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC))


def _scene(rng: Generator, field: Mask) -> NDArray[np.float32]:
    """Mucosa on black ground, of shape (height, width, 3), in grey levels."""
    shape = (field.shape[0], field.shape[1])
    y, x = (np.flatnonzero(field.any(axis=axis)) for axis in (1, 0))
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    v = ((rows - y.mean()) / (np.ptp(y) / 2 + 1)).astype(np.float32)
    u = ((columns - x.mean()) / (np.ptp(x) / 2 + 1)).astype(np.float32)
    light = rng.uniform(0.45, 1.0) * (1 - rng.uniform(0.1, 0.4) * np.minimum(u * u + v * v, 2))  # vignetting
    light = light * np.exp(0.22 * _cloud(rng, shape, 5) + 0.1 * _cloud(rng, shape, 17))
    away, angle = rng.uniform(0, 1.1), rng.uniform(0, 2 * np.pi)
    distance = np.hypot(u - away * np.cos(angle), v - away * np.sin(angle)) * (1 + 0.15 * _cloud(rng, shape, 6))
    depth = np.exp(-((distance / rng.uniform(0.12, 0.6)) ** 2))
    light = np.maximum(light * (1 - rng.uniform(0.8, 1.0) * depth), rng.uniform(0.0, 0.09))
    tint = np.array([215, rng.uniform(90, 150), rng.uniform(70, 120)], dtype=np.float32)
    if rng.random() < 0.1:
        tint = np.array([110, 165, 150], dtype=np.float32)  # narrow-band light
    scene = light[..., None] * tint * (1 + 0.06 * _cloud(rng, shape, 30))[..., None]
    glare = _cloud(rng, shape, int(rng.integers(12, 40))) > rng.uniform(1.9, 3)
    scene[glare] = 250
    ground = rng.uniform(0, 12) * np.ones(3)
    return np.asarray(np.where(field[..., None], scene, ground), dtype=np.float32)


def _console(rng: Generator, image: Pixels, field: Mask) -> None:
    """Draws over the frame what a console shows beside the field; text and insets may reach over its edge."""
    if rng.random() < 0.5:
        _inset(rng, image, field)
    if rng.random() < 0.4:
        _bar(rng, image, field)
    for _ in range(rng.integers(0, 5)):
        _text_block(rng, image)


def _text_block(rng: Generator, image: Pixels) -> None:
    """Lines of text in a corner or at an edge, at times with an outline or a boxed menu."""
    height, width = image.shape[:2]
    scale, colour = rng.uniform(0.9, 1.9) * height / 1000, COLOURS[rng.integers(len(COLOURS))]
    left = int(rng.choice([rng.uniform(0.005, 0.05), rng.uniform(0.7, 0.9)]) * width)
    top = rng.choice([rng.uniform(0.03, 0.2), rng.uniform(0.6, 0.85)]) * height
    stroke = max(1, round(scale * rng.uniform(1.2, 2.5)))
    outline, letters = rng.random() < 0.5, list("ABCDEFGHIKLMNOPRSTUVW 0123456789:/.-")
    for line in range(rng.integers(1, 6)):
        text, place = "".join(rng.choice(letters, rng.integers(4, 17))), (left, int(top + 36 * line * scale))
        if outline:
            cv2.putText(image, text, place, 0, scale, (5, 5, 5), stroke + max(2, stroke), cv2.LINE_AA)
        cv2.putText(image, text, place, 0, scale, colour, stroke, cv2.LINE_AA)
    if rng.random() < 0.15:
        cv2.rectangle(
            image, (left - 4, int(top - 40 * scale)), (left + int(200 * scale), int(top + 60 * scale)), colour, stroke
        )


def _bar(rng: Generator, image: Pixels, field: Mask) -> None:
    """A colour bar or a logo's plate outside of the field, if a place is found."""
    height, width = image.shape[:2]
    for _ in range(20):
        wide, high = (int(rng.uniform(0.02, 0.13) * width) + 2, int(rng.uniform(0.02, 0.13) * height) + 2)
        left, top = int(rng.integers(0, width - wide)), int(rng.integers(0, height - high))
        if not field[top : top + high, left : left + wide].any():
            steps = np.linspace(0, 5.99, high).astype(int)
            colours = rng.integers(40, 255, (6, 3), dtype=np.uint8)
            image[top : top + high, left : left + wide] = colours[steps][:, None]
            return


def _inset(rng: Generator, image: Pixels, field: Mask) -> None:
    """A second, small picture in a corner of the frame that hides at most 6 % of the field."""
    height, width = image.shape[:2]
    for _ in range(20):
        side = int(rng.uniform(0.14, 0.33) * min(height, width))
        left = int(rng.choice([0.01, 0.99 - side / width]) * width)
        top = int(rng.choice([0.01, 0.99 - side / height, rng.uniform(0, 1 - side / height)]) * height)
        place = np.s_[top : top + side, left : left + side]
        if field[place].sum() <= 0.06 * field.sum():
            own = cv2.circle(np.zeros((side, side), np.uint8), (side // 2, side // 2), side // 2 - 1, 1, -1) > 0
            own = own if rng.random() < 0.5 else np.ones_like(own)
            image[place] = np.clip(_scene(rng, own), 0, 255).astype(np.uint8)
            return


def _sensor(rng: Generator, image: Pixels, field: Mask, shape: str) -> Pixels:
    """Blur, noise and JPEG; the ground's noise reaches about 25 grey levels."""
    blurred = cv2.GaussianBlur(image.astype(np.float32), (0, 0), rng.uniform(0.3, 2.0) * max(field.shape) / 1280 + 0.2)
    noise = rng.uniform(0, 4.5) * rng.standard_normal(field.shape, dtype=np.float32)
    recorded = np.clip(blurred + noise[..., None], 0, 255).astype(np.uint8)
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 97))]
    packed = cv2.imencode(".jpg", recorded[:, :, ::-1], quality)[1]
    return np.ascontiguousarray(cv2.imdecode(packed, cv2.IMREAD_COLOR)[:, :, ::-1])
