"""Drawn gastroscopic images of three classes: the embedded default of the demo, the input of the tests.

They need no download and no patient, and their geometry is known. They only look like gastroscopy: a model
trained on them has learned nothing about stomachs.
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
    "gastric_cancer": painter.cancer,
    "gastric_ulcer": painter.ulcer,
    "chronic_gastritis": painter.gastritis,
}
CLASSES: tuple[str, ...] = tuple(_FINDINGS)
SHORT_NAMES: tuple[str, ...] = ("GC", "GU", "CG")
_SMALLEST = 32  # pixels; below, a lesion is a few pixels wide


@dataclass(frozen=True)
class Frame:
    """One drawn frame and what is known of it."""

    image: NDArray[np.uint8]  # (size, size, 3), RGB
    field: NDArray[np.bool_]  # (size, size), True inside the field of view; overlays leave it as it is


def draw_frame(label: str, *, seed: int, view: int = 0, size: int = 256, overlay: bool = False) -> Frame:
    """Draw one image of one patient; the same arguments give the same pixels.

    Args:
        label: One of `CLASSES`.
        seed: The patient, 0 or more: hue, folds, field of view and the finding's kind, size and place.
        view: Which image of this patient, 0 or more: angle, distance, light, blur and noise.
        size: Width and height in pixels, at least 32.
        overlay: Burn in text like a console's: hospital, patient, date, time, device, all made up.

    Returns:
        The frame; outside its field of view it is black but for the overlay.

    Raises:
        ValueError: If an argument is out of its range; the message names it.

    Example:
        >>> frame = draw_frame("gastric_ulcer", seed=7, size=64)
        >>> frame.image.shape, bool(frame.image[~frame.field].any())
        ((64, 64, 3), False)
    """
    if label not in CLASSES:
        raise ValueError(f"label is {label!r}; expected one of {', '.join(CLASSES)}.")
    _at_least(0, seed=seed, view=view)
    _at_least(_SMALLEST, size=size)
    # One stream for what a patient's images share, one for this view, one for the text: none shifts another.
    kind = CLASSES.index(label)
    keys = (kind, 0), (kind, 1, view), (kind, 2)
    patient, look, console = (np.random.default_rng(SeedSequence(seed, spawn_key=key)) for key in keys)
    field = painter.field_of_view(patient, size=size)
    wall = painter.look_at_wall(look, field)
    lumen = painter.draw_lumen(patient)
    layer = painter.mucosa(patient, wall, lumen=lumen) + _FINDINGS[label](patient, wall)
    colour = painter.colour_wall(patient, layer)
    shade = painter.shade_lumen(patient, wall, lumen=lumen)
    scattered, mirrored = painter.light_wall(look, field, layer.height)
    light = colour * (shade * scattered)[..., None] + (shade * mirrored)[..., None]
    image = painter.record(look, light, field)
    if overlay:
        _burn_in(image, console, view=view)
    return Frame(image, field.mask)


def draw_image_set(
    root: Path,
    *,
    images: int = 60,
    size: int = 256,
    seed: int = 0,
    images_per_patient: int = 2,
    overlay: bool = False,
) -> int:
    r"""Draw a whole image set as `root/<class>/patient_0001_1.jpg`, with JPEG quality 95.

    A patient has one class, and a number that no other patient of the set has, so that the regular expression
    `patient_\d+` names the patient. The set appears at once when it is complete, or not at all.

    Args:
        root: Folder to make; it may exist if it is empty.
        images: Images a class, at least 1; its last patient has fewer if they do not divide evenly.
        size: Width and height in pixels, at least 32.
        seed: Which set, 0 or more; sets of different seeds share no patient.
        images_per_patient: At least 1.
        overlay: Burn in text like a console's.

    Returns:
        How many files were written.

    Raises:
        ValueError: If a number is out of its range; the message names it.
        FileExistsError: If `root` is a file or a folder that holds something.
    """
    _at_least(1, images=images, images_per_patient=images_per_patient)
    _at_least(_SMALLEST, size=size)
    _at_least(0, seed=seed)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"root is {root}, which is no empty folder; choose a new or an empty one.")
    root.parent.mkdir(parents=True, exist_ok=True)
    # A folder that is there already may be a mount or the user's working folder: it is filled, not replaced.
    fill = root.exists()
    with TemporaryDirectory(prefix=f".{root.name}-", dir=root if fill else root.parent) as temporary:
        finished = Path(temporary) / "set"
        for number in range(images * len(CLASSES)):
            index, kind = divmod(number, len(CLASSES))
            turn, view = divmod(index, images_per_patient)
            patient = 1 + turn * len(CLASSES) + kind
            path = finished / CLASSES[kind] / f"patient_{patient:04d}_{view + 1}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            own_seed = int(SeedSequence(seed, spawn_key=(patient,)).generate_state(1, np.uint64)[0])
            frame = draw_frame(CLASSES[kind], seed=own_seed, view=view, size=size, overlay=overlay)
            Image.fromarray(frame.image).save(path, quality=95)
        if fill:
            for folder in sorted(finished.iterdir()):
                folder.rename(root / folder.name)
        else:
            finished.rename(root)
    return images * len(CLASSES)


def _burn_in(image: NDArray[np.uint8], console: Generator, *, view: int) -> None:
    """Write a console's text into the image's corners, beside and over the field of view."""
    size = image.shape[0]
    hospital = ("ST. ELSEWHERE HOSPITAL", "RIVERBEND CLINIC", "LAKESIDE ENDOSCOPY UNIT")[console.integers(3)]
    year, month, day = console.integers(2012, 2025), console.integers(1, 13), console.integers(1, 29)
    start = int(console.integers(8 * 3600, 16 * 3600)) + 47 * view
    top = [
        hospital,
        f"ID: {console.integers(10**6, 10**7)}",
        f"{year}/{month:02d}/{day:02d}",
        f"{start // 3600 % 24:02d}:{start // 60 % 60:02d}:{start % 60:02d}",
    ]
    bottom = [f"DEV EG-{console.integers(100, 1000)}X", f"SCV {console.integers(1, 40)}"]
    line, stroke = 0.045 * size, max(1, round(size / 400))
    rows = [line * (1 + row) for row in range(len(top))]
    rows += [size - line * (0.4 + row) for row in range(len(bottom))]
    for text, row in zip(top + bottom, rows, strict=True):
        place, font = (round(0.012 * size), round(row)), cv2.FONT_HERSHEY_SIMPLEX
        cv2.putText(image, text, place, font, 0.0013 * size, (235, 235, 225), stroke, cv2.LINE_AA)


def _at_least(least: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more.")
