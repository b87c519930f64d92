"""The LightningModule: one training stage of one network, its loss and its metrics."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from timm.optim._optim_factory import create_optimizer_v2, list_optimizers
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from pylorus.config.schema import FUSED, LossConfig, OptimizerConfig, StageConfig
from pylorus.core.distributed import ALONE, Processes
from pylorus.core.errors import PylorusError, format_name_list, format_suggestion
from pylorus.core.seeding import compute_seed
from pylorus.data.datamodule import Batch
from pylorus.model.backbone import Backbone, convert_to_pixel_scale, normalize_images
from pylorus.model.frozen_features import FeatureBatch
from pylorus.model.frozen_prefix import CutNetwork
from pylorus.model.metrics import EpochMetrics, FirstNonFiniteLoss


def compute_peak_lr(stage: StageConfig, optimizer: OptimizerConfig) -> float:
    """Return the stage's own learning rate, or its multiple of the run's."""
    return stage.lr if stage.lr is not None else optimizer.lr * stage.lr_factor


def get_monitor_mode(stage: StageConfig) -> Literal["min", "max"]:
    """Return whether a smaller or a larger value of the monitored metric is better."""
    return "min" if stage.monitor == "loss" else "max"


def build_optimizer(network: nn.Module, stage: StageConfig, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable parameters, grouped by layer where their learning rates differ.

    Raises:
        PylorusError: If timm has no optimizer of that name.
    """
    known = [str(name) for name in list_optimizers()]
    if config.name not in known:
        raise PylorusError(f'optimizer.name: timm has no "{config.name}".{format_suggestion(config.name, known)}')
    optimizer = create_optimizer_v2(
        network,
        opt=config.name,
        lr=compute_peak_lr(stage, config),
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        layer_decay=stage.layer_decay if stage.layer_decay < 1 else None,
        **cast(dict[str, Any], {"fused": True} if config.name in FUSED else {}),
    )
    for group in optimizer.param_groups:
        # timm leaves a group's lr_scale to its own schedulers; ours start from the group's learning rate.
        group["lr"] *= group.pop("lr_scale", 1.0)
    return optimizer


class WarmupCosine:
    """Learning rate as a fraction of its peak: linear warm-up, then half a cosine down to 0, or constant.

    Example:
        >>> schedule = WarmupCosine(steps=10, warmup=2, falls=True)
        >>> [round(schedule(step), 2) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """

    def __init__(self, *, steps: int, warmup: int, falls: bool) -> None:
        self.steps, self.warmup, self.falls = steps, warmup, falls

    def __call__(self, step: int) -> float:
        """Return the fraction, in [0, 1], at a step in [0, steps]."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if not self.falls:
            return 1.0
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_schedule(optimizer: torch.optim.Optimizer, stage: StageConfig, *, steps: int) -> dict[str, Any]:
    """Build the stage's learning-rate schedule in the form that Lightning expects.

    Args:
        optimizer: The optimizer whose learning rates it changes.
        stage: Names the schedule, its warm-up and the metric that a plateau is judged by.
        steps: Optimizer steps in the whole stage.
    """
    scheduler: LRScheduler | ReduceLROnPlateau
    if stage.schedule == "plateau":
        scheduler = ReduceLROnPlateau(optimizer, mode=get_monitor_mode(stage), factor=0.1, patience=3)
        return {"scheduler": scheduler, "interval": "epoch", "monitor": "monitor"}
    lr_factor = WarmupCosine(steps=steps, warmup=round(stage.warmup * steps), falls=stage.schedule == "cosine")
    return {"scheduler": LambdaLR(optimizer, lr_factor), "interval": "step"}


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Attributes:
        name: Name of the stage; first part of every metric's name.
        config: The user's configuration of the stage.
        first_epoch: Epochs that earlier stages ran: the offset of this stage's curves on the run's axis.
        seed: Random seed of the stage.
    """

    name: str
    config: StageConfig
    first_epoch: int
    seed: int


