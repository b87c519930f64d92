"""Compare remedies for class imbalance: losses, class weights, sampling, mixup and cutmix, on three imbalanced sets.

    OMP_NUM_THREADS=1 python benchmarks/imbalance.py IMAGES WEIGHTS                  # heads on frozen features
    OMP_NUM_THREADS=1 python benchmarks/imbalance.py IMAGES WEIGHTS --finetune       # then the last blocks, too
    python benchmarks/imbalance.py --report                                          # the tables of earlier results

IMAGES are class folders of blood cells, whose smears stand in for patients (`--group`); WEIGHTS is a weight file of
mobilenetv2_100. The other two sets are drawn gastroscopic images and the handwritten digits of scikit-learn. A seed
determines which patients are in training, validation and test, which images make the training long-tailed, the initial
head and the order of images. Each result is appended to `--output`; a benchmark that was interrupted goes on there.

A method is kept only if, by balanced accuracy, it beats cross-entropy and also cross-entropy with balanced class
weights: a mean paired difference that is positive on each of the three sets, with a 95 % interval over the seeds (of
the mean over the sets; Student's t) above 0; and if its macro AUROC isn't significantly below that of cross-entropy.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from imbalanced_sets import SIZE, ImageSet, Split, draw_gastroscopies, read_bloodcells, split_images, write_digits
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from pylorus.config.schema import LossConfig, ModelConfig
from pylorus.core.distributed import compute_seed
from pylorus.data.augmentation import Augmentation, build_augmentation, load_policy
from pylorus.evaluation.calibration import fit_temperature
from pylorus.model.backbone import Backbone, build_backbone, convert_to_pixel_scale, normalize_images
from pylorus.model.finetuning import WarmupCosine, apply_depth, set_modes
from pylorus.model.objectives import CrossEntropy, ImageLoss, build_loss

BATCH = 16
HEAD_EPOCHS, FINETUNE_EPOCHS, RATE = 30, 5, 1e-3
DEPTH = "blocks.5"
SETS = ("bloodcells", "drawn", "digits")
CROSS_ENTROPY, CLASS_WEIGHTS = "cross-entropy", "class weights"
METRICS = {
    "balanced_accuracy": "balanced accuracy",
    "worst_sensitivity": "lowest sensitivity",
    "macro_f1": "macro F1",
    "macro_auroc": "macro AUROC",
    "brier": "Brier score",
    "tuned_balanced_accuracy": "balanced accuracy, decision tuned",
}


# --- losses that Pylorus lacks ---


class EffectiveNumber(CrossEntropy):
    """Cross-entropy weighted by the effective number of images, (1 − beta^n) / (1 − beta) (Cui et al. 2019)."""

    def __init__(self, images_of_class: Sequence[int], *, beta: float) -> None:
        counts = torch.tensor(images_of_class, dtype=torch.float32)
        weights = (1 - beta) / (1 - beta**counts)
        super().__init__(weights * counts.sum() / (weights * counts).sum())


class Asymmetric(ImageLoss):
    """Asymmetric loss (Ridnik et al. 2021): one binary cross-entropy a class, in which easy negatives count less."""

    def __init__(self, class_weights: Tensor, *, positive: float = 0.0, negative: float = 4.0, margin: float = 0.05):
        super().__init__(torch.ones_like(class_weights))
        self.positive, self.negative, self.margin = positive, negative, margin

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        is_true = functional.one_hot(label, logits.shape[1]).bool()
        probability = logits.sigmoid()
        shifted = (probability - self.margin).clamp_min(0)
        of_true = -((1 - probability) ** self.positive) * functional.logsigmoid(logits)
        of_others = -(shifted**self.negative) * torch.log1p(-shifted.clamp_max(1 - 1e-7))
        return torch.where(is_true, of_true, of_others).sum(dim=1)


@dataclass(frozen=True)
class Method:
    """A remedy.

    Attributes:
        name: What tables call it.
        build_loss: Function of the number of training images of each class.
        is_sampled: Whether each class is drawn equally often.
        mix: mixup or cutmix of images; "": none.
        tau: What is subtracted from the logits after training, times the log of the training prevalence.
    """

    name: str
    build_loss: Callable[[Sequence[int]], ImageLoss]
    is_sampled: bool = False
    mix: str = ""
    tau: float = 0.0


def build_named_loss(counts: Sequence[int], **config: Any) -> ImageLoss:
    """Build a loss that Pylorus has."""
    return build_loss(LossConfig(**config), classes=len(counts), images_of_class=counts)


METHODS = (
    Method(CROSS_ENTROPY, build_named_loss),
    Method(CLASS_WEIGHTS, partial(build_named_loss, class_weights="balanced")),
    Method("effective number, beta 0.99", lambda counts: EffectiveNumber(counts, beta=0.99)),
    Method("effective number, beta 0.999", lambda counts: EffectiveNumber(counts, beta=0.999)),
    Method("focal, gamma 2", partial(build_named_loss, name="focal")),
    Method("focal, gamma 2, class weights", partial(build_named_loss, name="focal", class_weights="balanced")),
    Method("logit-adjusted, tau 1", partial(build_named_loss, name="logit_adjusted")),
    Method("logit-adjusted, tau 0.5", partial(build_named_loss, name="logit_adjusted", args={"tau": 0.5})),
    Method("asymmetric", lambda counts: Asymmetric(torch.ones(len(counts)))),
    Method("balanced sampling", build_named_loss, is_sampled=True),
    Method("adjusted after training", build_named_loss, tau=1.0),
    Method("mixup", build_named_loss, mix="mixup"),
    Method("cutmix", build_named_loss, mix="cutmix"),
)
FINETUNED = (
    CROSS_ENTROPY,
    CLASS_WEIGHTS,
    "logit-adjusted, tau 1",
    "adjusted after training",
    "mixup",
    "cutmix",
)


# --- order of images, and mixing ---


def order_images(label: NDArray[np.int64], seed: int, epoch: int, *, is_sampled: bool) -> list[tuple[int, int]]:
    """Return the positions of an epoch with the number of earlier draws of each image: a function of seed and epoch.

    Balanced: each class gets its share of the epoch's places. Its images come in one permutation after another, through
    all epochs, so that each of them is drawn once before any is drawn again.
    """
    rng = np.random.default_rng(compute_seed(seed, "order", epoch))
    if not is_sampled:
        return [(int(position), epoch) for position in rng.permutation(len(label))]
    present = np.unique(label)
    draws: list[tuple[int, int]] = []
    for place, each in enumerate(present):
        positions = np.flatnonzero(label == each)
        share = len(label) // len(present) + (place < len(label) % len(present))
        first, end = epoch * share, (epoch + 1) * share
        turns = range(first // len(positions), -(-end // len(positions)))
        stream = [
            (int(position), turn)
            for turn in turns
            for position in np.random.default_rng(compute_seed(seed, "class", int(each), turn)).permutation(positions)
        ]
        offset = first - turns.start * len(positions)
        draws += stream[offset : offset + share]
    return [draws[index] for index in rng.permutation(len(draws))]


def mix_images(images: Tensor, partner: Tensor, share: float) -> tuple[Tensor, float]:
    """Mixup (Zhang et al. 2018): return share · image + (1 − share) · partner, and the share."""
    return share * images + (1 - share) * partner, share


def cut_images(images: Tensor, partner: Tensor, share: float, center: NDArray[np.float64]) -> tuple[Tensor, float]:
    """Cutmix (Yun et al. 2019): replace a rectangle by that of the partner; return the share that remains."""
    size = images.shape[-1]
    half = size * (1 - share) ** 0.5 / 2
    (top, left), (bottom, right) = (np.clip(np.rint(center * size + sign * half), 0, size) for sign in (-1, 1))
    mixed = images.clone()
    window = (..., slice(int(top), int(bottom)), slice(int(left), int(right)))
    mixed[window] = partner[window]
    return mixed, 1 - (bottom - top) * (right - left) / size**2


def mix_batch(name: str, inputs: Tensor, draws: Sequence[tuple[int, int]], seed: int) -> tuple[Tensor, Tensor]:
    """Mix each image with the next one of its batch; the share is a function of (seed, epoch, sample).

    Returns:
        The inputs, and the share (batch,) of each image's own label.
    """
    mixed, shares = [], []
    for own, other, draw in zip(inputs, inputs.roll(-1, dims=0), draws, strict=True):
        rng = np.random.default_rng(compute_seed(seed, name, *draw))
        if name == "mixup":
            image, share = mix_images(own, other, rng.beta(0.2, 0.2))
        else:
            image, share = cut_images(own, other, rng.beta(1.0, 1.0), rng.random(2))
        mixed.append(image)
        shares.append(share)
    return torch.stack(mixed), torch.tensor(shares, dtype=torch.float32)


# --- training ---


@dataclass(frozen=True, eq=False)
class Task:
    """What a network is trained on.

    Attributes:
        load: Function of rows, and of the augmentation's seeds or None → inputs.
        label: Of all images, int64.
        split: The rows.
        seed: Of order, augmentation and mixing.
    """

    load: Callable[[NDArray[np.int64], Sequence[int] | None], Tensor]
    label: Tensor
    split: Split
    seed: int


def train(network: nn.Module, task: Task, method: Method, *, epochs: int, still: Sequence[str] = ()) -> None:
    """Train as a stage of a run does: AdamW, warm-up and cosine, clipping, the epoch with the lowest validation loss.

    Args:
        network: Takes what the task loads.
        task: The images.
        method: The remedy.
        epochs: Number of epochs.
        still: Modules that stay in evaluation mode.
    """
    loss, split = method.build_loss(task.split.counts), task.split
    learning = [each for each in network.parameters() if each.requires_grad]
    decayed, others = ([each for each in learning if (each.ndim > 1) is wide] for wide in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=RATE, weight_decay=0.01, fused=True
    )
    label = task.label[split.train].numpy()
    steps = epochs * -(-len(label) // BATCH)
    schedule = WarmupCosine(steps=steps, warmup=round(0.1 * steps), falls=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    lowest, best = float("inf"), {}
    for epoch in range(epochs):
        set_modes(network, still)
        draws = order_images(label, task.seed, epoch, is_sampled=method.is_sampled)
        for start in range(0, len(draws), BATCH):
            batch = draws[start : start + BATCH]
            rows = split.train[[position for position, _ in batch]]
            seeds = [compute_seed(task.seed, turn, int(row)) for row, (_, turn) in zip(rows, batch, strict=True)]
            inputs = task.load(rows, seeds)
            true = task.label[rows]
            if method.mix and inputs.ndim == 4 and len(batch) > 1:
                inputs, share = mix_batch(method.mix, inputs, batch, task.seed)
                logits, other = network(inputs), true.roll(-1)
                losses = share * loss(logits, true) + (1 - share) * loss(logits, other)
                weight = share * loss.compute_weights(true) + (1 - share) * loss.compute_weights(other)
            else:
                losses, weight = loss(network(inputs), true), loss.compute_weights(true)
            optimizer.zero_grad()
            (losses.sum() / weight.sum()).backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            rates.step()
        logits, true = predict(network, task, split.val), task.label[split.val]
        value = float(loss(logits, true).sum() / loss.compute_weights(true).sum())
        if value < lowest:
            lowest, best = value, {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(best)


@torch.no_grad()
def predict(network: nn.Module, task: Task, rows: NDArray[np.int64]) -> Tensor:
    """Compute the logits of images."""
    network.eval()
    return torch.cat([network(task.load(rows[start : start + 64], None)) for start in range(0, len(rows), 64)])


def train_head(task: Task, method: Method, *, features: int) -> nn.Linear:
    """Train a head, for all methods from the same initial weights."""
    head = nn.Linear(features, len(task.split.counts))
    generator = torch.Generator().manual_seed(compute_seed(task.seed, "head"))
    with torch.no_grad():
        head.weight.copy_(0.01 * torch.randn(head.weight.shape, generator=generator))
        head.bias.zero_()
    train(head, task, method, epochs=HEAD_EPOCHS)
    return head


def evaluate(task: Task, val: Tensor, test: Tensor, *, tau: float) -> dict[str, float]:
    """Compute the metrics of test logits; images are weighted so that classes are as frequent as in training."""
    split = task.split
    prevalence = np.array(split.counts) / sum(split.counts)
    logits, val_logits = ((each.double().numpy() - tau * np.log(prevalence)) for each in (test, val))
    true, val_true = task.label[split.test].numpy(), task.label[split.val].numpy()
    scaled = logits / fit_temperature(val_logits, val_true).temperature
    probability = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    probability /= probability.sum(axis=1, keepdims=True)
    weight = (prevalence / np.bincount(true, minlength=len(prevalence)))[true]
    positive = np.eye(len(prevalence))[true]
    sensitivity = compute_sensitivity(logits, true)
    areas = [roc_auc_score(positive[:, k], probability[:, k], sample_weight=weight) for k in range(len(prevalence))]
    # The decision that suits validation best, of those that lower the thresholds of rare classes more or less.
    grid = np.linspace(-1, 2, 13)
    reached = [np.nanmean(compute_sensitivity(val_logits - each * np.log(prevalence), val_true)) for each in grid]
    best = [each for each, value in zip(grid, reached, strict=True) if value >= max(reached) - 1e-9]
    tuned = compute_sensitivity(logits - np.median(best) * np.log(prevalence), true)
    return {
        "balanced_accuracy": float(sensitivity.mean()),
        "worst_sensitivity": float(sensitivity.min()),
        "macro_f1": float(f1_score(true, logits.argmax(axis=1), sample_weight=weight, average="macro")),
        "macro_auroc": float(np.mean(areas)),
        "brier": float(weight @ ((probability - positive) ** 2).sum(axis=1)),
        "tuned_balanced_accuracy": float(tuned.mean()),
    }


def compute_sensitivity(logits: NDArray[np.float64], true: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the proportion of the images of each class for which its logit is the largest."""
    is_right = logits.argmax(axis=1) == true
    return np.array([is_right[true == label].mean() for label in range(logits.shape[1])])


