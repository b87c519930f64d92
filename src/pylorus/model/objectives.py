"""What training minimizes and measures: the losses in one registry, and epoch metrics, summed on the device.

To add a loss: one class here, with an entry in `LOSSES`, and conf/loss/NAME.yaml. A loss from outside is named by
`loss._target_` in the user's configuration. A loss gives one value per image; that of a batch is their sum divided by
the sum of the images' weights, over all devices together. Class names and data modules are checked here.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Gt
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric, SumMetric

from pylorus.config.instantiation import TARGET, build_callable, get_object, get_target, list_parameters
from pylorus.config.keys import format_loss_name
from pylorus.config.schema import LossConfig
from pylorus.core.distributed import Processes
from pylorus.core.errors import PylorusError, format_name_list, format_suggestion
from pylorus.core.io import validate
from pylorus.evaluation.confusion import (
    CLASS_METRICS,
    IMAGE_METRICS,
    ClassCounts,
    ClassMetric,
    compute_class_metric,
    overall_indices,
    select_class_metrics,
)

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
    corrects_frequency = False
    """Whether it corrects for the frequencies of the classes itself, so that class weights would do so twice."""

    class_weights: Tensor

    def __init__(self, class_weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("class_weights", class_weights, persistent=False)

    def set_class_counts(self, images_of_class: Sequence[int]) -> None:
        """Take the number of training images of each class, for a loss that depends on it."""

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


def _check_factor(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name}: found {value}, expected 0 or more")
    return value


class FocalLoss(CrossEntropy):
    """Focal loss (Lin et al. 2017): cross-entropy times (1 - p)^gamma, so that easy images count less.

    p is the probability of the true class; gamma = 0 is cross-entropy.

    Raises:
        ValueError: If gamma is not a finite number of at least 0.
    """

    label = format_loss_name("focal")

    def __init__(self, class_weights: Tensor, *, gamma: float = 2.0, label_smoothing: float = 0.0) -> None:
        super().__init__(class_weights, label_smoothing=label_smoothing)
        self.gamma = _check_factor("gamma", gamma)

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the weighted focal loss of each image."""
        log_probability = functional.log_softmax(logits, dim=1).gather(1, label[:, None]).squeeze(1)
        # The gradient of a power below 1 is infinite at 0, that is, where an image is fitted perfectly.
        error = (-torch.expm1(log_probability)).clamp_min(1e-12)
        return error**self.gamma * super().forward(logits, label)


