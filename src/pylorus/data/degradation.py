"""Degrade frames in stated grades, as optics, light, cameras, recorders and consoles do.

A grade is a physical quantity, such as the radius of the blur in thousandths of the field's diameter. Lengths are
relative to the diameter of the field of view, so that a grade means the same on a frame of 400 and of 1,400 pixels.
Light is changed in linear light (a display gamma of 2.2) and only inside the field; what surrounds the field stays as
it is. A degraded frame is a pure function of the frame's content, the kind, the grade and the seed; the grades of a
kind share their random numbers, so that a higher grade is the same accident, only worse.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from pylorus.core.distributed import compute_seed
from pylorus.data.field_of_view import find_field
from pylorus.data.field_shape import FieldOfView
from pylorus.data.files import RGB
from pylorus.data.overlays import Overlays, cover_overlays, find_overlays

GRADES = 5
"""Grades of each kind, from 1 (hardly visible) to 5 (an endoscopist would discard the frame)."""
GAMMA = 2.2
"""Exponent from grey levels of a file to linear light."""
LEVELS = 4095
"""Steps of linear light in [0, 1] for which the grey level is tabulated."""
REFERENCE_DIAMETER = 1000
"""Diameter of a field, in pixels, for which photons are stated; a coarser sensor has larger pixels."""

Mask = NDArray[np.bool_]
Light = NDArray[np.float32]

_TO_LIGHT = ((np.arange(256) / 255) ** GAMMA).astype(np.float32)
_TO_GREY = np.rint(255 * (np.arange(LEVELS + 1) / LEVELS) ** (1 / GAMMA)).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Scene:
    """A frame, its field of view and a random generator that depends on its content.

    Attributes:
        image: RGB, uint8 of shape (height, width, 3).
        inside: True inside the field of view, of shape (height, width).
        diameter: Diameter of a disc with the field's area, in pixels.
        random: Generator of the kind; the same for all its grades.
    """

    image: RGB
    inside: Mask
    diameter: float
    random: Generator


@dataclass(frozen=True)
class Degradation:
    """A kind of degradation.

    Attributes:
        name: Short name in tables.
        title: Name in figures and sentences.
        quantity: What the numbers of the grades mean, with their unit.
        amounts: The quantity at grades 1 to 5.
        apply: Function of a scene and an amount that returns the degraded frame.
    """

    name: str
    title: str
    quantity: str
    amounts: tuple[float, float, float, float, float]
    apply: Callable[[Scene, float], RGB]

    @property
    def label(self) -> str:
        """The title within a sentence."""
        return self.title if self.title.isupper() else self.title.lower()

    def format_amount(self, grade: int) -> str:
        """Return the quantity of a grade as text."""
        return f"{self.amounts[grade - 1]:g}"

    def describe_grade(self, grade: int) -> str:
        """Return the quantity of a grade with its meaning.

        Example:
            >>> DEGRADATIONS["defocus"].describe_grade(3), DEGRADATIONS["jpeg"].describe_grade(5)
            ("radius 8 ‰ of the field's diameter", 'quality 7')
            >>> DEGRADATIONS["dark"].describe_grade(3)
            '1.5 stops less light'
        """
        noun, _, unit = self.quantity.partition(", ")
        amount = self.format_amount(grade)
        if unit.startswith(("‰", "%")) or noun == "quality":
            return f"{noun} {amount} {unit}".rstrip()
        return f"{amount} {self.quantity}"


def draw_field_mask(field: FieldOfView, shape: tuple[int, ...]) -> Mask:
    """Return a mask of shape (height, width) that is True inside a field of view.

    Args:
        field: The field of view.
        shape: Shape of the frame, beginning with height and width.
    """
    mask = np.zeros(shape[:2], dtype=bool)
    left, top, right, bottom = field.box
    mask[top:bottom, left:right] = True if field.mask is None else field.mask
    return mask


def compute_content_hash(image: RGB) -> str:
    """Return a hash of an image's pixels."""
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def degrade_image(
    image: RGB, name: str, grade: int, *, seed: int = 0, field: FieldOfView | None = None, content: str | None = None
) -> RGB:
    """Degrade a frame; deterministic.

    Args:
        image: RGB, uint8 of shape (height, width, 3).
        name: A key of `DEGRADATIONS`.
        grade: 1 to 5.
        seed: Seed of the random positions, directions and noise.
        field: The field of view, if it is known already.
        content: The result of `compute_content_hash`, if it is known already.

    Returns:
        A new frame of the same shape.

    Raises:
        ValueError: If there is no such kind or grade.

    Example:
        >>> from pylorus.data.synthetic import generate_frame
        >>> image = generate_frame("gastric_ulcer", seed=7, size=96).image
        >>> light, heavy = (degrade_image(image, "dark", grade).mean() for grade in (1, 5))
        >>> bool(image.mean() > light > heavy)
        True
    """
    if name not in DEGRADATIONS:
        raise ValueError(f'found the degradation "{name}"; expected one of {", ".join(DEGRADATIONS)}')
    if not 1 <= grade <= GRADES:
        raise ValueError(f"found grade {grade}; expected 1 to {GRADES}")
    field = find_field(image) if field is None else field
    random = np.random.default_rng(compute_seed(content or compute_content_hash(image), name, seed))
    diameter = 2 * math.sqrt(max(1, field.measure_area()) / math.pi)
    scene = Scene(image, draw_field_mask(field, image.shape), diameter, random)
    kind = DEGRADATIONS[name]
    return kind.apply(scene, kind.amounts[grade - 1])


