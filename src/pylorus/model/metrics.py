"""Epoch metrics, accumulated on the device without synchronizing: loss, confusion matrix, first non-finite loss.

Also the checks of what they are computed from: the names of classes, a data module, a batch of images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric, SumMetric

from pylorus.config.instantiation import TARGET, build_callable
from pylorus.core.arguments import describe_value
from pylorus.core.distributed import Processes
from pylorus.core.errors import PylorusError, format_name_list, format_suggestion
from pylorus.evaluation.confusion import (
    CLASS_METRICS,
    IMAGE_METRICS,
    ClassCounts,
    ClassMetric,
    compute_class_metric,
    overall_indices,
    select_class_metrics,
)


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


class InvalidBatchError(PylorusError, ValueError):
    """A batch of images in another form than a classifier takes."""


def check_image_batch(image: Any) -> None:
    """Check that images are RGB (batch, 3, size, size) with pixels in [0, 255].

    Raises:
        InvalidBatchError: If not; the message says how images of another kind are converted.
    """
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != 3:
        is_batch = isinstance(image, Tensor) and image.ndim == 4
        channels = f"found {image.shape[1]}-channel images, expected RGB: " if is_batch else ""
        raise InvalidBatchError(
            f"image: {channels}found {describe_value(image)}, expected a uint8 tensor of shape (batch, 3, size, size). "
            "An RGB array (size, size, 3) is converted by torch.from_numpy(array).permute(2, 0, 1)[None]."
        )
    if image.is_floating_point() and not torch.compiler.is_compiling():
        low, high = float(image.min()), float(image.max())
        if low < 0 or 0 < high <= 1.5:
            raise InvalidBatchError(
                f"image: found pixels from {low:.3g} to {high:.3g}, expected 0 to 255, as uint8: the classifier "
                "normalizes images itself."
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