class LogitAdjustedLoss(CrossEntropy):
    """Cross-entropy of logits + tau · log(frequency of the class in training) (Menon et al. 2021).

    So the largest logit decides as for equally frequent classes. tau = 1 is balanced softmax (Ren et al. 2020), tau = 0
    cross-entropy. Until `set_class_counts`, all classes count as equally frequent.

    Raises:
        ValueError: If tau is not a finite number of at least 0.
    """

    label = format_loss_name("logit_adjusted")
    corrects_frequency = True
    offset: Tensor

    def __init__(self, class_weights: Tensor, *, tau: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__(class_weights, label_smoothing=label_smoothing)
        self.tau = _check_factor("tau", tau)
        self.register_buffer("offset", torch.zeros_like(class_weights), persistent=False)

    def set_class_counts(self, images_of_class: Sequence[int]) -> None:
        """Take the number of training images of each class, at least 1, as the prior."""
        counts = torch.tensor(images_of_class, dtype=torch.float32)
        self.offset.copy_(self.tau * (counts / counts.sum()).log())

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Return the loss of each image."""
        return super().forward(logits + self.offset, label)


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


LOSSES: dict[str, type[ImageLoss]] = {
    "cross_entropy": CrossEntropy,
    "focal": FocalLoss,
    "logit_adjusted": LogitAdjustedLoss,
}
"""The losses by `loss.name`. Keys of `loss` that are parameters of the class are passed to it."""


def build_loss(config: LossConfig, *, classes: int, images_of_class: Sequence[int] | None = None) -> ImageLoss:
    """Build the configured loss.

    Args:
        config: The section `loss` of the configuration.
        classes: Number of classes.
        images_of_class: Number of training images of each class, for balanced class weights and logit adjustment.

    Raises:
        PylorusError: If there is no such loss, it refuses its arguments, or class weights would correct twice.
        ValueError: If balanced class weights lack `images_of_class`.
    """
    weights = compute_class_weights(config.class_weights, classes, images_of_class)
    if (node := get_target(config)) is not None:
        function = build_callable(node, key="loss", class_weights=weights, classes=classes)
        if config.class_weights != "none" and "class_weights" not in list_parameters(get_object(node, key="loss")):
            raise PylorusError(
                f"loss.class_weights: found {config.class_weights}, but {node[TARGET]} has no parameter class_weights. "
                "Leave it out, or add the parameter."
            )
        return ExternalLoss(function, weights, name=str(node[TARGET]))
    if config.name not in LOSSES:
        raise PylorusError(
            f'loss.name: there is no loss "{config.name}".{format_suggestion(str(config.name), LOSSES)} Available: '
            f"{', '.join(LOSSES)}; your own: loss._target_ in a configuration file of yours."
        )
    kind = LOSSES[config.name]
    for name in config.args:
        if name not in _list_arguments(kind):
            raise PylorusError(
                f"loss.args.{name}: {kind.label} has no such argument.{format_suggestion(name, _list_arguments(kind))}"
                f"{_suggest_loss(name)}"
            )
    if config.class_weights != "none":
        _check_class_weights(kind, f"loss.class_weights: found {config.class_weights}", "loss.class_weights=none")
    settings = {**asdict(config), **config.args}
    try:
        loss = kind(weights, **{name: settings[name] for name in _list_arguments(kind) & settings.keys()})
    except (TypeError, ValueError) as error:
        raise PylorusError(f"loss.args.{error}") from error
    if images_of_class is not None:
        loss.set_class_counts(images_of_class)
    return loss


def _check_class_weights(kind: type[ImageLoss], found: str, expected: str) -> None:
    if kind.corrects_frequency:
        raise PylorusError(
            f"{found}, but the {kind.label} corrects for the frequencies of the classes itself: both together would do "
            f"so twice. Type {expected}, or another loss."
        )


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
        if class_weights is not None:
            _check_class_weights(LOSSES[loss], f"class_weights: found {class_weights}", "class_weights=None")
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


def _list_arguments(kind: type[ImageLoss]) -> set[str]:
    return set(inspect.signature(kind).parameters) - {"class_weights"}


def _suggest_loss(argument: str) -> str:
    losses = [name for name, kind in LOSSES.items() if argument in _list_arguments(kind)]
    return f" Add loss={' or loss='.join(losses)}, or leave it out." if losses else ""


def build_metrics(configured: Mapping[str, Any], monitors: Sequence[str] = ()) -> list[ClassMetric]:
    """Build the indices of a class that a run computes: the registered ones that it shows, and the user's own.

    Args:
        configured: The section `metrics` of the configuration: null for a registered index, or the `_target_` of a
            function of a confusion matrix of shape (classes, classes) that returns one value per class.
        monitors: The stages' `monitor`, which are computed as well.

    Raises:
        PylorusError: If a name is unknown, or a function can't be imported.
    """
    own = {name: _build_own_metric(name, node) for name, node in configured.items() if node is not None}
    for name in configured:
        if name in own and name in (*CLASS_METRICS, *IMAGE_METRICS):
            raise PylorusError(f"metrics.{name}: Pylorus has an index of this name. Give yours another one.")
    known = [*IMAGE_METRICS, *CLASS_METRICS, *own]
    for key, name in [
        *((f"metrics.{name}", name) for name in configured if name not in own),
        *(("monitor", name) for name in monitors),
    ]:
        if name not in known:
            raise PylorusError(
                f'{key}: there is no metric "{name}".{format_suggestion(name, known)} Expected one of '
                f"{', '.join(known)}; your own: metrics.{name}._target_."
            )
    return [*select_class_metrics([*configured, *monitors]), *own.values()]


def _build_own_metric(name: str, node: Mapping[str, Any]) -> ClassMetric:
    function = build_callable(node, key=f"metrics.{name}")

    def compute(counts: ClassCounts) -> NDArray[np.float64]:
        values = np.asarray(function(counts.confusion), dtype=np.float64)
        if values.shape != counts.confusion.shape[:1]:
            raise PylorusError(
                f"metrics.{name}: {node[TARGET]} gave shape {values.shape}, expected one value per class: "
                f"{counts.confusion.shape[:1]}."
            )
        return values

    try:
        trial = function(np.full((3, 3), 2, dtype=np.int64))
    except Exception:  # it may refuse three classes, or equal counts
        trial = None
    if trial is not None and np.ndim(trial) != 1:
        raise PylorusError(
            f"metrics.{name}: {node[TARGET]} gave shape {np.shape(trial)} for three classes, expected one value per "
            "class: (3,)."
        )
    return ClassMetric(name, name, str(node[TARGET]), compute, is_in_tables=True)


def check_class_names(names: Sequence[str]) -> None:
    """Check the names of classes, which the names of metrics contain.

    Raises:
        PylorusError: If there are fewer than two, one is empty, or one occurs twice.
    """
    if len(names) < 2:
        raise PylorusError(f"classes: found {list(names)}, expected the names of at least two classes.")
    for name in names:
        if not name.strip():
            raise PylorusError(f"classes: found an empty name in {list(names)}.")
        if list(names).count(name) > 1:
            raise PylorusError(f'classes: found "{name}" twice, expected each class once.')


def check_data(data: Any, names: Sequence[str], *, image_size: int) -> None:
    """Check that a data module, of any kind, provides the images that a classifier was built for.

    Args:
        data: The data module; None if there is none. Its attributes `classes` and `form.size` are compared, where it
            has them.
        names: The classifier's names of its classes, in label order; names of its own are allowed.
        image_size: Side of the classifier's input in pixels.

    Raises:
        PylorusError: If the classes are in another order, or another number of them.
    """
    found = getattr(data, "classes", None)
    if not isinstance(found, list | tuple):
        return
    is_reordered = any(name in names and names.index(name) != label for label, name in enumerate(found))
    if len(found) != len(names) or is_reordered:
        raise PylorusError(
            f"classes: the classifier has {', '.join(names)}, but the data module has {', '.join(map(str, found))}. "
            "Labels are positions in this list, so both must be the same: write Classifier(…, data.classes)."
        )
    size = getattr(getattr(data, "form", None), "size", image_size)
    if size != image_size:
        rank_zero_warn(
            f"image_size: the classifier was built for images of {image_size} px, but the data module gives "
            f"{size} px. Pass the same image_size to both."
        )


class ConfusionCounts(Metric):
    """Confusion matrix, int64 of shape (classes, classes); rows are true, columns predicted.

    torchmetrics counts with `torch.bincount`, for which the host waits for a GPU in each step.
    """

    full_state_update = False
    confmat: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._classes = classes
        self.add_state("confmat", torch.zeros(classes, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, label: Tensor) -> None:
        """Count a batch: logits (batch, classes), labels (batch,)."""
        cell = label * self._classes + logits.argmax(dim=1)
        self.confmat.view(-1).scatter_add_(0, cell, torch.ones_like(cell))

    def compute(self) -> Tensor:
        """Return the counts of all batches."""
        return self.confmat


class EpochMetrics(nn.Module):
    """Mean loss and confusion matrix of an epoch, accumulated on the device without synchronizing."""

    def __init__(self, classes: int, metrics: Sequence[ClassMetric] | None = None) -> None:
        super().__init__()
        self.metrics = select_class_metrics() if metrics is None else list(metrics)
        # NaN stays in the sum: dropping it would hide a failed batch, and checking for it would synchronize.
        # Two sums, since torchmetrics' mean then drops its weights (its issue 3434).
        self.loss = SumMetric(nan_strategy="disable")
        self.weight = SumMetric(nan_strategy="disable")
        self.confusion = ConfusionCounts(classes)

    def add_batch(self, loss: Tensor, weight: Tensor, logits: Tensor, label: Tensor) -> None:
        """Add a batch: its mean loss, the weight of that mean, logits (batch, classes), labels (batch,)."""
        self.loss.update(loss.detach() * weight)
        self.weight.update(weight)
        self.confusion.update(logits.detach(), label)

    def compute_and_reset(self, prefix: str, names: Sequence[str]) -> dict[str, float]:
        """Return all metrics of the epoch by name, per class and averaged, and reset. Undefined ones are NaN."""
        confusion = self.confusion.compute().cpu().numpy()
        overall = overall_indices(confusion)
        loss = float(self.loss.compute() / self.weight.compute())
        metrics = {f"{prefix}/loss": loss, f"{prefix}/accuracy": float(overall.accuracy)}
        for metric in self.metrics:
            values = compute_class_metric(metric, confusion)
            metrics |= {
                f"{prefix}/{metric.name}/{name}": float(value) for name, value in zip(names, values, strict=True)
            }
            metrics[f"{prefix}/{metric.name}/average"] = float(np.mean(values))
        self.loss.reset()
        self.weight.reset()
        self.confusion.reset()
        return metrics

    def gather_sums(self, processes: Processes) -> dict[str, Tensor]:
        """Return the sums over all processes, to resume from."""
        sums_by_process = processes.gather({name: value.cpu() for name, value in self._get_sums().items()})
        return {
            name: sum((sums[name] for sums in sums_by_process[1:]), sums_by_process[0][name])
            for name in sums_by_process[0]
        }

    def restore_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Resume from sums."""
        for name, value in self._get_sums().items():
            value.copy_(sums[name])

    def _get_sums(self) -> dict[str, Tensor]:
        return {"loss": self.loss.sum_value, "weight": self.weight.sum_value, "confusion": self.confusion.confmat}


class FirstNonFiniteLoss:
    """Rows of an epoch's first batch with a NaN or infinite loss, kept on the device until they are requested."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._has_failed: Tensor | None = None

    def check_loss(self, loss: Tensor, row: Tensor, step: int) -> None:
        """Check a batch's loss; takes its rows (batch,) and its index in the epoch. The first batch is the largest."""
        if step == 0 or self._rows is None or self._has_failed is None:
            self._rows = torch.full_like(row, -1)
            self._has_failed = torch.zeros((), dtype=torch.bool, device=row.device)
        is_first = ~torch.isfinite(loss.detach()).to(row.device) & ~self._has_failed
        padded = functional.pad(row, (0, len(self._rows) - len(row)), value=-1)
        self._rows = torch.where(is_first, padded, self._rows)
        self._has_failed = self._has_failed | is_first

    def get_rows(self) -> list[int]:
        """Return the rows, after synchronizing with the device; empty if every loss was finite."""
        return [] if self._rows is None else [row for row in self._rows.tolist() if row >= 0]


def explain_non_finite_loss(
    split: str, *, stage: str, epoch: int, rows: Sequence[int], sample_ids: NDArray[np.str_] | None
) -> str:
    """Explain that a loss became NaN or infinite, and what to do.

    Args:
        split: train or val.
        stage: Name of the stage.
        epoch: The epoch, from 0.
        rows: Rows of the first batch with such a loss.
        sample_ids: ID of each image of the split, by row; None if unknown.
    """
    first_ids = [f"row {row}" if sample_ids is None else sample_ids[row] for row in rows]
    loss = "the training loss" if split == "train" else "the validation loss, but not yet the training loss,"
    first_images = (
        f"It happened first in the batch of these images (split.csv has their files):\n{format_name_list(first_ids)}\n"
    )
    return (
        f"{loss} of stage {stage} became NaN or infinite in epoch {epoch + 1}. "
        f"Lower optimizer.lr or stages.{stage}.lr, or set trainer.precision=32.\n"
        f"{first_images if first_ids else ''}"
        "Start a new run with other values: resumed, this one would fail again at the same step."
    )
