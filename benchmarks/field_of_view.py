"""Measure how well and fast the field of view is found: `python benchmarks/field_of_view.py [frames] [sheet.png]`.

Frames of all device layouts of `tests/data/device_frames.py` are drawn, whose fields are known. For each layout, prints
the overlap (intersection over union) with the true field, the proportion of the mucosa that is lost and of the ground
that is left, and the processor time per frame; then the targets. With a second argument, writes an image of the 24
worst frames: the true field in green, the found one in blue.

`python benchmarks/field_of_view.py --folder FOLDER sheet.png` writes an image of the frames of a folder instead, with
the outline of what is found: green if it is cropped, red if not.
"""

import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import cv2
import numpy as np

from pylorus.core.distributed import count_free_cores
from pylorus.data.decode import read_image
from pylorus.data.field_of_view import find_field
from pylorus.data.field_shape import FieldOfView
from tests.data.device_frames import LAYOUTS, Mask, Pixels, draw_frame
from tests.data.test_field_of_view import LEAST_OVERLAP, found_pixels, overlap

TILE, COLUMNS, WORST = 240, 8, 24
MOST_LOST = 0.01
"""Proportion of the mucosa that a field may lose."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Measurement:
    """One frame: overlap with the true field, lost mucosa, ground that is left, and processor time in seconds."""

    layout: str
    seed: int
    overlap: float
    lost: float
    left: float
    seconds: float


def main(frames: int, sheet: Path | None) -> None:
    """Measure all frames, print the results and write the image of the worst frames."""
    layouts = list(LAYOUTS)
    tasks = [(layouts[index % len(layouts)], index // len(layouts)) for index in range(frames)]
    with ProcessPoolExecutor(count_free_cores(), mp_context=get_context("spawn")) as pool:
        measured = list(pool.map(measure, tasks, chunksize=8))
    print(
        f"{'layout':32} {'n':>4} {'IoU min':>8} {'median':>7} {'>= 0.97':>8} {'lost max':>9} {'left max':>9} {'ms':>6}"
    )
    for name in (*layouts, "all"):
        print_row(name, [each for each in measured if name in (each.layout, "all")])
    is_found = np.mean([each.overlap >= LEAST_OVERLAP for each in measured])
    keeps = np.mean([each.lost <= MOST_LOST for each in measured])
    print(f"IoU >= {LEAST_OVERLAP} in {is_found:.1%} (target 99 %)")
    print(f"at most {MOST_LOST:.0%} of the mucosa lost in {keeps:.1%} (target 99.5 %)")
    print(f"1280 x 1024: {1e3 * measure_large_frames():.1f} ms of processor time in the median")
    worst = sorted(measured, key=lambda each: each.overlap - 10 * max(0.0, each.lost - MOST_LOST))[:WORST]
    for each in worst[:12]:
        print(f"  {each.layout} {each.seed}: IoU {each.overlap:.3f}, lost {each.lost:.1%}, left {each.left:.1%}")
    if sheet is not None:
        write_sheet(sheet, [draw_tile(each) for each in worst])


def measure(task: tuple[str, int]) -> Measurement:
    """Draw one frame, of another device for each seed, and find its field."""
    layout, seed = task
    cv2.setNumThreads(1)
    frame = draw_frame(layout, seed, device=seed)
    start = time.process_time()
    field = find_field(frame.image)
    seconds = time.process_time() - start
    found = found_pixels(field, frame.field.shape)
    both = np.count_nonzero(found & frame.field)
    lost, left = 1 - both / np.count_nonzero(frame.field), 1 - both / np.count_nonzero(found)
    return Measurement(layout, seed, overlap(found, frame.field), lost, left, seconds)


def print_row(name: str, measured: list[Measurement]) -> None:
    """Print the line of one layout."""
    if not measured:
        return
    overlaps = np.array([each.overlap for each in measured])
    lost, left = max(each.lost for each in measured), max(each.left for each in measured)
    milliseconds = 1e3 * np.median([each.seconds for each in measured])
    print(
        f"{name:32} {len(measured):4} {overlaps.min():8.3f} {np.median(overlaps):7.4f} "
        f"{np.mean(overlaps >= LEAST_OVERLAP):8.1%} {lost:9.1%} {left:9.1%} {milliseconds:6.1f}"
    )


def measure_large_frames() -> float:
    """Return the median over layouts of the least seconds of several repetitions at 1280 x 1024 pixels."""
    cv2.setNumThreads(1)
    seconds = []
    for layout in LAYOUTS:
        image = cv2.resize(draw_frame(layout, 1, longest=640).image, (1280, 1024))
        times = []
        for _ in range(5):
            start = time.process_time()
            find_field(image)
            times.append(time.process_time() - start)
        seconds.append(min(times))
    return float(np.median(seconds))


def draw_tile(measurement: Measurement) -> Pixels:
    """Draw a frame with both outlines, and its measurement as text."""
    frame = draw_frame(measurement.layout, measurement.seed, device=measurement.seed)
    found = found_pixels(find_field(frame.image), frame.field.shape)
    text = f"{measurement.layout[:20]} {measurement.seed} {measurement.overlap:.3f}"
    return fill_tile(frame.image, [(frame.field, (0, 255, 0)), (found, (60, 120, 255))], text)


def fill_tile(image: Pixels, outlines: list[tuple[Mask, tuple[int, int, int]]], text: str) -> Pixels:
    """Reduce a frame to a tile with outlines of masks and a line of text."""
    scale = (TILE - 20) / max(image.shape[:2])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    for mask, colour in outlines:
        inside = cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(small, contours, -1, colour, 1)
    tile = np.full((TILE, TILE, 3), 70, np.uint8)
    tile[: small.shape[0], : small.shape[1]] = small
    cv2.putText(tile, text, (3, TILE - 6), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (255, 255, 255), 1, cv2.LINE_AA)
    return tile


def write_sheet(path: Path, tiles: list[Pixels]) -> None:
    """Write tiles in rows as one image."""
    tiles = tiles + [np.zeros_like(tiles[0])] * (-len(tiles) % COLUMNS)
    rows = [np.hstack(tiles[start : start + COLUMNS]) for start in range(0, len(tiles), COLUMNS)]
    cv2.imwrite(str(path), np.vstack(rows)[:, :, ::-1])


def show_folder(folder: Path, sheet: Path) -> None:
    """Find the fields of all images in a folder, count their shapes, and write a sheet."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    with ProcessPoolExecutor(count_free_cores(), mp_context=get_context("spawn")) as pool:
        results = list(pool.map(show_file, paths, chunksize=8))
    for outcome, count in Counter(outcome for outcome, _ in results).most_common():
        print(f"{count:6,}  {outcome}")
    write_sheet(sheet, [tile for _, tile in results])


def show_file(path: Path) -> tuple[str, Pixels]:
    """Find the field of one image, and return what was found and its tile."""
    image = np.ascontiguousarray(read_image(path))
    field: FieldOfView = find_field(image)
    colour = (255, 40, 40) if field.shape == "full" else (0, 255, 0)
    text = f"{path.stem[-14:]} {field.outcome[:20]} {field.support:.0%}"
    return field.outcome, fill_tile(image, [(found_pixels(field, image.shape), colour)], text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--folder"]:
        show_folder(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 500, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
