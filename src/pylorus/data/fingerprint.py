"""Fingerprints of images: thumbnails of 1,024 bytes, and 64-bit perceptual hashes of their eight orientations.

The black around the field of view is the same in every frame of an endoscope. It has no weight, neither in the hash
nor in the comparison; otherwise two frames would be similar because the octagon around them is the same.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 32
"""Side length of a thumbnail in pixels."""
BLACK, SEEN = 10.0, 34.0
"""Grey levels up to which a pixel has weight 0, and from which it has weight 1."""
BLOCK = 8192
"""Thumbnails that are processed at once."""
ORIENTATIONS = (
    "as it is",
    "rotated by 90°",
    "rotated by 180°",
    "rotated by 270°",
    "mirrored",
    "mirrored and rotated by 90°",
    "mirrored and rotated by 180°",
    "mirrored and rotated by 270°",
)
"""Names of the eight orientations, in the order of `transform_thumbnails`."""

Thumbnails = NDArray[np.uint8]
"""Grey thumbnails of shape (images, SIDE, SIDE)."""


def compute_thumbnail(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Resize a grey image of shape (height, width) to (SIDE, SIDE), without keeping its proportions."""
    return np.asarray(cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def transform_thumbnails(thumbnails: Thumbnails, position: int) -> Thumbnails:
    """Return all thumbnails in one of the eight orientations; `position` is an index into `ORIENTATIONS`."""
    oriented = thumbnails[:, :, ::-1] if position >= 4 else thumbnails
    return np.rot90(oriented, k=position % 4, axes=(1, 2))


def compute_hashes(thumbnails: Thumbnails) -> NDArray[np.uint64]:
    """Compute the perceptual hash of each thumbnail: which of its 64 lowest frequencies exceed their median.

    The transform is the discrete cosine transform without its constant, over SIDE × SIDE pixels (Zauner 2010).

    Returns:
        Hashes of shape (images,).
    """
    return _map_blocks(_compute_block_hashes, thumbnails, np.uint64)


def _compute_block_hashes(thumbnails: Thumbnails) -> NDArray[np.uint64]:
    filled = _replace_black(thumbnails)
    frequencies, pixels = np.arange(1, 9)[:, None], np.arange(SIDE)[None, :]
    basis = np.cos(np.pi * frequencies * (2 * pixels + 1) / (2 * SIDE)).astype(np.float32)
    spectrum = (basis @ filled @ basis.T).reshape(-1, 64)
    bits = spectrum > np.median(spectrum, axis=1, keepdims=True)
    return np.ascontiguousarray(np.packbits(bits, axis=1)).view(np.uint64).reshape(-1)


def compute_contrast(thumbnails: Thumbnails) -> NDArray[np.float32]:
    """Compute the standard deviation of each thumbnail's grey levels outside the black; near 0, an image is blank."""
    return _map_blocks(_compute_block_contrast, thumbnails, np.float32)


def _compute_block_contrast(thumbnails: Thumbnails) -> NDArray[np.float32]:
    weight = _compute_weight(thumbnails)
    total = np.maximum(weight.sum(axis=(1, 2)), 1.0)
    offset = thumbnails - ((weight * thumbnails).sum(axis=(1, 2)) / total)[:, None, None]
    return np.asarray(np.sqrt((weight * offset**2).sum(axis=(1, 2)) / total), dtype=np.float32)


def compute_similarity(first: Thumbnails, second: Thumbnails) -> NDArray[np.float32]:
    """Compute the similarity of pairs of thumbnails: the correlation of their fine structure, in [-1, 1].

    What is smooth over a quarter of the frame is subtracted first: images of different subjects share a pale center on
    a darker background, or illumination that falls off toward the edge.

    Returns:
        Similarities of shape (pairs,).
    """
    weight = _compute_weight(first) * _compute_weight(second)
    total = np.maximum(weight.sum(axis=(1, 2), keepdims=True), 1e-6)

    def filter_fine_structure(thumbnails: Thumbnails) -> NDArray[np.float32]:
        filled = _replace_black(thumbnails)
        smooth = np.stack([cv2.GaussianBlur(each, (0, 0), SIDE / 8) for each in filled])
        fine = filled - smooth
        return np.asarray(fine - (weight * fine).sum(axis=(1, 2), keepdims=True) / total, dtype=np.float32)

    if not len(first):
        return np.zeros(0, dtype=np.float32)
    first_fine, second_fine = filter_fine_structure(first), filter_fine_structure(second)
    covariance = (weight * first_fine * second_fine).sum(axis=(1, 2))
    norm = np.sqrt((weight * first_fine**2).sum(axis=(1, 2)) * (weight * second_fine**2).sum(axis=(1, 2)))
    return np.asarray(covariance / np.maximum(norm, 1e-6), dtype=np.float32)


def _map_blocks(measure: Callable[[Thumbnails], NDArray[Any]], thumbnails: Thumbnails, kind: type) -> NDArray[Any]:
    """Apply `measure` in blocks: all thumbnails as floating-point numbers would take four times the memory."""
    parts = [measure(thumbnails[begin : begin + BLOCK]) for begin in range(0, len(thumbnails), BLOCK)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=kind)


def _compute_weight(thumbnails: Thumbnails) -> NDArray[np.float32]:
    return np.asarray(np.clip((thumbnails.astype(np.float32) - BLACK) / (SEEN - BLACK), 0.0, 1.0), dtype=np.float32)


def _replace_black(thumbnails: Thumbnails) -> NDArray[np.float32]:
    """Replace black by the mean of the visible pixels, without a hard edge that noise could shift."""
    weight = _compute_weight(thumbnails)
    mean = (weight * thumbnails).sum(axis=(1, 2)) / np.maximum(weight.sum(axis=(1, 2)), 1e-6)
    return np.asarray(mean[:, None, None] + weight * (thumbnails - mean[:, None, None]), dtype=np.float32)
