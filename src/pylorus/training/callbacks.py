"""Checkpoints of a stage: the weights of its best epoch, and all that is needed to resume.

Both are in checkpoints/. `last.ckpt` is the state after a complete epoch, or within one that takes long or was asked to
stop: weights, optimizer, schedule, number of epochs and batches. It names the best epoch so far, whose weights are
beside it in `best-<epoch>.ckpt`. When the stage is trained, that file becomes `best.ckpt`, `stage.json` is written, and
`last.ckpt` is deleted. However a run is killed, the files that `last.ckpt` refers to exist.
"""

import hashlib
import io
import logging
import math
import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import pandas as pd
import psutil
import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor
from tqdm import tqdm

from pylorus.core.distributed import Processes
from pylorus.core.errors import PylorusError
from pylorus.core.formatting import format_count, format_number, format_percent, open_progress_bar
from pylorus.core.io import SUFFIX, compute_digest, write_atomically, write_json, write_text
from pylorus.model.averaging import AverageWeights
from pylorus.model.classifier import StageClassifier, StagePlan
from pylorus.runs.folder import RunFolder, StageFolder, StageProgress
from pylorus.runs.process import StopRequest

log = logging.getLogger(__name__)


class StageBar(ProgressBar):
    """A progress bar for the batches of an epoch and then of its validation, in place of Lightning's own."""

    def __init__(self, plan: StagePlan) -> None:
        super().__init__()
        self.plan = plan
        self._bar: tqdm[Any] | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open a bar if there is none; it begins where a resumed epoch does."""
        if self._bar is None:
            self._open(trainer, "", trainer.num_training_batches, done=batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        """Advance."""
        self._advance()

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Open a bar for the validation."""
        self._open(trainer, " validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, *_: Any) -> None:
        """Advance."""
        self._advance()

    def on_validation_end(self, *_: Any) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, *_: Any) -> None:
        """Close the bar, so that what is printed next begins a line."""
        self._close()

    def print(self, *words: Any, **options: Any) -> None:
        """Print above the bar."""
        tqdm.write(options.pop("sep", " ").join(map(str, words)), file=sys.stdout)

    def disable(self) -> None:
        """Close the bar; Lightning calls this in all processes but the first, which has none."""
        self._close()

    def enable(self) -> None:
        """Do nothing: the next epoch opens the bar."""

    def _open(self, trainer: pl.Trainer, activity: str, batches: float, *, done: int = 0) -> None:
        self._close()
        epoch = f"{self.plan.name} epoch {trainer.current_epoch + 1}/{self.plan.config.epochs}"
        self._bar = open_progress_bar(epoch + activity, int(batches) if math.isfinite(batches) else None, done=done)

    def _advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class EpochLine(pl.Callback):
    """Log one line per epoch, with the time remaining in the stage and what follows it.

    Args:
        plan: The stage.
        following: Number of epochs of each stage that follows: how long one takes is not known before.
    """

    def __init__(self, plan: StagePlan, *, following: Mapping[str, int] | None = None) -> None:
        self.plan = plan
        stages = [f", then {name} ({format_count(epochs, 'epoch')})" for name, epochs in (following or {}).items()]
        self._remainder = f"left in {plan.name}{''.join(stages)}" if stages else "left"
        self._epoch_start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock here too: an epoch resumed midway does not call `on_train_epoch_start`."""
        self._epoch_start = time.monotonic()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._epoch_start = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the line."""
        epochs, name = self.plan.config.epochs, self.plan.name
        remaining = epochs - trainer.current_epoch - 1
        seconds_left = (time.monotonic() - self._epoch_start) * remaining

        def format_metrics(split: str) -> str:
            loss, accuracy = (
                float(trainer.callback_metrics[f"{name}/{split}/{metric}"]) for metric in ("loss", "accuracy")
            )
            shown = format_number(loss, 3) if loss < 1000 or not math.isfinite(loss) else f"{loss:.2e}"
            return f"loss {shown}, acc {format_percent(accuracy)} %"

        clock = time.strftime("%H:%M:%S" if seconds_left >= 3600 else "%M:%S", time.gmtime(seconds_left))
        log.info(
            "%s epoch %*d/%d | train: %s | val: %s%s",
            name,
            len(str(epochs)),
            trainer.current_epoch + 1,
            epochs,
            format_metrics("train"),
            format_metrics("val"),
            f" | {clock} {self._remainder}" if remaining else "",
        )


MIB = 2**20