class Classifier(pl.LightningModule):
    """Train a network for one stage; takes uint8 RGB images and normalizes them on the network's device."""

    mean: Tensor
    std: Tensor
    class_weights: Tensor

    def __init__(
        self,
        backbone: Backbone,
        names: Sequence[str],
        plan: StagePlan,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        *,
        images_of_class: Sequence[int] | None = None,
        channels_last: bool = True,
        processes: Processes = ALONE,
    ) -> None:
        """Set up the network, loss and metrics of a stage.

        Args:
            backbone: The network and the normalization of its input.
            names: Short name of each class, in label order.
            plan: The stage.
            optimizer: Optimizer configuration.
            loss: Loss configuration; "balanced" class weights need `images_of_class`.
            images_of_class: Number of training images of each class.
            channels_last: Memory layout of tensors; the numbers are the same.
            processes: The run's distributed processes, each of which computes its part of a batch.
        """
        super().__init__()
        self.strict_loading = False  # checkpoints omit frozen weights; `_check_weights` is strict about the rest
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = backbone.network.to(memory_format=self.memory_format)
        self.cut: CutNetwork | None = None
        """The network split in two, if features are used in place of images."""
        self.sample_ids: dict[str, NDArray[np.str_]] = {}
        """IDs of training and validation images, by row: for the message when a loss becomes NaN or infinite."""
        self._non_finite = {"train": FirstNonFiniteLoss(), "val": FirstNonFiniteLoss()}
        self.processes = processes
        self.names, self.plan, self.optimizer_config, self.loss_config = tuple(names), plan, optimizer, loss
        for name, tensor in zip(("mean", "std"), convert_to_pixel_scale(backbone.mean, backbone.std), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer(
            "class_weights", _compute_class_weights(loss, len(self.names), images_of_class), persistent=False
        )
        self.tallies = nn.ModuleDict(
            {"train_part": EpochMetrics(len(self.names)), "val_part": EpochMetrics(len(self.names))}
        )

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits (batch, classes) of uint8 RGB images (batch, 3, size, size).

        Raises:
            ValueError: If the images do not have three channels.
        """
        logits: Tensor = self.network(self.normalize_images(image))
        return logits.float()

    def normalize_images(self, image: Tensor) -> Tensor:
        """Normalize uint8 RGB images (batch, 3, size, size), in the network's memory layout.

        Raises:
            ValueError: If the images do not have three channels.
        """
        return normalize_images(image, self.mean, self.std).contiguous(memory_format=self.memory_format)

    def compute_logits(self, batch: Batch | FeatureBatch) -> Tensor:
        """Compute logits (batch, classes) of images, or of the features that replace them."""
        if isinstance(batch, Batch):
            logits: Tensor = self(batch.image)
            return logits
        if self.cut is None:
            raise ValueError("found features, expected images: the network was not split")
        return self.cut.run_suffix(batch.features).float()

    def compile_network(self) -> None:
        """Compile the network with torch, or its suffix if it is split; compilation happens at the first call."""
        if self.cut is not None:
            self.cut.compile_suffix()
        else:
            self.network.compile()

    def on_train_batch_start(self, batch: Batch | FeatureBatch, batch_idx: int) -> None:
        """Seed dropout from stage seed, epoch and step, so that a resumed run draws the same random numbers.

        Each process draws its own, for its own images.
        """
        rank = (self.processes.index,) if self.processes.index else ()
        torch.manual_seed(compute_seed(self.plan.seed, "step", self.current_epoch, batch_idx, *rank))

    def training_step(self, batch: Batch | FeatureBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self._compute_batch_loss(batch, "train_part")
        self._non_finite["train"].check_loss(loss, batch.row, batch_idx)
        return loss

    def validation_step(self, batch: Batch | FeatureBatch, batch_idx: int) -> None:
        """Accumulate a batch's loss and confusion matrix."""
        self._non_finite["val"].check_loss(self._compute_batch_loss(batch, "val_part"), batch.row, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's metrics: Lightning validates after the last training batch, so both splits are complete.

        Raises:
            PylorusError: If a loss became NaN or infinite.
        """
        name, monitor = self.plan.name, self.plan.config.monitor
        metrics = self._get_metrics("train_part").compute_and_reset(f"{name}/train", self.names)
        metrics |= self._get_metrics("val_part").compute_and_reset(f"{name}/val", self.names)
        for split in ("train", "val"):
            if not np.isfinite(metrics[f"{name}/{split}/loss"]):
                raise PylorusError(self._explain_non_finite_loss(split))
        metrics[f"{name}/lr"] = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        # "step" is the loggers' x-axis in Lightning: epochs over the whole run, so that stages follow each other.
        self.log_dict({**metrics, "step": float(self.plan.first_epoch + self.current_epoch + 1)})
        monitored = f"{name}/val/{monitor}" + ("" if monitor in ("loss", "accuracy") else "/average")
        self.log("monitor", metrics[monitored], logger=False)  # read by checkpoints and early stopping
        schedule = self.lr_schedulers()
        if isinstance(schedule, ReduceLROnPlateau) and not self.trainer.sanity_checking:
            schedule.step(metrics[monitored])

    def _explain_non_finite_loss(self, split: str) -> str:
        stage, sample_ids = self.plan.name, self.sample_ids.get(split)
        rows = [
            row for process_rows in self.processes.gather(self._non_finite[split].get_rows()) for row in process_rows
        ]
        first_ids = [f"row {row}" if sample_ids is None else sample_ids[row] for row in rows]
        loss = "the training loss" if split == "train" else "the validation loss, but not yet the training loss,"
        first_images = (
            "It happened first in the batch of these images (split.csv has their files):\n"
            f"{format_name_list(first_ids)}\n"
        )
        return (
            f"{loss} of stage {stage} became NaN or infinite in epoch {self.current_epoch + 1}. "
            f"Lower optimizer.lr or stages.{stage}.lr, or set trainer.precision=32.\n"
            f"{first_images if first_ids else ''}"
            "Start a new run with other values: resumed, this one would fail again at the same step."
        )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule, except a plateau's, which steps at validation: here a checkpoint would miss it."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def configure_optimizers(self) -> Any:
        """Build one optimizer and one schedule for the whole stage."""
        optimizer = build_optimizer(self.network, self.plan.config, self.optimizer_config)
        steps = int(self.trainer.estimated_stepping_batches)
        return {
            "optimizer": optimizer,
            "lr_scheduler": build_schedule(optimizer, self.plan.config, steps=steps),
        }

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip the gradient norm here, since Lightning refuses to clip with a fused optimizer."""
        if self.optimizer_config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.optimizer_config.clip)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Omit frozen weights: they have not changed since the stage began, and take hundreds of MB per epoch."""
        for name in self._list_frozen_names():
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check a checkpoint of this stage before Lightning loads it: it must lack only the frozen weights."""
        self._check_weights(checkpoint["state_dict"])

    def load_stage_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights from a checkpoint of this stage.

        Raises:
            ValueError: If it does not hold exactly the weights and statistics that change in this stage.
        """
        self._check_weights(weights)
        self.load_state_dict(weights, strict=False)

    def _check_weights(self, weights: Mapping[str, Tensor]) -> None:
        mismatched = (set(self.state_dict()) - self._list_frozen_names()) ^ set(weights)
        if mismatched:
            raise ValueError(
                f"not a checkpoint of stage {self.plan.name}: it differs in {', '.join(sorted(mismatched))}"
            )

    def _list_frozen_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if not parameter.requires_grad}

    def _compute_batch_loss(self, batch: Batch | FeatureBatch, split: str) -> Tensor:
        logits = self.compute_logits(batch)
        image_weights = self.class_weights[batch.label]
        losses = functional.cross_entropy(
            logits,
            batch.label,
            weight=self.class_weights,
            label_smoothing=self.loss_config.label_smoothing,
            reduction="none",
        )
        loss = losses.sum() / image_weights.sum()
        self._get_metrics(split).add_batch(loss, image_weights.sum(), logits, batch.label)
        if split == "val_part" or not self.processes.is_distributed:
            return loss
        # Gradients are averaged over processes: scaled like this, they give the whole batch's gradient.
        total_weight = image_weights.sum()
        distributed.all_reduce(total_weight)
        return losses.sum() * self.processes.count / total_weight

    def gather_metric_sums(self) -> dict[str, Tensor]:
        """Return the sums over this epoch's training batches so far, over all processes."""
        return self._get_metrics("train_part").gather_sums(self.processes)

    def restore_metric_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Resume from the sums accumulated before an interruption."""
        self._get_metrics("train_part").restore_sums(sums)

    def _get_metrics(self, split: str) -> EpochMetrics:
        metrics = self.tallies[split]
        assert isinstance(metrics, EpochMetrics)
        return metrics


def _compute_class_weights(loss: LossConfig, classes: int, images_of_class: Sequence[int] | None) -> Tensor:
    """Return one weight per class: inverse to its frequency if configured, with mean 1 over the images."""
    if loss.class_weights == "none":
        return torch.ones(classes)
    if images_of_class is None:
        raise ValueError("balanced class weights need images_of_class")
    counts = torch.tensor(images_of_class, dtype=torch.float32)
    return counts.sum() / (classes * counts)
