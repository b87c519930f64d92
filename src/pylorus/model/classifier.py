"""The LightningModule: one stage of training of one network, its loss and its metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pylorus.chance import derived_seed
from pylorus.config import LossConfig, OptimizerConfig, StageConfig
from pylorus.data.dataset import Batch
from pylorus.errors import PylorusError, listing
from pylorus.model.backbone import Backbone
from pylorus.model.cut import Cut
from pylorus.model.features import FeatureBatch
from pylorus.model.schedule import build_optimizer, build_schedule
from pylorus.model.tally import FirstBroken, Tally
from pylorus.parallel.processes import ALONE, Processes


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Attributes:
        name: Of the stage; first part of every metric's name.
        config: What the user said of it.
        first_epoch: How many epochs the stages before ran: where its curves begin on the run's axis.
        seed: The stage's chance.
    """

    name: str
    config: StageConfig
    first_epoch: int
    seed: int


class Classifier(pl.LightningModule):
    """Trains a network for one stage; takes uint8 RGB and normalises it where the network computes."""

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
        """Takes what a stage needs.

        Args:
            backbone: The network and how its input is normalised.
            names: Short name of each class, in the order of the labels.
            plan: The stage.
            optimizer: How weights move.
            loss: The loss; "balanced" needs `images_of_class`.
            images_of_class: Training images of each class.
            channels_last: How tensors lie in memory; the numbers are the same.
            processes: Each of which computes its share of a batch.
        """
        super().__init__()
        self.strict_loading = False  # checkpoints lack what is frozen; what must be in them is checked here
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = backbone.network.to(memory_format=self.memory_format)
        self.cut: Cut | None = None
        """The network in two parts, where features are served in the images' place."""
        self.sample_ids: dict[str, NDArray[np.str_]] = {}
        """Of the images of train and val, by row: for the message where a loss breaks."""
        self._broken = {"train": FirstBroken(), "val": FirstBroken()}
        self.processes = processes
        self.names, self.plan, self.optimizer_config, self.loss_config = tuple(names), plan, optimizer, loss
        self.register_buffer("mean", 255 * torch.tensor(backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(backbone.std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("class_weights", _class_weights(loss, len(self.names), images_of_class), persistent=False)
        self.tallies = nn.ModuleDict({"train_part": Tally(len(self.names)), "val_part": Tally(len(self.names))})

    def forward(self, image: Tensor) -> Tensor:
        """Logits (batch, classes) of uint8 RGB images (batch, 3, size, size).

        Raises:
            ValueError: If the images do not have three channels.
        """
        logits: Tensor = self.network(self.pixels(image))
        return logits.float()

    def pixels(self, image: Tensor) -> Tensor:
        """Normalised images (batch, 3, size, size) of uint8 RGB ones, as they lie best in memory.

        Raises:
            ValueError: If the images do not have three channels.
        """
        if image.shape[1] != 3:
            raise ValueError(
                f"found images of {image.shape[1]} channels, expected RGB: decode them with pylorus.data.image"
            )
        return ((image.float() - self.mean) / self.std).contiguous(memory_format=self.memory_format)

    def logits(self, batch: Batch | FeatureBatch) -> Tensor:
        """Logits (batch, classes) of images, or of the features that stand for them."""
        if isinstance(batch, Batch):
            logits: Tensor = self(batch.image)
            return logits
        if self.cut is None:
            raise ValueError("found features, expected images: the network was not cut")
        return self.cut.logits(batch.features).float()

    def compile_network(self) -> None:
        """Has torch translate what runs in a step, at its first call."""
        if self.cut is not None:
            self.cut.compile()
        else:
            self.network.compile()

    def on_train_batch_start(self, batch: Batch | FeatureBatch, batch_idx: int) -> None:
        """Dropout's chance is one of seed, epoch and step, so that a resumed run draws what it would have drawn.

        Each process draws for its own images.
        """
        mine = (self.processes.index,) if self.processes.index else ()
        torch.manual_seed(derived_seed(self.plan.seed, "step", self.current_epoch, batch_idx, *mine))

    def training_step(self, batch: Batch | FeatureBatch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self._step(batch, "train_part")
        self._broken["train"].look(loss, batch.row, batch_idx)
        return loss

    def validation_step(self, batch: Batch | FeatureBatch, batch_idx: int) -> None:
        """Gathers a batch's loss and decisions."""
        self._broken["val"].look(self._step(batch, "val_part"), batch.row, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs the epoch: Lightning validates when its training batches are done, so both tallies are complete.

        Raises:
            PylorusError: If a loss is no number any more.
        """
        name, monitor = self.plan.name, self.plan.config.monitor
        found = self._tally("train_part").take(f"{name}/train", self.names)
        found |= self._tally("val_part").take(f"{name}/val", self.names)
        for part in ("train", "val"):
            if not np.isfinite(found[f"{name}/{part}/loss"]):
                raise PylorusError(self._loss_broke(part))
        found[f"{name}/lr"] = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        # "step" is Lightning's word for a logger's axis: epochs over the whole run, so that stages follow each other.
        self.log_dict({**found, "step": float(self.plan.first_epoch + self.current_epoch + 1)})
        chosen = f"{name}/val/{monitor}" + ("" if monitor in ("loss", "accuracy") else "/average")
        self.log("monitor", found[chosen], logger=False)  # what checkpoints and early stopping go by
        schedule = self.lr_schedulers()
        if isinstance(schedule, ReduceLROnPlateau) and not self.trainer.sanity_checking:
            schedule.step(found[chosen])

    def _loss_broke(self, part: str) -> str:
        name, known = self.plan.name, self.sample_ids.get(part)
        rows = [row for mine in self.processes.gathered(self._broken[part].rows()) for row in mine]
        ids = [f"row {row}" if known is None else known[row] for row in rows]
        loss = "the training loss" if part == "train" else "the validation loss, and not yet the training loss,"
        first = f"It broke first in the batch of these images (split.csv has their files):\n{listing(ids)}\n"
        return (
            f"{loss} of stage {name} is no number any more in epoch {self.current_epoch + 1}. "
            f"Lower optimizer.lr or stages.{name}.lr, or take trainer.precision=32.\n{first if ids else ''}"
            "With other values it is a new run; this one would break again at the same place."
        )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """A schedule's step. A plateau's was taken at validation: here it would miss in what a checkpoint holds."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    def configure_optimizers(self) -> Any:
        """One optimiser and one schedule for the whole stage."""
        optimizer = build_optimizer(self.network, self.plan.config, self.optimizer_config)
        steps = int(self.trainer.estimated_stepping_batches)
        return {
            "optimizer": optimizer,
            "lr_scheduler": build_schedule(optimizer, self.plan.config, steps=steps),
        }

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Limits the norm of a step's gradient; here, since Lightning won't beside an optimiser of one pass."""
        if self.optimizer_config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.optimizer_config.clip)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves frozen weights out: they are those that the stage began with, and hundreds of megabytes an epoch."""
        for name in self._frozen():
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before Lightning takes a checkpoint of this stage, which lacks the frozen weights: they are there."""
        self._check_weights(checkpoint["state_dict"])

    def take_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the weights of a checkpoint of this stage.

        Raises:
            ValueError: If it does not hold exactly what learns and moves in this stage.
        """
        self._check_weights(weights)
        self.load_state_dict(weights, strict=False)

    def _check_weights(self, weights: Mapping[str, Tensor]) -> None:
        wrong = (set(self.state_dict()) - self._frozen()) ^ set(weights)
        if wrong:
            raise ValueError(f"not a checkpoint of stage {self.plan.name}: it differs in {', '.join(sorted(wrong))}")

    def _frozen(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if not parameter.requires_grad}

    def _step(self, batch: Batch | FeatureBatch, part: str) -> Tensor:
        logits = self.logits(batch)
        weights = self.class_weights[batch.label]
        losses = functional.cross_entropy(
            logits,
            batch.label,
            weight=self.class_weights,
            label_smoothing=self.loss_config.label_smoothing,
            reduction="none",
        )
        loss = losses.sum() / weights.sum()
        self._tally(part).add(loss, weights.sum(), logits, batch.label)
        if part == "val_part" or not self.processes.several:
            return loss
        # Gradients are averaged over processes: so scaled, their mean is the gradient of the whole batch's mean loss.
        whole = weights.sum()
        distributed.all_reduce(whole)
        return losses.sum() * self.processes.count / whole

    def gathered(self) -> dict[str, Tensor]:
        """What was gathered of this epoch's training batches, over all processes."""
        return self._tally("train_part").gathered(self.processes)

    def take_gathered(self, sums: Mapping[str, Tensor]) -> None:
        """Goes on from what was gathered before an interruption."""
        self._tally("train_part").take_gathered(sums)

    def _tally(self, part: str) -> Tally:
        tally = self.tallies[part]
        assert isinstance(tally, Tally)
        return tally


def _class_weights(loss: LossConfig, classes: int, images_of_class: Sequence[int] | None) -> Tensor:
    """A weight a class, of mean 1 over the images: inverse to how frequent the class is, where that is asked for."""
    if loss.class_weights == "none":
        return torch.ones(classes)
    if images_of_class is None:
        raise ValueError("balanced class weights need images_of_class")
    counts = torch.tensor(images_of_class, dtype=torch.float32)
    return counts.sum() / (classes * counts)