class SpeedMonitor(pl.Callback):
    """Measure the duration and memory of a stage, starting when this callback is created.

    Args:
        images: Number of training images.
        accelerator: cpu, cuda or mps.

    Attributes:
        features_seconds: Time to find or compute the frozen prefix's features; set by the caller.
        fit_seconds: Time for all epochs, with validation and checkpoints.
    """

    def __init__(self, images: int, accelerator: str) -> None:
        self._images, self._accelerator = images, accelerator
        self._start = time.monotonic()
        self._epoch_start = 0.0
        self._fit_start = 0.0
        self._training: list[float] = []
        self.features_seconds = 0.0
        self.fit_seconds = 0.0
        _reset_peak_memory(accelerator)

    def on_fit_start(self, *_: Any) -> None:
        """Start the clock of the whole fit."""
        self._fit_start = time.monotonic()

    def on_train_epoch_start(self, *_: Any) -> None:
        """Start the clock of an epoch."""
        self._epoch_start = time.monotonic()

    def on_validation_start(self, *_: Any) -> None:
        """Stop the clock of an epoch: Lightning validates after its last training batch."""
        if self._accelerator == "cuda":
            torch.cuda.synchronize()
        if self._epoch_start:  # not for an epoch resumed midway
            self._training.append(time.monotonic() - self._epoch_start)

    def on_fit_end(self, *_: Any) -> None:
        """Stop the clock of the whole fit."""
        self.fit_seconds = time.monotonic() - self._fit_start

    def write_speed(self, path: Path) -> None:
        """Write the measurements as JSON: seconds, training images per second, MiB."""
        # The first epoch is a warm-up, unless it is the only one.
        epoch_seconds = self._training[1:] or self._training
        write_json(
            path,
            {
                "seconds": round(time.monotonic() - self._start, 3),
                "features_seconds": round(self.features_seconds, 3),
                "fit_seconds": round(self.fit_seconds, 3),
                "epochs": len(self._training),
                "images_per_second": round(self._images / median(epoch_seconds), 2) if epoch_seconds else None,
                "peak_memory_mib": get_peak_memory("cpu") // MIB,
                "peak_gpu_memory_mib": get_peak_memory("cuda") // MIB if self._accelerator == "cuda" else None,
            },
        )


def _reset_peak_memory(accelerator: str) -> None:
    """Reset the peak memory, where the system supports it."""
    if accelerator == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return


def get_peak_memory(accelerator: str) -> int:
    """Return the peak memory of this process in bytes: GPU memory for cuda, else main memory."""
    if accelerator == "cuda":
        return int(torch.cuda.max_memory_allocated())
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)


