"""What training minimizes, and how: the losses in one registry, the optimizer and the learning-rate schedule.

To add a loss: one class here, with an entry in `LOSSES`, and conf/loss/NAME.yaml. A loss from outside Pylorus is named
by `loss._target_` in the user's own configuration. A loss gives one value per image; the loss of a batch is their sum
divided by the sum of the images' weights, over all devices together.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, cast

import torch
from annotated_types import Gt
from timm.optim._optim_factory import create_optimizer_v2, list_optimizers
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from pylorus.config.instantiation import TARGET, build_callable, get_object, get_target, list_parameters
from pylorus.config.keys import format_loss_name
from pylorus.config.schema import FUSED_OPTIMIZERS, LossConfig, OptimizerConfig, StageConfig
from pylorus.core.distributed import Processes
from pylorus.core.errors import PylorusError, format_suggestion
from pylorus.core.io import validate

PositiveNumber = Annotated[float, Gt(0)]
LossFunction = Callable[[Tensor, Tensor], Tensor]
"""A loss of logits (batch, classes) and labels (batch,): one value per image, or the mean of a batch's images."""
ClassWeights = Literal["balanced"] | Mapping[str, PositiveNumber] | Sequence[PositiveNumber] | None
"""Weight of each class in label order or by name; balanced: inversely to its frequency among the training images."""
OWN_LOSS = "own: "
"""What the hyperparameter `loss` begins with where the loss is the user's own, before its name."""


class ImageLoss(nn.Module):
    """A loss with one value per image.

    Args:
        class_weights: Weight of each class, of shape (classes,).
    """

    label = ""
    """What texts about a run call it."""

    class_weights: Tensor

    def __init__(self, class_weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights, persistent=False)

    def compute_weights(self, label: Tensor) -> Tensor:
        """Return the weight of each image, of shape (batch,)."""
        return self.class_weights[label]

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the weighted loss of each image, of shape (batch,).

        Args:
            logits: Shape (batch, classes).
            label: Shape (batch,), in [0, classes).
        """
        raise NotImplementedError


class CrossEntropy(ImageLoss):
    """Cross-entropy with class weights and label smoothing."""

    label = format_loss_name("cross_entropy")

    def __init__(self, class_weights: Tensor, *, label_smoothing: float = 0.0) -> None:
        super().__init__(class_weights)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the weighted cross-entropy of each image."""
        return functional.cross_entropy(
            logits, label, weight=self.class_weights, label_smoothing=self.label_smoothing, reduction="none"
        )


class FocalLoss(CrossEntropy):
    """Focal loss (Lin et al. 2017): cross-entropy times (1 - p)^gamma, so that easy images count less.

    p is the probability of the true class; gamma = 0 is cross-entropy.

    Raises:
        ValueError: If gamma is negative.
    """

    label = format_loss_name("focal")

    def __init__(self, class_weights: Tensor, *, gamma: float = 2.0, label_smoothing: float = 0.0) -> None:
        super().__init__(class_weights, label_smoothing=label_smoothing)
        if not gamma >= 0:
            raise ValueError(f"gamma: found {gamma}, expected 0 or more")
        self.gamma = gamma

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the weighted focal loss of each image."""
        log_probability = functional.log_softmax(logits, dim=1).gather(1, label[:, None]).squeeze(1)
        # The gradient of a power below 1 is infinite at 0, that is, where an image is fitted perfectly.
        error = (-torch.expm1(log_probability)).clamp_min(1e-12)
        return error**self.gamma * super().forward(logits, label)


class ExternalLoss(ImageLoss):
    """A callable from outside Pylorus: (logits, labels) → one value per image, or the mean of a batch's images.

    Args:
        function: The callable; an nn.Module without trainable parameters, or a function.
        class_weights: Only their number is used: a class that takes `class_weights` applies them itself.
        name: What messages call it.

    Raises:
        PylorusError: If it has trainable parameters, which the optimizer does not know.
    """

    def __init__(self, function: LossFunction, class_weights: Tensor, *, name: str) -> None:
        super().__init__(torch.ones_like(class_weights))
        self.function, self.name = function, name
        if isinstance(function, nn.Module) and any(parameter.requires_grad for parameter in function.parameters()):
            raise PylorusError(f"loss: {name} has trainable parameters, which no optimizer updates. Make them buffers.")

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the loss of each image; a batch's mean counts once for each of its images.

        Raises:
            PylorusError: If the result has another shape.
        """
        losses = self.function(logits, label)
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        if shape not in ((), tuple(label.shape)):
            raise PylorusError(
                f"loss: {self.name} gave {shape}, expected a tensor of shape () or {tuple(label.shape)}."
            )
        return losses.expand(len(label))


