"""Generate synthetic gastroscopic images of three classes: the data of the demo and the input of the tests.

They need no download and no patient, and their geometry is known. They only resemble gastroscopy: a model trained on
them has learned nothing about stomachs.

A frame is rendered in the order in which light forms it. The wall is a sum of layers, mucosa and a lesion; a light
source beside the lens illuminates it; lens and sensor add blur and noise.

Lengths are in field radii: the field of view is approximately the unit disc, x to the right and y down. A view
rotates, zooms and shifts the wall, so that a patient's images show the same folds and the same lesion. Everything that
is drawn from the generator `patient` is the same in these images; only the sensor's noise depends on the size in
pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray
from PIL import Image

from pylorus.core.io import check_new_folder

Plane = NDArray[np.floating]  # always float32, which NumPy's type stubs can't express for arithmetic with floats

_ABSORPTION = np.array([0.14, 0.75, 0.62], dtype=np.float32)  # absorption of red, green and blue light at redness 1
_FIBRIN = np.array([0.93, 0.85, 0.64], dtype=np.float32)  # whitish yellow
_MIN_GREY = 14  # grey levels: even the lumen is brighter than the area outside the field


@dataclass(frozen=True)
class Field:
    """The field of view: each array of shape (size, size)."""

    mask: NDArray[np.bool_]
    x: Plane
    y: Plane
    radius: float  # pixels


@dataclass(frozen=True)
class Layer:
    """What one layer adds to the wall: each array of shape (size, size)."""

    height: Plane  # towards the lens, in field radii
    redness: Plane  # blood near the surface; 0 is the patient's own colour
    coat: Plane  # proportion covered by fibrin or mucus, in [0, 1]

    def __add__(self, over: Layer) -> Layer:
        coat = self.coat + over.coat - self.coat * over.coat
        return Layer(self.height + over.height, self.redness + over.redness, coat)


@dataclass(frozen=True)
class Wall:
    """The point on the stomach's wall at which each pixel looks: `x` and `y` of shape (size, size)."""

    x: Plane
    y: Plane

    def sample_noise(self, patient: Generator, *, cells: float) -> Plane:
        """Sample smooth noise with mean 0 and a standard deviation of about 1.

        A small random grid is enlarged and then sampled at each pixel, which is much cheaper than a wide blur.

        Args:
            patient: The patient's generator.
            cells: Grid nodes per field radius; more is finer.
        """
        reach = 2.2  # no view reaches further from the centre of the wall
        nodes = int(2 * reach * cells) + 3
        # `remap` interpolates in steps of 1/32 of a node. In the enlarged grid they are too small to be visible.
        zoom = max(2, -(-192 // nodes))
        grid = patient.standard_normal((nodes, nodes), dtype=np.float32)
        enlarged = cv2.resize(grid, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
        columns, rows = ((axis + reach) * (cells * zoom) for axis in (self.x, self.y))
        sampled = cv2.remap(enlarged, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        return np.asarray(sampled, dtype=np.float32)


def generate_field(patient: Generator, *, size: int) -> Field:
    """Generate a disc or a square with cut corners, slightly off the frame's centre and fully inside the frame."""
    radius = patient.uniform(0.43, 0.485) * size
    octagonal, bevel = patient.random() < 0.5, patient.uniform(1.35, 1.6)
    middle = 0.5 * (size - 1) + patient.uniform(-0.8, 0.8, 2) * (0.5 * size - radius)
    pixels = np.arange(size)
    columns, rows = (((pixels - at) / radius).astype(np.float32) for at in middle)
    x, y = np.meshgrid(columns, rows)
    across, down = np.abs(x), np.abs(y)
    mask = (np.maximum(across, down) <= 1) & (across + down <= bevel) if octagonal else x * x + y * y <= 1
    return Field(mask, x, y, radius)


def transform_wall(view: Generator, field: Field) -> Wall:
    """Compute the wall seen in one view: rotated by any angle, zoomed by up to a quarter, slightly shifted."""
    angle, zoom = view.uniform(0, 2 * np.pi), view.uniform(0.8, 1.25)
    right, down = view.uniform(-0.15, 0.15), view.uniform(-0.15, 0.15)
    cos, sin = float(np.cos(angle)) / zoom, float(np.sin(angle)) / zoom
    return Wall(cos * field.x - sin * field.y + right, sin * field.x + cos * field.y + down)


def render_mucosa(patient: Generator, wall: Wall, *, lumen: tuple[float, float]) -> Layer:
    """Render healthy wall: folds that run towards or around the lumen, patches, fine vessels, flecks of mucus."""
    across, down = wall.x - lumen[0], wall.y - lumen[1]
    distance = np.hypot(across, down) + np.float32(0.05)
    bend = wall.sample_noise(patient, cells=1.6)
    # An integer, so that the folds close around the lumen.
    radial_folds = int(patient.integers(7, 15)) if patient.random() < 0.65 else 0
    circular_folds = patient.uniform(0, 3) if radial_folds else patient.uniform(6, 11)
    phase = (
        radial_folds * np.arctan2(down, across) + circular_folds * np.log(distance) + patient.uniform(1.2, 2.6) * bend
    )
    crest = np.sqrt(np.sin(0.5 * phase) ** 2 + np.float32(0.02))
    folded = 1 - _compute_smoothstep(wall.sample_noise(patient, cells=1.3) + patient.uniform(-0.8, 0.8), width=1.2)
    depth = patient.uniform(0.5, 1.5) / (radial_folds or circular_folds) * distance * (0.15 + 0.85 * folded)
    grain = wall.sample_noise(patient, cells=12)
    vessels = np.exp(-(((wall.sample_noise(patient, cells=4.5) + 0.25 * bend) / 0.09) ** 2)) * (1 - folded)
    blotches = patient.uniform(0.05, 0.18) * wall.sample_noise(patient, cells=3)
    mucus = _compute_smoothstep(wall.sample_noise(patient, cells=7) - patient.uniform(1.5, 3.0), width=0.8)
    return Layer(
        height=depth * crest + 0.03 * bend + 0.006 * grain + 0.012 * mucus,
        redness=blotches + patient.uniform(0.1, 0.5) * vessels + 0.07 * grain + 0.35 * (1 - crest) * folded,
        coat=0.6 * mucus,
    )


def render_cancer(patient: Generator, wall: Wall) -> Layer:
    """Render an irregular, raised, dark-red mass with a nodular surface and a ragged edge."""
    distance, size = _compute_lesion_distance(patient, wall, ragged=patient.uniform(0.16, 0.3))
    inside = _compute_smoothstep(1.15 - distance, width=patient.uniform(0.4, 0.8))
    # The absolute value of smooth noise gives rounded tops with narrow clefts between them.
    nodules = np.sqrt(wall.sample_noise(patient, cells=patient.uniform(2.0, 3.0) / size) ** 2 + np.float32(0.03))
    patchy = wall.sample_noise(patient, cells=1.8 / size)
    return Layer(
        height=size * inside * (patient.uniform(0.1, 0.35) + patient.uniform(0.1, 0.2) * nodules),
        redness=inside * (patient.uniform(0.8, 1.6) + 0.3 * patchy - 0.3 * nodules),
        coat=0.6 * inside * _compute_smoothstep(patchy - patient.uniform(1.0, 2.0), width=0.8),
    )


def render_ulcer(patient: Generator, wall: Wall) -> Layer:
    """Render a smooth oval crater with a pale floor and a swollen red rim."""
    distance, size = _compute_lesion_distance(patient, wall, ragged=patient.uniform(0.03, 0.1))
    crater = _compute_smoothstep(0.95 - distance, width=patient.uniform(0.25, 0.5))
    rim = np.exp(-(((distance - 1) / patient.uniform(0.2, 0.4)) ** 2))
    uneven = wall.sample_noise(patient, cells=2 / size) + 0.5 * wall.sample_noise(patient, cells=6 / size)
    return Layer(
        height=size * (patient.uniform(0.08, 0.2) * rim - patient.uniform(0.1, 0.3) * crater),
        redness=patient.uniform(0.3, 0.8) * rim * (1 + 0.2 * uneven),
        coat=crater * np.clip(patient.uniform(0.5, 0.88) + 0.15 * uneven, 0, 1),
    )


def render_gastritis(patient: Generator, wall: Wall) -> Layer:
    """Render red patches all over the wall without a single lesion; the reddest are slightly swollen or eroded."""
    coarse, fine = wall.sample_noise(patient, cells=patient.uniform(4, 7)), wall.sample_noise(patient, cells=14)
    patchiness = coarse + 0.35 * fine
    patches = _compute_smoothstep(patchiness - patient.uniform(-0.2, 0.4), width=patient.uniform(0.9, 1.7))
    erosions = _compute_smoothstep(patchiness - patient.uniform(1.6, 2.6), width=0.8)
    return Layer(
        height=0.01 * patches,
        redness=patient.uniform(0.5, 1.1) * patches * (1 + 0.2 * fine),
        coat=0.5 * erosions,
    )


def sample_lumen(patient: Generator) -> tuple[float, float]:
    """Sample the position of the lumen on the wall: mostly near the edge of the field, sometimes out of sight."""
    angle, distance = patient.uniform(0, 2 * np.pi), patient.uniform(0.7, 1.35)
    return distance * float(np.cos(angle)), distance * float(np.sin(angle))


def compute_wall_colour(patient: Generator, layer: Layer) -> Plane:
    """Compute the wall's colour under white light, of shape (size, size, 3), linear RGB in [0, 1].

    Blood absorbs green and blue (Beer-Lambert law); patients differ in hue and paleness.
    """
    hue, saturation = patient.uniform(0.01, 0.055), patient.uniform(0.5, 0.64)
    own = np.array(colorsys.hsv_to_rgb(hue, saturation, patient.uniform(0.8, 1.0)), dtype=np.float32)
    redness = np.maximum(layer.redness + patient.uniform(-0.1, 0.2), -0.25)
    colour = own * np.exp(-redness[..., None] * _ABSORPTION)
    return np.asarray(colour + (_FIBRIN - colour) * layer.coat[..., None])


def compute_lumen_shade(patient: Generator, wall: Wall, *, lumen: tuple[float, float]) -> Plane:
    """Compute the proportion of light that returns, of shape (size, size): little from the depth of the lumen."""
    uneven = 1 + 0.12 * wall.sample_noise(patient, cells=2)
    distance = np.hypot(wall.x - lumen[0], wall.y - lumen[1]) * uneven
    return np.asarray(1 - 0.95 * np.exp(-((distance / patient.uniform(0.2, 0.4)) ** 2)))


def compute_wall_light(view: Generator, field: Field, height: Plane) -> tuple[Plane, Plane]:
    """Compute the diffuse and the specular reflection of the wall, each of shape (size, size); 1 is white."""
    reach, power = view.uniform(0.9, 1.3), view.uniform(0.8, 1.25)  # reach: from lens to wall
    to_x, to_y = view.uniform(-0.25, 0.25) - field.x, view.uniform(-0.25, 0.25) - field.y
    distance = np.sqrt(to_x * to_x + to_y * to_y + reach * reach)
    slope_x, slope_y = (field.radius / 8 * cv2.Sobel(height, cv2.CV_32F, *axis) for axis in ((1, 0), (0, 1)))
    # Tissue is soft and scatters light internally, so that slopes look less steep than they are.
    softening = 1 / (1 + 0.35 * np.hypot(slope_x, slope_y))
    slope_x, slope_y = slope_x * softening, slope_y * softening
    normal_z = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    tilt = slope_x * to_x + slope_y * to_y
    facing = np.clip((reach - tilt) * normal_z / distance, 0, 1)
    diffuse = power * (0.2 + 0.8 * facing) * (reach / distance) ** 2
    # A wet wall reflects the light source where its normal is halfway between light source and lens (Blinn). Near 1,
    # exp(800 (c - 1)) approximates c to the power of 800, and is a hundred times faster.
    halfway = (distance + reach - tilt) * normal_z / np.sqrt(to_x * to_x + to_y * to_y + (distance + reach) ** 2)
    return diffuse, 2 * np.exp(800 * (halfway - 1)) * diffuse


def render_sensor_image(view: Generator, light: Plane, field: Field) -> NDArray[np.uint8]:
    """Convert light to a sensor image: blurred, noisy, 8-bit RGB, black outside the field."""
    blurred = cv2.GaussianBlur(light, (0, 0), view.uniform(0.4, 1.1) * field.mask.shape[0] / 256)
    grey = 255 * (1 - np.exp(-1.6 * blurred))  # bright light saturates softly
    grey += view.uniform(1, 4) * view.standard_normal(grey.shape, dtype=np.float32)
    return np.where(field.mask[..., None], np.clip(grey, _MIN_GREY, 255), 0).astype(np.uint8)


def _compute_lesion_distance(patient: Generator, wall: Wall, *, ragged: float) -> tuple[Plane, float]:
    """Compute the distance from a lesion's centre, 1 at its edge, and the lesion's size in field radii."""
    angle, offset = patient.uniform(0, 2 * np.pi), patient.uniform(0, 0.4)
    size, aspect, rotation = patient.uniform(0.28, 0.5), patient.uniform(1.0, 1.35), patient.uniform(0, np.pi)
    x, y = wall.x - offset * float(np.cos(angle)), wall.y - offset * float(np.sin(angle))
    cos, sin = float(np.cos(rotation)), float(np.sin(rotation))
    edge = wall.sample_noise(patient, cells=1.3 / size) + 0.5 * wall.sample_noise(patient, cells=3 / size)
    along, across = (cos * x + sin * y) / (size * aspect), (cos * y - sin * x) / (size / aspect)
    return np.hypot(along, across) + ragged * edge, size


def _compute_smoothstep(values: Plane, *, width: float) -> Plane:
    """Rise smoothly from 0 to 1 while the values rise from 0 to `width` (smoothstep)."""
    fraction = np.clip(values / width, 0, 1)
    return np.asarray(fraction * fraction * (3 - 2 * fraction))


_FINDINGS: dict[str, Callable[[Generator, Wall], Layer]] = {
    "gastric_cancer": render_cancer,
    "gastric_ulcer": render_ulcer,
    "chronic_gastritis": render_gastritis,
}
CLASSES: tuple[str, ...] = tuple(_FINDINGS)
SHORT_NAMES: tuple[str, ...] = ("GC", "GU", "CG")
_MIN_SIZE = 32  # pixels; in a smaller image a lesion is only a few pixels wide


@dataclass(frozen=True)
class Frame:
    """One generated frame and its field of view."""

    image: NDArray[np.uint8]  # (size, size, 3), RGB
    field: NDArray[np.bool_]  # (size, size), True inside the field of view; not changed by an overlay


def generate_frame(label: str, *, seed: int, view: int = 0, size: int = 256, overlay: bool = False) -> Frame:
    """Generate one image of one patient; the same arguments give the same pixels.

    Args:
        label: One of `CLASSES`.
        seed: The patient, 0 or more: determines hue, folds, field of view, and the lesion's kind, size and position.
        view: Number of the patient's image, 0 or more: determines angle, distance, light, blur and noise.
        size: Width and height in pixels, at least 32.
        overlay: Whether to draw text like that of a console: hospital, patient, date, time, device, all fictitious.

    Returns:
        The frame; outside its field of view it is black except for the overlay.

    Raises:
        ValueError: If an argument is out of range; the message names it.

    Example:
        >>> frame = generate_frame("gastric_ulcer", seed=7, size=64)
        >>> frame.image.shape, bool(frame.image[~frame.field].any())
        ((64, 64, 3), False)
    """
    if label not in CLASSES:
        raise ValueError(f"label is {label!r}; expected one of {', '.join(CLASSES)}.")
    _check_minimum(0, seed=seed, view=view)
    _check_minimum(_MIN_SIZE, size=size)
    # Separate random streams for the patient, the view and the text, so that none affects another.
    class_index = CLASSES.index(label)
    keys = (class_index, 0), (class_index, 1, view), (class_index, 2)
    patient_generator, view_generator, overlay_generator = (
        np.random.default_rng(SeedSequence(seed, spawn_key=key)) for key in keys
    )
    field = generate_field(patient_generator, size=size)
    wall = transform_wall(view_generator, field)
    lumen = sample_lumen(patient_generator)
    layer = render_mucosa(patient_generator, wall, lumen=lumen) + _FINDINGS[label](patient_generator, wall)
    colour = compute_wall_colour(patient_generator, layer)
    shade = compute_lumen_shade(patient_generator, wall, lumen=lumen)
    diffuse, specular = compute_wall_light(view_generator, field, layer.height)
    light = colour * (shade * diffuse)[..., None] + (shade * specular)[..., None]
    image = render_sensor_image(view_generator, light, field)
    if overlay:
        _draw_overlay(image, overlay_generator, view=view)
    return Frame(image, field.mask)


def generate_image_set(
    root: Path,
    *,
    images: int = 60,
    size: int = 256,
    seed: int = 0,
    images_per_patient: int = 2,
    overlay: bool = False,
) -> int:
    r"""Generate an image set as `root/<class>/patient_0001_1.jpg`, with JPEG quality 95.

    Each patient has one class and a number that is unique in the set, so that the regular expression `patient_\d+`
    extracts the patient. The set appears only once it is complete, or not at all.

    Args:
        root: Folder to create; an empty folder may exist.
        images: Images per class, at least 1; the last patient of a class has fewer if the division leaves a remainder.
        size: Width and height in pixels, at least 32.
        seed: Seed of the set, 0 or more; sets with different seeds have no patient in common.
        images_per_patient: At least 1.
        overlay: Whether to draw text like that of a console.

    Returns:
        The number of files written.

    Raises:
        ValueError: If a number is out of range; the message names it.
        PylorusError: If `root` is a file or a folder that is not empty.
    """
    _check_minimum(1, images=images, images_per_patient=images_per_patient)
    _check_minimum(_MIN_SIZE, size=size)
    _check_minimum(0, seed=seed)
    check_new_folder(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    # An existing folder may be a mount point or the working directory, so it is filled, not replaced.
    is_existing = root.exists()
    with TemporaryDirectory(prefix=f".{root.name}-", dir=root if is_existing else root.parent) as temporary:
        finished = Path(temporary) / "set"
        for number in range(images * len(CLASSES)):
            index, class_index = divmod(number, len(CLASSES))
            patient_of_class, view = divmod(index, images_per_patient)
            patient = 1 + patient_of_class * len(CLASSES) + class_index
            path = finished / CLASSES[class_index] / f"patient_{patient:04d}_{view + 1}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            patient_seed = int(SeedSequence(seed, spawn_key=(patient,)).generate_state(1, np.uint64)[0])
            frame = generate_frame(CLASSES[class_index], seed=patient_seed, view=view, size=size, overlay=overlay)
            Image.fromarray(frame.image).save(path, quality=95)
        if is_existing:
            for folder in sorted(finished.iterdir()):
                folder.rename(root / folder.name)
        else:
            finished.rename(root)
    return images * len(CLASSES)


def _draw_overlay(image: NDArray[np.uint8], generator: Generator, *, view: int) -> None:
    """Draw a console's text into the image's corners, beside and over the field of view."""
    size = image.shape[0]
    hospital = ("ST. ELSEWHERE HOSPITAL", "RIVERBEND CLINIC", "LAKESIDE ENDOSCOPY UNIT")[generator.integers(3)]
    year, month, day = generator.integers(2012, 2025), generator.integers(1, 13), generator.integers(1, 29)
    seconds = int(generator.integers(8 * 3600, 16 * 3600)) + 47 * view
    top = [
        hospital,
        f"ID: {generator.integers(10**6, 10**7)}",
        f"{year}/{month:02d}/{day:02d}",
        f"{seconds // 3600 % 24:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}",
    ]
    bottom = [f"DEV EG-{generator.integers(100, 1000)}X", f"SCV {generator.integers(1, 40)}"]
    line_height, stroke = 0.045 * size, max(1, round(size / 400))
    rows = [line_height * (1 + row) for row in range(len(top))]
    rows += [size - line_height * (0.4 + row) for row in range(len(bottom))]
    for text, row in zip(top + bottom, rows, strict=True):
        position, font = (round(0.012 * size), round(row)), cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(image, text, position, font, 0.0013 * size, (235, 235, 225), stroke, cv2.LINE_AA)


def _check_minimum(minimum: int, **arguments: int) -> None:
    """Raise ValueError, naming the argument, if one of `arguments` is below `minimum`."""
    for name, value in arguments.items():
        if value < minimum:
            raise ValueError(f"{name} is {value}; expected {minimum} or more.")
