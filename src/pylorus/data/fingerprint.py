"""What an image looks like in 1,024 bytes: its thumbnail, and 64-bit perceptual hashes of it in all eight positions.

Black around the field of view is the same in every frame of an endoscope. It gets no weight, neither in the hash nor
in the comparison; else two frames would look alike because the octagon around them is the same.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 32
"""Pixels of a thumbnail's side."""
BLACK, SEEN = 10.0, 34.0
"""Grey levels: up to the first a pixel has no weight, from the second on all of it."""
BLOCK = 8192
"""Thumbnails that are measured together."""
POSITIONS = (
    "as it is",
    "rotated by 90°",
    "rotated by 180°",
    "rotated by 270°",
    "mirrored",
    "mirrored and rotated by 90°",
    "mirrored and rotated by 180°",
    "mirrored and rotated by 270°",
)
"""Names of the eight positions, in the order of `turned`."""

Thumbnails = NDArray[np.uint8]
"""Grey thumbnails of shape (images, SIDE, SIDE)."""


def thumbnail(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image of shape (height, width), squeezed to (SIDE, SIDE)."""
    return np.asarray(cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def turned(thumbnails: Thumbnails, position: int) -> Thumbnails:
    """All thumbnails in one of the eight POSITIONS."""
    shown = thumbnails[:, :, ::-1] if position >= 4 else thumbnails
    return np.rot90(shown, k=position % 4, axes=(1, 2))


def hashes(thumbnails: Thumbnails) -> NDArray[np.uint64]:
    """The perceptual hash of each thumbnail: which of its 64 lowest waves lie over their median.

    The transform is the discrete cosine transform without its constant, over SIDE × SIDE pixels (Zauner 2010).

    Returns:
        Of shape (images,).
    """
    return _in_blocks(_hashes, thumbnails, np.uint64)


def _hashes(thumbnails: Thumbnails) -> NDArray[np.uint64]:
    filled = _without_black(thumbnails)
    steps, pixels = np.arange(1, 9)[:, None], np.arange(SIDE)[None, :]
    waves = np.cos(np.pi * steps * (2 * pixels + 1) / (2 * SIDE)).astype(np.float32)
    spectrum = (waves @ filled @ waves.T).reshape(-1, 64)
    bits = spectrum > np.median(spectrum, axis=1, keepdims=True)
    return np.ascontiguousarray(np.packbits(bits, axis=1)).view(np.uint64).reshape(-1)


def contrast(thumbnails: Thumbnails) -> NDArray[np.float32]:
    """The spread of each thumbnail's grey levels where it is not black: near 0 an image shows nothing."""
    return _in_blocks(_contrast, thumbnails, np.float32)


def _contrast(thumbnails: Thumbnails) -> NDArray[np.float32]:
    weight = _weight(thumbnails)
    total = np.maximum(weight.sum(axis=(1, 2)), 1.0)
    offset = thumbnails - ((weight * thumbnails).sum(axis=(1, 2)) / total)[:, None, None]
    return np.asarray(np.sqrt((weight * offset**2).sum(axis=(1, 2)) / total), dtype=np.float32)


def likeness(first: Thumbnails, second: Thumbnails) -> NDArray[np.float32]:
    """How alike thumbnails are, pair by pair: the correlation of their fine structure, in [-1, 1].

    What is smooth over a quarter of the frame is taken off first: a pale middle on a darker ground, or a lamp's
    light that falls off to the edge, is shared by images that show different things.
    """
    weight = _weight(first) * _weight(second)
    total = np.maximum(weight.sum(axis=(1, 2), keepdims=True), 1e-6)

    def centred(thumbnails: Thumbnails) -> NDArray[np.float32]:
        filled = _without_black(thumbnails)
        smooth = np.stack([cv2.GaussianBlur(each, (0, 0), SIDE / 8) for each in filled])
        fine = filled - smooth
        return np.asarray(fine - (weight * fine).sum(axis=(1, 2), keepdims=True) / total, dtype=np.float32)

    if not len(first):
        return np.zeros(0, dtype=np.float32)
    one, other = centred(first), centred(second)
    shared = (weight * one * other).sum(axis=(1, 2))
    size = np.sqrt((weight * one**2).sum(axis=(1, 2)) * (weight * other**2).sum(axis=(1, 2)))
    return np.asarray(shared / np.maximum(size, 1e-6), dtype=np.float32)


def _in_blocks(measure: Callable[[Thumbnails], NDArray[Any]], thumbnails: Thumbnails, kind: type) -> NDArray[Any]:
    """A measure of each thumbnail, of some at a time: as floating-point numbers all would take four times as much."""
    parts = [measure(thumbnails[begin : begin + BLOCK]) for begin in range(0, len(thumbnails), BLOCK)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=kind)


def _weight(thumbnails: Thumbnails) -> NDArray[np.float32]:
    return np.asarray(np.clip((thumbnails.astype(np.float32) - BLACK) / (SEEN - BLACK), 0.0, 1.0), dtype=np.float32)


def _without_black(thumbnails: Thumbnails) -> NDArray[np.float32]:
    """Black gives way to the mean of what is seen, without a hard edge that noise could move."""
    weight = _weight(thumbnails)
    mean = (weight * thumbnails).sum(axis=(1, 2)) / np.maximum(weight.sum(axis=(1, 2)), 1e-6)
    return np.asarray(mean[:, None, None] + weight * (thumbnails - mean[:, None, None]), dtype=np.float32)
