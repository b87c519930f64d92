"""Measure how many copies are found by their fingerprints, how many different images are accused, and what they reveal.

`python benchmarks/fingerprints.py [DIR …] [--most N] [--copies N]`: the images below each DIR, or drawn frames if none
is given, are the development images. Copies of some of them, changed in several ways, are searched for; then the whole
images, where those in training were cropped; then each image is searched for among all others, which are different
images. Prints a table in Markdown. Pairs of different images that are accused are named on stderr: look at them, since
a set may contain copies.

What is revealed is measured by the best linear reconstruction of each thumbnail from its code with the known salt: its
correlation with the middle frequencies from which the code was computed, and with the thumbnail itself.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).parent))

import cv2
import numpy as np
from near_copies import changed

from pylorus.data.decode import decode_image
from pylorus.data.image_measures import compute_thumbnail, reduce_image
from pylorus.data.synthetic import generate_image_set
from pylorus.deploy.fingerprints import (
    BITS,
    LEAST_AGREEMENT,
    create_fingerprints,
    find_matches,
    measure_agreements,
    measure_reconstruction,
)

PLANTED = (
    "saved again, quality 60, 95 % of the size",
    "half the size, quality 40",
    "mirrored, quality 75",
    "rotated by 90°",
    "brightened by a fifth",
    "2 % cropped from each side",
    "5 % cropped from each side",
    "5 % cropped from each side, brightened, quality 60",
    "5 % cropped from each side, mirrored",
    "8 % cropped from each side",
    "10 % cropped from two sides",
    "rotated by 1°",
    "rotated by 3°",
)
CROPPED = (
    "2 % cropped from each side",
    "5 % cropped from each side",
    "8 % cropped from each side",
    "10 % cropped from each side",
)
"""Changes of development images whose whole originals are searched for."""


def compute_columns(contents: list[bytes]) -> tuple[list[str], list[str], np.ndarray]:
    """Return hashes of bytes and pixels and the thumbnails of images, without their other facts."""
    images = [decode_image(content) for content in contents]
    greys = [np.asarray(cv2.cvtColor(reduce_image(image), cv2.COLOR_RGB2GRAY), np.uint8) for image in images]
    files = [hashlib.sha256(content).hexdigest() for content in contents]
    pixels = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    return files, pixels, np.stack([compute_thumbnail(grey) for grey in greys])


def measure(name: str, root: Path, *, most: int, copies: int) -> None:
    """Measure one set of images and print its rows."""
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[:most]
    contents = [path.read_bytes() for path in paths]
    files, pixels, thumbnails = compute_columns(contents)
    fingerprints = create_fingerprints(files, pixels, thumbnails, salt=bytes(32))
    chosen = np.random.default_rng(0).permutation(len(paths))[:copies]
    for change in PLANTED:
        columns = compute_columns([changed(contents[index], change) for index in chosen])
        found = len(find_matches(fingerprints, *columns))
        print(f"| {name} | found: {change} | {found} of {len(chosen)} |", flush=True)
    for change in CROPPED:
        shown = compute_columns([changed(contents[index], change) for index in chosen])
        known = create_fingerprints(*shown, salt=bytes(32))
        whole = [files[index] for index in chosen], [pixels[index] for index in chosen], thumbnails[chosen]
        found = len(find_matches(known, *whole))
        print(f"| {name} | found: whole, of images in training {change} | {found} of {len(chosen)} |", flush=True)
    accused, closest, begin = set[tuple[int, int]](), 0, time.process_time()
    owners: dict[bytes, list[int]] = {}
    for index in range(len(paths)):
        own = create_fingerprints([files[index]], [pixels[index]], thumbnails[index : index + 1], salt=bytes(32))
        for row in own.codes:  # of an image without structure there is none
            owners.setdefault(row.tobytes(), []).append(index)
    for index in range(len(paths)):
        for code, agreement in measure_agreements(fingerprints, thumbnails[index]).items():
            other = owners[fingerprints.codes[code].tobytes()][0]
            if other == index:
                continue
            closest = max(closest, agreement)
            if agreement >= LEAST_AGREEMENT:
                accused.add((min(index, other), max(index, other)))
                print(f"{paths[index]}: {agreement} of {BITS} bits agree with {paths[other]}", file=sys.stderr)
    seconds = time.process_time() - begin
    pairs = len(paths) * (len(paths) - 1)
    print(f"| {name} | different images accused | {len(accused)} of {pairs // 2:,} pairs, each compared both ways |")
    print(
        f"| {name} | most bits that agree in different images | {closest} of {BITS}; accused from {LEAST_AGREEMENT} |"
    )
    print(f"| {name} | CPU time per image, {len(paths):,} fingerprints | {1000 * seconds / len(paths):.0f} ms |")
    middle, whole = measure_reconstruction(thumbnails, salt=bytes(32))
    print(f"| {name} | correlation of a reconstruction with the middle frequencies, median | {np.median(middle):.2f} |")
    print(f"| {name} | … with the thumbnail, median (90 % of the images below) | {np.median(whole):.2f} "
          f"({np.quantile(whole, 0.9):.2f}) |", flush=True)  # fmt: skip


def main() -> None:
    """Measure the sets that were named, or drawn frames; on one core, the drawn ones take some six minutes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="*", type=Path, metavar="DIR")
    parser.add_argument("--most", type=int, default=1_000_000, metavar="N", help="images of each DIR (default: all)")
    parser.add_argument("--copies", type=int, default=100, metavar="N", help="copies of each kind (default: 100)")
    arguments = parser.parse_args()
    print("| images | measured | result |\n| --- | --- | --: |")
    for root in arguments.roots:
        measure(root.name, root, most=arguments.most, copies=arguments.copies)
    if not arguments.roots:
        with tempfile.TemporaryDirectory() as folder:
            for seed, overlay in ((0, False), (1, True)):
                root = Path(folder) / str(seed)
                generate_image_set(root, images=150, size=256, images_per_patient=1, seed=seed, overlay=overlay)
                name = f"drawn frames{', with text' if overlay else ''}"
                measure(name, root, most=arguments.most, copies=arguments.copies)


if __name__ == "__main__":
    main()
