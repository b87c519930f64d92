"""Measure how fast `pylorus predict` classifies a folder of large frames, and what bounds it.

`python benchmarks/predict_folder.py [--models test_resnet,resnet50] [--images 600] [--turns 3]` prints a table in
Markdown: images per second (best turn) and CPU milliseconds per image (least) of OpenCV's bare decode in a process per
core, of reading alone, of the network alone, and of both together. Weights are random; frames and bundles are generated
on the first call.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import environment
from images_once import frames

HERE = Path(__file__).parent
OUTPUTS = HERE / "outputs"
BATCH = 32


def bundle(model: str) -> Path:
    """Return the bundle of a network with random weights at 224 px; train it on synthetic images on the first call."""
    run = OUTPUTS / f"predict-{model}"
    if not (run / "model" / "SHA256SUMS").is_file():
        words = ["data=synthetic", "model=timm", f"model.name={model}", "model.weights=none", "data.image_size=224"]
        words += ["stage=pretrain", "stages.pretrain.epochs=1", "report=false", "trainer.progress=false"]
        subprocess.run(
            [sys.executable, "train.py", *words, f"cache.folder={OUTPUTS}/cache", f"hydra.run.dir={run}"],
            cwd=HERE.parent,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return run / "model"


def decode(path: str) -> int:
    """Decode an image with OpenCV in full size."""
    import cv2

    cv2.setNumThreads(0)
    return int(cv2.imread(path).shape[0])


def measure(work: Callable[[], int]) -> tuple[float, float]:
    """Return the images per second and the CPU milliseconds per image of a function that returns a count of images."""
    start, used = perf_counter(), sum(os.times()[:4])
    count = work()
    return count / (perf_counter() - start), (sum(os.times()[:4]) - used) / count * 1000


def contenders(model: str, folder: Path, count: int) -> dict[str, Callable[[], int]]:
    """Return the functions to measure, by name."""
    import numpy as np

    from pylorus.core.distributed import count_free_cores
    from pylorus.deploy.inputs import Sources
    from pylorus.deploy.predict import PredictOptions, iter_predicted_rows, load_model, read_ahead

    loaded = load_model(bundle(model))
    items = list(Sources((str(folder),), [], None).iter_items())[:count]
    paths = [str(item.source) for item in items]
    batch = np.zeros((BATCH, loaded.input.size, loaded.input.size, 3), dtype=np.uint8)

    def decode_all() -> int:
        with ProcessPoolExecutor(count_free_cores()) as pool:
            return sum(1 for _ in pool.map(decode, paths, chunksize=8))

    # Iterators, as `pylorus predict` does not know how many images there are.
    return {
        "OpenCV, bare decode": decode_all,
        "reading alone": lambda: sum(len(read) for read, _ in read_ahead(iter(items), loaded.input, BATCH)),
        "network alone": lambda: sum(len(loaded.run_network(batch).logits) for _ in range(-(-len(items) // BATCH))),
        "predict": lambda: sum(map(len, iter_predicted_rows(loaded, iter(items), PredictOptions(batch=BATCH)))),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="test_resnet,resnet50", help="names of timm models, separated by commas")
    parser.add_argument("--images", type=int, default=600, help="number of frames of 1280 × 1024 pixels")
    parser.add_argument("--turns", type=int, default=3, help="number of alternating measurements of each")
    arguments = parser.parse_args()
    environment.enter()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does
    folder = frames(1280, 1024, count=arguments.images)
    print("| model | work | images/s | CPU ms per image |\n| --- | --- | --: | --: |")
    for model in arguments.models.split(","):
        works = contenders(model, folder, arguments.images)
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
        for _ in range(arguments.turns):
            for name, work in works.items():
                figures[name].append(measure(work))
        for name, values in figures.items():
            speed, used = max(value[0] for value in values), min(value[1] for value in values)
            print(f"| {model} | {name} | {speed:.0f} | {used:.1f} |", flush=True)


if __name__ == "__main__":
    main()
