"""What is gathered of an epoch on the device, without waiting for it: loss, decisions, and where a loss broke."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from pylorus.evaluation.confusion import class_indices, overall_indices
from pylorus.parallel.processes import Processes

CLASS_METRICS = ("precision", "sensitivity", "f1")


class Tally(nn.Module):
    """Mean loss and confusion matrix of an epoch, gathered on the device without waiting for it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        # Numbers that are none stay in the sum: left out, a broken batch would hide, and looking for it would wait.
        # Two sums, since torchmetrics' mean then drops its weights (its issue 3434).
        self.loss = SumMetric(nan_strategy="disable")
        self.weight = SumMetric(nan_strategy="disable")
        self.confusion = MulticlassConfusionMatrix(classes, validate_args=False)

    def add(self, loss: Tensor, weight: Tensor, logits: Tensor, label: Tensor) -> None:
        """A batch: its mean loss, the weight of that mean, logits (batch, classes), labels (batch,)."""
        self.loss.update(loss.detach() * weight)
        self.weight.update(weight)
        self.confusion.update(logits.detach(), label)

    def take(self, prefix: str, names: Sequence[str]) -> dict[str, float]:
        """All metrics of the epoch by name, each class's and their average; starts anew. Undefined ones are nan."""
        confusion = self.confusion.compute().cpu().numpy()
        by_class, overall = class_indices(confusion), overall_indices(confusion)
        loss = float(self.loss.compute() / self.weight.compute())
        found = {f"{prefix}/loss": loss, f"{prefix}/accuracy": float(overall.accuracy)}
        for metric in CLASS_METRICS:
            values = getattr(by_class, metric)
            found |= {f"{prefix}/{metric}/{name}": float(value) for name, value in zip(names, values, strict=True)}
            found[f"{prefix}/{metric}/average"] = float(np.mean(values))
        self.loss.reset()
        self.weight.reset()
        self.confusion.reset()
        return found

    def gathered(self, processes: Processes) -> dict[str, Tensor]:
        """The sums of all processes, to go on from."""
        parts = processes.gathered({name: value.cpu() for name, value in self._sums().items()})
        return {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in parts[0]}

    def take_gathered(self, sums: Mapping[str, Tensor]) -> None:
        """Goes on from sums."""
        for name, value in self._sums().items():
            value.copy_(sums[name])

    def _sums(self) -> dict[str, Tensor]:
        return {"loss": self.loss.sum_value, "weight": self.weight.sum_value, "confusion": self.confusion.confmat}


class FirstBroken:
    """The rows of the first batch of an epoch whose loss was no number, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._found: Tensor | None = None

    def look(self, loss: Tensor, row: Tensor, step: int) -> None:
        """A batch's loss, its rows (batch,) and its number in the epoch; the first batch is the largest."""
        if step == 0 or self._rows is None or self._found is None:
            self._rows = torch.full_like(row, -1)
            self._found = torch.zeros((), dtype=torch.bool, device=row.device)
        now = ~torch.isfinite(loss.detach()).to(row.device) & ~self._found
        padded = functional.pad(row, (0, len(self._rows) - len(row)), value=-1)
        self._rows = torch.where(now, padded, self._rows)
        self._found = self._found | now

    def rows(self) -> list[int]:
        """The rows; waits for the device. Empty where each loss was a number."""
        return [] if self._rows is None else [row for row in self._rows.tolist() if row >= 0]
