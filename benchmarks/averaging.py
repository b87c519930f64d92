"""Measure what averaging the weights gains in test accuracy, log loss and Brier score over those of the last step.

`python benchmarks/averaging.py IMAGES WEIGHTS FOLDER [--group REGEX]`: class folders with a test folder, a weight file
of mobilenetv2_100, and a folder for the results. Each seed and schedule is one training of all layers, with Pylorus's
own classes; the averages are taken beside it, since they do not change it. Of each, the last epoch is tested, and that
with the lowest validation loss, as in a run. A second call with the same folder measures only what is missing. Prints a
table in Markdown.

Batch-norm statistics are either averaged with the weights or estimated anew over the training images; of each kind of
average the table has both. Intervals are percentiles of 10,000 bootstrap samples of the groups (patients, smears) of
the test images, of the mean over the seeds; differences are paired by image.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

import pylorus

EPOCHS, LR, SIZE = 6, 3e-4, 96
SCHEDULES = ("cosine", "constant")
BASELINE = "last"
AVERAGES: dict[str, tuple[str, bool]] = {
    "ema": ("ema", False),
    "ema, estimated": ("ema", True),
    "mean": ("mean", True),
    "mean, not estimated": ("mean", False),
}
"""Method, and whether batch-norm statistics are estimated anew, by the name of the row."""
BY_EPOCH = ("mean",)


class Averages(pl.Callback):
    """Several averages of one training, and the logits of each after each epoch.

    Attributes:
        logits: By average and split, one array (images, classes) an epoch; None before an average has begun.
    """

    def __init__(self, data: pylorus.ImageDataModule) -> None:
        self._data = data
        self.averages: dict[str, pylorus.AverageWeights] = {}
        for name, (method, is_estimated) in AVERAGES.items():
            averaging = pylorus.AverageWeights(method, start_epoch=EPOCHS // 2 if method in BY_EPOCH else 0)  # type: ignore[arg-type]
            averaging.estimates_statistics = is_estimated
            self.averages[name] = averaging
        self.logits: dict[str, list[np.ndarray]] = {
            f"{name}/{split}": [] for name in (BASELINE, *AVERAGES) for split in ("val", "test")
        }

    def setup(self, *arguments: Any, **options: Any) -> None:
        for averaging in self.averages.values():
            averaging.setup(*arguments, **options)

    def on_train_start(self, *arguments: Any) -> None:
        for averaging in self.averages.values():
            averaging.on_train_start(*arguments)

    def on_train_epoch_start(self, *arguments: Any) -> None:
        for averaging in self.averages.values():
            averaging.on_train_epoch_start(*arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        for averaging in self.averages.values():
            averaging.on_train_batch_end(*arguments)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate(BASELINE, pl_module)
        for name, averaging in self.averages.items():
            averaging.on_validation_start(trainer, pl_module)
            self._evaluate(name, pl_module, has_begun=averaging.updates > 0)
            averaging.on_validation_end(trainer, pl_module)

    def _evaluate(self, name: str, module: pl.LightningModule, *, has_begun: bool = True) -> None:
        modes = [(each, each.training) for each in module.modules()]
        module.eval()
        for split in ("val", "test"):
            with torch.inference_mode():
                parts = [module(batch.image) for batch in self._data.build_loader(split)] if has_begun else []
            shape = (len(self._data.parts[split]), len(self._data.classes))
            self.logits[f"{name}/{split}"].append(torch.cat(parts).numpy() if parts else np.full(shape, np.nan))
        for each, training in modes:
            each.training = training


def measure(images: Path, weights: Path, group: str, schedule: str, seed: int) -> dict[str, np.ndarray]:
    """Train with one seed; return the logits of each average for each epoch, and labels and groups of the images."""
    data = pylorus.ImageDataModule(images, image_size=SIZE, group=group, batch_size=16, augment="light", seed=seed)
    classifier = pylorus.Classifier(
        "mobilenetv2_100",
        data.classes,
        weights=weights,
        model_args={"pad_type": "same"},
        lr=LR,
        schedule=schedule,  # type: ignore[arg-type]
        seed=seed,
    )
    averages = Averages(data)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[averages],
        limit_val_batches=0,  # `averages` validates
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(classifier, data)
    labels = {f"label/{split}": data.get_labels(split) for split in ("val", "test")}
    groups = data.parts["test"]["group"].to_numpy(dtype=str)
    return {name: np.stack(values) for name, values in averages.logits.items()} | labels | {"group": groups}


def compute_losses(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return accuracy, log loss and Brier score of each image, from logits (images, classes)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    true = np.eye(logits.shape[1])[labels]
    return {
        "accuracy": (logits.argmax(axis=1) == labels).astype(float),
        "log loss": -log_probabilities[np.arange(len(labels)), labels],
        "Brier score": np.square(np.exp(log_probabilities) - true).sum(axis=1),
    }


def select_epoch(logits: np.ndarray, labels: np.ndarray) -> int:
    """Return the epoch with the lowest validation loss."""
    losses = [np.nan if np.isnan(each).any() else compute_losses(each, labels)["log loss"].mean() for each in logits]
    return int(np.nanargmin(losses))


def compute_interval(values: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean over images, resampling whole groups."""
    _, codes = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(codes, weights=values), np.bincount(codes)
    drawn = np.random.default_rng(0).integers(0, len(sums), (10_000, len(sums)))
    low, high = np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


