"""Measure what test-time augmentation gains on real test images, over several seeds of a head on a frozen network.

`python benchmarks/tta_gain.py IMAGES WEIGHTS [--group REGEX] [--seeds N]`: class folders in train/ and test/, and a
weight file of mobilenetv2_100. Each seed is a run of the stage pretrain, whose bundle then predicts the test images
without augmentation and with each kind. Prints a table in Markdown: means over the seeds, and of the differences with
minus without augmentation 95 % intervals that keep groups (patients, smears) together; the losses of an image are
averaged over the seeds first.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
import pandas as pd

import pylorus
from pylorus.deploy.augmented import COPIES
from pylorus.evaluation.comparison import paired_loss_difference

ROOT = Path(__file__).parents[1]
FIGURES = {"accuracy": (100.0, 1), "Brier score": (1.0, 4), "log loss": (1.0, 4)}
"""Factor and decimals of each figure."""


def compute_losses(table: pd.DataFrame) -> pd.DataFrame:
    """Return of each image whether it was classified correctly, its Brier loss and its log loss."""
    columns = [name for name in table if name.startswith("probability/")]
    probabilities = table[columns].to_numpy()
    truth = np.array([[f"probability/{name}" == column for column in columns] for name in table["true"]], dtype=float)
    return pd.DataFrame(
        {
            "accuracy": (table["true"] == table["predicted"]).astype(float),
            "Brier score": ((probabilities - truth) ** 2).sum(axis=1),
            "log loss": -np.log((probabilities * truth).sum(axis=1)),
        }
    ).set_axis(table["path"])


def run(command: list[str]) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGES")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS")
    parser.add_argument("--group", default=r"BloodImage_\d+", metavar="REGEX")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    chosen = parser.parse_args()
    measured: dict[str | None, list[pd.DataFrame]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(chosen.seeds):
            path = Path(folder) / str(seed)
            run(
                [
                    str(ROOT / "train.py"), f"data.root={chosen.images}", f"data.group='{chosen.group}'",
                    "stage=pretrain", "model=timm", "model.name=mobilenetv2_100", f"model.weights={chosen.weights}",
                    "model.args.pad_type=same", "data.image_size=128", "trainer=cpu", "trainer.threads=1",
                    "report=false", f"cache.folder={folder}/cache", f"seed={seed}", f"hydra.run.dir={path}/run",
                ]
            )  # fmt: skip
            model = pylorus.load_model(path / "run", device="cpu")
            for kind in (None, *COPIES):
                measured.setdefault(kind, []).append(model.predict(chosen.images / "test", tta=kind))
    print(f"| `--tta` | passes | {' | '.join(FIGURES)} | another class |")
    print("| --- | --: | --- | --- | --- | --: |")
    for kind, copies in COPIES.items():
        before, after = (sum(map(compute_losses, measured[each])) / chosen.seeds for each in (None, kind))
        pairs = zip(measured[None], measured[kind], strict=True)
        changed = np.mean([(one["predicted"] != other["predicted"]).sum() for one, other in pairs])
        groups = before.index.str.extract(f"({chosen.group})", expand=False).to_numpy(dtype=str)
        cells = []
        for name, (factor, digits) in FIGURES.items():
            change = paired_loss_difference(after[name].to_numpy(), before[name].to_numpy(), groups)
            low, high = factor * change.low, factor * change.high
            cells.append(
                f"{factor * before[name].mean():.{digits}f} → {factor * after[name].mean():.{digits}f}: "
                f"{factor * change.value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
            )
        print(f"| `{kind}` | {len(copies)} | {' | '.join(cells)} | {changed:.1f} |")
    print(f"\n{len(before)} test images of {len(set(groups))} groups, {chosen.seeds} seeds")


if __name__ == "__main__":
    main()
