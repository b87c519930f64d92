"""Measure how many foreign images a bundle calls unlike: by features alone, as before, and by appearance too.

`python benchmarks/unlike.py RUN ROOT [DIR …]`: RUN is a finished run on the images in ROOT. Foreign sets are its test
images in other colors, noise, plain colors, and the images below each DIR. Prints a table in Markdown.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
import pandas as pd
import torch

from pylorus.data.files import RGB
from pylorus.deploy.model import Bundle, load_bundle
from pylorus.evaluation.discrimination import auroc
from pylorus.model.inference import compute_unlikeness

MIXTURE = np.array([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6]], dtype=np.float32)


def recolored(images: RGB) -> Iterator[tuple[str, RGB]]:
    """Yield sets of the images in other colors, each with its name."""
    pixels = images.astype(np.float32)
    changed = {
        "red and blue swapped": pixels[..., ::-1],
        "inverted": 255 - pixels,
        "another white balance": pixels * np.array([1.1, 0.95, 0.8]),
        "green stain": pixels * np.array([0.75, 1.05, 0.8]),
        "channels mixed": pixels @ MIXTURE.T,
        "gamma 1.6": 255 * (pixels / 255) ** 1.6,
        "grey": np.repeat(pixels.mean(axis=-1, keepdims=True), 3, axis=-1),
        "dark": pixels * 0.3,
    }
    for name, values in changed.items():
        yield name, np.clip(values, 0, 255).astype(np.uint8)
    random = np.random.default_rng(0)
    yield "noise", random.integers(0, 256, images.shape, dtype=np.uint8)
    plain = random.integers(0, 256, (len(images), 1, 1, 3), dtype=np.uint8)
    yield "plain colors", np.broadcast_to(plain, images.shape)


def distances(bundle: Bundle, images: RGB) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance by features alone and that of the bundle, each of shape (n,)."""
    alone, combined = [], []
    for begin in range(0, len(images), 32):
        batch = torch.from_numpy(np.ascontiguousarray(images[begin : begin + 32].transpose(0, 3, 1, 2)))
        with torch.inference_mode():
            _, features = bundle.classifier.forward_with_features(batch)
            alone.append(compute_unlikeness(features, bundle.classifier.directions))
            combined.append(bundle.classifier(batch).unlikeness)
    return torch.cat(alone).double().numpy(), torch.cat(combined).double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("root", type=Path)
    parser.add_argument("others", nargs="*", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.run / "model")
    split = pd.read_csv(arguments.run / "split.csv", dtype=str)
    validation, test = (
        bundle.input.load_images([arguments.root / path for path in split[split["split"] == part]["path"]])
        for part in ("val", "test")
    )
    limits = (
        np.quantile(distances(bundle, validation)[0], 0.95, method="higher") + 1e-5,
        bundle.description.abstention.unlike_above,
    )
    own = distances(bundle, test)
    print(
        "| images | features alone, 95th percentile | bundle | AUROC alone | AUROC |\n| --- | --: | --: | --: | --: |"
    )
    shares = (100 * (values > limit).mean() for values, limit in zip(own, limits, strict=True))
    print(f"| {len(test)} test images | {next(shares):.1f} % | {next(shares):.1f} % | | |")
    others = [
        (folder.name, bundle.input.load_images(sorted(path for path in folder.rglob("*.jpg"))[:80]))
        for folder in arguments.others
    ]
    for name, images in [*recolored(test), *others]:
        cells = [f"{len(images)} {name}"]
        found = distances(bundle, images)
        cells += [f"{100 * (values > limit).mean():.1f} %" for values, limit in zip(found, limits, strict=True)]
        for known, foreign in zip(own, found, strict=True):
            is_foreign = np.arange(len(known) + len(foreign)) >= len(known)
            cells.append(f"{auroc(is_foreign, np.concatenate([known, foreign])).value:.3f}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
