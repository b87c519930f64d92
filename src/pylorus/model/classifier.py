"""The LightningModule: a backbone with a new head, its loss, its metrics and its optimizer.

`Classifier` is built from plain values, for any `pl.Trainer`; `StageClassifier` adds what a stage of a run needs.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import numpy as np
import pytorch_lightning as pl
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from pydantic import InstanceOf
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pylorus.config.schema import LossConfig, ModelConfig, OptimizerConfig, StageConfig
from pylorus.core.arguments import check_arguments
from pylorus.core.distributed import SINGLE_PROCESS, Processes, compute_seed
from pylorus.core.errors import PylorusError, translate_errors
from pylorus.core.io import validate
from pylorus.data.dataset import Batch
from pylorus.evaluation.confusion import ClassMetric, get_monitor_column
from pylorus.hardware import FullBatchForward
from pylorus.model.averaging import load_average, save_average
from pylorus.model.backbone import (
    Backbone,
    build_backbone,
    check_image_batch,
    convert_to_pixel_scale,
    normalize_images,
)
from pylorus.model.finetuning import StepLoss, build_optimizer, build_schedule, check_optimizer_name
from pylorus.model.frozen_features import FeatureBatch
from pylorus.model.frozen_prefix import CutNetwork
from pylorus.model.objectives import (
    OWN_LOSS,
    ClassWeights,
    EpochMetrics,
    FirstNonFiniteLoss,
    LossFunction,
    build_loss,
    check_class_names,
    check_data,
    compute_class_weights,
    explain_non_finite_loss,
    resolve_loss,
)
from pylorus.model.weights import read_checkpoint

ARGUMENTS = {
    "model.weights=none": "weights='none'",
    "model.weights": "weights",
    "model.name": "model",
    "model.args": "model_args",
    "model.mean": "mean",
    "model.std": "std",
    "data.image_size": "image_size",
}
"""What the keys in messages are called in Python."""


class Classifier(pl.LightningModule):
    """A pretrained backbone with a new head; takes uint8 RGB images and normalizes them on the network's device.

    It trains with any `pl.Trainer` and logs `train/…`, `val/…` and `test/…`: loss, accuracy, and precision, sensitivity
    and F1 of each class and their average. Without `pylorus.FreezeBackbone` the whole network is trained.
    """

    mean: Tensor
    std: Tensor

    @check_arguments
    def __init__(
        self,
        model: str | InstanceOf[Backbone],
        classes: Sequence[str],
        *,
        weights: str | Path = ModelConfig.weights,
        model_args: Mapping[str, Any] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_size: Annotated[int, Ge(32)] | None = None,
        loss: str | LossFunction = str(LossConfig.name),
        class_weights: ClassWeights = None,
        label_smoothing: float = LossConfig.label_smoothing,
        optimizer: str = OptimizerConfig.name,
        lr: float = OptimizerConfig.lr,
        weight_decay: float = OptimizerConfig.weight_decay,
        momentum: float = OptimizerConfig.momentum,
        clip: float | None = OptimizerConfig.clip,
        layer_decay: float = StageConfig.layer_decay,
        schedule: Literal["cosine", "plateau", "constant"] = cast(Any, StageConfig.schedule),
        warmup: float = StageConfig.warmup,
        channels_last: bool = True,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        """Build the network, its loss and its metrics.

        Args:
            model: Name of a timm model, preferably with its tag (resnet50.tv_in1k); or a backbone that is already
                built: `load_from_checkpoint` can't build that again.
            classes: Name of each class, in label order.
            weights: Initial weights of the backbone; hub: downloaded once; none: random; or a file of tensors.
            model_args: Further arguments of `timm.create_model`.
            mean: Mean of red, green and blue, for pixels in [0, 1], of the images on which the weights were trained;
                None: as timm states it for the model.
            std: Standard deviation of these images; None: as timm states it.
            image_size: Side of the input in pixels, at least 32; None: the size that the backbone was designed for.
            loss: cross_entropy, logit_adjusted, focal, or your own: an `nn.Module` or function of logits (batch,
                classes) and labels (batch,).
            class_weights: Weight of each class in the loss, in label order or by name; balanced: inversely to its
                frequency among the data module's training images; None: 1.
            label_smoothing: Fraction of each label that is spread evenly over all classes.
            optimizer: adamw, sgd, or any other optimizer of timm.
            lr: Peak learning rate.
            weight_decay: Weight decay; not applied to biases and normalization layers.
            momentum: Momentum, for optimizers that use it.
            clip: Largest gradient norm of a step, unless the Trainer has `gradient_clip_val`; None: no limit.
            layer_decay: Learning rate of a layer divided by that of the next layer towards the head.
            schedule: cosine, constant, or plateau, which follows `val/loss`.
            warmup: Fraction of the steps over which the learning rate rises from zero.
            channels_last: Memory layout of tensors; the numbers are the same.
            seed: Random seed of the head's initial weights and of dropout, at least 0.

        Raises:
            PylorusError: If a value is not allowed, or the weights are unavailable or do not match.
        """
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        check_class_names(classes)
        check_optimizer_name(optimizer, where="optimizer")
        self.optimizer_config = validate(
            OptimizerConfig,
            {"name": optimizer, "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "clip": clip},
        )
        self.stage_config = validate(StageConfig, {"layer_decay": layer_decay, "schedule": schedule, "warmup": warmup})
        if isinstance(model, str):
            if not isinstance(loss, str):
                arguments["loss"] = f"{OWN_LOSS}{getattr(loss, '__name__', type(loss).__name__)}"
            self.save_hyperparameters(_convert_to_plain(arguments))
            with torch.random.fork_rng(devices=[]):  # leaves torch's global generator as it was
                torch.manual_seed(compute_seed(seed, "head"))
                model_config = ModelConfig(
                    name=model,
                    weights=str(weights),
                    args=dict(model_args or {}),
                    mean=None if mean is None else list(mean),
                    std=None if std is None else list(std),
                )
                with translate_errors(ARGUMENTS):
                    backbone = build_backbone(model_config, classes=len(classes), image_size=image_size)
        else:
            backbone = model
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = backbone.network.to(memory_format=self.memory_format)
        self.names, self.image_size, self.seed = tuple(classes), backbone.image_size, seed
        self.loss = resolve_loss(loss, class_weights, label_smoothing=label_smoothing, classes=classes)
        kind = f"loss: found the {self.loss.label}" if self.loss.corrects_frequency else ""
        self._counts_for = "class_weights: found 'balanced'" if class_weights == "balanced" else kind
        self.step_loss, self.processes = StepLoss(), SINGLE_PROCESS
        """The distributed processes, each of which computes its part of a batch."""
        for name, tensor in zip(("mean", "std"), convert_to_pixel_scale(backbone.mean, backbone.std), strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.tallies = nn.ModuleDict(
            {split: EpochMetrics(len(self.names)) for split in ("train_part", "val_part", "test_part")}
        )

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        *,
        loss: str | LossFunction | None = None,
        **changed: Any,
    ) -> Self:
        """Load a classifier from a checkpoint that any Trainer saved of it; reads tensors and plain values only.

        Args:
            checkpoint_path: The file.
            map_location: Device to load to; None: the CPU.
            loss: Your own loss, which a checkpoint does not hold, or a name; None: the named loss of the checkpoint.
            changed: Arguments of the constructor that shall differ from those that it was built with.

        Raises:
            PylorusError: If the file is not a checkpoint of a `Classifier`; the message says what is wrong.
        """
        state, hyperparameters = read_checkpoint(Path(checkpoint_path), map_location or "cpu")
        # The checkpoint holds all weights, so none are downloaded.
        known = set(inspect.signature(cls.__init__).parameters) - {"self"}
        arguments = {**hyperparameters, **changed, "weights": "none"}
        unknown = sorted(str(name) for name in set(arguments) - known)
        is_named = all(isinstance(arguments.get(name, ""), str) for name in ("model", "loss"))
        if unknown or not is_named or not {"model", "classes"} <= set(arguments):
            problem = (
                f"unknown hyperparameter {unknown[0][:100]!r}" if unknown else "it does not name model and classes"
            )
            raise PylorusError(f"{checkpoint_path}: this is not a checkpoint of pylorus.Classifier: {problem}.")
        saved = str(arguments.pop("loss", OWN_LOSS))  # older checkpoints say nothing of a loss of the user's own
        if loss is None and saved.startswith(OWN_LOSS):
            own = saved.removeprefix(OWN_LOSS)
            raise PylorusError(
                f"loss: {checkpoint_path} was trained with a loss of your own{f', {own}' if own else ''}, which a "
                "checkpoint does not hold. Pass loss=…, or loss='cross_entropy' to compute that in its place."
            )
        classifier = cls(**arguments, loss=saved if loss is None else loss)
        if loss is None or isinstance(loss, str):
            state = {name: value for name, value in state.items() if not name.startswith("loss.")}
        try:
            classifier.load_state_dict(state)
        except RuntimeError as error:
            raise PylorusError(f"{checkpoint_path}: the weights do not match {arguments['model']}: {error}") from error
        return classifier.to(map_location or "cpu").eval()

    def setup(self, stage: str) -> None:
        """Check the data module, and take this process's place among the Trainer's, if a run has not set it.

        Raises:
            PylorusError: If the data module has other classes, or the loss needs one that counts the training images.
        """
        data = getattr(self.trainer, "datamodule", None)
        check_data(data, self.names, image_size=self.image_size)
        if self._counts_for and stage != "predict":
            if data is None or not hasattr(data, "get_labels"):
                raise PylorusError(
                    f"{self._counts_for}, which needs a pylorus.ImageDataModule to count its training images. Pass it "
                    "to the Trainer, or weight cross_entropy by numbers, as in class_weights=[1.0, 2.5]."
                )
            counts = np.bincount(data.get_labels("train"), minlength=len(self.names)).tolist()
            if not self.loss.corrects_frequency:
                self.loss.class_weights.copy_(compute_class_weights("balanced", len(self.names), counts))
            self.loss.set_class_counts(counts)
            self._counts_for = ""
        self.step_loss.batches = self.trainer.accumulate_grad_batches
        if self.trainer.world_size > 1 and not self.processes.is_distributed:
            self.processes = Processes(self.trainer.global_rank, self.trainer.world_size, self.trainer.local_rank)

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits (batch, classes) of uint8 RGB images (batch, 3, size, size).

        Raises:
            PylorusError: If the images have another shape, or pixels outside [0, 255] or only in [0, 1].
        """
        check_image_batch(image)
        logits: Tensor = self.network(self.normalize_images(image))
        return logits.float()

    def normalize_images(self, image: Tensor) -> Tensor:
        """Normalize uint8 RGB images (batch, 3, size, size), in the network's memory layout.

        Raises:
            ValueError: If the images do not have three channels.
        """
        return normalize_images(image, self.mean, self.std).contiguous(memory_format=self.memory_format)

    def on_train_batch_start(self, batch: Batch | FeatureBatch, batch_idx: int) -> None:
        """Seed dropout from seed, epoch and step, so that a resumed training draws the same random numbers.

        Each process draws its own, for its own images.
        """
        rank = (self.processes.index,) if self.processes.index else ()
        seed = compute_seed(self.seed, "step", self.current_epoch, batch_idx, *rank)
        # torch.manual_seed seeds what the machine does not have too, which takes a millisecond.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def compute_logits(self, batch: Batch | FeatureBatch) -> Tensor:
        """Compute logits (batch, classes) of images."""
        assert isinstance(batch, Batch)
        logits: Tensor = self(batch.image)
        return logits

    def training_step(self, batch: Batch | FeatureBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._compute_batch_loss(batch, "train_part")

    def validation_step(self, batch: Batch | FeatureBatch, batch_idx: int) -> None:
        """Accumulate a batch's loss and confusion matrix."""
        self._compute_batch_loss(batch, "val_part")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate a batch's loss and confusion matrix."""
        self._compute_batch_loss(batch, "test_part")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the probabilities (batch, classes), not calibrated, on the CPU."""
        return self.compute_logits(batch).softmax(dim=1).cpu()

    def on_train_epoch_end(self) -> None:
        """Log the epoch's training metrics."""
        self._log_metrics("train")

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's validation metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_metrics("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save averaged weights in place of the last ones, if there are any; see `pylorus.AverageWeights`."""
        save_average(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the last weights, if the checkpoint of a training has averages as well."""
        load_average(self.trainer, checkpoint)

    def _log_metrics(self, split: str) -> None:
        metrics = self._get_metrics(f"{split}_part").compute_and_reset(split, self.names)
        if split != "test" and not math.isfinite(metrics[f"{split}/loss"]):
            raise PylorusError(
                f"{split}/loss became NaN or infinite in epoch {self.current_epoch + 1}. Lower lr, set the Trainer's "
                "precision to 32, or check a loss of your own."
            )
        self.log_dict(metrics)

    def configure_optimizers(self) -> Any:
        """Build one optimizer and one schedule for the whole training.

        Raises:
            PylorusError: If the schedule depends on the number of steps and the Trainer has no limit.
        """
        # With 16-bit floats, gradients are unscaled before clipping; a fused optimizer would do so afterwards.
        fused = self.trainer.precision != "16-mixed"
        optimizer = build_optimizer(self.network, self.stage_config, self.optimizer_config, fused=fused)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps) and self.stage_config.schedule == "cosine":
            raise PylorusError(
                "schedule: cosine needs the number of steps: give the Trainer max_epochs or max_steps, or use "
                "schedule='constant'."
            )
        schedule = build_schedule(optimizer, self.stage_config, steps=0 if math.isinf(steps) else int(steps))
        return {"optimizer": optimizer, "lr_scheduler": schedule | {"monitor": self._get_monitored_name()}}

    def _get_monitored_name(self) -> str:
        return "val/loss"

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Complete and clip the gradients here, since Lightning refuses to clip with a fused optimizer."""
        self.step_loss.normalize_gradients(self.network.parameters(), self.processes)
        limit = self.optimizer_config.clip if gradient_clip_val is None else gradient_clip_val
        if limit is not None and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.network.parameters(), limit)
        elif limit is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)

    def _compute_batch_loss(self, batch: Batch | FeatureBatch, split: str) -> Tensor:
        logits = self.compute_logits(batch)
        losses, weight = self.loss(logits, batch.label), self.loss.compute_weights(batch.label).sum()
        loss: Tensor = losses.sum() / weight
        self._get_metrics(split).add_batch(loss, weight, logits, batch.label)
        if split != "train_part" or not (self.processes.is_distributed or self.step_loss.batches > 1):
            return loss
        return self.step_loss.scale_batch(losses, weight, self.processes)

    def _get_metrics(self, split: str) -> EpochMetrics:
        metrics = self.tallies[split]
        assert isinstance(metrics, EpochMetrics)
        return metrics


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


