"""Measure how many images per second the data module reads from large JPEG frames, with and without caching them.

`python benchmarks/images_once.py` prints a table in Markdown. Frames of 1280 × 1024 and of 1920 × 1080 pixels are
generated once; each is a synthetic square image in the middle of a black frame, as endoscopes produce it.

`python benchmarks/images_once.py --work first-pass` measures the first pass of a run over the files (facts for the
audit, and the network's input for the cache) on one core and on several, against OpenCV's bare decoding of the same
files in as many processes. With glibc's own settings, a process that decodes large frames spends more time on memory
that the system takes back and clears for each frame than on decoding, so that bare decoding is also measured with the
memory of one frame reused for the next, as the first pass does.

`python benchmarks/images_once.py --work second-pass` measures what a run does with its images before it trains
(catalog, audit, search for copies, split, and the files in its folder), for new and for known files.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import environment

HERE = Path(__file__).parent
FRAMES = ((1280, 1024), (1920, 1080))
TURNS = 8
"""Number of files from one generated image: its rotations by 90° and their mirror images."""


NAMES = {
    "decode": "OpenCV's bare decoding",
    "reuse": "the same, memory reused",
    "pass": "first pass of a run",
}


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


@dataclass(frozen=True)
class Cost:
    """Seconds that reading all files took.

    Attributes:
        wall: From the first file to the last, without imports.
        cpu: Of all processes together, in user and in system mode.
    """

    wall: float
    cpu: float


def decode_files(paths: Sequence[Path], *, reuse_memory: bool) -> None:
    """Read and decode files with OpenCV and do nothing with them."""
    import cv2
    import numpy as np

    from pylorus.core.limited_process import keep_freed_memory

    if reuse_memory:
        keep_freed_memory()
    cv2.setNumThreads(0)
    for path in paths:
        cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)


def read_first_time(work: str, root: Path, *, size: int, interpolation: str, processes: int, store: Path) -> Cost:
    """Read all files below `root` once; `work` is one of `NAMES`."""
    import cv2  # noqa: F401 imported before the clock starts, as below

    from pylorus.config.schema import CacheConfig
    from pylorus.data.image_facts import load_or_compute_facts
    from pylorus.data.input_format import ImageWriter, InputFormat

    files = sorted(path for path in root.rglob("*") if path.is_file())
    cpu, start = measure_cpu(), perf_counter()
    if work in ("decode", "reuse"):
        shares = [files[index::processes] for index in range(processes)]
        fork, options = multiprocessing.get_context("fork"), {"reuse_memory": work == "reuse"}
        readers = [fork.Process(target=decode_files, args=(share,), kwargs=options) for share in shares]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    else:
        images = ImageWriter(InputFormat(size, "pad", interpolation), CacheConfig(folder=str(store), images=True))
        paths = [path.relative_to(root).as_posix() for path in files]
        load_or_compute_facts(root, paths, store=store / "facts", images=images)
    return Cost(perf_counter() - start, measure_cpu() - cpu)


def measure_cpu() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def print_first_pass(options: argparse.Namespace) -> None:
    """Print the cost of the first pass and of bare decoding, on one core and on `--cores`, each in fresh processes."""
    store = HERE / "outputs" / "images-once"
    width, height = FRAMES[0]
    root = frames(width, height, count=options.count)
    count = sum(path.is_file() for path in root.rglob("*"))
    cores = sorted(os.sched_getaffinity(0))[: options.cores]
    works = [(work, number) for work in NAMES for number in sorted({1, len(cores)})]
    costs: dict[tuple[str, int], list[Cost]] = {work: [] for work in works}
    for _ in range(options.repeats):  # in turn, so that other work on the machine meets all of them
        for work, number in works:
            shutil.rmtree(store, ignore_errors=True)
            words = ["--one", work, "--processes", str(number), "--size", str(options.size)]
            done = subprocess.run(
                [sys.executable, __file__, "--use-this-python", "--count", str(options.count), *words,
                 "--interpolation", options.interpolation],
                stdout=subprocess.PIPE, check=True, text=True,
                preexec_fn=lambda used=cores[:number]: os.sched_setaffinity(0, used),
            )  # fmt: skip
            costs[work, number].append(Cost(**json.loads(done.stdout)))
    shutil.rmtree(store, ignore_errors=True)
    wall = {work: min(cost.wall for cost in repeats) for work, repeats in costs.items()}
    cpu = {work: min(cost.cpu for cost in repeats) for work, repeats in costs.items()}
    print(f"{count} frames of {width} × {height}, network input {options.size}, {options.interpolation};")
    print(f"minimum of {options.repeats} repeats\n")
    print("| work | cores | seconds | CPU ms a frame | seconds / bare decoding | speed-up over one core |")
    print("| --- | --: | --: | --: | --: | --: |")
    for work, number in works:
        ratio, gain = wall[work, number] / wall["decode", number], wall[work, 1] / wall[work, number]
        milliseconds = 1000 * cpu[work, number] / count
        print(
            f"| {NAMES[work]} | {number} | {wall[work, number]:.2f} | {milliseconds:.2f} | {ratio:.2f} | {gain:.2f} |"
        )


def print_second_pass(options: argparse.Namespace) -> None:
    """Print what preparing the images of a run costs for new files, and for the same files afterwards."""
    import cv2  # noqa: F401 imported before the clock starts, as in a run

    from pylorus.config.schema import CacheConfig, Config, DataConfig
    from pylorus.data.input_format import InputFormat
    from pylorus.data.prepare import prepare_images

    store = HERE / "outputs" / "images-once"
    root = frames(*FRAMES[0], count=options.count)
    count = sum(path.is_file() for path in root.rglob("*"))
    data = DataConfig(kind="folders", root=str(root), group=r"patient_\d+")
    config = Config(data=data, cache=CacheConfig(folder=str(store / "cache"), images=True))
    shutil.rmtree(store, ignore_errors=True)
    costs = []
    for number in range(2 + options.repeats):  # the second one warms up
        folder = store / f"run-{number}"
        folder.mkdir(parents=True)
        cpu, start = measure_cpu(), perf_counter()
        prepare_images(config, folder, InputFormat(options.size, "pad", options.interpolation))
        costs.append(Cost(perf_counter() - start, measure_cpu() - cpu))
    shutil.rmtree(store, ignore_errors=True)
    first, known = costs[0], costs[2:]
    second = Cost(min(cost.wall for cost in known), min(cost.cpu for cost in known))
    print(f"{count} frames of {FRAMES[0][0]} × {FRAMES[0][1]}; second pass: minimum of {options.repeats} repeats")
    print(f"(median {1000 * median(cost.wall for cost in known):.0f} ms)\n")
    print("| pass | wall, s | CPU, s |")
    print("| --- | --: | --: |")
    for name, cost in (("first", first), ("second", second)):
        print(f"| {name} | {cost.wall:.3f} | {cost.cpu:.3f} |")
    print(f"| first / second | {first.wall / second.wall:.0f} | {first.cpu / second.cpu:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--count", type=int, default=240, help="frames of each size")
    parser.add_argument("--size", type=int, default=224, help="side of the network's input in pixels")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0, help="decoding processes; on a CPU, Pylorus uses 0")
    parser.add_argument(
        "--work", choices=("epochs", "first-pass", "second-pass"), default="epochs", help="what to measure"
    )
    parser.add_argument("--cores", type=int, default=2, help="cores for the first pass, besides one alone")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of a pass; the quickest counts")
    parser.add_argument("--interpolation", default="bicubic", help="interpolation of the network's input")
    parser.add_argument("--one", choices=tuple(NAMES), help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--use-this-python", action="store_true")
    options = parser.parse_args()
    if not options.use_this_python:
        environment.enter()
    if options.one is not None:
        root, store = frames(*FRAMES[0], count=options.count), HERE / "outputs" / "images-once"
        cost = read_first_time(
            options.one, root, size=options.size, interpolation=options.interpolation,
            processes=options.processes, store=store,
        )  # fmt: skip
        print(json.dumps(vars(cost)))
        return
    if options.work == "first-pass":
        print_first_pass(options)
        return
    if options.work == "second-pass":
        print_second_pass(options)
        return
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
