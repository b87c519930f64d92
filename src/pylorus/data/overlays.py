"""Detect and cover what a console draws over a frame: text, rows of pictograms, and plates such as a scope map.

Text is bright thin strokes in rows. A row of letters is wide, dense in strokes, and has no gaps; specular highlights
are single blobs of all sizes, at any height, and form such rows by chance in one of some hundred frames. Once a row is
certain, rows of similar letters above and below it need less evidence. A plate is a rectangle of one flat colour that
mucosa does not have.

A frame is judged by itself, so prediction covers what training covered. What is not detected: a second picture over the
field, whose content is mucosa too; dark letters over the mucosa; a single letter or symbol far from any text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from pylorus.data.files import RGB

WORKING_SIDE = 1000
"""The working copy is reduced by a whole factor to at most this many pixels on its longer side."""
MIN_SIDE = 48
"""Shorter side in pixels below which nothing is searched for: letters would have a few pixels only."""
STROKE = 9
"""Strokes of letters are thinner than this many pixels of the working copy."""
CONTRAST = 36
"""Grey levels by which a stroke is brighter than its surroundings."""
MIN_HEIGHT, MAX_HEIGHT = 4, 24
"""Heights of letters in pixels of the working copy and of its half; so the largest have 48 of the former."""
MAX_WIDTH = 16
"""Greatest width of a shape in heights: letters of a line may touch, but a line along the frame's side is longer."""
MAX_STEPS = 3
"""Times that a row that is text is extended at its ends by the shapes next to it."""
MIN_ASPECT = 1.2
"""Least ratio of a row's width to its height."""
MAX_SPECKS, NOT_TEXT = 0.7, -9.0
"""Shapes around a row, per square of a letter's height, above which it is not text, and the score that it then has."""
MIN_STROKES = 0.4
"""Strokes per height of a letter from which a row may be text by itself."""
CERTAIN, DOUBTFUL, POSSIBLE = 3.0, -1.0, -3.5
"""Scores from which a row is text by itself, if other frames have text there too, and close to a row that is text."""
MIN_PLATE = 0.01
"""Fraction of the frame that a plate covers at least."""
MIN_PLATE_SIDE, MIN_FILLED = 0.12, 0.85
"""Least sides of a plate, as fractions of the frame's, and the fraction of its box that is of its colour."""
PLATE_SIDE = 180
"""Least number of pixels on the longer side of the copy in which plates are searched for, if the frame has as many."""
FOREIGN = 24
"""Grey levels by which a plate is more green or blue than red, as mucosa under white light never is."""
FILL_SIDE = 160
"""Pixels of the longer side of the copy in which text is filled from its surroundings."""
FLAT = 18
"""Grey levels around the median within which most of a plate lies; mucosa under narrow-band light varies more."""

Box = tuple[int, int, int, int]
Mask = NDArray[np.bool_]
Plane = NDArray[np.uint8]
Boxes = NDArray[np.int64]

_NO_BOXES: Boxes = np.zeros((0, 4), dtype=np.int64)


@dataclass(frozen=True)
class Overlays:
    """What a console drew over a frame; boxes are left, top, right, bottom in pixels, right and bottom exclusive.

    Attributes:
        text: Boxes of rows of text, of shape (rows, 4).
        plates: Boxes of flat coloured plates, of shape (plates, 4).
        doubtful: Boxes of what may be text, of shape (rows, 4): not covered, but text if other frames have it as well.
    """

    text: Boxes
    plates: Boxes
    doubtful: Boxes

    def __bool__(self) -> bool:
        return len(self.text) + len(self.plates) > 0

    def draw_mask(self, shape: tuple[int, ...]) -> Mask:
        """Return a mask of shape (height, width) that is True where the frame is covered."""
        mask = np.zeros(shape[:2], dtype=bool)
        for left, top, right, bottom in (*self.text, *self.plates):
            mask[top:bottom, left:right] = True
        return mask


def find_overlays(image: RGB, reduced: RGB | None = None) -> Overlays:
    """Find text and plates in a frame; deterministic.

    Args:
        image: RGB, uint8 of shape (height, width, 3).
        reduced: The image reduced by `image_measures.reduce_image`, if that is known already: often the working copy.
    """
    if min(image.shape[:2]) < MIN_SIDE:
        return Overlays(_NO_BOXES, _NO_BOXES, _NO_BOXES)
    small, factor = _reduce(image, reduced)
    planes = [np.asarray(plane, dtype=np.uint8) for plane in cv2.split(small)]
    text, doubtful = _find_text(planes[1], planes[2])
    limit = np.array([image.shape[1], image.shape[0]] * 2)
    scaled = (np.clip(boxes * factor, 0, limit) for boxes in (text, _find_plates(planes), doubtful))
    return Overlays(*scaled)


