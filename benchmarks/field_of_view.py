"""Measure how well and fast the field of view is found: `python -m benchmarks.field_of_view [frames] [sheet.png]`.

Prints the overlap (intersection over union) with the true field of synthetic frames by shape, and the time per frame
on one core. With a second argument, writes an image of the 24 worst frames: the true field in green, the found one in
blue.
"""

import sys
import time
from pathlib import Path

import cv2
import numpy as np
from tests.data.drawn_frames import SHAPES, Mask, Pixels, drawn_frame

from pylorus.data.field_of_view import find_field
from tests.data.test_field_of_view import LEAST_OVERLAP, found_pixels, overlap

TILE, COLUMNS, WORST = 320, 6, 24


def main(frames: int, sheet: Path | None) -> None:
    """Measure all frames, print the results and write the image of the worst frames."""
    cv2.setNumThreads(1)
    found = {seed: measured(seed) for seed in range(frames)}
    for name in (*SHAPES, "all"):
        values = np.array([value for shape, value, _ in found.values() if name in (shape, "all")])
        if len(values):
            first, median = np.percentile(values, [1, 50])
            share = np.mean(values >= LEAST_OVERLAP)
            print(
                f"{name:26} n {len(values):5}  min {values.min():.4f}  1st percentile {first:.4f}"
                f"  median {median:.4f}  at least {LEAST_OVERLAP}: {share:.1%}"
            )
    times = np.array([seconds for *_, seconds in found.values()])
    print(f"processor time per frame: median {1e3 * np.median(times):.1f} ms, longest {1e3 * times.max():.1f} ms")
    print(f"1280 × 1024: {1e3 * seconds_of_a_large_frame():.1f} ms")
    worst = sorted(found, key=lambda seed: found[seed][1])[:WORST]
    for seed in worst[:12]:
        print(f"  seed {seed:4}  {found[seed][1]:.4f}  {found[seed][0]}")
    if sheet is not None:
        tiles = [tile(seed) for seed in worst]
        rows = [np.hstack(tiles[start : start + COLUMNS]) for start in range(0, len(tiles), COLUMNS)]
        cv2.imwrite(str(sheet), np.vstack(rows)[:, :, ::-1])


def measured(seed: int) -> tuple[str, float, float]:
    """Return shape, overlap and seconds of one frame."""
    frame = drawn_frame(seed)
    start = time.process_time()
    field = find_field(frame.image)
    seconds = time.process_time() - start
    return frame.shape, overlap(found_pixels(field, frame.image.shape), frame.field), seconds


def seconds_of_a_large_frame() -> float:
    """Return the median seconds over shapes and repetitions at 1280 × 1024 pixels."""
    times = []
    for shape in SHAPES:
        image = cv2.resize(drawn_frame(1, longest=640, shape=shape).image, (1280, 1024))
        for _ in range(5):
            start = time.process_time()
            find_field(image)
            times.append(time.process_time() - start)
    return float(np.median(times))


def tile(seed: int) -> Pixels:
    """Draw a frame with both outlines, its seed, overlap and shape."""
    frame = drawn_frame(seed)
    field = find_field(frame.image)
    scale = (TILE - 20) / max(frame.field.shape)
    small = cv2.resize(frame.image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    for mask, colour in ((frame.field, (0, 255, 0)), (found_pixels(field, frame.field.shape), (60, 120, 255))):
        outline(small, mask, colour)
    square = np.full((TILE, TILE, 3), 70, np.uint8)
    square[: small.shape[0], : small.shape[1]] = small
    text = f"{seed} {overlap(found_pixels(field, frame.field.shape), frame.field):.3f} {field.shape}"
    cv2.putText(square, text, (4, TILE - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
    return square


def outline(image: Pixels, mask: Mask, colour: tuple[int, int, int]) -> None:
    """Draw the border of a mask into a smaller image."""
    small = cv2.resize(mask.view(np.uint8), image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    around, _ = cv2.findContours(small, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(image, around, -1, colour, 1)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