# --- light ---


def _convert_to_light(image: RGB) -> Light:
    return np.asarray(_TO_LIGHT[image])


def _convert_to_image(light: Light, scene: Scene) -> RGB:
    """Return light as a frame that differs from the scene's only inside the field."""
    levels = np.clip(light * LEVELS + 0.5, 0, LEVELS).astype(np.uint16)
    return np.asarray(np.where(scene.inside[..., None], _TO_GREY[levels], scene.image), dtype=np.uint8)


def _blur(scene: Scene, kernel: NDArray[np.float32]) -> RGB:
    """Convolve the field's light with a kernel; what lies outside the field does not darken its edge."""
    inside = scene.inside.astype(np.float32)
    border = cv2.BORDER_REFLECT_101
    light = cv2.filter2D(_convert_to_light(scene.image) * inside[..., None], -1, kernel, borderType=border)
    weight = cv2.filter2D(inside, -1, kernel, borderType=border)
    return _convert_to_image(np.asarray(light / np.maximum(weight, 1e-6)[..., None], dtype=np.float32), scene)


def _defocus(scene: Scene, amount: float) -> RGB:
    radius = amount / 1000 * scene.diameter
    reach = math.ceil(radius)
    x, y = np.meshgrid(*2 * [np.arange(-reach, reach + 1)])
    kernel = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1).astype(np.float32)  # the edge pixels count in part
    return _blur(scene, kernel / kernel.sum())


def _move(scene: Scene, amount: float) -> RGB:
    length, angle = amount / 1000 * scene.diameter, scene.random.uniform(0, math.pi)
    reach = math.ceil(length / 2)
    x, y = np.meshgrid(*2 * [np.arange(-reach, reach + 1)])
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    kernel = np.clip(length / 2 + 0.5 - np.abs(along), 0, 1) * np.clip(1 - np.abs(across), 0, 1)
    return _blur(scene, (kernel / kernel.sum()).astype(np.float32))


def _expose(scene: Scene, stops: float) -> RGB:
    return _convert_to_image(_convert_to_light(scene.image) * np.float32(2.0**stops), scene)


def _darken(scene: Scene, amount: float) -> RGB:
    return _expose(scene, -amount)


def _vignette(scene: Scene, amount: float) -> RGB:
    rows, columns = np.nonzero(scene.inside)
    center_x, center_y = columns.mean(), rows.mean()
    y, x = np.ogrid[: scene.inside.shape[0], : scene.inside.shape[1]]
    distance = np.hypot(x - center_x, y - center_y) / (scene.diameter / 2)
    falloff = np.maximum(1 - amount / 100 * distance**2, 0).astype(np.float32)
    return _convert_to_image(_convert_to_light(scene.image) * falloff[..., None], scene)


def _shift_white_balance(scene: Scene, amount: float) -> RGB:
    gain = 1 + amount / 100
    red = gain if scene.random.random() < 0.5 else 1 / gain  # warmer or colder
    gains = np.array([red, 1, 1 / red], dtype=np.float32)
    return _convert_to_image(_convert_to_light(scene.image) * gains, scene)