NOMINAL_WEIGHT = 32.0
"""What the loss of a batch is divided by until the weights of all batches of its step are known."""


class StepLoss:
    """The loss of an optimizer step: over all its images, in all processes and batches, losses divided by weights.

    Where several batches make a step, the weights of the later ones are unknown when the first one's gradients are
    computed. So gradients are those of the sum, scaled by a constant, until `normalize_gradients`.

    Attributes:
        batches: Number of batches for each step; Lightning divides the loss of each by it.
    """

    def __init__(self) -> None:
        self.batches = 1
        self._weight: Tensor | None = None

    def scale_batch(self, losses: Tensor, weight: Tensor, processes: Processes) -> Tensor:
        """Return what a process differentiates for its part of a batch.

        Args:
            losses: Loss of each image, of shape (batch,).
            weight: Sum of the images' weights, of shape ().
            processes: The processes, over which gradients are averaged.
        """
        if self.batches > 1:
            self._weight = weight if self._weight is None else self._weight + weight
            return losses.sum() * (processes.count * self.batches / NOMINAL_WEIGHT)
        total_weight = weight.clone()
        distributed.all_reduce(total_weight)
        return losses.sum() * processes.count / total_weight

    def normalize_gradients(self, parameters: Iterable[nn.Parameter], processes: Processes) -> None:
        """Divide the gradients of a step by the weight of its images, if it has several batches."""
        if self._weight is None:
            return
        if processes.is_distributed:
            distributed.all_reduce(self._weight)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        shards = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]
        torch._foreach_mul_(shards, NOMINAL_WEIGHT / self._weight)
        self._weight = None


LOSSES: dict[str, type[ImageLoss]] = {"cross_entropy": CrossEntropy, "focal": FocalLoss}
"""The losses by `loss.name`. Keys of `loss` that are parameters of the class are passed to it."""


def build_loss(config: LossConfig, *, classes: int, images_of_class: Sequence[int] | None = None) -> ImageLoss:
    """Build the configured loss.

    Args:
        config: The section `loss` of the configuration.
        classes: Number of classes.
        images_of_class: Number of training images of each class; balanced class weights need it.

    Raises:
        PylorusError: If there is no such loss, or it refuses its arguments.
        ValueError: If balanced class weights lack `images_of_class`.
    """
    weights = compute_class_weights(config.class_weights, classes, images_of_class)
    node = get_target(config)
    if node is not None:
        function = build_callable(node, key="loss", class_weights=weights, classes=classes)
        if config.class_weights != "none" and "class_weights" not in list_parameters(get_object(node, key="loss")):
            raise PylorusError(
                f"loss.class_weights: found {config.class_weights}, but {node[TARGET]} has no parameter class_weights. "
                "Leave it out, or add the parameter."
            )
        return ExternalLoss(function, weights, name=str(node[TARGET]))
    kind = _get_loss(str(config.name))
    for name in config.args:
        if name not in _list_arguments(kind):
            raise PylorusError(
                f"loss.args.{name}: {kind.label} has no such argument.{format_suggestion(name, _list_arguments(kind))}"
            )
    settings = {**asdict(config), **config.args}
    try:
        return kind(weights, **{name: settings[name] for name in _list_arguments(kind) & settings.keys()})
    except (TypeError, ValueError) as error:
        raise PylorusError(f"loss.args.{error}") from error


def resolve_loss(
    loss: str | LossFunction, class_weights: ClassWeights, *, label_smoothing: float, classes: Sequence[str]
) -> ImageLoss:
    """Build a loss by its name in `LOSSES`, or from a function or module of the caller.

    Args:
        loss: The name, or the function.
        class_weights: Weight of each class, also by its name; None: 1; balanced: 1 until the training images are known.
            Of a named loss only.
        label_smoothing: Fraction of each label that is spread evenly over all classes. Of a named loss only.
        classes: Name of each class, in label order.

    Raises:
        PylorusError: If there is no such loss, or it can't take these arguments.
    """
    weights = torch.tensor(_list_class_weights(class_weights, classes), dtype=torch.float32)
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise PylorusError(
                f"loss: found {loss!r}, expected one of {', '.join(LOSSES)}, or your own nn.Module or function of "
                f"logits and labels.{format_suggestion(loss, LOSSES)}"
            )
        settings = validate(LossConfig, {"name": loss, "label_smoothing": label_smoothing})
        built = build_loss(settings, classes=len(classes))
        built.class_weights = weights
        return built
    if class_weights is not None or label_smoothing:
        raise PylorusError("class_weights, label_smoothing: your own loss applies them itself. Leave them out.")
    if isinstance(loss, type):
        raise PylorusError(f"loss: found the class {loss.__name__}, expected an object. Write {loss.__name__}().")
    name = getattr(loss, "__name__", type(loss).__name__)
    _check_loss_arguments(loss, name)
    return ExternalLoss(loss, weights, name=name)


