"""Weight averaging: evaluate and save the average of the weights over training in place of the last ones.

An exponential moving average (EMA) follows the weights from step to step (Polyak and Juditsky 1992); the mean of the
weights after each of the last epochs is stochastic weight averaging (SWA; Izmailov et al. 2018). Both are evaluated, so
that they are what early stopping and the choice of an epoch see; training goes on with its own weights.

Only what the optimizer trains is averaged, in 32 bits: torch's `AveragedModel` copies frozen layers as well, and waits
for the GPU at each update.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Annotated, Any, Literal, cast

import pytorch_lightning as pl
import torch
from annotated_types import Ge, Lt
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pylorus.config.schema import AveragingConfig
from pylorus.core.arguments import check_arguments
from pylorus.core.errors import PylorusError
from pylorus.data.dataset import EpochBatchSampler
from pylorus.model.backbone import restore_modes

ENTRY = "averaging"
"""Entry of a checkpoint whose weights are averages: the weights of the last step, and how many were averaged."""

AVERAGE_BYTES = 4
"""Bytes of the average of one parameter, which is kept in 32 bits."""


class AverageWeights(pl.Callback):
    """Validate, test and save the average of a classifier's trained weights over training.

    A checkpoint's `state_dict` holds averages, and so does the classifier after training; the last weights, with which
    a training resumes, are beside them. The average takes four bytes for each trained parameter, and a validation as
    many again. It is updated after a step of the optimizer, so neither accumulated gradients nor CUDA graphs matter.

    Batch norm: an EMA averages the running statistics of trained layers as well. For a mean they are estimated anew by
    a pass over the training images at the end of each epoch, since those of different epochs belong to different
    weights. Statistics of frozen layers stay as they are.

    Args:
        method: ema or mean.
        decay: Fraction of an EMA that an update retains; after n updates at most (1 + n) / (10 + n), so that the first
            weights are forgotten soon.
        every: Steps of the optimizer between two updates; None: 1 for an EMA, those of an epoch for a mean.
        start_epoch: The epoch, from 0, from which on weights are averaged; until then the last ones are used.

    Attributes:
        updates: Number of weights that have been averaged.
        estimates_statistics: Whether batch-norm statistics are estimated anew, not averaged.

    Example:
        >>> callback = AverageWeights(decay=0.99)
        >>> [round(callback.compute_decay(updates), 3) for updates in (1, 10, 100, 1000)]
        [0.182, 0.55, 0.918, 0.99]
    """

    @check_arguments
    def __init__(
        self,
        method: Literal["ema", "mean"] = "ema",
        *,
        decay: Annotated[float, Ge(0), Lt(1)] = AveragingConfig.decay,
        every: Annotated[int, Ge(1)] | None = None,
        start_epoch: Annotated[int, Ge(0)] = 0,
    ) -> None:
        self.method, self.decay, self.every, self.start_epoch = method, decay, every, start_epoch
        self.estimates_statistics = method == "mean"
        self._reset()

    def _reset(self) -> None:
        self.updates = 0
        self._average: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] | None = None
        """The last weights while the module holds averages."""
        self._trained: dict[str, Tensor] = {}
        """What is averaged, as it is trained; {}: to be found at the next step."""
        self._norms: tuple[str, ...] = ()
        self._loader: Any = None
        self._step, self._estimated_step = 0, -1

    @property
    def estimated_norms(self) -> int:
        """Number of batch-norm layers whose statistics are estimated anew."""
        return len(self._norms) if self.estimates_statistics and self.updates else 0

    def compute_decay(self, updates: int) -> float:
        """Return the fraction of the average that the next update retains, in [0, 1)."""
        if self.method == "mean":
            return updates / (updates + 1)
        return min(self.decay, (1 + updates) / (10 + updates))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin a new average.

        Raises:
            PylorusError: If the module is no classifier of Pylorus, its weights are divided among devices, or the
                training ends before the first epoch that is averaged.
        """
        if stage != "fit":
            return
        if not hasattr(pl_module, "compute_logits"):
            raise PylorusError(f"AverageWeights: found {type(pl_module).__name__}, expected a pylorus.Classifier.")
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise PylorusError(
                f"AverageWeights: found {type(trainer.strategy).__name__}, expected a single device or strategy='ddp', "
                "where each device has all weights."
            )
        if trainer.max_epochs is not None and 0 < trainer.max_epochs <= self.start_epoch:
            raise PylorusError(
                f"AverageWeights: start_epoch: found {self.start_epoch}, expected less than the Trainer's max_epochs, "
                f"{trainer.max_epochs}: epochs are counted from 0, so nothing would be averaged."
            )
        self._reset()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count steps from here: those before an interruption are in the average already."""
        self._step, self._trained = trainer.global_step, {}

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find what is trained anew, since more may be from this epoch on."""
        self._trained = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        """Update the average after a step of the optimizer, and complete it at the end of an epoch."""
        if trainer.global_step == self._step:
            return  # within a step, whose gradients are accumulated
        self._step = trainer.global_step
        if not self._trained:
            self._find_trained(trainer, pl_module)
        every = 1 if self.every is None else self.every
        is_due = trainer.is_last_batch if self.every is None and self.method == "mean" else self._step % every == 0
        is_due |= trainer.is_last_batch and not self.updates  # every epoch from the first one on has an average
        if is_due and trainer.current_epoch >= self.start_epoch:
            self._update()
        if trainer.is_last_batch:
            # Here, since a run's processes serve one loader at a time, and validation has asked for its first batch
            # before it calls any callback.
            self._estimate_statistics(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the average."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._estimate_statistics(trainer, pl_module)
            self._put_average(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the last weights."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._put_last(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average in the module."""
        if not self.updates:
            rank_zero_warn(
                f"AverageWeights: nothing was averaged: the training ended before epoch {self.start_epoch}, start_epoch"
            )
        self._estimate_statistics(trainer, pl_module)
        self._put_average(pl_module)
        self._loader = None

    def save_average(self, checkpoint: dict[str, Any]) -> None:
        """Put the average in the place of the last weights, which move to an entry of their own."""
        if not self.updates:
            return
        state = checkpoint["state_dict"]
        last = {name: state[name] for name in self._average} if self._last is None else self._last
        checkpoint[ENTRY] = {"method": self.method, "updates": self.updates, "last": last}
        state.update(self._average)

    def load_average(self, checkpoint: dict[str, Any]) -> None:
        """Restore the average from a checkpoint, and put the last weights in its place.

        Raises:
            PylorusError: If the checkpoint has an average of another kind.
        """
        entry, state = checkpoint.get(ENTRY), checkpoint["state_dict"]
        if entry is None:
            return  # of a training without averages, which begin now
        if entry["method"] != self.method:
            raise PylorusError(
                f"AverageWeights: method: found {self.method}, but the checkpoint has {entry['method']}."
            )
        self.updates = int(entry["updates"])
        self._average = {name: state[name].float() for name in entry["last"]}
        checkpoint["state_dict"] = {**state, **entry["last"]}

    def _find_trained(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Find the tensors to average: what the optimizer trains, and statistics of batch norm in training mode."""
        trained = {
            id(tensor) for each in trainer.optimizers for group in each.param_groups for tensor in group["params"]
        }
        self._trained = {
            name: parameter.detach() for name, parameter in module.named_parameters() if id(parameter) in trained
        }
        norms = {name: norm for name, norm in module.named_modules() if isinstance(norm, _BatchNorm)}
        self._norms = tuple(name for name, norm in norms.items() if norm.training and norm.running_mean is not None)
        if not self.estimates_statistics:
            self._trained |= _list_statistics(norms, self._norms)
        for name, tensor in self._trained.items():
            # In the memory layout of the weights: kernels for another one may round differently.
            average = torch.empty_like(tensor, dtype=torch.float32)
            self._average[name] = average.copy_(self._average.get(name, tensor))

    @torch.no_grad()
    def _update(self) -> None:
        tensors = [tensor.float() for tensor in self._trained.values()]
        averages = [self._average[name] for name in self._trained]
        if self.updates:
            torch._foreach_lerp_(averages, tensors, 1 - self.compute_decay(self.updates))
        else:
            torch._foreach_copy_(averages, tensors)
        self.updates += 1

    def _estimate_statistics(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Estimate the average's batch-norm statistics by a pass over the epoch's training batches, without dropout."""
        if not self.estimated_norms or self._estimated_step == self._step:
            return
        self._estimated_step = self._step
        norms = {name: cast(_BatchNorm, module.get_submodule(name)) for name in self._norms}
        with torch.inference_mode(False), torch.no_grad(), restore_modes(module):
            self._put_average(module)
            try:
                with (
                    _collect_statistics(module, norms.values()),
                    trainer.precision_plugin.forward_context(),
                    torch.random.fork_rng(devices=[]),
                ):
                    for batch in self._load_batches(trainer):
                        cast(Any, module).compute_logits(trainer.strategy.batch_to_device(batch))
                    statistics = {name: each.clone() for name, each in _list_statistics(norms, self._norms).items()}
            finally:
                self._put_last(module)
            self._average |= statistics

    def _load_batches(self, trainer: pl.Trainer) -> Iterable[Any]:
        """Load the training batches of the current epoch again, from its first one."""
        data = getattr(trainer, "datamodule", None)
        if self._loader is None:
            self._loader = trainer.train_dataloader if data is None else data.train_dataloader()
        batches = getattr(self._loader, "batch_sampler", None)
        if isinstance(batches, EpochBatchSampler):
            batches.rewind(trainer.current_epoch)
        limit = trainer.num_training_batches
        return islice(self._loader, None if math.isinf(limit) else int(limit))

    def _put_average(self, module: pl.LightningModule) -> None:
        if self.updates and self._last is None:
            with torch.inference_mode(False), torch.no_grad():
                tensors = _get_tensors(module, self._average)
                self._last = {name: tensor.clone() for name, tensor in tensors.items()}
                for name, tensor in tensors.items():
                    tensor.copy_(self._average[name])

    def _put_last(self, module: pl.LightningModule) -> None:
        if self._last is not None:
            with torch.inference_mode(False), torch.no_grad():
                for name, tensor in _get_tensors(module, self._last).items():
                    tensor.copy_(self._last[name])
            self._last = None


def _get_tensors(module: pl.LightningModule, names: Iterable[str]) -> dict[str, Tensor]:
    """Return a module's own parameters and buffers by name, to be changed in place."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensors[name].detach() for name in names}


def _list_statistics(norms: Mapping[str, _BatchNorm], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the running statistics of some batch-norm layers by their names in a state."""
    kinds = ("running_mean", "running_var")
    return {f"{name}.{kind}": cast(Tensor, getattr(norms[name], kind)) for name in names for kind in kinds}


@contextmanager
def _collect_statistics(module: pl.LightningModule, norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Inside, running statistics are means over all batches, which nothing but batch norm sees as training.

    On exit, the layers have their own statistics again.
    """
    saved = [(norm, norm.momentum, [buffer.clone() for buffer in norm.buffers()]) for norm in norms]
    module.eval()
    for norm, _, _ in saved:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    try:
        yield
    finally:
        for norm, momentum, values in saved:
            norm.momentum = momentum
            for buffer, value in zip(norm.buffers(), values, strict=True):
                buffer.copy_(value)


def find_averaging(trainer: pl.Trainer) -> AverageWeights | None:
    """Return the callback that averages the weights of a training; None if there is none."""
    return next((each for each in trainer.callbacks if isinstance(each, AverageWeights)), None)  # type: ignore[attr-defined]


def save_average(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Save averages as a checkpoint's weights; called by the module, as checkpoints of weights call no callback."""
    averaging = find_averaging(trainer)
    if averaging is not None:
        averaging.save_average(checkpoint)


def load_average(trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
    """Load the last weights of a training that is resumed; anything else takes the averages.

    Raises:
        PylorusError: If the training was averaged and is to be resumed without.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    averaging = find_averaging(trainer)
    if averaging is not None:
        averaging.load_average(checkpoint)
    elif ENTRY in checkpoint:
        raise PylorusError(
            "ckpt_path: the checkpoint is that of a training with averaged weights. Add its callback to the Trainer, "
            f"pylorus.AverageWeights('{checkpoint[ENTRY]['method']}'), with the same arguments."
        )
