"""Detect the field of view of an endoscopic frame: what the lens shows, without the console's text, logos and insets.

The field is a bright convex shape on a nearly black background. Parts of its border are hidden by text, by an inset or
in dark mucosa, so a complete shape is fitted to the visible parts (`field_edge.py`, `field_fit.py`). If no shape fits,
the frame is left as it is and the reason is given.

Text inside the field remains; text that crosses the border is cut off at the border.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.data.field_edge import PAD, WORKING_SIDE, WorkingCopy, create_working_copy, find_edge
from pylorus.data.field_fit import fit_shape
from pylorus.data.field_shape import Disc, Shape
from pylorus.data.image import RGB

MIN_SIDE = 32
"""Minimum side in pixels: in smaller frames a border can't be distinguished from texture."""
MIN_POINTS = 12
"""Minimum number of points on the edge."""
MIN_SUPPORT = 0.4
"""Minimum proportion of the points of the sharp edge that lie on the shape."""
MIN_AREA = 0.08
"""Minimum proportion of the frame that a field covers."""
FULL_AREA = 0.995
"""A field that covers at least this proportion of the frame is the whole frame."""
MAX_BRIGHT_OUTSIDE = 0.4
"""Maximum proportion of the pixels outside a field that may be bright: text, insets, bars."""
MIN_BRIGHT_AREA = 0.1
"""Proportion of the frame: a smaller bright area outside the field may be an inset in the only cut corner."""

_SHIFT = 4
"""Fractional bits of the coordinates with which OpenCV draws polygons."""


@dataclass(frozen=True)
class FieldOfView:
    """The field of view in a frame.

    Attributes:
        box: Left, top, right, bottom in pixels of the frame; right and bottom are exclusive.
        shape: `full` if nothing is to be cropped, otherwise a description of the shape, such as `octagon`.
        mask: True inside the field, of shape (bottom - top, right - left); None if the field fills the whole box.
        support: Proportion of the visible edge that lies on the shape, in [0, 1]; 0 if no shape was fitted.
        reason: Why this is the field, or why none was found, for the audit.
    """

    box: tuple[int, int, int, int]
    shape: str
    mask: NDArray[np.bool_] | None
    support: float
    reason: str


def find_field(image: RGB) -> FieldOfView:
    """Detect the field of view of a frame; deterministic.

    Args:
        image: RGB, uint8 of shape (height, width, 3).

    Returns:
        The field; the whole frame if it has no dark background around a field, or no shape fits the edge.

    Raises:
        ValueError: If the image is not a uint8 RGB array.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} of shape {image.shape}; expected uint8 of shape (height, width, 3).")
    if min(image.shape[:2]) < MIN_SIDE:
        return _build_full_field(
            image, f"no field of view found: a side is shorter than {MIN_SIDE} pixels; not cropped"
        )
    copy = create_working_copy(image)
    if copy is None:
        return _build_full_field(
            image, "no dark background at the edge of the frame: the field of view is the whole frame"
        )
    edge = find_edge(copy)
    if edge is None or len(edge.points) < MIN_POINTS:
        return _build_full_field(
            image, "no field of view found: no sharp edge between field and dark background; not cropped"
        )
    shape, points_on_shape = fit_shape(edge.points, centre=edge.centre)
    support = points_on_shape / len(edge.points)
    if support < MIN_SUPPORT:
        return _build_full_field(
            image, f"no field of view found: no shape fits the edge (at best {support:.0%}); not cropped"
        )
    objection = _find_objection(copy, shape)
    if objection is not None:
        return _build_full_field(image, f"{objection}; not cropped", support=support)
    return _scale_to_frame(image, shape, support)


def crop_to_field(image: RGB) -> RGB:
    """Crop a frame to the bounding box of its field of view, and set pixels outside the field to black.

    Args:
        image: RGB, uint8 of shape (height, width, 3).

    Returns:
        A new array of the box's size; the same array object if the field is the whole frame or none was found.

    Raises:
        ValueError: If the image is not a uint8 RGB array.
    """
    import cv2

    field = find_field(image)
    if field.shape == "full":
        return image
    left, top, right, bottom = field.box
    cropped = image[top:bottom, left:right]
    if field.mask is None:
        return cropped.copy()
    return np.asarray(cv2.bitwise_and(cropped, cropped, mask=field.mask.view(np.uint8)))


def _build_full_field(image: RGB, reason: str, *, support: float = 0.0) -> FieldOfView:
    height, width = image.shape[:2]
    return FieldOfView((0, 0, width, height), "full", None, support, reason)


def _find_objection(copy: WorkingCopy, shape: Shape) -> str | None:
    """Return what speaks against a shape as the field; None if nothing does."""
    height, width = copy.grey.shape[0] - 2 * PAD, copy.grey.shape[1] - 2 * PAD
    inside = _draw_mask(shape, scale=(1.0, 1.0), size=(width, height))
    area = np.count_nonzero(inside) / inside.size
    if area < MIN_AREA:
        return f"no field of view found: the best shape covers only {area:.0%} of the frame"
    if area >= FULL_AREA:
        return "the field of view fills the frame"
    bright = copy.grey[PAD:-PAD, PAD:-PAD] > copy.threshold
    bright_outside = np.count_nonzero(bright & ~inside)
    bright_proportion = bright_outside / np.count_nonzero(~inside)
    if bright_proportion > MAX_BRIGHT_OUTSIDE and bright_outside > MIN_BRIGHT_AREA * inside.size:
        return f"no field of view found: {bright_proportion:.0%} of the area outside the best shape is bright"
    return None


def _scale_to_frame(image: RGB, shape: Shape, support: float) -> FieldOfView:
    """Convert a shape from pixels of the working copy to a field of view in pixels of the frame."""
    height, width = image.shape[:2]
    scale = min(1.0, WORKING_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    mask = _draw_mask(shape, scale=(width / size[0], height / size[1]), size=(width, height))
    rows, columns = np.asarray(mask.any(axis=1)), np.asarray(mask.any(axis=0))
    top, bottom = int(np.argmax(rows)), height - int(np.argmax(rows[::-1]))
    left, right = int(np.argmax(columns)), width - int(np.argmax(columns[::-1]))
    box_mask = np.ascontiguousarray(mask[top:bottom, left:right])
    reason = f"{shape.name}: fits {support:.0%} of the visible edge"
    return FieldOfView((left, top, right, bottom), shape.name, None if box_mask.all() else box_mask, support, reason)


def _draw_mask(shape: Shape, *, scale: tuple[float, float], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Rasterize a shape, scaled by (x, y) `scale`, to a mask of a frame of `size` (width, height)."""
    import cv2

    width, height = size
    mask = np.zeros((height, width), dtype=np.uint8)
    corners = np.round((shape.get_polygon() * scale - 0.5) * 2**_SHIFT).astype(np.int32)
    cv2.fillConvexPoly(mask, corners, 1, lineType=cv2.LINE_8, shift=_SHIFT)
    if isinstance(shape, Disc):
        box = np.clip(np.array(shape.box), -1e6, 1e6) * np.tile(scale, 2)
        left, top, right, bottom = (max(0, round(side)) for side in box.tolist())
        mask[:top], mask[bottom:], mask[:, :left], mask[:, right:] = 0, 0, 0, 0
    return mask.view(np.bool_)
