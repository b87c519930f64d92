"""The brush behind `synthetic.py`: gastroscopic frames, from the wall of a stomach to the sensor.

A frame is painted in the order in which light makes it. The wall is a sum of layers, mucosa and a finding;
a lamp beside the lens lights it; lens and sensor blur it and add noise.

Lengths are in field radii: the field of view is about the unit disc, x to the right and y down. A view turns,
zooms and moves the wall, so the images of one patient show the same folds and the same finding. Whatever is
drawn from `patient` is shared by these images; nothing but the sensor's noise depends on the size in pixels.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Plane = NDArray[np.floating]  # 32 bits wide throughout, which the stubs of arithmetic with floats do not say

_ABSORBED = np.array([0.14, 0.75, 0.62], dtype=np.float32)  # of red, green, blue light, by redness 1
_FIBRIN = np.array([0.93, 0.85, 0.64], dtype=np.float32)  # whitish yellow
_DARKEST = 14  # grey levels: even the lumen is not as black as what lies outside the field


@dataclass(frozen=True)
class Field:
    """What the lens shows: each array of shape (size, size)."""

    mask: NDArray[np.bool_]
    x: Plane
    y: Plane
    radius: float  # pixels


@dataclass(frozen=True)
class Layer:
    """What one layer adds to the wall: each array of shape (size, size)."""

    height: Plane  # towards the lens, in field radii
    redness: Plane  # blood near the surface; 0 is the patient's own colour
    coat: Plane  # share covered by fibrin or mucus, in [0, 1]

    def __add__(self, over: Layer) -> Layer:
        coat = self.coat + over.coat - self.coat * over.coat
        return Layer(self.height + over.height, self.redness + over.redness, coat)


@dataclass(frozen=True)
class Wall:
    """The place on the stomach's wall that each pixel looks at: `x` and `y` of shape (size, size)."""

    x: Plane
    y: Plane

    def noise(self, patient: Generator, *, cells: float) -> Plane:
        """Smooth noise around 0 with a spread of about 1; `cells` nodes a field radius, more is finer.

        A small random grid, enlarged, then read at each pixel: many times cheaper than a wide blur.
        """
        reach = 2.2  # no view looks further from the middle of the wall
        nodes = int(2 * reach * cells) + 3
        # `remap` reads to 1/32 of a node. Enlarged, these steps are too small to show in the shading.
        zoom = max(2, -(-192 // nodes))
        grid = patient.standard_normal((nodes, nodes), dtype=np.float32)
        enlarged = cv2.resize(grid, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
        columns, rows = ((axis + reach) * (cells * zoom) for axis in (self.x, self.y))
        read = cv2.remap(enlarged, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        return np.asarray(read, dtype=np.float32)


def field_of_view(patient: Generator, *, size: int) -> Field:
    """A disc or a bevelled square, a little off the frame's centre and always wholly within the frame."""
    radius = patient.uniform(0.43, 0.485) * size
    octagonal, bevel = patient.random() < 0.5, patient.uniform(1.35, 1.6)
    middle = 0.5 * (size - 1) + patient.uniform(-0.8, 0.8, 2) * (0.5 * size - radius)
    pixels = np.arange(size)
    columns, rows = (((pixels - at) / radius).astype(np.float32) for at in middle)
    x, y = np.meshgrid(columns, rows)
    across, down = np.abs(x), np.abs(y)
    mask = (np.maximum(across, down) <= 1) & (across + down <= bevel) if octagonal else x * x + y * y <= 1
    return Field(mask, x, y, radius)


def look_at_wall(view: Generator, field: Field) -> Wall:
    """The wall as one view sees it: turned by any angle, a quarter nearer or further, a little shifted."""
    angle, zoom = view.uniform(0, 2 * np.pi), view.uniform(0.8, 1.25)
    right, down = view.uniform(-0.15, 0.15), view.uniform(-0.15, 0.15)
    cos, sin = float(np.cos(angle)) / zoom, float(np.sin(angle)) / zoom
    return Wall(cos * field.x - sin * field.y + right, sin * field.x + cos * field.y + down)


def mucosa(patient: Generator, wall: Wall, *, lumen: tuple[float, float]) -> Layer:
    """Healthy wall: folds that run towards or around the lumen, blotches, fine vessels, flecks of mucus."""
    across, down = wall.x - lumen[0], wall.y - lumen[1]
    distance = np.hypot(across, down) + np.float32(0.05)
    bend = wall.noise(patient, cells=1.6)
    towards = int(patient.integers(7, 15)) if patient.random() < 0.65 else 0  # whole: folds meet all around
    around = patient.uniform(0, 3) if towards else patient.uniform(6, 11)
    phase = towards * np.arctan2(down, across) + around * np.log(distance) + patient.uniform(1.2, 2.6) * bend
    crest = np.sqrt(np.sin(0.5 * phase) ** 2 + np.float32(0.02))
    folded = 1 - _ramp(wall.noise(patient, cells=1.3) + patient.uniform(-0.8, 0.8), width=1.2)
    depth = patient.uniform(0.5, 1.5) / (towards or around) * distance * (0.15 + 0.85 * folded)
    grain = wall.noise(patient, cells=12)
    vessels = np.exp(-(((wall.noise(patient, cells=4.5) + 0.25 * bend) / 0.09) ** 2)) * (1 - folded)
    blotches = patient.uniform(0.05, 0.18) * wall.noise(patient, cells=3)
    mucus = _ramp(wall.noise(patient, cells=7) - patient.uniform(1.5, 3.0), width=0.8)
    return Layer(
        height=depth * crest + 0.03 * bend + 0.006 * grain + 0.012 * mucus,
        redness=blotches + patient.uniform(0.1, 0.5) * vessels + 0.07 * grain + 0.35 * (1 - crest) * folded,
        coat=0.6 * mucus,
    )


def cancer(patient: Generator, wall: Wall) -> Layer:
    """An irregular, raised, dark-red mass with a nodular surface and a ragged edge."""
    distance, size = _around_lesion(patient, wall, ragged=patient.uniform(0.16, 0.3))
    inside = _ramp(1.15 - distance, width=patient.uniform(0.4, 0.8))
    # The size of a smooth noise: rounded tops with narrow clefts between them.
    nodules = np.sqrt(wall.noise(patient, cells=patient.uniform(2.0, 3.0) / size) ** 2 + np.float32(0.03))
    patchy = wall.noise(patient, cells=1.8 / size)
    return Layer(
        height=size * inside * (patient.uniform(0.1, 0.35) + patient.uniform(0.1, 0.2) * nodules),
        redness=inside * (patient.uniform(0.8, 1.6) + 0.3 * patchy - 0.3 * nodules),
        coat=0.6 * inside * _ramp(patchy - patient.uniform(1.0, 2.0), width=0.8),
    )


def ulcer(patient: Generator, wall: Wall) -> Layer:
    """A smooth oval crater with a pale floor and a swollen red rim."""
    distance, size = _around_lesion(patient, wall, ragged=patient.uniform(0.03, 0.1))
    crater = _ramp(0.95 - distance, width=patient.uniform(0.25, 0.5))
    rim = np.exp(-(((distance - 1) / patient.uniform(0.2, 0.4)) ** 2))
    uneven = wall.noise(patient, cells=2 / size) + 0.5 * wall.noise(patient, cells=6 / size)
    return Layer(
        height=size * (patient.uniform(0.08, 0.2) * rim - patient.uniform(0.1, 0.3) * crater),
        redness=patient.uniform(0.3, 0.8) * rim * (1 + 0.2 * uneven),
        coat=crater * np.clip(patient.uniform(0.5, 0.88) + 0.15 * uneven, 0, 1),
    )


def gastritis(patient: Generator, wall: Wall) -> Layer:
    """Red patches all over the wall and no one lesion; the reddest are slightly swollen or eroded."""
    coarse, fine = wall.noise(patient, cells=patient.uniform(4, 7)), wall.noise(patient, cells=14)
    spread = coarse + 0.35 * fine
    patches = _ramp(spread - patient.uniform(-0.2, 0.4), width=patient.uniform(0.9, 1.7))
    erosions = _ramp(spread - patient.uniform(1.6, 2.6), width=0.8)
    return Layer(
        height=0.01 * patches,
        redness=patient.uniform(0.5, 1.1) * patches * (1 + 0.2 * fine),
        coat=0.5 * erosions,
    )


def draw_lumen(patient: Generator) -> tuple[float, float]:
    """Where the lumen lies on the wall: mostly towards the edge of the field, at times out of sight."""
    angle, away = patient.uniform(0, 2 * np.pi), patient.uniform(0.7, 1.35)
    return away * float(np.cos(angle)), away * float(np.sin(angle))


def colour_wall(patient: Generator, layer: Layer) -> Plane:
    """The wall's own colour under white light: shape (size, size, 3), linear RGB in [0, 1].

    Blood takes up green and blue (Beer and Lambert's law); patients differ in hue and paleness.
    """
    hue, saturation = patient.uniform(0.01, 0.055), patient.uniform(0.5, 0.64)
    own = np.array(colorsys.hsv_to_rgb(hue, saturation, patient.uniform(0.8, 1.0)), dtype=np.float32)
    redness = np.maximum(layer.redness + patient.uniform(-0.1, 0.2), -0.25)
    colour = own * np.exp(-redness[..., None] * _ABSORBED)
    return np.asarray(colour + (_FIBRIN - colour) * layer.coat[..., None])


def shade_lumen(patient: Generator, wall: Wall, *, lumen: tuple[float, float]) -> Plane:
    """Share of the light that comes back, of shape (size, size): little of it out of the lumen's depth."""
    uneven = 1 + 0.12 * wall.noise(patient, cells=2)
    distance = np.hypot(wall.x - lumen[0], wall.y - lumen[1]) * uneven
    return np.asarray(1 - 0.95 * np.exp(-((distance / patient.uniform(0.2, 0.4)) ** 2)))


def light_wall(view: Generator, field: Field, height: Plane) -> tuple[Plane, Plane]:
    """Light that the wall scatters and light that it mirrors, each of shape (size, size); 1 is white."""
    reach, power = view.uniform(0.9, 1.3), view.uniform(0.8, 1.25)  # reach: from lens to wall
    to_x, to_y = view.uniform(-0.25, 0.25) - field.x, view.uniform(-0.25, 0.25) - field.y
    far = np.sqrt(to_x * to_x + to_y * to_y + reach * reach)
    slope_x, slope_y = (field.radius / 8 * cv2.Sobel(height, cv2.CV_32F, *axis) for axis in ((1, 0), (0, 1)))
    # Tissue is soft and scatters light within: what is steep looks less steep than it is.
    soften = 1 / (1 + 0.35 * np.hypot(slope_x, slope_y))
    slope_x, slope_y = slope_x * soften, slope_y * soften
    upright = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    tilt = slope_x * to_x + slope_y * to_y
    facing = np.clip((reach - tilt) * upright / far, 0, 1)
    scattered = power * (0.2 + 0.8 * facing) * (reach / far) ** 2
    # A wet wall mirrors the lamp where it stands upright to the middle between lamp and lens (Blinn). Near 1,
    # exp(800 (c - 1)) is c to the power of 800, a hundred times faster.
    halfway = (far + reach - tilt) * upright / np.sqrt(to_x * to_x + to_y * to_y + (far + reach) ** 2)
    return scattered, 2 * np.exp(800 * (halfway - 1)) * scattered


def record(view: Generator, light: Plane, field: Field) -> NDArray[np.uint8]:
    """What the sensor makes of the light: blurred, noisy, 8 bits of RGB, black outside the field."""
    blurred = cv2.GaussianBlur(light, (0, 0), view.uniform(0.4, 1.1) * field.mask.shape[0] / 256)
    grey = 255 * (1 - np.exp(-1.6 * blurred))  # bright light saturates softly
    grey += view.uniform(1, 4) * view.standard_normal(grey.shape, dtype=np.float32)
    return np.where(field.mask[..., None], np.clip(grey, _DARKEST, 255), 0).astype(np.uint8)


def _around_lesion(patient: Generator, wall: Wall, *, ragged: float) -> tuple[Plane, float]:
    """Distance from a lesion's middle, 1 at its edge, and the lesion's size in field radii."""
    angle, away = patient.uniform(0, 2 * np.pi), patient.uniform(0, 0.4)
    size, aspect, turn = patient.uniform(0.28, 0.5), patient.uniform(1.0, 1.35), patient.uniform(0, np.pi)
    x, y = wall.x - away * float(np.cos(angle)), wall.y - away * float(np.sin(angle))
    cos, sin = float(np.cos(turn)), float(np.sin(turn))
    edge = wall.noise(patient, cells=1.3 / size) + 0.5 * wall.noise(patient, cells=3 / size)
    along, across = (cos * x + sin * y) / (size * aspect), (cos * y - sin * x) / (size / aspect)
    return np.hypot(along, across) + ragged * edge, size


def _ramp(values: Plane, *, width: float) -> Plane:
    """Rises smoothly from 0 to 1 while the values go from 0 to `width`."""
    share = np.clip(values / width, 0, 1)
    return np.asarray(share * share * (3 - 2 * share))