class StageClassifier(Classifier):
    """A classifier for one stage of a run.

    It trains on cached features where the network is split at its frozen prefix, stops at a loss that is NaN or
    infinite, logs the metrics of all stages of a run on one axis, and leaves frozen weights out of its checkpoints.
    """

    def __init__(
        self,
        backbone: Backbone,
        names: Sequence[str],
        plan: StagePlan,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        *,
        images_of_class: Sequence[int] | None = None,
        metrics: Sequence[ClassMetric] | None = None,
        channels_last: bool = True,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        """Set up the network, loss and metrics of a stage.

        Args:
            backbone: The network and the normalization of its input.
            names: Short name of each class, in label order.
            plan: The stage.
            optimizer: Optimizer configuration.
            loss: Loss configuration; "balanced" class weights need `images_of_class`.
            images_of_class: Number of training images of each class.
            metrics: The indices of a class to compute in each epoch; None: those that tables show.
            channels_last: Memory layout of tensors; the numbers are the same.
            processes: The run's distributed processes, each of which computes its part of a batch.
        """
        super().__init__(backbone, names, channels_last=channels_last, seed=plan.seed)
        self.strict_loading = False  # checkpoints omit frozen weights; `_check_weights` is strict about the rest
        self.cut: CutNetwork | None = None
        """The network split in two, if features are used in place of images."""
        self.full_batch_forward: FullBatchForward | None = None
        """How full training batches pass through the network, or its suffix; None: like all others."""
        self.sample_ids: dict[str, NDArray[np.str_]] = {}
        """IDs of training and validation images, by row: for the message when a loss becomes NaN or infinite."""
        self._non_finite = {"train": FirstNonFiniteLoss(), "val": FirstNonFiniteLoss()}
        self.processes, self.plan = processes, plan
        self.stage_config, self.optimizer_config = plan.config, optimizer
        self.loss = build_loss(loss, classes=len(self.names), images_of_class=images_of_class)
        for tally in self.tallies.values():
            if metrics is not None and isinstance(tally, EpochMetrics):
                tally.metrics = list(metrics)

    def compute_logits(self, batch: Batch | FeatureBatch) -> Tensor:
        """Compute logits (batch, classes) of images, or of the features that replace them."""
        full = self.full_batch_forward
        if full is not None and self.training and len(batch.label) == full.images:
            inputs = (self.normalize_images(batch.image),) if isinstance(batch, Batch) else batch.features
            return full(inputs).float()
        if isinstance(batch, Batch):
            return super().compute_logits(batch)
        if self.cut is None:
            raise ValueError("found features, expected images: the network was not split")
        return self.cut.run_suffix(batch.features).float()

    def training_step(self, batch: Batch | FeatureBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss = super().training_step(batch, batch_idx)
        self._non_finite["train"].check_loss(loss, batch.row, batch_idx)
        return loss

    def validation_step(self, batch: Batch | FeatureBatch, batch_idx: int) -> None:
        """Accumulate a batch's loss and confusion matrix."""
        self._non_finite["val"].check_loss(self._compute_batch_loss(batch, "val_part"), batch.row, batch_idx)

    def on_train_epoch_end(self) -> None:
        """Do nothing: training metrics are logged with those of validation."""

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
                raise PylorusError(
                    explain_non_finite_loss(
                        split,
                        stage=name,
                        epoch=self.current_epoch,
                        rows=[
                            row for rows in self.processes.gather(self._non_finite[split].get_rows()) for row in rows
                        ],
                        sample_ids=self.sample_ids.get(split),
                    )
                )
        metrics[f"{name}/lr"] = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        # "step" is the loggers' x-axis in Lightning: epochs over the whole run, so that stages follow each other.
        self.log_dict({**metrics, "step": float(self.plan.first_epoch + self.current_epoch + 1)})
        monitored = f"{name}/{get_monitor_column(monitor)}"
        self.log("monitor", metrics[monitored], logger=False)  # read by checkpoints and early stopping
        schedule = self.lr_schedulers()
        if isinstance(schedule, ReduceLROnPlateau) and not self.trainer.sanity_checking:
            schedule.step(metrics[monitored])

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule, except a plateau's, which steps at validation: here a checkpoint would miss it."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Omit frozen weights: they have not changed since the stage began, and take hundreds of MB per epoch."""
        super().on_save_checkpoint(checkpoint)
        for name in self._list_frozen_names():
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check a checkpoint of this stage before Lightning loads it: it must lack only the frozen weights."""
        super().on_load_checkpoint(checkpoint)
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

    def _get_monitored_name(self) -> str:
        return "monitor"

    def _list_frozen_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if not parameter.requires_grad}

    def gather_metric_sums(self) -> dict[str, Tensor]:
        """Return the sums over this epoch's training batches so far, over all processes."""
        return self._get_metrics("train_part").gather_sums(self.processes)

    def restore_metric_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Resume from the sums accumulated before an interruption."""
        self._get_metrics("train_part").restore_sums(sums)


def _convert_to_plain(value: Any) -> Any:
    """Convert a constructor's arguments to the plain values that a checkpoint may hold."""
    if isinstance(value, Mapping):
        return {str(name): _convert_to_plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_convert_to_plain(each) for each in value]
    if hasattr(value, "tolist"):  # of NumPy or torch
        return value.tolist()
    return str(value) if isinstance(value, Path | str) else value
