"""Lightning's part of a stage: its Trainer and its fit."""

import logging
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping

from pylorus.config.instantiation import instantiate
from pylorus.config.schema import Config, StageConfig
from pylorus.core.distributed import Processes
from pylorus.core.errors import PylorusError
from pylorus.data.prepare import RunImages
from pylorus.hardware.engine import Engine
from pylorus.model.backbone import Backbone
from pylorus.model.classifier import StageClassifier, StagePlan, get_monitor_mode
from pylorus.model.distributed import build_strategy_arguments, use_sharded_network, use_sync_batch_norm
from pylorus.model.freeze import FreezeBackbone
from pylorus.runs.folder import RunFolder, StageFolder
from pylorus.runs.process import StopRequest
from pylorus.training.callbacks import Checkpoints, CurvesFile, EpochLine, ProgressBar, SpeedMonitor
from pylorus.training.dashboards import Dashboard


@dataclass(frozen=True)
class Run:
    """State shared by the stages of a run.

    Attributes:
        config: The run's configuration.
        folder: The run's folder.
        images: The catalog with its split.
        backbone: The network, passed from stage to stage.
        engine: The compute engine.
        dashboard: Loggers of the run's dashboards.
        processes: The run's distributed processes.
        stop: Whether the run has been asked to stop.
    """

    config: Config
    folder: RunFolder
    images: RunImages
    backbone: Backbone
    engine: Engine
    dashboard: Dashboard
    processes: Processes
    stop: StopRequest


log = logging.getLogger(__name__)


def build_trainer(plan: StagePlan, run: Run, stage_folder: StageFolder, speed: SpeedMonitor) -> pl.Trainer:
    """Build the Trainer of a stage, with its loggers and callbacks."""
    curves = CurvesFile(stage_folder.metrics_path, last_step=plan.first_epoch + stage_folder.progress.epochs)
    progress = run.config.trainer.progress and run.processes.is_first
    progress_bar = [ProgressBar(plan)] if progress else []
    checkpoints = Checkpoints(stage_folder, mode=get_monitor_mode(plan.config), processes=run.processes, stop=run.stop)
    # The dashboard first: after an interruption it is not sent again what the file already holds.
    loggers = [*run.dashboard.create_loggers(known_step=curves.known_step), curves]
    return pl.Trainer(
        accelerator=run.engine.accelerator,
        **build_strategy_arguments(run.processes, run.config.trainer),
        precision=run.engine.lightning_precision,
        max_epochs=plan.config.epochs,
        callbacks=[
            FreezeBackbone(plan.config.learn),
            *_build_early_stopping(plan.config),
            EpochLine(plan),
            speed,
            *progress_bar,
            *build_callbacks(run.config.callbacks),
            checkpoints,
        ],
        logger=loggers if run.processes.is_first else False,
        default_root_dir=stage_folder.path,
        enable_progress_bar=progress,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def build_callbacks(configured: Mapping[str, Any]) -> list[pl.Callback]:
    """Build the user's own callbacks, new ones for each stage.

    Raises:
        PylorusError: If one can't be built, is not a callback, or would write checkpoints beside ours.
    """
    callbacks = {name: instantiate(node, key=f"callbacks.{name}") for name, node in configured.items()}
    for name, callback in callbacks.items():
        if not isinstance(callback, pl.Callback) or isinstance(callback, Checkpoint):
            raise PylorusError(
                f"callbacks.{name}: found {type(callback).__name__}, expected a pytorch_lightning.Callback other than "
                "ModelCheckpoint: Pylorus saves the checkpoints itself."
            )
    return list(callbacks.values())


def fit_stage(
    trainer: pl.Trainer, classifier: StageClassifier, data: pl.LightningDataModule, stage_folder: StageFolder, run: Run
) -> None:
    """Fit from the stage's start, or from where it was last saved."""
    checkpoint = stage_folder.last_checkpoint if stage_folder.last_checkpoint.is_file() else None
    if checkpoint is not None:
        epochs, batches = stage_folder.progress
        log.info("%s resumes after epoch %d%s", classifier.plan.name, epochs, f", batch {batches}" * (batches > 0))
    with (
        _handle_interrupts(trainer),
        _use_sharding(classifier, run),
        use_sync_batch_norm(classifier.network, classifier.processes),
    ):
        trainer.fit(classifier, data, ckpt_path=checkpoint, weights_only=True)


@contextmanager
def _use_sharding(classifier: StageClassifier, run: Run) -> Iterator[None]:
    """Shard the trainable weights among the devices, if configured."""
    if not (run.processes.is_distributed and run.config.trainer.strategy == "fsdp"):
        yield
        return
    with use_sharded_network(classifier, run.engine.accelerator, image_size=run.backbone.image_size) as (
        local_count,
        trainable_count,
    ):
        name = classifier.plan.name
        log.info(
            "%s: the first device holds %s of the %s trainable parameters",
            name,
            f"{local_count:,}",
            f"{trainable_count:,}",
        )
        yield


@contextmanager
def _handle_interrupts(trainer: pl.Trainer) -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, where Lightning raises SystemExit and then ignores further signals."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


def _build_early_stopping(stage: StageConfig) -> list[pl.Callback]:
    if stage.patience is None:
        return []
    # An undefined precision is no reason to stop; a NaN or infinite loss stops the run elsewhere.
    # Checking at validation makes its decision part of what is saved at the epoch's end.
    return [
        EarlyStopping(
            "monitor",
            mode=get_monitor_mode(stage),
            patience=stage.patience,
            check_finite=False,
            check_on_train_epoch_end=False,
        )
    ]