def _add_noise(scene: Scene, photons: float) -> RGB:
    light = _convert_to_light(scene.image)
    count = photons * (REFERENCE_DIAMETER / scene.diameter) ** 2
    noise = scene.random.standard_normal(light.shape, dtype=np.float32)
    return _convert_to_image(light + np.sqrt(light / np.float32(count)) * noise, scene)


def _add_highlights(scene: Scene, amount: float) -> RGB:
    """Cover a part of the field with saturated ellipses with soft edges, as a wet wall reflects the lamp."""
    rows, columns = np.nonzero(scene.inside)
    wanted = amount / 100 * len(rows)
    spots, covered = np.zeros(scene.inside.shape, dtype=np.uint8), 0.0
    while covered < wanted:
        at = int(scene.random.integers(len(rows)))
        size, aspect = scene.diameter * scene.random.uniform(0.006, 0.025), scene.random.uniform(1, 3)
        axes = max(1, round(size * math.sqrt(aspect))), max(1, round(size / math.sqrt(aspect)))
        angle = scene.random.uniform(0, 180)
        cv2.ellipse(spots, (int(columns[at]), int(rows[at])), axes, angle, 0, 360, 255, -1)
        covered += math.pi * axes[0] * axes[1]
    glow = cv2.GaussianBlur(spots, (0, 0), max(0.5, 0.003 * scene.diameter)).astype(np.float32) / 255
    return _convert_to_image(_convert_to_light(scene.image) + np.asarray(glow, dtype=np.float32)[..., None], scene)


# --- recorder and console ---


def _compress(scene: Scene, quality: float) -> RGB:
    encoded = cv2.imencode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(quality)])[1]
    decoded = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), dtype=np.uint8)
    return np.ascontiguousarray(decoded[..., ::-1])


def _write_rows(scene: Scene, rows: float) -> RGB:
    """Write rows of a console's text into the frame's left corners, over the field where this reaches there."""
    canvas = scene.image.copy()
    height = canvas.shape[0]
    letters = np.array(list("ABCDEFGHKLMNPRSTUVWXZ0123456789"))
    for row in range(int(rows)):
        text = "".join(scene.random.choice(letters, int(scene.random.integers(5, 12))))
        step = 0.045 * height
        y = step * (1 + row // 2) if row % 2 == 0 else height - step * (0.4 + row // 2)
        place = round(0.012 * canvas.shape[1]), round(y)
        thickness = max(1, round(height / 400))
        cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.0013 * height, (235,) * 3, thickness, cv2.LINE_AA)
    return canvas


def _draw_marks(scene: Scene, count: float) -> RGB:
    """Draw arrows over the field, as endoscopists mark findings."""
    canvas = scene.image.copy()
    rows, columns = np.nonzero(scene.inside)
    thickness = max(1, round(0.008 * scene.diameter))
    for _ in range(int(count)):
        at = int(scene.random.integers(len(rows)))
        angle = scene.random.uniform(0, 2 * math.pi)
        tip = int(columns[at]), int(rows[at])
        length = 0.14 * scene.diameter
        tail = round(tip[0] + length * math.cos(angle)), round(tip[1] + length * math.sin(angle))
        cv2.arrowedLine(canvas, tail, tip, (250, 240, 60), thickness, cv2.LINE_AA, tipLength=0.35)
    return canvas


def _draw_corner_mark(scene: Scene, amount: float) -> RGB:
    """Draw a bright square into a corner of the frame, as a stamp or a symbol of a recorder."""
    canvas = scene.image.copy()
    height, width = canvas.shape[:2]
    side, gap = max(1, round(amount / 100 * min(height, width))), round(0.015 * min(height, width))
    corner = int(scene.random.integers(4))
    left = gap if corner % 2 == 0 else width - gap - side
    top = gap if corner < 2 else height - gap - side
    canvas[top : top + side, left : left + side] = (60, 200, 240)
    return canvas


