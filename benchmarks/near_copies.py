"""Measure how many copies the audit finds, and how many different images it reports as copies.

`python benchmarks/near_copies.py [DIR …]`: each image of the class folders in DIR (or of synthetic frames if no DIR is
given) is changed in several ways and searched for among all images. Prints a table in Markdown.
"""

import argparse
import io
import sys
import tempfile
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


CHANGES: dict[str, tuple[Callable[[Image.Image], Image.Image], int]] = {
    "saved again, quality 60, 95 % of the size": (lambda image: _smaller(image, 0.95), 60),
    "half the size, quality 40": (lambda image: _smaller(image, 0.5), 40),
    "rotated by 90°": (lambda image: image.transpose(Image.Transpose.ROTATE_90), 90),
    "mirrored, quality 75": (lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 75),
    "brightened by a fifth": (lambda image: image.point(lambda value: min(255, round(value * 1.2))), 90),
    "2 % cropped from each side": (lambda image: _cropped(image, 0.02), 90),
    "5 % cropped from each side": (lambda image: _cropped(image, 0.05), 90),
    "rotated by 3°": (lambda image: image.rotate(3, Image.Resampling.BICUBIC), 90),
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


def measure(name: str, root: Path) -> None:
    contents = [path.read_bytes() for path in sorted(root.rglob("*.jpg"))]
    originals = [compute_facts(content) for content in contents]
    accused = len(find_copies(originals, Thresholds()).near)
    images = len(originals)
    print(f"| {name} | different images reported as copies | {accused} of {images * (images - 1) // 2:,} pairs |")
    for change in CHANGES:
        share = found_share(originals, [compute_facts(changed(content, change)) for content in contents])
        print(f"| {name} | found: {change} | {100 * share:.1f} % |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("roots", nargs="*", type=Path, metavar="DIR")
    roots = parser.parse_args().roots
    print("| images | measured | result |\n| --- | --- | --: |")
    for root in roots:
        measure(root.name, root)
    if not roots:
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(3):
                for overlay in (False, True):
                    root = Path(folder) / f"{seed}-{overlay}"
                    generate_image_set(root, images=100, size=256, images_per_patient=1, seed=seed, overlay=overlay)
                    measure(f"synthetic, seed {seed}{', with text' if overlay else ''}", root)


if __name__ == "__main__":
    main()