class CurvesFile(Logger):
    """Write Lightning's metrics to metrics.csv: columns `step` (epochs over the whole run) and one per metric.

    Undefined values are empty cells. A row is rewritten when more metrics of its epoch arrive.

    Args:
        path: The file.
        last_step: Rows up to this step are retained: a stage resumed from there has neither gaps nor duplicates.

    Attributes:
        known_step: The last step in the existing file; 0 if there was none.
    """

    def __init__(self, path: Path, *, last_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.known_step = 0
        self._rows: dict[int, dict[str, float]] = {}
        if path.is_file():
            existing = pd.read_csv(path, index_col="step")
            rows = {int(str(step)): {str(k): float(v) for k, v in row.items()} for step, row in existing.iterrows()}
            self.known_step = max(rows, default=0)
            self._rows = {step: row for step, row in rows.items() if step <= last_step}

    @property
    def name(self) -> str:
        """Lightning's name for this logger."""
        return "curves"

    @property
    def version(self) -> str:
        """Empty: there is only one."""
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml has them."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics to the row of a step."""
        row = self._rows.setdefault(int(step or 0), {})
        row.update({name: value for name, value in metrics.items() if "/" in name})

    def save(self) -> None:
        """Write the file; Lightning calls this after each set of metrics, and before the first."""
        if not self._rows:
            return
        frame = pd.DataFrame([{"step": step, **row} for step, row in sorted(self._rows.items())])
        content = frame.to_csv(index=False).encode()
        # Both digests, since the process may be killed between these two files.
        digests = [hashlib.sha256(content).hexdigest(), compute_digest(self.path)]
        write_text(self.path.with_name(self.path.name + SUFFIX), "\n".join(filter(None, digests)) + "\n")
        with write_atomically(self.path) as temporary:
            temporary.write_bytes(content)


MIN_LOSS_SCALE = 2.0**-10
"""Factor of the loss below which even gradients of ordinary size would not be infinite in fp16."""


class LossScale(pl.Callback):
    """Stop a stage in fp16 whose gradients stay NaN or infinite, however little the loss is scaled.

    That a single step is skipped is part of the method: its gradients were infinite, the scale is halved, and neither
    weights nor moments change. It happens in the first steps, and in some later ones when the scale is doubled.
    """

    def __init__(self, plan: StagePlan) -> None:
        self.plan = plan

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the scale.

        Raises:
            PylorusError: If it is so small that the optimizer must have skipped many steps in a row.
        """
        plugin = trainer.precision_plugin
        assert isinstance(plugin, MixedPrecision)
        assert plugin.scaler is not None
        scale = plugin.scaler.get_scale()
        if scale < MIN_LOSS_SCALE:
            raise PylorusError(
                f"the gradients of stage {self.plan.name} stay NaN or infinite in fp16 (loss scale {scale:.1e} in "
                f"epoch {trainer.current_epoch + 1}), so its weights no longer change. Start a new run with "
                "trainer.precision=32, or with a lower optimizer.lr."
            )


MAX_SAVING_FRACTION = 0.02
"""Fraction of training time that saving may take: if it takes longer, not every epoch is saved."""
MAX_UNSAVED_SECONDS = 600.0
"""Seconds of training that a killed run may lose: longer epochs are saved midway."""
BYTES_A_SECOND = 1e9
"""Speed at which a state is assumed to be saved until one was."""


class Checkpoints(pl.Callback):
    """Save a stage's state during training, each time between two steps of the optimizer.

    The weights of the best epoch are kept in memory, and written with the next state and at the end of training: a run
    that is killed goes on from that state, and finds a later best epoch again.

    Args:
        saved: The stage's folder.
        mode: Whether the best monitored value is the `min` or the `max`.
        processes: The run's processes; the first one writes.
        stop: Stop request: the current step is finished and its state saved.
        averaging: Averages the weights; epochs before its first one are not chosen. None: weights are not averaged.
    """

    def __init__(
        self,
        saved: StageFolder,
        *,
        mode: str,
        processes: Processes,
        stop: StopRequest,
        averaging: AverageWeights | None = None,
    ) -> None:
        self._saved, self._sign = saved, 1.0 if mode == "max" else -1.0
        self._processes, self._stop, self._averaging = processes, stop, averaging
        self._best_score, self._best_epoch, self._best_average = -math.inf, -1, (0, 0)
        self._saved_at = self._trained_since = 0.0
        self._cost = 0.0
        self._reached = StageProgress(0, 0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock; from now until the end of training, signals wait for a state that can be saved."""
        self._saved_at = self._trained_since = time.monotonic()
        self._cost = _count_state_bytes(pl_module) / BYTES_A_SECOND
        self._stop.wait_for_step()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *step: Any) -> None:
        """Save within long epochs, and when the run is asked to stop.

        Raises:
            KeyboardInterrupt: If the run was asked to stop.
        """
        batches = int(trainer.fit_loop.epoch_loop.batch_idx) + 1
        if batches % trainer.accumulate_grad_batches and batches != trainer.num_training_batches:
            return  # within a step, whose gradients a checkpoint does not hold
        unsaved_seconds = time.monotonic() - self._trained_since
        due, stop = self._processes.reduce_any(
            unsaved_seconds >= max(MAX_UNSAVED_SECONDS, self._cost / MAX_SAVING_FRACTION), self._stop.asked
        )
        if batches == trainer.num_training_batches:
            return  # saved at the end of the epoch, after validation
        if due or stop:
            self._save_last(trainer, StageProgress(trainer.current_epoch, batches))
        if stop:
            self._stop.raise_interrupt()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the run's folder still exists, before anything of the epoch is written."""
        RunFolder(self._saved.path.parent).check_exists()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after validation, and after early stopping has decided.

        Raises:
            KeyboardInterrupt: If the run was asked to stop since the epoch's last step; its state is saved.
        """
        score = self._sign * float(trainer.callback_metrics["monitor"])
        first = self._averaging.start_epoch if self._averaging is not None else 0
        if score > self._best_score or self._best_epoch < first:  # NaN only beats having no score
            self._best_score = score if math.isfinite(score) else -math.inf
            self._best_epoch = int(trainer.current_epoch)
            if self._averaging is not None:
                self._best_average = (self._averaging.updates, self._averaging.estimated_norms)
            trainer.save_checkpoint(
                self._saved.get_best_path(self._best_epoch), weights_only=True, storage_options=CheckpointFiles.KEEP
            )
        done = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        due = time.monotonic() - self._saved_at >= self._cost / MAX_SAVING_FRACTION
        due, stop = self._processes.reduce_any(due and self._processes.is_first, self._stop.asked)
        stop = stop and not trainer.should_stop  # resumed, it would train on although early stopping ended it
        if (due and not done) or stop:
            self._save_last(trainer, StageProgress(trainer.current_epoch + 1, 0))
        if stop:
            self._stop.raise_interrupt()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop the optimizer: Lightning would copy its state to the host, where nothing needs it."""
        trainer.strategy.optimizers = []

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record that the stage is trained, and name its best checkpoint."""
        if self._processes.is_first:
            _get_files(trainer).write_kept()
            _create_link(self._saved.get_best_path(self._best_epoch), self._saved.best_checkpoint)
            weights, norms = self._best_average
            self._saved.write_record(
                epochs=int(trainer.current_epoch),
                best_epoch=self._best_epoch + 1,
                averaged_weights=weights,
                estimated_norms=norms,
            )
            self._saved.delete_training_state()
        self._processes.wait()
        self._stop.stop_waiting()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add what Lightning does not save: the stage's progress and, within an epoch, its metric sums."""
        assert isinstance(pl_module, StageClassifier)
        checkpoint["reached"] = tuple(self._reached)
        if self._reached.batches:
            checkpoint["tally"] = pl_module.gather_metric_sums()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the metric sums of a partial epoch in the first process."""
        assert isinstance(pl_module, StageClassifier)
        if "tally" in checkpoint and self._processes.is_first:
            pl_module.restore_metric_sums(checkpoint["tally"])

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, so that a checkpoint loads with tensors only."""
        return {
            "best_score": self._best_score,
            "best_epoch": self._best_epoch,
            "best_average": list(self._best_average),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score and epoch."""
        self._best_score, self._best_epoch = state_dict["best_score"], state_dict["best_epoch"]
        weights, norms = state_dict.get("best_average", (0, 0))  # an earlier version saved none
        self._best_average = (int(weights), int(norms))

    def _save_last(self, trainer: pl.Trainer, reached: StageProgress) -> None:
        start = time.monotonic()
        self._reached = reached
        if self._processes.is_first:
            _get_files(trainer).write_kept()
            with write_atomically(self._saved.last_checkpoint) as temporary:
                trainer.save_checkpoint(temporary)
        else:
            trainer.save_checkpoint(self._saved.last_checkpoint)
        self._processes.wait()
        self._saved_at = self._trained_since = time.monotonic()
        self._cost = self._saved_at - start
        if self._processes.is_first:
            self._saved.delete_other_bests(self._best_epoch)


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint into its own folder: Lightning writes the whole of it to TMPDIR first, and copies it.

    Attributes:
        kept: The last checkpoint that was saved with the option `KEEP`, in the host's memory, and its path.
    """

    KEEP: ClassVar = {"keep": True}
    """`storage_options` with which a checkpoint is kept in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: tuple[dict[str, Any], Path] | None = None
        self._is_written = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; `Checkpoints` gives the file its name once it is complete. Or keep it in memory."""
        if storage_options == self.KEEP:
            self.kept = apply_to_collection(checkpoint, Tensor, partial(Tensor.to, device="cpu", copy=True)), path
            self._is_written = False
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with open(path, "wb") as file:  # noqa: PTH123 also of a text
            file.write(content.getbuffer())

    def write_kept(self) -> None:
        """Write the checkpoint that is kept, unless it is written already or there is none."""
        if self.kept is None or self._is_written:
            return
        checkpoint, path = self.kept
        with write_atomically(path) as temporary:
            self.save_checkpoint(checkpoint, temporary)
        self._is_written = True


def _get_files(trainer: pl.Trainer) -> CheckpointFiles:
    files = trainer.strategy.checkpoint_io
    assert isinstance(files, CheckpointFiles)
    return files


def get_kept_weights(trainer: pl.Trainer) -> Mapping[str, Tensor] | None:
    """Return the weights of a stage's best epoch after training; None if this process has to read them."""
    kept = _get_files(trainer).kept
    return None if kept is None else kept[0]["state_dict"]


def _count_state_bytes(module: pl.LightningModule) -> int:
    """Count the bytes of a stage's state: trained weights and two moments of each; frozen ones are not saved."""
    return 3 * sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def _create_link(path: Path, link: Path) -> None:
    """Hard-link or copy a file: if the run is killed now, the name in `last.ckpt` still exists."""
    with write_atomically(link) as temporary:
        try:
            temporary.hardlink_to(path)
        except OSError:  # the file system has no hard links
            shutil.copyfile(path, temporary)