def print_rows(schedule: str, results: list[dict[str, np.ndarray]], *, last_epoch: bool) -> None:
    """Print a row for each average: its means, and its differences from the weights that are not averaged."""
    groups = results[0]["group"]
    scores: dict[str, dict[str, np.ndarray]] = {}
    for name in (BASELINE, *AVERAGES):
        tested = []
        for result in results:
            epoch = -1 if last_epoch else select_epoch(result[f"{name}/val"], result["label/val"])
            tested.append(compute_losses(result[f"{name}/test"][epoch], result["label/test"]))
        scores[name] = {score: np.mean([each[score] for each in tested], axis=0) for score in tested[0]}
    for name, each in scores.items():
        cells = []
        for score, values in each.items():
            scale, digits = (100, 1) if score == "accuracy" else (1, 4)
            cells.append(f"{scale * values.mean():.{digits}f}")
            if name == BASELINE:
                cells.append("")
                continue
            difference = scale * (values - scores[BASELINE][score])
            low, high = compute_interval(difference, groups)
            cells.append(f"{difference.mean():+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})")
        print(f"| {schedule}, {'last' if last_epoch else 'best'} epoch | {name} | {' | '.join(cells)} |")


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGES")
    parser.add_argument("weights", type=Path, metavar="WEIGHTS")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--group", default=r"BloodImage_\d+", metavar="REGEX")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, choices=SCHEDULES)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, np.ndarray]]] = {schedule: [] for schedule in chosen.schedules}
    for schedule in chosen.schedules:
        for seed in range(chosen.seeds):
            path = chosen.folder / f"{schedule}-{seed}.npz"
            if not path.is_file():
                measured = measure(chosen.images, chosen.weights, chosen.group, schedule, seed)
                temporary = path.with_suffix(".part.npz")
                np.savez(temporary, **measured)
                temporary.rename(path)
            results[schedule].append(dict(np.load(path)))
    print("| schedule | weights | accuracy, % | difference | log loss | difference | Brier score | difference |")
    print("| --- | --- | --: | --- | --: | --- | --: | --- |")
    for schedule in chosen.schedules:
        for last_epoch in (False, True):
            print_rows(schedule, results[schedule], last_epoch=last_epoch)
    first = results[chosen.schedules[0]][0]
    print(f"\n{len(first['group'])} test images of {len(set(first['group']))} groups, {chosen.seeds} seeds")


if __name__ == "__main__":
    main()
