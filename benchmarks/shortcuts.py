"""Count how often `pylorus stress` finds a shortcut that was planted, and how often it accuses a model without one.

Each run draws its own synthetic patients, plants a mark into a corner outside the field of view, trains a small network
from random weights, and tests it on other patients, as `pylorus stress` does.

* planted: the mark is in 95 % of the images of one class and in 5 % of the others (`--association`).
* clean: nothing outside the field (even runs), or the same mark in half of all images, whatever their class (odd runs).

    python benchmarks/shortcuts.py --runs 100
    python benchmarks/shortcuts.py --runs 30 --association 0.6 --side 3 --only planted
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from timm import create_model
from torch import nn

from pylorus.data.input_format import InputFormat
from pylorus.data.synthetic import CLASSES, generate_frame
from pylorus.deploy.stress import REGION_VARIANTS, WHOLE, compute_variants, evaluate_regions
from pylorus.evaluation.stress import RegionResult
from pylorus.model.inference import NetworkOutput

FRAME, INPUT = 96, 64
CORNERS = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True)
class Images:
    """Frames, uint8 of shape (n, side, side, 3), their classes and patients."""

    frames: np.ndarray
    true: np.ndarray
    patients: np.ndarray


def draw_images(run: int, *, patients: int, views: int, is_test: bool) -> Images:
    """Draw the frames of one run's patients, each of one class."""
    frames, true, names = [], [], []
    for number in range(patients):
        label = number % len(CLASSES)
        seed = int(np.random.SeedSequence([run, number, int(is_test)]).generate_state(1, np.uint64)[0])
        for view in range(views):
            frames.append(generate_frame(CLASSES[label], seed=seed, view=view, size=FRAME).image)
            true.append(label)
            names.append(number)
    return Images(np.stack(frames), np.array(true), np.array(names))


def plant_mark(
    images: Images, probability: np.ndarray, *, side: float, corner: int, random: np.random.Generator
) -> None:
    """Draw a square into a corner of each frame with a probability that depends on its class."""
    length, gap = max(1, round(side / 100 * FRAME)), 1
    left = gap if corner % 2 == 0 else FRAME - gap - length
    top = gap if corner < 2 else FRAME - gap - length
    for frame, label in zip(images.frames, images.true, strict=True):
        if random.random() < probability[label]:
            frame[top : top + length, left : left + length] = (60, 200, 240)


def train_network(images: np.ndarray, true: np.ndarray, *, epochs: int, seed: int) -> nn.Module:
    """Train a small network from random weights."""
    torch.manual_seed(seed)
    network = create_model("test_resnet.r160_in1k", pretrained=False, num_classes=len(CLASSES))
    pixels = normalize(images)
    labels = torch.from_numpy(true)
    steps = epochs * (len(pixels) // 32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(pixels))
        for start in range(0, len(pixels) - 31, 32):
            rows = order[start : start + 32]
            loss = nn.functional.cross_entropy(network(pixels[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def normalize(images: np.ndarray) -> torch.Tensor:
    """Return uint8 images of shape (n, side, side, 3) as the network's input."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.45) / 0.25


def run_once(run: int, options: argparse.Namespace, *, planted: bool) -> tuple[list[RegionResult], float, int | None]:
    """Train and test one network; return the regions, its accuracy and the corner of the mark."""
    random = np.random.default_rng([run, int(planted)])
    corner = int(random.integers(4))
    parts = [
        draw_images(2 * run + int(planted), patients=count, views=options.views, is_test=is_test)
        for count, is_test in ((options.train_patients, False), (options.test_patients, True))
    ]
    marked = None
    if planted or run % 2:
        chosen, strength = int(random.integers(len(CLASSES))), options.association
        probability = (
            np.where(np.arange(len(CLASSES)) == chosen, strength, 1 - strength) if planted else np.full(3, 0.5)
        )
        for part in parts:
            plant_mark(part, probability, side=options.side, corner=corner, random=random)
        marked = corner
    train, test = parts
    form = InputFormat(INPUT, "pad", "bicubic")
    prepared = np.stack([form.prepare_image(frame) for frame in train.frames])
    network = train_network(prepared, train.true, epochs=options.epochs, seed=run)

    def compute(images: np.ndarray) -> NetworkOutput:
        with torch.inference_mode():
            return NetworkOutput(network(normalize(images)), torch.zeros(len(images)))

    outputs = compute_variants(list(test.frames), form, compute, (WHOLE, *REGION_VARIANTS), progress=False)
    regions = evaluate_regions(outputs, test.true, test.patients, seed=run)
    accuracy = float((outputs.get_logits(WHOLE).argmax(axis=1) == test.true).mean())
    return regions, accuracy, marked


def main() -> None:
    """Run planted and clean trainings and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="planted and clean runs, each")
    parser.add_argument("--first", type=int, default=0, help="number of the first run, for several processes")
    parser.add_argument("--only", choices=("planted", "clean"), help="only one kind of run")
    parser.add_argument("--association", type=float, default=0.95, help="probability of the mark in its class")
    parser.add_argument("--side", type=float, default=8.0, help="side of the mark in percent of the frame")
    parser.add_argument("--train-patients", type=int, default=150)
    parser.add_argument("--test-patients", type=int, default=75)
    parser.add_argument("--views", type=int, default=2, help="images of each patient")
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    start = time.perf_counter()
    for run in range(options.first, options.first + options.runs):
        for kind in ("planted", "clean"):
            if options.only not in (None, kind):
                continue
            regions, accuracy, corner = run_once(run, options, planted=kind == "planted")
            accused = [each.region for each in regions if each.is_shortcut]
            counts[f"{kind} runs"] += 1
            counts[f"{kind} runs with a shortcut found"] += bool(accused)
            if kind == "planted" and corner is not None:
                counts["planted runs whose corner is named"] += CORNERS[corner] in accused
                counts["planted runs in which another corner is accused"] += bool(
                    set(accused) & (set(CORNERS) - {CORNERS[corner]})
                )
            details = ", ".join(
                f"{each.region} {each.test.area:.2f} p {each.corrected_p:.2g} shift {each.shift:.3f}"
                for each in regions
                if each.test is not None and (each.is_shortcut or each.region == "border" or each.corrected_p < 0.01)
            )
            print(f"{kind} {run}: accuracy {accuracy:.2f}; accused: {accused or 'none'}; {details}", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s")
    for name, count in counts.items():
        print(f"{name}: {count}")


if __name__ == "__main__":
    main()
