"""Long-tailed image sets for `imbalance.py`, split by patient.

A seed determines which patients are in training, validation and test, and which of their images make training and
validation long-tailed. All images of the test patients are used, so that the sensitivity of rare classes is measured
on as many images as that of frequent ones.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from pylorus.core.distributed import compute_seed
from pylorus.data.degradation import degrade_image
from pylorus.data.input_format import InputFormat
from pylorus.data.synthetic import CLASSES, generate_frame

SIZE = 96
"""Side of the images in pixels."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with their patients.

    Attributes:
        images: uint8 of shape (n, SIZE, SIZE, 3), RGB.
        label: Shape (n,).
        group: Patient of each image, of shape (n,).
        train: Training images of each class, from the most frequent one; validation has a quarter as many.
        tail: The order of classes from frequent to rare; None: another one for each seed.
    """

    images: NDArray[np.uint8]
    label: NDArray[np.int64]
    group: NDArray[np.int64]
    train: tuple[int, ...]
    tail: tuple[int, ...] | None = None


def read_bloodcells(folder: Path, group: str) -> ImageSet:
    """Read the images of all class folders, also of several splits: they are split anew."""
    form = InputFormat(SIZE, "pad", "bicubic")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    names = sorted({path.parent.name for path in paths})
    patients = [re.search(group, str(path.relative_to(folder))) for path in paths]
    known = sorted({str(each and each.group()) for each in patients})
    images = form.load_images(paths)
    label = np.array([names.index(path.parent.name) for path in paths])
    codes = np.array([known.index(str(each and each.group())) for each in patients])
    return ImageSet(images, label, codes, train=decline(70, 10, len(names)))


def draw_gastroscopies(patients: int = 150) -> ImageSet:
    """Draw two frames of each patient, dark and out of focus; cancer is the rare class, gastritis the frequent one."""
    images, label, group = [], [], []
    for code in range(patients * len(CLASSES)):
        for view in range(2):
            frame = generate_frame(CLASSES[code % len(CLASSES)], seed=code, view=view, size=SIZE)
            blurred = degrade_image(frame.image, "defocus", 4)
            images.append(degrade_image(blurred, "dark", 3))
            label.append(code % len(CLASSES))
            group.append(code)
    return ImageSet(np.stack(images), np.array(label), np.array(group), train=decline(100, 20, 3), tail=(2, 1, 0))


def write_digits() -> ImageSet:
    """Enlarge the 8 × 8 digits; blocks of 138 stand in for the 13 writers, of whom only the number is known."""
    digits = load_digits()
    small = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = [cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for image in small]
    group = np.arange(len(images)) * 13 // len(images)
    return ImageSet(np.stack(images)[..., None].repeat(3, axis=3), digits.target, group, train=decline(50, 10, 10))


def decline(largest: int, ratio: float, classes: int) -> tuple[int, ...]:
    """Return numbers of images that fall geometrically from `largest` to `largest / ratio`."""
    return tuple(round(largest * ratio ** (-place / (classes - 1))) for place in range(classes))


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of the training, validation and test images, and the number of training images of each class."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]
    counts: tuple[int, ...]


def split_images(images: ImageSet, seed: int) -> Split:
    """Split by patient; training and validation become long-tailed, all test images are used."""
    rng = np.random.default_rng(compute_seed(seed, "imbalance"))
    classes = len(images.train)
    tail = rng.permutation(classes) if images.tail is None else np.array(images.tail)
    wanted = np.empty(classes, dtype=np.int64)
    wanted[tail] = images.train
    for _ in range(1000):
        order = rng.permutation(np.unique(images.group))
        first, second = round(len(order) / 3), round(len(order) / 2)
        parts = [np.flatnonzero(np.isin(images.group, part)) for part in np.split(order, [first, second])]
        test, val, train = (rng.permutation(part) for part in parts)
        kept = [
            [choose_rows(images, part, label, max(1, round(share * wanted[label]))) for label in range(classes)]
            for part, share in ((train, 1.0), (val, 0.25))
        ]
        if all(rows is not None for of_part in kept for rows in of_part):
            counts = tuple(len(rows) for rows in kept[0])
            return Split(np.concatenate(kept[0]), np.concatenate(kept[1]), np.sort(test), counts)
    raise ValueError("found no split in which each class has enough images in training and validation")


def choose_rows(images: ImageSet, rows: NDArray[np.int64], label: int, count: int) -> NDArray[np.int64] | None:
    """Choose images of a class, patient after patient; None if there are too few."""
    rows = rows[images.label[rows] == label]
    _, first, code = np.unique(images.group[rows], return_index=True, return_inverse=True)
    chosen = rows[np.argsort(first[code], kind="stable")][:count]
    return chosen if len(chosen) == count else None