def cover_overlays(image: RGB, overlays: Overlays) -> RGB:
    """Cover text with the colour of its surroundings, and plates with black, as around the field of view.

    Text lies on mucosa: a black bar in its place would have an edge of high contrast that says where the device writes.
    Behind a plate is no mucosa to be guessed.

    Returns:
        A new array; the same array object if there is nothing to cover.
    """
    if not overlays:
        return image
    covered = image.copy()
    if len(overlays.text):
        _fill_from_surroundings(covered, overlays.text)
    for left, top, right, bottom in overlays.plates:
        covered[top:bottom, left:right] = 0
    return covered


def _reduce(image: RGB, reduced: RGB | None) -> tuple[RGB, int]:
    height, width = image.shape[:2]
    factor = -(-max(height, width) // WORKING_SIDE)
    if factor == 1:
        return image, 1
    if reduced is not None and reduced.shape[:2] == (height // factor, width // factor):
        return reduced, factor
    whole = image[: height // factor * factor, : width // factor * factor]
    small = cv2.resize(whole, (width // factor, height // factor), interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.uint8), factor


# --- text ---


@dataclass(frozen=True)
class _Shapes:
    """Bright thin shapes: boxes as left, top, right, bottom, and a plane in which strokes are 1 and all else is 0."""

    boxes: Boxes
    strokes: Plane


def _find_text(green: Plane, blue: Plane) -> tuple[Boxes, Boxes]:
    """Return the boxes of rows that are text, and of those that may be, in pixels of the working copy."""
    # White, yellow, green and cyan letters stand out most where mucosa is darkest: in green and blue.
    plane = cv2.addWeighted(green, 0.5, blue, 0.5, 0)
    half = cv2.resize(plane, (max(1, plane.shape[1] // 2), max(1, plane.shape[0] // 2)), interpolation=cv2.INTER_AREA)
    fine, coarse = (_find_shapes(np.asarray(level, dtype=np.uint8)) for level in (plane, half))
    (fine_rows, fine_scores), (coarse_rows, coarse_scores) = _find_rows(fine), _find_rows(coarse)
    if not len(fine_rows) + len(coarse_rows):
        return _NO_BOXES, _NO_BOXES
    rows, scores = np.concatenate([fine_rows, 2 * coarse_rows]), np.concatenate([fine_scores, coarse_scores])
    accepted, count = _accept_rows(rows, scores), len(fine_rows)
    text = (
        _widen(fine_rows[accepted[:count]], fine.boxes),
        2 * _widen(coarse_rows[accepted[count:]], coarse.boxes),
    )
    return np.concatenate(text), rows[~accepted & (scores >= DOUBTFUL)]


def _find_shapes(plane: Plane) -> _Shapes:
    tophat = cv2.morphologyEx(plane, cv2.MORPH_TOPHAT, np.ones((STROKE, STROKE), np.uint8))
    strokes = cv2.threshold(tophat, CONTRAST, 1, cv2.THRESH_BINARY)[1]
    contours, hierarchy = cv2.findContours(strokes, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    # Not only the outermost: a line around the whole frame contains all others.
    outer = [contours[index] for index in np.flatnonzero(hierarchy[0, :, 3] < 0).tolist()] if contours else []
    boxes = np.array([cv2.boundingRect(contour) for contour in outer], dtype=np.int64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return _Shapes(boxes, np.asarray(strokes, dtype=np.uint8))


def _find_rows(shapes: _Shapes) -> tuple[Boxes, NDArray[np.float64]]:
    """Join neighbours of similar height at one level to rows; return the boxes of wide rows, and their scores."""
    width, height = shapes.boxes[:, 2] - shapes.boxes[:, 0], shapes.boxes[:, 3] - shapes.boxes[:, 1]
    letters = shapes.boxes[(height >= MIN_HEIGHT) & (height <= MAX_HEIGHT) & (width <= MAX_WIDTH * height)]
    letters = letters[np.argsort(letters[:, 0], kind="stable")]
    if not len(letters):
        return _NO_BOXES, np.zeros(0)
    label = _label_rows(letters)
    order = np.argsort(label, kind="stable")
    letters, begins = letters[order], np.flatnonzero(np.diff(label[order], prepend=-1))
    counts = np.diff(begins, append=len(letters))
    lowest, highest = np.minimum.reduceat(letters, begins), np.maximum.reduceat(letters, begins)
    rows = np.concatenate([lowest[:, :2], highest[:, 2:]], axis=1)
    height = rows[:, 3] - rows[:, 1]
    uneven = np.maximum(highest[:, 1] - lowest[:, 1], highest[:, 3] - lowest[:, 3])
    is_even = (counts >= 4) & (height >= 6) & (uneven <= np.maximum(1, height // 14))
    wide = np.flatnonzero(rows[:, 2] - rows[:, 0] >= MIN_ASPECT * height)
    if not len(wide):
        return _NO_BOXES, np.zeros(0)
    rows = rows[wide]
    scores = np.array([_score_row(row, shapes.strokes) for row in rows.tolist()]) + 4 * is_even[wide]
    scores[_count_specks(rows, scores, shapes.boxes) > MAX_SPECKS] = NOT_TEXT
    return rows, scores


def _count_specks(rows: Boxes, scores: NDArray[np.float64], shapes: Boxes) -> NDArray[np.float64]:
    """Count the shapes around each row that are in no row, per square of a letter's height.

    Around text is little else; rows by chance lie in glittering or strongly sharpened mucosa.
    """
    x, y = (shapes[:, 0] + shapes[:, 2]) / 2, (shapes[:, 1] + shapes[:, 3]) / 2

    def contain(boxes: Boxes, margin: NDArray[np.floating]) -> Mask:
        left, top, right, bottom = (boxes + margin[:, None] * np.array([-1, -1, 1, 1])).T[..., None]
        return np.asarray((x >= left) & (x <= right) & (y >= top) & (y <= bottom))

    likely = rows[scores >= 0]
    is_alone = ~contain(likely, np.full(len(likely), 2.0)).any(axis=0)
    width, height = rows[:, 2] - rows[:, 0], rows[:, 3] - rows[:, 1]
    around = contain(rows, 1.5 * height) & is_alone
    return np.asarray(around.sum(axis=1) * height**2 / ((width + 3 * height) * 4 * height - width * height))


def _label_rows(letters: Boxes) -> NDArray[np.int64]:
    """Return the row of each letter: the lowest index of a letter that is linked to it through neighbours.

    Args:
        letters: Boxes in the order of their left sides.
    """
    left, top, right, bottom = letters.T
    height = bottom - top
    count = np.searchsorted(left, right + height + 2) - np.arange(1, len(letters) + 1)  # candidates to the right
    first = np.repeat(np.arange(len(letters)), count)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(count) - count, count)
    lower, higher = np.minimum(height[first], height[second]), np.maximum(height[first], height[second])
    gap, slack = left[second] - right[first], np.maximum(1, higher // 8)
    overlap = np.minimum(bottom[first], bottom[second]) - np.maximum(top[first], top[second])
    is_level = (np.abs(bottom[first] - bottom[second]) <= slack) | (np.abs(top[first] - top[second]) <= slack)
    linked = (5 * overlap >= 4 * lower) & (10 * higher <= 19 * lower) & is_level & (gap >= -2) & (gap <= lower + 1)
    label = list(range(len(letters)))

    def find(index: int) -> int:
        while label[index] != index:
            label[index] = label[label[index]]
            index = label[index]
        return index

    for one, other in zip(first[linked].tolist(), second[linked].tolist(), strict=True):
        low, high = sorted((find(one), find(other)))
        label[high] = low
    return np.array([find(index) for index in range(len(letters))], dtype=np.int64)


def _score_row(box: Box, strokes: Plane) -> float:
    """Score a row by its width, its strokes a letter's height, its ink, and how strokes vary from line to line.

    The weights are those of a logistic regression on rows of drawn frames and of highlights in public ones.
    """
    left, top, right, bottom = box
    height, width = bottom - top, right - left
    pixels = strokes[top:bottom, left:right]
    # Of strokes on each line: where a pixel is 1 and the one before is 0.
    begins = (pixels[:, 1:] > pixels[:, :-1]).sum(axis=1) + pixels[:, 0]
    total = int(begins.sum())
    aspect, count = width / height, total / height
    variation = math.sqrt(max(0.0, int(begins @ begins) / height - count * count)) / max(count, 0.1)
    density = 12 * cv2.countNonZero(pixels) / (height * width)
    score = 8 * math.log(aspect) + 8 * math.log(count / aspect + 0.05) + density + 5 * variation
    score -= 2.5 * math.log(height) + 11
    # Dashes are text only beside letters: the edge of a field and noise along a side look the same.
    return float(min(score, CERTAIN - 1) if count < MIN_STROKES * aspect else score)


def _accept_rows(rows: Boxes, scores: NDArray[np.float64]) -> Mask:
    """Accept certain rows, and step by step those close to them that have letters of similar height."""
    accepted = scores >= CERTAIN
    left, top, right, bottom = rows.T
    height = bottom - top
    # Step by step, heights could drift far from those of the rows that are certain.
    is_similar = 10 * np.abs(height[:, None] - height[accepted]) <= 3 * height[accepted] + 10
    possible = (scores >= POSSIBLE) & is_similar.any(axis=1)
    lower, higher = np.minimum(height[:, None], height), np.maximum(height[:, None], height)
    apart_x = np.maximum(left[:, None] - right, left - right[:, None])
    apart_y = np.maximum(top[:, None] - bottom, top - bottom[:, None])
    is_below = (apart_x <= 2 * lower) & (apart_y <= 3.5 * lower)
    is_aligned = (np.abs(left[:, None] - left) <= 0.6 * lower + 1) & (apart_y <= 10 * lower)
    is_level = (np.abs(bottom[:, None] - bottom) <= 0.2 * lower + 1) & (apart_x <= 12 * lower)
    close = (higher <= 1.45 * lower + 1) & (is_below | is_aligned | is_level)
    certain = accepted
    while True:
        wider = accepted | (possible & close[:, accepted].any(axis=1))
        if (wider == accepted).all():
            break
        accepted = wider
    # If far more rows are only possible, the frame is full of shapes that form rows by chance.
    return np.asarray(accepted if accepted.sum() <= 6 * certain.sum() + 6 else certain)


def _widen(rows: Boxes, shapes: Boxes) -> Boxes:
    """Extend rows by shapes of their height beside them, such as colons and letters that touch others, and a margin."""
    left, top, right, bottom = shapes.T
    widened = []
    for row in rows:
        height = int(row[3] - row[1])
        beside = shapes[
            (top >= row[1] - 0.3 * height) & (bottom <= row[3] + 0.3 * height) & (right - left <= 8 * height)
        ]
        box = row
        for _ in range(MAX_STEPS):
            touched = beside[(beside[:, 0] <= box[2] + height) & (beside[:, 2] >= box[0] - height)]
            wider = np.concatenate(
                [
                    np.minimum(box[:2], touched[:, :2].min(axis=0, initial=1 << 30)),
                    np.maximum(box[2:], touched[:, 2:].max(axis=0, initial=0)),
                ]
            )
            if (wider == box).all():
                break
            box = wider
        margin = 2 + height // 6
        widened.append(box + np.array([-margin, -margin, margin, margin]))
    return np.array(widened, dtype=np.int64).reshape(-1, 4)


# --- plates ---


def _find_plates(planes: Sequence[Plane]) -> Boxes:
    """Return the boxes of rectangles of one flat colour that is more green or blue than red, with straight sides."""
    step = max(1, max(planes[0].shape) // PLATE_SIDE)
    red, green, blue = (np.ascontiguousarray(plane[::step, ::step]) for plane in planes)
    plates: list[Box] = []
    for this, other in ((green, blue), (blue, green)):
        is_foreign = (cv2.subtract(this, red) > FOREIGN) & (cv2.subtract(other, this) < FOREIGN)
        foreign = np.asarray(is_foreign).view(np.uint8)
        if cv2.countNonZero(foreign) < MIN_PLATE * foreign.size:
            continue
        closed = cv2.morphologyEx(foreign, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
        opened = cv2.morphologyEx(closed, cv2.MORPH_OPEN, np.ones((7, 7), np.uint8))
        boxes = _find_filled_boxes(
            np.asarray(opened, dtype=np.uint8), least=int(MIN_FILLED * MIN_PLATE_SIDE**2 * foreign.size)
        )
        plates += [box for box in boxes if _is_plate(red, green, blue, foreign, box)]
    margin = np.array([-1, -1, 1, 1])
    return np.asarray((np.array(plates, dtype=np.int64).reshape(-1, 4) + margin) * step)


def _find_filled_boxes(mask: Plane, *, least: int) -> list[Box]:
    """Return the boxes that a connected component of a mask fills; those of fewer than `least` pixels may be left out.

    Few components remain after the opening: filling them takes a sixth of the time of labelling all pixels.
    """
    boxes: list[Box] = []
    remaining, count = np.ascontiguousarray(mask), cv2.countNonZero(mask)
    while count > least:
        top, left = divmod(int(remaining.argmax()), remaining.shape[1])
        area, _, _, (left, top, width, height) = cv2.floodFill(remaining, None, (left, top), 0, flags=4)
        if area >= MIN_FILLED * width * height:
            boxes.append((left, top, left + width, top + height))
        count -= area
    return boxes


def _is_plate(red: Plane, green: Plane, blue: Plane, foreign: Plane, box: Box) -> bool:
    left, top, right, bottom = box
    sides, limits = (right - left, bottom - top), foreign.shape[::-1]
    if not all(MIN_PLATE_SIDE * limit <= side <= 0.6 * limit for side, limit in zip(sides, limits, strict=True)):
        return False
    pixels = np.dstack([plane[top:bottom, left:right] for plane in (red, green, blue)]).reshape(-1, 3).astype(np.int16)
    if (np.abs(pixels - np.median(pixels, axis=0)) <= FLAT).all(axis=1).mean() < 0.6:
        return False
    strips = (  # inside and outside of each side, in pixels of `tiny`
        (foreign[top + 1 : top + 3, left:right], foreign[max(0, top - 4) : max(0, top - 2), left:right]),
        (foreign[bottom - 3 : bottom - 1, left:right], foreign[bottom + 2 : bottom + 4, left:right]),
        (foreign[top:bottom, left + 1 : left + 3], foreign[top:bottom, max(0, left - 4) : max(0, left - 2)]),
        (foreign[top:bottom, right - 3 : right - 1], foreign[top:bottom, right + 2 : right + 4]),
    )
    return all(inside.mean() >= 0.75 and (not outside.size or outside.mean() <= 0.2) for inside, outside in strips)


# --- filling ---


def _fill_from_surroundings(image: RGB, text: Boxes) -> None:
    """Replace text by the mean colour of what surrounds it, in place.

    On a small copy, each level of a pyramid is the mean of the pixels that are not text; what has none is filled from
    the next coarser level (Gortler et al. 1996, pull-push).
    """
    step = max(1, max(image.shape) // FILL_SIDE)
    low = text[:, :2].min(axis=0) // step * step
    high = text[:, 2:].max(axis=0)
    region = image[low[1] : high[1], low[0] : high[0]]
    mask = np.zeros(region.shape[:2], dtype=np.uint8)
    for left, top, right, bottom in text - np.tile(low, 2):
        mask[top:bottom, left:right] = 1
    # A margin of the frame around the region gives the colours at its border.
    margin = 8 * step
    begin = np.maximum(low - margin, 0)
    around = image[begin[1] : high[1] + margin : step, begin[0] : high[0] + margin : step]
    is_text = np.zeros(around.shape[:2], dtype=np.uint8)
    for left, top, right, bottom in (text - np.tile(begin, 2)) // step:
        is_text[max(0, top - 1) : bottom + 2, max(0, left - 1) : right + 2] = 1
    filled = cv2.blur(_pull_and_push(around.astype(np.float32), np.asarray(is_text == 0, dtype=np.float32)), (3, 3))
    enlarged = cv2.resize(filled.astype(np.uint8), None, fx=step, fy=step, interpolation=cv2.INTER_LINEAR)
    offset = low - begin
    cut = enlarged[offset[1] : offset[1] + region.shape[0], offset[0] : offset[0] + region.shape[1]]
    cv2.copyTo(cut, mask, region)


def _pull_and_push(colour: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    height, width = weight.shape
    if weight.all() or min(height, width) < 2:
        return colour
    half = (width + 1) // 2, (height + 1) // 2
    coarse_weight = cv2.resize(weight, half, interpolation=cv2.INTER_AREA)
    coarse = cv2.resize(colour * weight[..., None], half, interpolation=cv2.INTER_AREA)
    mean = np.asarray(coarse / np.maximum(coarse_weight, 1e-6)[..., None], dtype=np.float32)
    pushed = _pull_and_push(mean, np.asarray(coarse_weight > 0.05, dtype=np.float32))
    enlarged = cv2.resize(pushed, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(np.where(weight[..., None] > 0, colour, enlarged), dtype=np.float32)