def _list_class_weights(class_weights: ClassWeights, classes: Sequence[str]) -> list[float]:
    """Return one weight per class, in label order."""
    if class_weights is None or isinstance(class_weights, str):
        return [1.0] * len(classes)
    if isinstance(class_weights, Mapping):
        for name in class_weights:
            if name not in classes:
                raise PylorusError(
                    f"class_weights: found {name!r}, which is not among the classes {', '.join(classes)}."
                    f"{format_suggestion(str(name), classes)}"
                )
        missing = [name for name in classes if name not in class_weights]
        if missing:
            raise PylorusError(f"class_weights: found none for {', '.join(missing)}, expected one for each class.")
        return [class_weights[name] for name in classes]
    if len(class_weights) != len(classes):
        raise PylorusError(f"class_weights: found {len(class_weights)} weights for {len(classes)} classes.")
    return list(class_weights)


def _check_loss_arguments(loss: LossFunction, name: str) -> None:
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise PylorusError(
            f"loss: {name} has the arguments {signature}, expected two: logits (batch, classes) and labels (batch,)."
        ) from error


def compute_class_weights(mode: str, classes: int, images_of_class: Sequence[int] | None) -> Tensor:
    """Return one weight per class: inverse to its frequency if configured, with mean 1 over the images."""
    if mode == "none":
        return torch.ones(classes)
    if images_of_class is None:
        raise ValueError("balanced class weights need images_of_class")
    counts = torch.tensor(images_of_class, dtype=torch.float32)
    return counts.sum() / (classes * counts)


def _get_loss(name: str) -> type[ImageLoss]:
    if name not in LOSSES:
        raise PylorusError(
            f'loss.name: there is no loss "{name}".{format_suggestion(name, LOSSES)} Available: {", ".join(LOSSES)}; '
            "your own: loss._target_ in a configuration file of yours."
        )
    return LOSSES[name]


def _list_arguments(kind: type[ImageLoss]) -> set[str]:
    return set(inspect.signature(kind).parameters) - {"class_weights"}


def compute_peak_lr(stage: StageConfig, optimizer: OptimizerConfig) -> float:
    """Return the stage's own learning rate, or its multiple of the run's."""
    return stage.lr if stage.lr is not None else optimizer.lr * stage.lr_factor


def get_monitor_mode(monitor: str) -> Literal["min", "max"]:
    """Return whether a smaller or a larger value of the monitored metric is better."""
    return "min" if monitor == "loss" else "max"


def check_optimizer_name(name: str, *, where: str) -> None:
    """Check that timm has an optimizer.

    Raises:
        PylorusError: If it has none of that name.
    """
    known = [str(each) for each in list_optimizers()]
    if name not in known:
        raise PylorusError(f'{where}: timm has no "{name}".{format_suggestion(name, known)}')


def build_optimizer(
    network: nn.Module, stage: StageConfig, config: OptimizerConfig, *, fused: bool = True
) -> torch.optim.Optimizer:
    """Build an optimizer over the trainable parameters, grouped by layer where their learning rates differ.

    Args:
        network: A timm model.
        stage: Learning rate and layer decay.
        config: Name and arguments of the optimizer.
        fused: Whether torch may update all weights at once.

    Raises:
        PylorusError: If timm has no optimizer of that name.
    """
    check_optimizer_name(config.name, where="optimizer.name")
    optimizer = create_optimizer_v2(
        network,
        opt=config.name,
        lr=compute_peak_lr(stage, config),
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        layer_decay=stage.layer_decay if stage.layer_decay < 1 else None,
        **cast(dict[str, Any], {"fused": True} if fused and config.name in FUSED_OPTIMIZERS else {}),
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
        scheduler = ReduceLROnPlateau(optimizer, mode=get_monitor_mode(stage.monitor), factor=0.1, patience=3)
        return {"scheduler": scheduler, "interval": "epoch", "monitor": "monitor"}
    lr_factor = WarmupCosine(steps=steps, warmup=round(stage.warmup * steps), falls=stage.schedule == "cosine")
    return {"scheduler": LambdaLR(optimizer, lr_factor), "interval": "step"}
