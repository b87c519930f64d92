"""Train many linear heads on the same frozen features at once, as one batched matrix, and choose one of them.

Each head is trained as the stage `pretrain` trains one: the same order of images, loss, AdamW, clipping of the gradient
norm, and learning-rate schedule. The heads share nothing but the features, so that one is the same in any company.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pylorus.config.schema import LossConfig, OptimizerConfig, StageConfig
from pylorus.core.distributed import compute_seed
from pylorus.core.errors import PylorusError
from pylorus.data.dataset import EpochBatchSampler, EpochSampler
from pylorus.model.finetuning import WarmupCosine
from pylorus.model.frozen_features import generate_sample
from pylorus.model.inference import Evaluator, NormalizingNetwork
from pylorus.model.objectives import LogitAdjustedLoss, build_loss
from pylorus.model.weights import list_classifier_names
from pylorus.runs.folder import StageScore, score_stage

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Defaults of torch's AdamW."""
CLIP_EPSILON = 1e-6
"""What `torch.nn.utils.clip_grad_norm_` adds to a norm before it divides by it."""
INITIAL_SPREAD = 0.01
"""Standard deviation of the initial weights, as in `pylorus.model.weights.init_head`."""
BLOCK_BYTES = 1 << 20
"""Size of the weights that are updated at once: what an update reads and writes stays in a core's cache."""
MAX_BYTES = 64 << 20
"""Size of the weights that are trained at once; more heads are trained one part after the other."""


@dataclass(frozen=True)
class HeadSettings:
    """What distinguishes heads of the same seed.

    Attributes:
        lr: Peak learning rate.
        weight_decay: Weight decay of the weights; the bias has none.
        class_weights: none, or balanced, as in `loss.class_weights`.
        loss: cross_entropy, or logit_adjusted with its usual argument, as in `loss.name`.
    """

    lr: float
    weight_decay: float
    class_weights: str
    loss: str = "cross_entropy"


@dataclass(frozen=True, eq=False)
class LabelledFeatures:
    """Penultimate features of images.

    Attributes:
        features: float32 of shape (images, features).
        label: int64 of shape (images,), in [0, classes).
    """

    features: Tensor
    label: Tensor

    def to(self, device: torch.device | str) -> "LabelledFeatures":
        """Return the same on another device."""
        return LabelledFeatures(self.features.to(device), self.label.to(device))


@dataclass(frozen=True, eq=False)
class TrainedHeads:
    """Heads at the epoch with the lowest validation loss of each.

    Attributes:
        weight: float32 of shape (seeds, settings, classes, features).
        bias: float32 of shape (seeds, settings, classes).
        best_epoch: Epoch of these weights, from 1, int64 of shape (seeds, settings); 0 if the loss never was finite.
        epochs: Epochs trained until patience ended, int64 of shape (seeds, settings).
    """

    weight: Tensor
    bias: Tensor
    best_epoch: NDArray[np.int64]
    epochs: NDArray[np.int64]

    def compute_logits(self, features: Tensor, *, seed: int, setting: int) -> Tensor:
        """Return the logits (images, classes) of one head, by its positions."""
        return functional.linear(features, self.weight[seed, setting], self.bias[seed, setting])