# --- the benchmark ---


@dataclass
class Results:
    """Results by recipe, set, seed and method, appended to a file of JSON lines."""

    file: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.file.is_file():
            self.rows = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]

    def has(self, **key: Any) -> bool:
        """Return whether there is a result."""
        return any(all(row[name] == value for name, value in key.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append a result."""
        self.rows.append(row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def build_network(weights: Path, classes: int) -> Backbone:
    """Build MobileNetV2 with a new head."""
    config = ModelConfig(name="mobilenetv2_100", weights=str(weights), args={"pad_type": "same"})
    torch.manual_seed(0)
    return build_backbone(config, classes=classes, image_size=SIZE)


def load_batch(
    images: ImageSet, scale: tuple[Tensor, Tensor], augment: Augmentation | None, rows: Any, seeds: Any
) -> Tensor:
    """Return normalized images, augmented if there are seeds."""
    batch = images.images[rows]
    if seeds is not None and augment is not None:
        batch = np.stack([augment(image, seed) for image, seed in zip(batch, seeds, strict=True)])
    return normalize_images(torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))), *scale)


@torch.no_grad()
def compute_features(backbone: Backbone, images: ImageSet, scale: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the penultimate features of all images."""
    network: Any = backbone.network.eval()
    blocks = np.array_split(np.arange(len(images.images)), -(-len(images.images) // 64))
    return torch.cat(
        [network.forward_head(network.forward_features(load_batch(images, scale, None, rows, None)), pre_logits=True)
         for rows in blocks]
    )  # fmt: skip


def run(options: argparse.Namespace, results: Results) -> None:
    """Train what has no result yet, seed by seed."""
    readers = {
        "bloodcells": lambda: read_bloodcells(options.images, options.group),
        "drawn": draw_gastroscopies,
        "digits": write_digits,
    }
    sets = {name: readers[name]() for name in SETS}
    backbones = {name: build_network(options.weights, len(images.train)) for name, images in sets.items()}
    scales = {name: convert_to_pixel_scale(each.mean, each.std) for name, each in backbones.items()}
    features = {name: compute_features(backbones[name], sets[name], scales[name]) for name in SETS}
    recipe = "finetune" if options.finetune else "head"
    methods = [each for each in METHODS if (each.name in FINETUNED if options.finetune else not each.mix)]
    for seed in range(options.seeds):
        for name, images in sets.items():
            split, label = split_images(images, seed), torch.from_numpy(images.label.astype(np.int64))
            trained: tuple[Any, ...] = ()
            for method in methods:
                key = {"recipe": recipe, "set": name, "seed": seed, "method": method.name}
                if results.has(**key):
                    continue
                start = time.process_time()
                if not method.tau or not trained:
                    task = Task(lambda rows, _, of=features[name]: of[rows], label, split, seed)
                    plain = METHODS[0] if method.tau else method
                    network: nn.Module = train_head(task, plain, features=features[name].shape[1])
                    if options.finetune:
                        task, network = finetune(task, plain, network, images, options.weights, scales[name])
                    outputs = predict(network, task, split.val), predict(network, task, split.test)
                    trained = (task, *outputs) if method.name == CROSS_ENTROPY else trained
                else:
                    task, *outputs = trained
                metrics = evaluate(task, *outputs, tau=method.tau)
                results.add({**key, **metrics, "counts": split.counts, "seconds": time.process_time() - start})
                print(f"{recipe} {name} {seed} {method.name}: {metrics['balanced_accuracy']:.3f}", flush=True)


def finetune(
    task: Task, method: Method, head: nn.Module, images: ImageSet, weights: Path, scale: tuple[Tensor, Tensor]
) -> tuple[Task, nn.Module]:
    """Train the last blocks too, from a trained head on."""
    network: Any = build_network(weights, len(task.split.counts)).network
    network.get_classifier().load_state_dict(head.state_dict())
    augment = build_augmentation(load_policy("light"))
    torch.manual_seed(compute_seed(task.seed, "finetune"))
    whole = Task(lambda rows, seeds: load_batch(images, scale, augment, rows, seeds), task.label, task.split, task.seed)
    train(network, whole, method, epochs=FINETUNE_EPOCHS, still=apply_depth(network, DEPTH).eval_modules)
    return whole, network


# --- tables ---


def compute_interval(differences: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the mean of one value per seed with its 95 % interval, by Student's t."""
    mean, count = float(differences.mean()), len(differences)
    half = stats.t.ppf(0.975, count - 1) * differences.std(ddof=1) / count**0.5 if count > 1 else float("nan")
    return mean, mean - half, mean + half


def pair(rows: list[dict[str, Any]], metric: str, method: str, reference: str) -> dict[str, NDArray[np.float64]]:
    """Return the differences of a method from a reference by set, one for each seed that all sets have of both."""
    values = {(row["set"], row["seed"], row["method"]): row[metric] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    complete = [s for s in seeds if all((name, s, each) in values for name in SETS for each in (method, reference))]
    return {name: np.array([values[name, s, method] - values[name, s, reference] for s in complete]) for name in SETS}


def beats(rows: list[dict[str, Any]], method: str, reference: str) -> bool:
    """Return whether a method beats a reference: on average with its whole interval, and on each set on average."""
    differences = pair(rows, "balanced_accuracy", method, reference)
    _, low, _ = compute_interval(np.mean(list(differences.values()), axis=0))
    return low > 0 and all(each.mean() > 0 for each in differences.values())


def print_report(results: Results) -> None:
    """Print, for each recipe and metric, the values of cross-entropy, the paired differences from it, and the rule."""
    for recipe in sorted({row["recipe"] for row in results.rows}, reverse=True):
        rows = [row for row in results.rows if row["recipe"] == recipe]
        names = [name for name in dict.fromkeys(row["method"] for row in rows) if name != CROSS_ENTROPY]
        for metric, title in METRICS.items():
            print(f"\n{recipe}, {title}, 100 ×: difference from cross-entropy (95 % interval)\n")
            print(f"| method | {' | '.join(SETS)} | all three | seeds |\n| --- | {'--: | ' * 3}--- | --: |")
            means = compute_means(rows, metric)
            print(f"| {CROSS_ENTROPY} | {' | '.join(f'{each:.1f}' for each in means)} | {np.mean(means):.1f} | |")
            for name in names:
                found = pair(rows, metric, name, CROSS_ENTROPY)
                by_set = " | ".join(f"{100 * each.mean():+.1f}".replace("-", "−") for each in found.values())
                print(f"| {name} | {by_set} | {format_difference(found)} | {len(found[SETS[0]])} |")
        print(f"\n{recipe}, mean of the three sets, 100 ×: difference from cross-entropy (95 % interval)\n")
        others = dict(list(METRICS.items())[1:])
        print(f"| method | {' | '.join(others.values())} |\n| --- |{' --- |' * len(others)}")
        plain = [f"{np.mean(compute_means(rows, metric)):.1f}" for metric in others]
        print(f"| {CROSS_ENTROPY} | {' | '.join(plain)} |")
        for name in names:
            cells = [format_difference(pair(rows, metric, name, CROSS_ENTROPY)) for metric in others]
            print(f"| {name} | {' | '.join(cells)} |")
        print(
            f"\n{recipe}, the rule\n\n| method | beats cross-entropy | beats class weights | AUROC is lower | passes |"
        )
        print("| --- | --- | --- | --- | --- |")
        for name in names[1:]:
            wins = [beats(rows, name, reference) for reference in (CROSS_ENTROPY, CLASS_WEIGHTS)]
            areas = np.mean(list(pair(rows, "macro_auroc", name, CROSS_ENTROPY).values()), axis=0)
            is_worse = compute_interval(areas)[2] < 0
            first, second, third, passes = (
                "yes" if each else "no" for each in (*wins, is_worse, all(wins) and not is_worse)
            )
            against = format_difference(pair(rows, "balanced_accuracy", name, CLASS_WEIGHTS))
            print(f"| {name} | {first} | {second}: {against} | {third} | {passes} |")


def compute_means(rows: list[dict[str, Any]], metric: str) -> list[float]:
    """Return the mean of cross-entropy on each set, times 100."""
    plain = [row for row in rows if row["method"] == CROSS_ENTROPY]
    return [100 * float(np.mean([row[metric] for row in plain if row["set"] == name])) for name in SETS]


def format_difference(differences: dict[str, NDArray[np.float64]]) -> str:
    """Return the mean over the sets with its interval, times 100."""
    mean, low, high = (100 * each for each in compute_interval(np.mean(list(differences.values()), axis=0)))
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="?", metavar="IMAGES")
    parser.add_argument("weights", type=Path, nargs="?", metavar="WEIGHTS")
    parser.add_argument("--group", default=r"BloodImage_\d+", metavar="REGEX")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--finetune", action="store_true", help="fine-tune the last blocks after the head")
    parser.add_argument("--report", action="store_true", help="only print the tables")
    parser.add_argument("--output", type=Path, default=Path("outputs/imbalance.jsonl"), metavar="FILE")
    options = parser.parse_args()
    if not options.report and options.weights is None:
        parser.error("IMAGES and WEIGHTS are required, except with --report")
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    results = Results(options.output)
    if not options.report:
        run(options, results)
    print_report(results)


if __name__ == "__main__":
    main()
