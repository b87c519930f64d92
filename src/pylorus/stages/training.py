"""Lightning's part of a stage: its Trainer and its fit."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping

from pylorus.config import StageConfig
from pylorus.model.classifier import Classifier, StagePlan
from pylorus.model.freeze import Freeze
from pylorus.model.schedule import better
from pylorus.model.sharded import sharded
from pylorus.model.shared_norm import norm_of_all
from pylorus.parallel.strategy import spread
from pylorus.stages.checkpoints import Checkpoints
from pylorus.stages.curves import CurvesFile
from pylorus.stages.folder import StageFolder
from pylorus.stages.progress import EpochLine, ProgressBar
from pylorus.stages.run import Run
from pylorus.stages.speed import Speed

log = logging.getLogger(__name__)


def stage_trainer(plan: StagePlan, run: Run, stage_folder: StageFolder, speed: Speed) -> pl.Trainer:
    """Build the Trainer of a stage, with its loggers and callbacks."""
    curves = CurvesFile(stage_folder.metrics, last_step=plan.first_epoch + stage_folder.reached.epochs)
    progress = run.config.trainer.progress and run.processes.first
    progress_bar = [ProgressBar(plan)] if progress else []
    checkpoints = Checkpoints(stage_folder, mode=better(plan.config), processes=run.processes, stop=run.stop)
    # The dashboard first: after an interruption it is not sent again what the file already holds.
    loggers = [*run.dashboard.loggers(known_step=curves.known_step), curves]
    return pl.Trainer(
        accelerator=run.engine.accelerator,
        **spread(run.processes, run.config.trainer),
        precision=run.engine.lightning_precision,
        max_epochs=plan.config.epochs,
        callbacks=[
            Freeze(plan.config.learn),
            *_patience(plan.config),
            EpochLine(plan),
            speed,
            *progress_bar,
            checkpoints,
        ],
        logger=loggers if run.processes.first else False,
        default_root_dir=stage_folder.path,
        enable_progress_bar=progress,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def fit(
    trainer: pl.Trainer, classifier: Classifier, data: pl.LightningDataModule, stage_folder: StageFolder, run: Run
) -> None:
    """Fit from the stage's start, or from where it was last saved."""
    checkpoint = stage_folder.last if stage_folder.last.is_file() else None
    if checkpoint is not None:
        epochs, batches = stage_folder.reached
        log.info("%s resumes after epoch %d%s", classifier.plan.name, epochs, f", batch {batches}" * (batches > 0))
    with _interruptible(trainer), _divided(classifier, run), norm_of_all(classifier.network, classifier.processes):
        trainer.fit(classifier, data, ckpt_path=checkpoint, weights_only=True)


@contextmanager
def _divided(classifier: Classifier, run: Run) -> Iterator[None]:
    """Shard the trainable weights among the devices, if configured."""
    if not (run.processes.several and run.config.trainer.strategy == "fsdp"):
        yield
        return
    with sharded(classifier, run.engine.accelerator, image_size=run.backbone.image_size) as (
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
def _interruptible(trainer: pl.Trainer) -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, where Lightning raises SystemExit and then ignores further signals."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


def _patience(stage: StageConfig) -> list[pl.Callback]:
    if stage.patience is None:
        return []
    # An undefined precision is no reason to stop; a NaN or infinite loss stops the run elsewhere.
    # Checking at validation makes its decision part of what is saved at the epoch's end.
    return [
        EarlyStopping(
            "monitor",
            mode=better(stage),
            patience=stage.patience,
            check_finite=False,
            check_on_train_epoch_end=False,
        )
    ]