def train_heads(
    train: LabelledFeatures,
    val: LabelledFeatures,
    settings: Sequence[HeadSettings],
    *,
    seeds: Sequence[int],
    classes: int,
    stage: StageConfig,
    optimizer: OptimizerConfig,
    batch_size: int,
    advance: Callable[[int], object] = int,
) -> TrainedHeads:
    """Train one head for each seed and each of the settings.

    Args:
        train: Training images, in the order of the split's table, on the device that trains.
        val: Validation images, whose loss chooses the epoch of each head.
        settings: Learning rate, weight decay, class weights and loss.
        seeds: Seeds of runs: they determine initial weights and the order of images.
        classes: Number of classes.
        stage: Epochs, schedule (cosine or constant), warm-up and patience.
        optimizer: The largest gradient norm; the rest is in `settings`.
        batch_size: Images per step.
        advance: Called after each epoch with the number of heads in training.

    Raises:
        ValueError: If a class has no training image, so that there are no balanced weights.
    """
    counts = torch.bincount(train.label, minlength=classes).tolist()
    if 0 in counts:
        raise ValueError(f"found {counts} training images by class, expected at least one each")
    per_setting = 4 * len(seeds) * classes * train.features.shape[1]
    at_once = max(1, MAX_BYTES // per_setting)
    parts = []
    for start in range(0, len(settings), at_once):
        batch = HeadBatch(train, val, settings[start : start + at_once], seeds, counts, stage, optimizer, batch_size)
        with _use_one_thread(train.features.device):
            parts.append(batch.train(advance))
    weight, bias = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("weight", "bias"))
    best, epochs = (
        np.concatenate([getattr(part, name) for part in parts], axis=1) for name in ("best_epoch", "epochs")
    )
    return TrainedHeads(weight, bias, best, epochs)


