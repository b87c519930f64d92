"""Measure what the heads of `pylorus bakeoff` cost beside the forward passes of its networks.

Synthetic images are drawn, each network processes each of them once with random weights and an empty cache, as a first
bake-off does, and 64 heads × 3 seeds are trained for each. The ratio is the time of passes and heads by that of the
passes alone, from one run.

    OMP_NUM_THREADS=1 python benchmarks/bakeoff.py
    OMP_NUM_THREADS=1 python benchmarks/bakeoff.py --images 300 --size 64 --models test_resnet,resnet18
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from pylorus.core.io import read_json
from pylorus.data.synthetic import generate_image_set
from pylorus.launch.bakeoff import NETWORKS, BakeoffOptions, run_bakeoff

MODELS = (
    *("resnet18", "resnet10t", "resnet26", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0"),
    *("regnetx_002", "regnety_002", "ghostnet_100", "mnasnet_100", "densenet121", "test_resnet"),
)


def main() -> None:
    """Draw, compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=120, help="images per class, of three classes")
    parser.add_argument("--size", type=int, default=96, help="side of the input in pixels")
    parser.add_argument("--models", default=",".join(MODELS))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bakeoff-"))
    try:
        generate_image_set(folder / "images", images=options.images, size=options.size)
        settings = BakeoffOptions(
            models=tuple(options.models.split(",")),
            weights="none",
            group=r"patient_\d+",
            sizes=(options.size,),
            overrides=(f"cache.folder={folder / 'cache'}", "trainer.accelerator=cpu", "trainer.threads=1"),
        )
        run_bakeoff(folder / "images", folder / "output", settings)
        print(f"\n{'network':24} {'features, s':>12} {'heads, s':>10} {'heads':>8} {'ratio':>6}")
        passes = heads = 0.0
        for name in settings.models:
            record = read_json(folder / "output" / NETWORKS / f"{name}.json")
            seconds, count = record["seconds"], len(record["heads"])
            passes, heads = passes + seconds["features"], heads + seconds["heads"]
            ratio = 1 + seconds["heads"] / seconds["features"]
            print(f"{name:24} {seconds['features']:12.1f} {seconds['heads']:10.1f} {count:8} {ratio:6.2f}")
        print(f"{'all':24} {passes:12.1f} {heads:10.1f} {'':8} {1 + heads / passes:6.2f}")
        print(f"{3 * options.images} images at {options.size} px, torch {torch.__version__}, one thread")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
