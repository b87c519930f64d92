"""Compare the speed of the augmentation policies with albumentations on one core: `python benchmarks/augmentation.py`.

For each policy and image size: milliseconds per image of both, measured alternately (the median of the rounds), and how
many times as long albumentations takes.
"""

import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import statistics
import time
from collections.abc import Callable

import albumentations
import cv2
import numpy as np
import yaml

from pylorus.config.schema import CONF, AugmentConfig
from pylorus.data.augmentation import build_augmentation

SIZES = (224, 299)
TURNS, IMAGES = 9, 100


def make_image(size: int) -> np.ndarray:
    """Return a smooth random image, similar to a photograph; pure noise would make JPEG slow."""
    small = np.random.default_rng(0).integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
    return cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)


def measure_milliseconds(augment: Callable[[int], object]) -> float:
    """Return the mean time of one image."""
    start = time.perf_counter()
    for seed in range(IMAGES):
        augment(seed)
    return (time.perf_counter() - start) / IMAGES * 1e3


def compare_policy(policy: AugmentConfig, size: int) -> tuple[float, float]:
    """Return the milliseconds per image of Pylorus and of albumentations."""
    image, ours = make_image(size), build_augmentation(policy)
    assert ours is not None
    theirs = albumentations.Compose([getattr(albumentations, name)(**args) for name, args in policy.transforms.items()])

    def augment_with_albumentations(seed: int) -> object:
        theirs.set_random_seed(seed)
        return theirs(image=image)["image"]

    measure_milliseconds(lambda seed: ours(image, seed))  # warm-up: the first round builds tables
    turns = [
        (measure_milliseconds(lambda seed: ours(image, seed)), measure_milliseconds(augment_with_albumentations))
        for _ in range(TURNS)
    ]
    return statistics.median(turn[0] for turn in turns), statistics.median(turn[1] for turn in turns)


def main() -> None:
    """Print a line for each policy and size."""
    cv2.setNumThreads(1)
    print(f"OpenCV {cv2.__version__}, albumentations {albumentations.__version__}; ms per image")
    print("policy      size  Pylorus  albumentations  ratio")
    for name in ("light", "endoscopy"):
        policy = AugmentConfig(**yaml.safe_load((CONF / "augment" / f"{name}.yaml").read_text()))
        for size in SIZES:
            ours, theirs = compare_policy(policy, size)
            print(f"{name:10}  {size:4}  {ours:7.3f}  {theirs:14.3f}  {theirs / ours:5.2f}")


if __name__ == "__main__":
    main()