@contextmanager
def _use_one_thread(device: torch.device) -> Iterator[None]:
    """Compute on one thread of a CPU: steps are so small that threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class HeadBatch:
    """Heads that are trained at once: `weight` of shape (seeds, features, settings × classes), `bias` with one row."""

    def __init__(
        self,
        train: LabelledFeatures,
        val: LabelledFeatures,
        settings: Sequence[HeadSettings],
        seeds: Sequence[int],
        counts: Sequence[int],
        stage: StageConfig,
        optimizer: OptimizerConfig,
        batch_size: int,
    ) -> None:
        self._train, self._val, self._stage, self._clip = train, val, stage, optimizer.clip
        device, classes, length = train.features.device, len(counts), train.features.shape[1]
        self._shape = len(seeds), len(settings), classes
        losses = [
            build_loss(
                LossConfig(name=each.loss, class_weights=each.class_weights), classes=classes, images_of_class=counts
            )
            for each in settings
        ]
        self._class_weights = torch.stack([loss.class_weights for loss in losses]).to(device)
        # What a logit-adjusted loss adds to the logits, in training and validation, by column.
        self._offset = torch.cat(
            [loss.offset if isinstance(loss, LogitAdjustedLoss) else torch.zeros(classes) for loss in losses]
        ).to(device)
        # One column per class of each head, so that they broadcast over the columns of the weights.
        self._lr, self._decay = (
            torch.tensor(values, device=device).repeat_interleave(classes).expand(len(seeds), 1, -1).clone()
            for values in ([each.lr for each in settings], [each.weight_decay for each in settings])
        )
        initial = torch.stack([draw_initial_weight(seed, classes, length) for seed in seeds])
        weight = initial.transpose(1, 2).repeat(1, 1, len(settings)).contiguous().to(device)
        self._tensors = weight, torch.zeros(len(seeds), 1, weight.shape[2], device=device)
        self._best = tuple(tensor.clone() for tensor in self._tensors)
        self._means = tuple(torch.zeros_like(tensor) for tensor in self._tensors)
        self._squares = tuple(torch.zeros_like(tensor) for tensor in self._tensors)
        self._samplers = [
            EpochBatchSampler(EpochSampler(len(train.label), seed=compute_seed(seed, "stage", "pretrain")), batch_size)
            for seed in seeds
        ]
        self._steps = 0
        rows = max(1, BLOCK_BYTES // (4 * weight[:, 0].numel()))
        self._blocks = [slice(first, first + rows) for first in range(0, length, rows)]

    def train(self, advance: Callable[[int], object]) -> TrainedHeads:
        """Train until no head is left whose patience lasts, and return the best epoch of each."""
        seeds, settings, classes = self._shape
        stage, batches = self._stage, len(self._samplers[0])
        steps = stage.epochs * batches
        schedule = WarmupCosine(steps=steps, warmup=round(stage.warmup * steps), falls=stage.schedule == "cosine")
        lowest = torch.full((seeds, settings), math.inf, device=self._lr.device)
        best_epoch, epochs = (torch.zeros(seeds, settings, dtype=torch.int64) for _ in range(2))
        is_active = torch.ones(seeds, settings, dtype=torch.bool)
        for epoch in range(stage.epochs):
            for sampler in self._samplers:
                sampler.sampler.set_epoch(epoch)
            for batch in zip(*self._samplers, strict=True):
                rows = torch.tensor([[draw.row for draw in draws] for draws in batch], device=self._lr.device)
                self._take_step(rows, schedule(self._steps))
            epochs[is_active] = epoch + 1
            loss = self._compute_validation_loss()
            is_better = (loss < lowest) & is_active.to(loss.device)
            lowest = torch.where(is_better, loss, lowest)
            best_epoch[is_better.cpu()] = epoch + 1
            columns = is_better.repeat_interleave(classes, dim=1)[:, None]
            for best, tensor in zip(self._best, self._tensors, strict=True):
                torch.where(columns, tensor, best, out=best)
            advance(int(is_active.sum()))
            if stage.patience is not None:
                is_active &= epoch + 1 - best_epoch < stage.patience
            if not is_active.any():
                break
        weight, bias = self._best
        return TrainedHeads(
            weight.view(seeds, -1, settings, classes).permute(0, 2, 3, 1).contiguous(),
            bias.view(seeds, settings, classes),
            best_epoch.numpy(),
            epochs.numpy(),
        )

    def _take_step(self, rows: Tensor, lr_factor: float) -> None:
        """Take one step of AdamW with the rows (seeds, batch) of the training images."""
        seeds, settings, classes = self._shape
        inputs, label = self._train.features[rows], self._train.label[rows]
        weight, bias = self._tensors
        probability = (
            torch.baddbmm(bias + self._offset, inputs, weight).view(seeds, -1, settings, classes).softmax(dim=3)
        )
        # The gradient of the weighted cross-entropy of a batch: its losses divided by the sum of their weights.
        image_weight = self._class_weights[:, label].permute(1, 2, 0)
        error = probability - functional.one_hot(label, classes)[:, :, None]
        error *= (image_weight / image_weight.sum(dim=1, keepdim=True))[..., None]
        error = error.view(seeds, -1, settings * classes)
        error *= self._compute_clip_factor(inputs, error)
        self._steps += 1
        self._update(1, slice(None), error.sum(dim=1, keepdim=True), lr_factor)
        for block in self._blocks:
            self._update(0, block, torch.bmm(inputs[:, :, block].transpose(1, 2), error), lr_factor)

    def _compute_clip_factor(self, inputs: Tensor, error: Tensor) -> Tensor:
        """Return what limits the gradient norm of each head, by column, as `torch.nn.utils.clip_grad_norm_` does.

        Args:
            inputs: The batch X, of shape (seeds, batch, features).
            error: Derivative of the loss by the logits E, of shape (seeds, batch, settings × classes).
        """
        seeds, settings, classes = self._shape
        if self._clip is None:
            return torch.ones((), device=error.device)
        # The gradients are XᵀE and the sum of E. The squared norms of their columns are those of E by XXᵀ + 1.
        gram = torch.bmm(inputs, inputs.transpose(1, 2)) + 1
        squares = (torch.bmm(gram, error) * error).sum(dim=1)
        norm = squares.view(seeds, settings, classes).sum(dim=2).clamp_min(0).sqrt()
        return (self._clip / (norm + CLIP_EPSILON)).clamp(max=1).repeat_interleave(classes, dim=1)[:, None]

    def _update(self, index: int, block: slice, gradient: Tensor, lr_factor: float) -> None:
        """Update weights (index 0) or biases (1) as torch's AdamW does, each head with its own learning rate and decay.

        Args:
            index: Which tensors.
            block: Their rows.
            gradient: Of these rows; overwritten.
            lr_factor: Fraction of the peak learning rate.
        """
        tensor, mean, square = (each[index][:, block] for each in (self._tensors, self._means, self._squares))
        lr, corrections = self._lr * lr_factor, [1 - beta**self._steps for beta in BETAS]
        if index == 0:
            tensor.mul_(1 - lr * self._decay)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        divisor = square.sqrt().div_(math.sqrt(corrections[1])).add_(EPSILON)
        tensor.addcdiv_(torch.mul(mean, lr / corrections[0], out=gradient), divisor, value=-1)

    def _compute_validation_loss(self) -> Tensor:
        """Return the weighted cross-entropy (seeds, settings) of the validation images; NaN where a head diverged."""
        seeds, settings, classes = self._shape
        weight, bias = self._tensors
        losses = []
        for seed in range(seeds):
            logits = torch.addmm(bias[seed] + self._offset, self._val.features, weight[seed]).view(
                -1, settings, classes
            )
            index = self._val.label[:, None, None].expand(-1, settings, 1)
            error = -logits.log_softmax(dim=2).gather(2, index).squeeze(2)
            image_weight = self._class_weights[:, self._val.label].T
            losses.append((error * image_weight).sum(dim=0) / image_weight.sum(dim=0))
        return torch.stack(losses)


def draw_initial_weight(seed: int, classes: int, features: int) -> Tensor:
    """Draw the initial weights (classes, features) of the heads of a seed, with the spread of `init_head`."""
    generator = torch.Generator().manual_seed(compute_seed(seed, "head"))
    return torch.randn(classes, features, generator=generator) * INITIAL_SPREAD


# --- features, and the choice of a head ---


def compute_features(evaluator: Evaluator, split: str, advance: Callable[[int], object] = int) -> LabelledFeatures:
    """Compute the penultimate features of a split, in the order of its table, or read them from the cache.

    Args:
        evaluator: The network and the images.
        split: train, val or test.
        advance: Called with the number of images that have just been computed.
    """
    table = evaluator.image_data.parts[split]
    outputs = list(evaluator.compute_outputs(split, np.arange(len(table)), advance=advance))
    order = torch.argsort(torch.cat([each.row for each in outputs]))
    features = torch.cat([each.features for each in outputs])[order]
    return LabelledFeatures(features, torch.tensor(table["label"].to_numpy(dtype=np.int64)))


def check_linear_head(label: str, network: NormalizingNetwork, *, image_size: int) -> None:
    """Check that the logits are a linear function of the penultimate features."""
    head = network.network.get_submodule(list_classifier_names(network.network)[0])
    with torch.inference_mode():
        logits, features = network.forward_with_features(generate_sample(image_size).to(network.mean.device))
        is_linear = features.shape[1] == head.in_features and torch.allclose(head(features), logits, atol=1e-4)
    if not is_linear:
        raise PylorusError(
            f"--models: the logits of {label} are not a linear function of its features, so that its heads "
            "can't be trained at once. Leave it out: the other networks are not computed again."
        )


def score_heads(heads: TrainedHeads, val: LabelledFeatures) -> list[list[StageScore]]:
    """Score each head by its own logits for the validation images, not by its loss; one list for each seed."""
    true = val.label.cpu().numpy()
    seeds, settings = heads.best_epoch.shape
    return [
        [
            score_stage(heads.compute_logits(val.features, seed=seed, setting=setting).double().cpu().numpy(), true)
            for setting in range(settings)
        ]
        for seed in range(seeds)
    ]


def choose_head(label: str, heads: TrainedHeads, scores: Sequence[Sequence[StageScore]]) -> tuple[int, int]:
    """Choose settings by the mean over the seeds, and a seed: highest accuracy, among equals the lowest loss.

    Returns:
        Positions of the settings and of the seed.
    """
    seeds, settings = heads.best_epoch.shape
    usable = [setting for setting in range(settings) if (heads.best_epoch[:, setting] > 0).all()]
    if not usable:
        raise PylorusError(
            f"{label}: all heads diverged: their validation loss is NaN or infinite. Check the weights and "
            "the normalization (model.mean, model.std), or add lower learning rates (--lr)."
        )

    def rank(setting: int) -> tuple[int, float]:
        return -sum(scores[seed][setting].correct for seed in range(seeds)), sum(
            scores[seed][setting].loss for seed in range(seeds)
        )

    chosen = min(usable, key=rank)
    return chosen, min(range(seeds), key=lambda seed: (-scores[seed][chosen].correct, scores[seed][chosen].loss))