_KINDS = (
    Degradation("defocus", "Defocus", "radius, ‰ of the field's diameter", (2, 4, 8, 14, 22), _defocus),
    Degradation("motion", "Motion blur", "length, ‰ of the field's diameter", (5, 10, 20, 35, 55), _move),
    Degradation("dark", "Underexposure", "stops less light", (0.5, 1, 1.5, 2.2, 3), _darken),
    Degradation("bright", "Overexposure", "stops more light", (0.25, 0.5, 0.8, 1.2, 1.7), _expose),
    Degradation("vignetting", "Vignetting", "% less light at the field's edge", (20, 40, 60, 80, 95), _vignette),
    Degradation(
        *("white-balance", "White balance", "% more red and less blue, or the reverse", (5, 12, 25, 45, 70)),
        _shift_white_balance,
    ),
    Degradation(
        *("noise", "Sensor noise", "photons in a white pixel, field of 1,000 pixels", (200, 60, 20, 8, 3)), _add_noise
    ),
    Degradation("jpeg", "JPEG", "quality", (80, 50, 30, 15, 7), _compress),
    Degradation("highlights", "Highlights", "% of the field", (0.5, 1, 2, 4, 8), _add_highlights),
    Degradation("text", "Console text", "rows", (1, 2, 4, 6, 10), _write_rows),
    Degradation("arrows", "Arrows in the field", "arrows", (1, 2, 3, 5, 8), _draw_marks),
    Degradation("corner-mark", "Mark in a corner", "side, % of the frame", (2, 4, 6, 8, 12), _draw_corner_mark),
)
DEGRADATIONS = {kind.name: kind for kind in _KINDS}
"""All kinds by name, in the order of tables."""


# --- what surrounds the tissue ---

MARGIN = 0.02
"""The field is widened by this fraction of its diameter, so that its surroundings hold no tissue."""
MIN_BORDER = 0.01
"""Fraction of the frame that must lie outside the widened field; else the frame has no border."""

REGIONS = {
    "border": "all around the field of view",
    "overlays": "text and plates that were detected",
    "top left": "corner outside the field",
    "top right": "corner outside the field",
    "bottom left": "corner outside the field",
    "bottom right": "corner outside the field",
}
"""Regions of a frame that show no tissue, and what they are."""


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What a frame shows besides tissue.

    Attributes:
        inside: True in the widened field of view, of shape (height, width).
        overlays: Detected text and plates.
        ground: Median colour outside the widened field, uint8 of shape (3,).
        has_border: Whether the field was found and leaves a border.
    """

    inside: Mask
    overlays: Overlays
    ground: NDArray[np.uint8]
    has_border: bool

    def get_mask(self, region: str) -> Mask:
        """Return a mask of shape (height, width) that is True in a region of `REGIONS`."""
        if region == "overlays":
            return self.overlays.draw_mask(self.inside.shape)
        mask = ~self.inside
        if region != "border":
            height, width = mask.shape
            above, left = region.startswith("top"), region.endswith("left")
            mask[height // 2 :] &= not above
            mask[: height // 2] &= above
            mask[:, width // 2 :] &= not left
            mask[:, : width // 2] &= left
        return mask


def find_surroundings(image: RGB, field: FieldOfView) -> Surroundings:
    """Find what a frame shows besides tissue."""
    inside = draw_field_mask(field, image.shape)  # everything if no field was found
    has_border = field.shape != "full"
    if has_border:
        reach = max(1, math.ceil(MARGIN * 2 * math.sqrt(field.measure_area() / math.pi)))
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
        inside = cv2.dilate(inside.view(np.uint8), kernel).astype(bool)
        has_border = float((~inside).mean()) >= MIN_BORDER
    ground = np.median(image[~inside], axis=0) if has_border else np.zeros(3)
    return Surroundings(inside, find_overlays(image), ground.astype(np.uint8), has_border)


def isolate_region(image: RGB, surroundings: Surroundings, region: str | None, fill: NDArray[np.uint8]) -> RGB:
    """Return a frame that shows only a region of `REGIONS`: one colour in the field, one around it, and the region.

    Args:
        image: RGB, uint8 of shape (height, width, 3).
        surroundings: The result of `find_surroundings`.
        region: A key of `REGIONS`; None: no region, so that the field's shape is all that is left.
        fill: The colour in the field, the same for all images of a set: an image's own could tell its class.
    """
    canvas = np.where(surroundings.inside[..., None], fill, surroundings.ground).astype(np.uint8)
    if region is None:
        return canvas
    return np.asarray(np.where(surroundings.get_mask(region)[..., None], image, canvas), dtype=np.uint8)


def hide_region(image: RGB, surroundings: Surroundings, region: str) -> RGB:
    """Return a frame whose region of `REGIONS` has the colour around the field; text has that of its surroundings."""
    if region == "overlays":
        image = cover_overlays(image, surroundings.overlays)
    mask = surroundings.get_mask(region) & ~surroundings.inside
    return np.asarray(np.where(mask[..., None], surroundings.ground, image), dtype=np.uint8)
