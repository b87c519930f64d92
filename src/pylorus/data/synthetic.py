"""Generate synthetic gastroscopic images of three classes: the default data of the demo and the input of the tests.

They need no download and no patient, and their geometry is known. They only resemble gastroscopy: a model trained on
them has learned nothing about stomachs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray
from PIL import Image

from pylorus.data import painter

_FINDINGS: dict[str, Callable[[Generator, painter.Wall], painter.Layer]] = {
    "gastric_cancer": painter.render_cancer,
    "gastric_ulcer": painter.render_ulcer,
    "chronic_gastritis": painter.render_gastritis,
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
    field = painter.generate_field(patient_generator, size=size)
    wall = painter.transform_wall(view_generator, field)
    lumen = painter.sample_lumen(patient_generator)
    layer = painter.render_mucosa(patient_generator, wall, lumen=lumen) + _FINDINGS[label](patient_generator, wall)
    colour = painter.compute_wall_colour(patient_generator, layer)
    shade = painter.compute_lumen_shade(patient_generator, wall, lumen=lumen)
    diffuse, specular = painter.compute_wall_light(view_generator, field, layer.height)
    light = colour * (shade * diffuse)[..., None] + (shade * specular)[..., None]
    image = painter.render_sensor_image(view_generator, light, field)
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
        FileExistsError: If `root` is a file or a folder that is not empty.
    """
    _check_minimum(1, images=images, images_per_patient=images_per_patient)
    _check_minimum(_MIN_SIZE, size=size)
    _check_minimum(0, seed=seed)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"root is {root}, which is not an empty folder; choose a new or empty one.")
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
