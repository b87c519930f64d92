"""The losses that training can minimize: one registry, which training, checklist, card and configuration read.

To add a loss: one class here, with an entry in `LOSSES`, and conf/loss/NAME.yaml. A loss from outside Pylorus is named
by `loss._target_` in the user's own configuration. A loss gives one value per image; the loss of a batch is their sum
divided by the sum of the images' weights, over all devices together.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from pylorus.config.checks import format_loss_name
from pylorus.config.instantiation import TARGET, build_callable, get_object, get_target, list_parameters
from pylorus.config.schema import LossConfig
from pylorus.core.distributed import Processes
from pylorus.core.errors import PylorusError, format_suggestion

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""A loss of logits (batch, classes) and labels (batch,): one value per image, or the mean of a batch's images."""


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
    kind = _get_loss(config.name)
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
    loss: str | LossFunction, class_weights: Sequence[float] | None, *, label_smoothing: float, classes: int
) -> ImageLoss:
    """Build a loss by its name in `LOSSES`, or from a function or module of the caller.

    Args:
        loss: The name, or the function.
        class_weights: Weight of each class; None: 1. Of a named loss only.
        label_smoothing: Fraction of each label that is spread evenly over all classes. Of a named loss only.
        classes: Number of classes.

    Raises:
        PylorusError: If there is no such loss, or it can't take these arguments.
    """
    weights = torch.ones(classes) if class_weights is None else torch.tensor(list(class_weights), dtype=torch.float32)
    if len(weights) != classes:
        raise PylorusError(f"class_weights: found {len(weights)} weights for {classes} classes.")
    if isinstance(loss, str):
        built = build_loss(LossConfig(name=loss, label_smoothing=label_smoothing), classes=classes)
        built.class_weights = weights
        return built
    if class_weights is not None or label_smoothing:
        raise PylorusError("class_weights, label_smoothing: your own loss applies them itself. Leave them out.")
    return ExternalLoss(loss, weights, name=getattr(loss, "__name__", type(loss).__name__))


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
