"""The field of view of an endoscopic frame: what the lens shows, without the console's text, logos and insets.

The field is a bright convex shape on nearly black ground. Its border is seen at many places and hidden at others, by
text, by a second picture or in dark mucosa; so a whole shape is fitted to what is seen of it (`field_edge.py`,
`field_fit.py`). Where no shape explains the frame, nothing is cut away, and the reason says so.

What lies over the field itself stays: text that reaches into it is cut at the border, no further.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pylorus.data.field_edge import LONGEST, PAD, WorkingCopy, find_edge, working_copy
from pylorus.data.field_fit import fit_shape
from pylorus.data.field_shape import Disc, Shape
from pylorus.data.image import RGB

SMALLEST = 32
"""Sides in pixels: on smaller frames a border is too coarse to be told from texture."""
LEAST_POINTS = 12
LEAST_SUPPORT = 0.4
"""Share of the sharp edge that a shape must pass through."""
LEAST_AREA = 0.08
"""Share of the frame that a field covers at least."""
WHOLE = 0.995
"""Share of the frame from which on a field is the whole frame."""
MOST_BRIGHT = 0.4
"""Share of what lies outside of a field that may be bright: text, insets, bars."""
LEAST_BRIGHT = 0.1
"""Share of the frame: less than that beside a field may be an inset that fills the only cut corner."""

_SHIFT = 4
"""Binary places behind the point with which OpenCV draws polygons."""


@dataclass(frozen=True)
class FieldOfView:
    """Where the field of view lies in a frame.

    Attributes:
        box: Left, top, right, bottom in pixels of the frame; right and bottom are the first pixels outside.
        shape: `full` where nothing is to be cut away, else the field's shape in words, such as `octagon`.
        mask: True inside the field, of shape (bottom - top, right - left); None where the whole box is field.
        support: Share of the seen edge that the shape passes through, in [0, 1]; 0 where no shape was fitted.
        reason: Why this is the field, or why none was found, for the audit.
    """

    box: tuple[int, int, int, int]
    shape: str
    mask: NDArray[np.bool_] | None
    support: float
    reason: str


def find_field(image: RGB) -> FieldOfView:
    """The field of view of a frame; the same pixels always give the same field.

    Args:
        image: Of shape (height, width, 3).

    Returns:
        The field; the whole frame where there is no dark ground around a field, or no shape explains the edge.

    Raises:
        ValueError: If the image is no RGB array of 8 bits.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype} of shape {image.shape}; expected uint8 of shape (height, width, 3).")
    if min(image.shape[:2]) < SMALLEST:
        return _whole(image, f"no field found: a side is shorter than {SMALLEST} pixels, kept whole")
    copy = working_copy(image)
    if copy is None:
        return _whole(image, "no dark ground at the frame's rim: the whole frame is field")
    edge = find_edge(copy)
    if edge is None or len(edge.points) < LEAST_POINTS:
        return _whole(image, "no field found: no sharp edge between a bright field and dark ground, kept whole")
    shape, passed = fit_shape(edge.points, middle=edge.middle)
    support = passed / len(edge.points)
    if support < LEAST_SUPPORT:
        return _whole(image, f"no field found: no shape passes through the edge (at best {support:.0%}), kept whole")
    doubt = _doubt(copy, shape)
    if doubt is not None:
        return _whole(image, f"{doubt}, kept whole", support=support)
    return _in_frame(image, shape, support)


def crop_to_field(image: RGB) -> RGB:
    """The box around a frame's field of view, black outside of the field.

    Args:
        image: Of shape (height, width, 3).

    Returns:
        A new array of the box's size; the very same array where the whole frame is field or none was found.

    Raises:
        ValueError: If the image is no RGB array of 8 bits.
    """
    import cv2

    field = find_field(image)
    if field.shape == "full":
        return image
    left, top, right, bottom = field.box
    inside = image[top:bottom, left:right]
    if field.mask is None:
        return inside.copy()
    return np.asarray(cv2.bitwise_and(inside, inside, mask=field.mask.view(np.uint8)))


def _whole(image: RGB, reason: str, *, support: float = 0.0) -> FieldOfView:
    height, width = image.shape[:2]
    return FieldOfView((0, 0, width, height), "full", None, support, reason)


def _doubt(copy: WorkingCopy, shape: Shape) -> str | None:
    """What speaks against a shape as the field, in words."""
    height, width = copy.grey.shape[0] - 2 * PAD, copy.grey.shape[1] - 2 * PAD
    inside = _drawn(shape, scale=(1.0, 1.0), size=(width, height))
    share = np.count_nonzero(inside) / inside.size
    if share < LEAST_AREA:
        return f"no field found: the best shape covers only {share:.0%} of the frame"
    if share >= WHOLE:
        return "the field fills the frame"
    bright = copy.grey[PAD:-PAD, PAD:-PAD] > copy.threshold
    beside = np.count_nonzero(bright & ~inside)
    outside = beside / np.count_nonzero(~inside)
    if outside > MOST_BRIGHT and beside > LEAST_BRIGHT * inside.size:
        return f"no field found: {outside:.0%} of what lies outside of the best shape is bright"
    return None


def _in_frame(image: RGB, shape: Shape, support: float) -> FieldOfView:
    """A shape of the working copy in pixels of the frame."""
    height, width = image.shape[:2]
    scale = min(1.0, LONGEST / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    mask = _drawn(shape, scale=(width / size[0], height / size[1]), size=(width, height))
    rows, columns = np.asarray(mask.any(axis=1)), np.asarray(mask.any(axis=0))
    top, bottom = int(np.argmax(rows)), height - int(np.argmax(rows[::-1]))
    left, right = int(np.argmax(columns)), width - int(np.argmax(columns[::-1]))
    inner = np.ascontiguousarray(mask[top:bottom, left:right])
    reason = f"{shape.name}: passes through {support:.0%} of the seen edge"
    return FieldOfView((left, top, right, bottom), shape.name, None if inner.all() else inner, support, reason)


def _drawn(shape: Shape, *, scale: tuple[float, float], size: tuple[int, int]) -> NDArray[np.bool_]:
    """A shape's pixels in a frame of `size` (width, height) that is `scale` times as wide and as high."""
    import cv2

    width, height = size
    drawn = np.zeros((height, width), dtype=np.uint8)
    corners = np.round((shape.polygon() * scale - 0.5) * 2**_SHIFT).astype(np.int32)
    cv2.fillConvexPoly(drawn, corners, 1, lineType=cv2.LINE_8, shift=_SHIFT)
    if isinstance(shape, Disc):
        box = np.clip(np.array(shape.box), -1e6, 1e6) * np.tile(scale, 2)
        left, top, right, bottom = (max(0, round(side)) for side in box.tolist())
        drawn[:top], drawn[bottom:], drawn[:, :left], drawn[:, right:] = 0, 0, 0, 0
    return drawn.view(np.bool_)
