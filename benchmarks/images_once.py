"""Measure how many images per second the data module reads from large JPEG frames, with and without caching them.

`python benchmarks/images_once.py` prints a table in Markdown. Frames of 1280 × 1024 and of 1920 × 1080 pixels are
generated once; each is a synthetic square image in the middle of a black frame, as endoscopes produce it.
"""

import argparse
import shutil
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import environment

HERE = Path(__file__).parent
FRAMES = ((1280, 1024), (1920, 1080))
TURNS = 8
"""Number of files from one generated image: its rotations by 90° and their mirror images."""


def frames(width: int, height: int, *, count: int) -> Path:
    """Return a folder of at least `count` frames in class folders; generate it on the first call."""
    import numpy as np
    from PIL import Image

    from pylorus.data.synthetic import CLASSES, generate_frame

    folder = HERE / "outputs" / f"frames-{width}x{height}-{count}"
    if folder.is_dir():
        return folder
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    side = min(width, height)
    for label in CLASSES:
        (temporary / label).mkdir(parents=True)
        for patient in range(max(6, -(-count // (TURNS * len(CLASSES))))):  # fewer patients cannot be split
            drawn = generate_frame(label, seed=patient, size=side).image
            for turn in range(TURNS):
                seen = np.rot90(drawn if turn < 4 else drawn[:, ::-1], turn % 4)
                frame = np.zeros((height, width, 3), np.uint8)
                left, top = (width - side) // 2, (height - side) // 2
                frame[top : top + side, left : left + side] = seen
                name = f"patient_{CLASSES.index(label)}{patient:03d}_{turn}.jpg"
                Image.fromarray(frame).save(temporary / label / name, quality=90)
    temporary.rename(folder)
    return folder


def data_module(root: Path, *, size: int, workers: int, keep: bool, store: Path) -> object:
    """Build the data module for a folder, without augmentation; `keep` is the value of cache.images."""
    from pylorus.config.schema import AugmentConfig, CacheConfig, DataConfig
    from pylorus.data.catalog import read_folders
    from pylorus.data.datamodule import ImageDataModule
    from pylorus.data.input_format import InputFormat
    from pylorus.data.split import split_catalog

    catalog = read_folders(root, group=r"patient_\d+")
    table = split_catalog(catalog, DataConfig()).table
    return ImageDataModule.from_table(
        table,
        catalog.root,
        InputFormat(size, "pad", "bilinear"),
        batch_size=16,
        workers=workers,
        policy=AugmentConfig(),
        seed=0,
        cache=CacheConfig(folder=str(store), images=keep),
    )


def epochs(served: object, count: int) -> tuple[float, float]:
    """Return the seconds of the first epoch, including its set-up, and the images per second of the later epochs."""
    found, images = [], 0
    start = perf_counter()
    loader = served.train_dataloader()
    for _ in range(count):
        images = sum(len(batch.label) for batch in loader)
        found.append(perf_counter() - start)
        start = perf_counter()
    return found[0], images / median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--count", type=int, default=240, help="frames of each size")
    parser.add_argument("--size", type=int, default=224, help="side of the network's input in pixels")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0, help="decoding processes; on a CPU, Pylorus uses 0")
    parser.add_argument("--use-this-python", action="store_true")
    options = parser.parse_args()
    if not options.use_this_python:
        environment.enter()
    store = HERE / "outputs" / "images-once"
    print("| frames | decoded images kept | first epoch, s | later epochs, images/s |")
    print("| --- | --- | --: | --: |")
    for width, height in FRAMES:
        root = frames(width, height, count=options.count)
        for state in ("no", "now", "by an earlier run"):
            if state != "by an earlier run":
                shutil.rmtree(store, ignore_errors=True)
            keep = state != "no"
            served = data_module(root, size=options.size, workers=options.workers, keep=keep, store=store)
            first, later = epochs(served, options.epochs)
            print(f"| {width} × {height} | {state} | {first:.2f} | {later:.0f} |", flush=True)
    shutil.rmtree(store, ignore_errors=True)


if __name__ == "__main__":
    main()
