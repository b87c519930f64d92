"""Measure test accuracy by training depth and learning rate, on real images and with three seeds.

`python benchmarks/depth_and_rate.py IMAGES WEIGHTS [--group REGEX]`: class folders and a weight file of
mobilenetv2_100. Each setting is a run of both stages (or of only the head); the settings differ in one respect. Prints
a table in Markdown. Intervals are percentiles of 10,000 bootstrap samples of the groups (patients, smears) of the test
images: they show how much the mean over the seeds would vary with other test images. Differences are paired by image.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
EPOCHS = {"pretrain": 8, "finetune": 5}

SETTINGS: dict[str, tuple[str, ...]] = {
    "head, 1e-3": ("stage=pretrain",),
    "head, 1e-4": ("stage=pretrain", "optimizer.lr=1e-4"),
    "head, 1e-2": ("stage=pretrain", "optimizer.lr=1e-2"),
    "then from blocks.5, 1e-4": ("stages.finetune.learn=blocks.5",),
    "then from blocks.3, 1e-4": ("stages.finetune.learn=blocks.3",),
    "then all, 1e-4": (),
    "then all, 1e-5": ("stages.finetune.lr=1e-5",),
    "then all, 1e-3": ("stages.finetune.lr=1e-3",),
}
"""Settings by name; the others are compared with the first one."""


def accuracy(images: Path, weights: Path, group: str, words: tuple[str, ...], seed: int, cache: Path) -> pd.DataFrame:
    """Run one setting; return, for each test sample, its group and whether the last stage classified it correctly."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(ROOT / "train.py"), "data=folders", f"data.root={images}", f"data.group='{group}'",
            "model=timm", "model.name=mobilenetv2_100", f"model.weights={weights}", "model.args.pad_type=same",
            "data.image_size=128", "trainer=cpu", "trainer.threads=1", "report=false", f"cache.folder={cache}",
            *(f"stages.{stage}.epochs={count}" for stage, count in EPOCHS.items()),
            *words, f"seed={seed}", f"hydra.run.dir={folder}/run",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        stage = "pretrain" if "stage=pretrain" in words else "finetune"
        table = pd.read_parquet(Path(folder) / "run" / stage / "predictions-test.parquet").set_index("sample_id")
    return pd.DataFrame({"group": table["group"], f"seed {seed}": table["true"] == table["predicted"]})


def interval(values: pd.Series, groups: pd.Series) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean over images, resampling whole groups."""
    sums = values.groupby(groups).agg(["sum", "count"]).to_numpy()
    drawn = np.random.default_rng(0).integers(0, len(sums), (10_000, len(sums)))
    totals = sums[drawn].sum(axis=1)
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGES")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS")
    parser.add_argument("--group", default=r"BloodImage_\d+", metavar="REGEX")
    chosen = parser.parse_args()
    print("| trained, at rate | seeds 0, 1, 2 | mean (95 %) | difference from the first (95 %) | seconds per run |")
    print("| --- | --- | --- | --- | --: |", flush=True)
    first: pd.Series | None = None
    with tempfile.TemporaryDirectory() as cache:
        for name, words in SETTINGS.items():
            start = time.monotonic()
            runs = [accuracy(chosen.images, chosen.weights, chosen.group, words, seed, Path(cache)) for seed in SEEDS]
            seconds = (time.monotonic() - start) / len(SEEDS)
            table = pd.concat([runs[0]["group"], *(run.iloc[:, 1] for run in runs)], axis=1)
            shares = table.drop(columns="group").astype(float)
            right = shares.mean(axis=1)
            first = right if first is None else first
            low, high = interval(right, table["group"])
            less, more = interval(right - first, table["group"])
            against = (
                ""
                if right is first
                else f"{100 * (right - first).mean():+.1f} ({100 * less:+.1f} to {100 * more:+.1f})"
            )
            print(
                f"| {name} | {', '.join(f'{100 * value:.1f}' for value in shares.mean())} | "
                f"{100 * right.mean():.1f} ({100 * low:.1f} to {100 * high:.1f}) | {against} | {seconds:.0f} |",
                flush=True,
            )
    groups = table["group"].nunique()
    print(f"\n{len(table)} test images of {groups} groups")


if __name__ == "__main__":
    main()
