"""Measure how many copies the audit finds, and how many different images it reports as copies.

`python benchmarks/near_copies.py [DIR …] [--most N]`: each image below DIR (or of synthetic frames if no DIR is given)
is changed in several ways and searched for among all images. Prints a table in Markdown. Pairs of different images that
are reported are named on stderr: look at them, since a set may contain copies.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from PIL import Image

from pylorus.data.audit_findings import Thresholds
from pylorus.data.fact_store import Facts
from pylorus.data.image_facts import compute_facts
from pylorus.data.leakage import find_copies
from pylorus.data.synthetic import generate_image_set


def _smaller(image: Image.Image, share: float) -> Image.Image:
    return image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.LANCZOS)


def _cropped(image: Image.Image, share: float) -> Image.Image:
    by = (round(image.width * share), round(image.height * share))
    return image.crop((*by, image.width - by[0], image.height - by[1]))


def _corner(image: Image.Image, share: float) -> Image.Image:
    return image.crop((round(image.width * share), 0, image.width, image.height - round(image.height * share)))


def _turned(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BICUBIC)


def _brighter(image: Image.Image) -> Image.Image:
    return image.point(lambda value: min(255, round(value * 1.2)))


def _mirrored(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


CHANGES: dict[str, tuple[Callable[[Image.Image], Image.Image], int]] = {
    "saved again, quality 60, 95 % of the size": (lambda image: _smaller(image, 0.95), 60),
    "half the size, quality 40": (lambda image: _smaller(image, 0.5), 40),
    "rotated by 90°": (lambda image: image.transpose(Image.Transpose.ROTATE_90), 90),
    "mirrored, quality 75": (_mirrored, 75),
    "brightened by a fifth": (_brighter, 90),
    "2 % cropped from each side": (lambda image: _cropped(image, 0.02), 90),
    "5 % cropped from each side": (lambda image: _cropped(image, 0.05), 90),
    "8 % cropped from each side": (lambda image: _cropped(image, 0.08), 90),
    "10 % cropped from each side": (lambda image: _cropped(image, 0.1), 90),
    "10 % cropped from two sides": (lambda image: _corner(image, 0.1), 90),
    "5 % cropped from each side, brightened, quality 60": (lambda image: _brighter(_cropped(image, 0.05)), 60),
    "5 % cropped from each side, mirrored": (lambda image: _mirrored(_cropped(image, 0.05)), 90),
    "rotated by 1°": (lambda image: _turned(image, 1), 90),
    "rotated by 3°": (lambda image: _turned(image, 3), 90),
    "rotated by -5°": (lambda image: _turned(image, -5), 90),
    "rotated by 3°, then 5 % cropped from each side": (lambda image: _cropped(_turned(image, 3), 0.05), 90),
}


def changed(content: bytes, name: str) -> bytes:
    """Return the content of an image file after the named change."""
    change, quality = CHANGES[name]
    held = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        change(image.convert("RGB")).save(held, format="JPEG", quality=quality)
    return held.getvalue()


def found_share(originals: list[Facts], copies: list[Facts]) -> float:
    """Return the fraction of copies that are found as copies of their own original."""
    pairs = {(each.first, each.second) for each in find_copies([*originals, *copies], Thresholds()).near}
    return sum((index, index + len(originals)) in pairs for index in range(len(originals))) / len(originals)


def measure(name: str, root: Path, most: int) -> None:
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[:most]
    contents = [path.read_bytes() for path in paths]
    originals = [compute_facts(content) for content in contents]
    begin = time.process_time()
    accused = find_copies(originals, Thresholds()).near
    seconds = time.process_time() - begin
    for copy in accused:
        print(f"{paths[copy.first]} {paths[copy.second]}: {copy.description}", file=sys.stderr)
    images = len(originals)
    print(f"| {name} | different images reported as copies | {len(accused)} of {images * (images - 1) // 2:,} pairs |")
    print(f"| {name} | time per image | {1000 * seconds / images:.1f} ms |")
    for change in CHANGES:
        share = found_share(originals, [compute_facts(changed(content, change)) for content in contents])
        print(f"| {name} | found: {change} | {100 * share:.1f} % |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="*", type=Path, metavar="DIR")
    parser.add_argument("--most", type=int, default=1_000_000, metavar="N", help="images of each DIR (default: all)")
    arguments = parser.parse_args()
    print("| images | measured | result |\n| --- | --- | --: |")
    for root in arguments.roots:
        measure(root.name, root, arguments.most)
    if not arguments.roots:
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(3):
                for overlay in (False, True):
                    root = Path(folder) / f"{seed}-{overlay}"
                    generate_image_set(root, images=100, size=256, images_per_patient=1, seed=seed, overlay=overlay)
                    measure(f"synthetic, seed {seed}{', with text' if overlay else ''}", root, arguments.most)


if __name__ == "__main__":
    main()
