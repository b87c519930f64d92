"""Measure how well text and plates are found and covered: `python benchmarks/overlays.py [devices] [sheet.png]`.

Draws frames of all kinds of devices with exact masks, with and without text and insets, and prints the precision and
recall of the search for burned-in text, how much text and mucosa is left or lost after `data.mask=overlays`, and the
processor time. With a second argument, writes an image of frames before and after. Takes a minute for 3 devices a kind.
"""

import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import cv2
import numpy as np

from pylorus.data.overlays import cover_overlays, find_overlays
from tests.data.device_frames import LAYOUTS, DeviceFrame, draw_frame

TILE, COLUMNS = 300, 8
COVERED_LEVEL = 20
"""Pixels of an overlay that are as dark as this, such as a black patch, need not be covered."""


def main(devices: int, sheet: Path | None) -> None:
    """Measure all frames, print the results and write the image."""
    cv2.setNumThreads(1)
    names, results, tiles = list(LAYOUTS), [], []
    for name in names:
        LAYOUTS[f"{name}, bare"] = dataclasses.replace(LAYOUTS[name], texts=("none",), inset="none")
    for name in names:
        for device in range(devices):
            for kind in (name, f"{name}, bare"):
                frame = draw_frame(kind, 5 * device, device=device)
                results.append(measure(frame))
                if len(tiles) < 96 and not kind.endswith("bare"):
                    after = cover_overlays(frame.image, find_overlays(frame.image))
                    tiles += [draw_tile(frame.image), draw_tile(after)]
    print_results(names, results)
    print(f"1280 × 1024: {1e3 * min(time_large_frame() for _ in range(5)):.1f} ms (least of five)")
    if sheet is not None:
        begins = range(0, len(tiles) // COLUMNS * COLUMNS, COLUMNS)
        rows = [np.hstack(tiles[begin : begin + COLUMNS]) for begin in begins]
        cv2.imwrite(str(sheet), np.vstack(rows)[:, :, ::-1])


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found in one frame; counts are of pixels over the field."""

    layout: str
    has_text: bool
    found_text: bool
    overlay: int
    left: int
    mucosa: int
    lost: int


def measure(frame: DeviceFrame) -> Result:
    """Search one frame, and compare what would be covered with what was drawn."""
    overlays = find_overlays(frame.image)
    covered = overlays.draw_mask(frame.image.shape)
    overlay = frame.overlay & (frame.image.max(axis=2) > COVERED_LEVEL)
    mucosa = frame.field & ~frame.overlay
    counts = overlay, overlay & ~covered, mucosa, mucosa & covered
    has_text = not frame.layout.endswith("bare") and "none" not in LAYOUTS[frame.layout].texts
    return Result(frame.layout, has_text, len(overlays.text) > 0, *(int(np.count_nonzero(each)) for each in counts))


def print_results(names: list[str], results: list[Result]) -> None:
    """Print one line for each kind of device and the totals."""
    for name in names:
        own = [each for each in results if each.layout == name and each.overlay]
        if own:
            left = sum(each.left for each in own) / sum(each.overlay for each in own)
            print(f"{name:32} overlay left {left:6.1%}  frames with a tenth left {share_left(own, 0.1):4.0%}")
    found = [each for each in results if each.found_text]
    drawn = [each for each in results if each.has_text]
    true = sum(each.has_text for each in found)
    print(f"burned-in text: precision {true / len(found):.3f}, recall {true / len(drawn):.3f} of {len(drawn)} frames")
    # A second picture over the field is mucosa too: it is not searched for.
    over = [each for each in results if each.overlay and LAYOUTS[each.layout].inset != "picture"]
    left = sum(each.left for each in over) / sum(each.overlay for each in over)
    print(
        f"over the field, {len(over)} frames: {left:.1%} of the overlay left; "
        f"a tenth left in {share_left(over, 0.1):.1%}, a third in {share_left(over, 1 / 3):.1%} of the frames"
    )
    lost = [each.lost / each.mucosa for each in drawn]
    print(f"with overlays: {np.mean(lost):.2%} of the mucosa lost beside them, at most {max(lost):.1%}")
    bare = [each for each in results if each.layout.endswith("bare")]
    lost = [each.lost / each.mucosa for each in bare]
    print(
        f"without overlays, {len(bare)} frames: {np.mean(lost):.3%} of the mucosa lost, something covered in "
        f"{np.mean([share > 0 for share in lost]):.1%}"
    )


def share_left(results: list[Result], least: float) -> float:
    """Return the proportion of frames in which at least this proportion of the overlay is left."""
    return float(np.mean([each.left >= least * each.overlay for each in results]))


def draw_tile(image: np.ndarray) -> np.ndarray:
    """Draw a frame into a square."""
    scale = TILE / max(image.shape)
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    square = np.full((TILE, TILE, 3), 70, np.uint8)
    square[: small.shape[0], : small.shape[1]] = small
    return square


def time_large_frame() -> float:
    """Return the processor seconds that one frame with much text takes, averaged over several."""
    images = [
        cv2.resize(draw_frame(name, 0, longest=720).image, (1280, 1024))
        for name in ("whole with text", "octagon", "octagon, cropped, scope map", "round above a status bar")
    ]
    begin = time.process_time()
    for image in images:
        find_overlays(image)
    return (time.process_time() - begin) / len(images)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
